"""Which TPU a program is compiled for: what is traced for one is not taken for another."""

import jax
import jax.numpy as jnp
import pytest
from jaxdistill.kernels import compiling_for, generation


def test_off_a_tpu_there_is_no_target() -> None:
    assert generation.target() is None
    assert generation.vmem_limit() == 16 * 2**20


def test_compiling_for_a_generation() -> None:
    with compiling_for("v6e", num_devices=4):
        assert generation.target() == ("v6e", 4)
        assert generation.vmem_limit() == 96 * 2**20
        with compiling_for("v4"):
            assert generation.vmem_limit() == 16 * 2**20
    assert generation.target() is None


def test_a_trace_for_one_generation_is_not_reused_for_another() -> None:
    @jax.jit
    def limit(x: jax.Array) -> jax.Array:
        return x + generation.vmem_limit()

    found = [int(limit(jnp.zeros((), jnp.int32)))]
    for name in ("v5e", "v5p"):
        with compiling_for(name):
            found.append(int(limit(jnp.zeros((), jnp.int32))))
    assert found == [16 * 2**20, 96 * 2**20, 48 * 2**20]


def test_unknown_generation() -> None:
    message = "generation must be one of v4, v5e, v5p, v6e, tpu7x, but it is 'v9'"
    with pytest.raises(ValueError, match=message), compiling_for("v9"):
        pass


def test_a_tpu_newer_than_this_list_gets_what_any_core_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert generation.target() == (None, jax.device_count())
    assert generation.vmem_limit() == generation.SCOPED_VMEM_BYTES
