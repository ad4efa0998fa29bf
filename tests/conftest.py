"""What every test runs under: eight fake CPU devices, no hub, no silent broadcasting between ranks."""

import os
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

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _no_more_programs_than_fit():
    """A compiled program keeps memory mapped, and a process may have 65,530 mappings, Linux's default. Workers that had
    tens of thousands crashed in the middle of a later test; that the limit was the cause was not shown."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text().count("\n") > 20_000:
        import jax

        jax.clear_caches()
