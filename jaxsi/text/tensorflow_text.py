"""The one place that imports TensorFlow, which comes with tensorflow-text. It leaves the accelerators to JAX."""

import contextlib
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any


@functools.cache
def load() -> tuple[Any, Any]:
    """(tensorflow, tensorflow_text), imported at the first call.

    Raises:
      ImportError: if tensorflow-text has no wheel for the platform.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _banners_dropped(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come from TensorFlow's own imports; nothing here can act on them
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            try:
                tf.config.set_visible_devices([], kind)
            except RuntimeError:  # the application used TensorFlow before: its choice of devices stands
                if tf.config.get_visible_devices(kind):
                    warnings.warn(f"TensorFlow already uses the {kind}; it will compete with JAX", stacklevel=2)
        import tensorflow_text
    return tf, tensorflow_text


@contextlib.contextmanager
def _banners_dropped() -> Iterator[None]:
    """Drops what the libraries write to stderr while they load; if loading fails, shows it after all.

    A log level cannot do this: the libraries write before their logging starts.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as banners:
        os.dup2(banners.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(stderr, 2)
            banners.seek(0)
            os.write(2, banners.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
