import jax
import pytest


@pytest.fixture
def least_effort():
    """Programs for TPUs compile in a third of the time. Tests see that effort, not the default one."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)
