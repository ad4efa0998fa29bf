import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_text", reason="no wheel of tensorflow-text for this platform")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_it_loads_without_a_word_and_sees_no_accelerator():
    done = python(
        "from jaxsi import tensorflow_text\n"
        "tf, text = tensorflow_text.load()\n"
        "assert {d.device_type for d in tf.config.get_visible_devices()} == {'CPU'}\n"
        "assert text.metrics.rouge_l and text.SentencepieceTokenizer\n"
        "assert tensorflow_text.load()[0] is tf"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_kind_of_accelerator_is_hidden():
    done = python(
        "import tensorflow as tf\n"
        "hidden = []\n"
        "tf.config.set_visible_devices = lambda devices, kind: hidden.append((devices, kind))\n"
        "from jaxsi import tensorflow_text\n"
        "tensorflow_text.load()\n"
        "assert hidden == [([], 'GPU'), ([], 'TPU')], hidden"
    )
    assert done.returncode == 0, done.stderr


def test_what_loading_says_is_shown_where_it_fails():
    done = python(
        "import os, sys\n"
        "from jaxsi import tensorflow_text\n"
        "with tensorflow_text._banners_dropped():\n"
        "    os.write(2, b'a library: missing symbol')\n"
        "    raise ImportError('no such library')"
    )
    assert done.returncode == 1
    assert "a library: missing symbol" in done.stderr
    assert "ImportError: no such library" in done.stderr
