"""What every test runs under: eight fake CPU devices, no hub, no silent broadcasting between ranks."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Before anything imports JAX or a Hugging Face library: both read these once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Programs are compiled once for all workers, and for the processes that tests start; never taken from an older session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxsi-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _no_more_programs_than_fit():
    """A compiled program keeps memory mapped, and a process may have 65,530 mappings, Linux's default. Workers that had
    tens of thousands crashed in the middle of a later test; that the limit was the cause was not shown."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text().count("\n") > 20_000:
        import jax

        jax.clear_caches()
