"""Strict jax for every test: 8 CPU devices, no silent dtype or rank promotion."""

import os
import pathlib

import jax
import pytest

# Of the processes that tests start too: libtpu is here for its compiler, not for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_directory() -> pathlib.Path:
    """The shared data directory; tests that need it skip where it is absent."""
    path = os.environ.get("JAXDISTILL_DATA")
    if not path or not pathlib.Path(path).is_dir():
        pytest.skip("JAXDISTILL_DATA names no directory, so the shared data cannot be read")
    return pathlib.Path(path)
