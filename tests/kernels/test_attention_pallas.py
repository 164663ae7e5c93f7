"""The TPU kernels of attention, interpreted on a CPU; `test_attention_tpu` compiles them."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxdistill.kernels import ImplementationError, attention, dispatch, on_tpu

from tests.kernels import attention_cases as cases
from tests.kernels.attention_tests import AttentionTests

BLOCKS = {"block_query": 128, "block_key": 128, "implementation": "pallas"}


@pytest.mark.usefixtures("interpreted")
class TestPallas(AttentionTests):
    how = BLOCKS
    size = "large"


NAN_MEMORY = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", [NAN_MEMORY], indirect=True, ids=["nan_and_races"])
@pytest.mark.usefixtures("interpreted", "no_races")
class TestPallasNanMemory(AttentionTests):
    """In the simulation of a TPU's memories, where nothing is zero before it is written."""

    how = BLOCKS
    size = "large"


@pytest.mark.usefixtures("interpreted")
def test_bfloat16_by_default_blocks() -> None:
    cases.check("everything", jnp.bfloat16, size="large", implementation="pallas")


@pytest.mark.parametrize("interpreted", [NAN_MEMORY], indirect=True, ids=["nan_and_races"])
@pytest.mark.usefixtures("interpreted", "no_races")
def test_memory_full_of_nan_and_races() -> None:
    """What `TestPallasNanMemory` does, once by default."""
    cases.check("everything", jnp.float32, size="large", **BLOCKS)


def test_on_a_cpu_it_refuses_when_lowered() -> None:
    query = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(ImplementationError, match="lowered for a TPU, but this program is lowered"):
        attention(query, query, query, implementation="pallas")
    with pytest.raises(ImplementationError, match="choose 'xla' or 'auto'"):
        jax.jit(lambda x: attention(x, x, x, implementation="pallas")).lower(query)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.float16}, "query must be float32 or bfloat16 for implementation 'pallas' of"),
        ({"block_query": 64}, "block_query must be a multiple of 128 for implementation 'pallas'"),
        ({"block_key": 100}, "block_key must be a multiple of 128 for implementation 'pallas' of"),
    ],
)
def test_what_it_cannot_serve_names_what_can(change: dict[str, Any], message: str) -> None:
    query = np.zeros((1, 4, 1, 8), change.pop("dtype", np.float32))
    with pytest.raises(ImplementationError, match=f"{message}.*: choose 'xla' or 'reference'"):
        attention(query, query, query, implementation="pallas", **change)


def test_more_heads_to_a_key_head_than_vmem_holds_are_refused() -> None:
    query, key = np.zeros((1, 4, 71, 64), np.float32), np.zeros((1, 4, 1, 64), np.float32)
    with pytest.raises(ImplementationError, match="71 heads of width 64 to a key head do not:"):
        attention(query, key, key, implementation="pallas")


@pytest.mark.parametrize(("heads", "chosen"), [(4, "pallas"), (71, "xla")])
def test_auto_on_a_tpu_takes_the_kernel_where_it_serves(
    heads: int, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_tpu, "is_default", lambda: True)
    dispatch._say_once.cache_clear()
    query, key = (jax.ShapeDtypeStruct((1, 4, x, 64), jnp.float32) for x in (heads, 1))
    with caplog.at_level(logging.INFO, logger="jaxdistill.kernels"):
        program = jax.make_jaxpr(attention)(query, key, key)
    assert f"attention: implementation='auto' chose '{chosen}'" in caplog.text
    assert ("pallas_call" in str(program)) == (chosen == "pallas")
