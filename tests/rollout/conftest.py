"""Tiny models: compiling takes longer than running, so XLA is told to try less."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """What users run, fully optimised, is tested with stories260K in tests/models."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
