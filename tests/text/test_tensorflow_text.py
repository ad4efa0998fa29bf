"""TensorFlow is imported in one place, silently, and without a view of the accelerators."""

import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_text", reason="no wheel of tensorflow-text for this platform")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_load_is_silent_and_sees_no_accelerator():
    process = python(
        "from jaxsi.text import tensorflow_text\n"
        "tf, text = tensorflow_text.load()\n"
        "assert {d.device_type for d in tf.config.get_visible_devices()} == {'CPU'}\n"
        "assert text.metrics.rouge_l and text.SentencepieceTokenizer\n"
        "assert tensorflow_text.load()[0] is tf"
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.slow
def test_load_hides_every_kind_of_accelerator():
    process = python(
        "import tensorflow as tf\n"
        "hidden = []\n"
        "tf.config.set_visible_devices = lambda devices, kind: hidden.append((devices, kind))\n"
        "from jaxsi.text import tensorflow_text\n"
        "tensorflow_text.load()\n"
        "assert hidden == [([], 'GPU'), ([], 'TPU')], hidden"
    )
    assert process.returncode == 0, process.stderr


def test_failed_load_shows_the_stderr_of_the_libraries():
    process = python(
        "import os, sys\n"
        "from jaxsi.text import tensorflow_text\n"
        "with tensorflow_text._banners_dropped():\n"
        "    os.write(2, b'a library: missing symbol')\n"
        "    raise ImportError('no such library')"
    )
    assert process.returncode == 1
    assert "a library: missing symbol" in process.stderr
    assert "ImportError: no such library" in process.stderr
