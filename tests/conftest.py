"""Settings of every test: eight fake CPU devices, fast compilation, no hub, no silent broadcasting between ranks."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Tests compile a lot and compute little. So XLA compiles in half the time, without LLVM's optimisations. With
# JAXSI_TEST_OPTIMIZED=1 it compiles as it does for users; `.ci/run` does so for some files on its second interpreter.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ.get("JAXSI_TEST_OPTIMIZED") != "1":
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
    if version("jaxlib").startswith("0.10."):  # 0.12 ends at this flag, because it does not know it
        FLAGS += ["--xla_cpu_use_fusion_emitters=false"]

# Before anything imports JAX or a Hugging Face library: both read these once.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit them
    os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# All workers, and the processes that tests start, share compiled programs and micro runs: each is made once a session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    for variable in ("JAX_COMPILATION_CACHE_DIR", "JAXSI_TEST_RUNS"):
        os.environ[variable] = tempfile.mkdtemp(prefix="jaxsi-tests-")
        atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _no_more_programs_than_fit():
    """A compiled program keeps memory mapped, and Linux allows a process 65,530 mappings by default. Workers with tens
    of thousands of mappings crashed in the middle of a later test; whether the limit was the cause was not shown."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text().count("\n") > 20_000:
        import jax

        jax.clear_caches()
