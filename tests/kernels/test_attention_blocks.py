"""Blocks of attention: which are looked at, and which sizes fit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels.attention import pallas_grid, problem
from jaxdistill.kernels.attention.problem import Blocking, Options, Places

from tests.kernels import attention_cases as cases

QUERY, KEY = 8, 16  # sizes of the blocks


def bounds_of(name: str) -> tuple[problem.Bounds, problem.Bounds, np.ndarray]:
    """Of blocks of queries, of blocks of keys, and which blocks do see each other, by pairs."""
    case = cases.case_of(name, "small")
    options = case.options
    num_query, num_key = -(-case.length // QUERY), -(-case.slots // KEY)
    blocking = Blocking(QUERY, KEY, num_query, num_key, case.slots)
    of_queries = options.get("segment_ids")
    of_keys = options.get("key_segment_ids", of_queries)
    places = Places(
        *(
            None if x is None else jnp.asarray(x)
            for x in (options.get("positions"), of_queries, of_keys, options.get("lengths"))
        )
    )
    static = Options(
        options.get("causal", True), options.get("window"), None, 1.0, None, None, False
    )
    padded = problem.pad_places(places, blocking)
    seen = cases.visible(case.length, case.slots, cases.ROWS, **options)
    whole = np.zeros((cases.ROWS, num_query * QUERY, num_key * KEY), bool)
    whole[:, : case.length, : case.slots] = seen
    tiles = whole.reshape(cases.ROWS, num_query, QUERY, num_key, KEY).any((2, 4))
    return (
        problem.key_bounds(static, blocking, padded),
        problem.query_bounds(static, blocking, padded),
        tiles,
    )


@pytest.mark.parametrize("name", cases.NAMES)
def test_no_block_that_is_seen_is_left_out(name: str) -> None:
    key_bounds, query_bounds, tiles = bounds_of(name)
    for bounds, seen in ((key_bounds, tiles), (query_bounds, tiles.swapaxes(1, 2))):
        first, last = (np.broadcast_to(x, seen.shape[:2]) for x in bounds[:2])
        block = np.arange(seen.shape[2])
        looked_at = (block >= first[..., None]) & (block <= last[..., None])
        assert not (seen & ~looked_at).any()
        assert (last - first + 1).max() <= bounds.steps


@pytest.mark.parametrize("name", ["causal", "full", "window", "window_both_sides", "soft_cap"])
def test_no_block_is_looked_at_in_vain(name: str) -> None:
    """Of what is known when tracing, first and last are exact: nothing else is fetched."""
    key_bounds, _, tiles = bounds_of(name)
    first, last = (np.asarray(x)[0] for x in key_bounds[:2])
    block = np.arange(tiles.shape[2])
    looked_at = (block >= first[:, None]) & (block <= last[:, None])
    # The last block of queries is padded: what only its padding sees is looked at too.
    np.testing.assert_array_equal(looked_at[:-1], tiles[0, :-1])


def test_keys_past_the_length_are_not_looked_at() -> None:
    key_bounds, _, _ = bounds_of("lengths")
    last = np.asarray(key_bounds.last)
    expected = -(-cases.case_of("lengths", "small").options["lengths"] // KEY) - 1
    np.testing.assert_array_equal(last, np.broadcast_to(expected[:, None], last.shape))
    assert (np.asarray(key_bounds.first)[2] > last[2]).all()


def test_a_window_shortens_the_grid() -> None:
    options = Options(True, 1000, None, 1.0, None, None, False)
    blocking = Blocking(512, 512, 64, 64, 64 * 512)
    places = Places(None, None, None, None)
    # Slots 512 b - 999 ... 512 b + 511. Where lengths hide how long a row is, one more might be.
    assert problem.key_bounds(options, blocking, places).steps == 3
    assert problem.query_bounds(options, blocking, places).steps == 3
    ragged = places._replace(lengths=jnp.full(2, 9))
    assert problem.key_bounds(options, blocking, ragged).steps == 4


def test_packed_sequences_look_at_their_own_blocks_alone() -> None:
    options = Options(True, None, None, 1.0, None, None, False)
    blocking = Blocking(128, 128, 8, 8, 1024)
    segments = jnp.asarray(np.repeat([1, 2, 3, 4], 256)[None])
    bounds = problem.key_bounds(options, blocking, Places(None, segments, segments, None))
    np.testing.assert_array_equal(bounds.first[0], [0, 0, 2, 2, 4, 4, 6, 6])
    np.testing.assert_array_equal(bounds.last[0], np.arange(8))


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "expected"),
    [
        (4, 128, jnp.bfloat16, (256, 512)),  # Llama-3-8B
        (2, 128, jnp.bfloat16, (512, 512)),  # Qwen3-1.7B
        (8, 256, jnp.bfloat16, (128, 512)),  # Gemma 2B
        (3, 64, jnp.bfloat16, (256, 512)),  # SmolLM2
        (8, 256, jnp.float32, (128, 128)),
        (16, 128, jnp.bfloat16, (128, 256)),
    ],
)
def test_blocks_from_the_budget(
    heads: int, width: int, dtype: jnp.dtype, expected: tuple[int, int]
) -> None:
    options = Options(True, None, None, 1.0, None, None, False)
    query = jax.ShapeDtypeStruct((1, 1, heads, 4096, width), dtype)
    blocking = pallas_grid.plan(options, query, 4096)
    assert (blocking.query, blocking.key) == expected
    assert blocking.num_query * blocking.query == 4096


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"causal": False, "window": 7}])
def test_what_is_known_when_tracing_is_not_computed_in_the_program(options: dict) -> None:
    """And it is what the program computes where it is not known."""
    static = Options(
        options.get("causal", True), options.get("window"), None, 1.0, None, None, False
    )
    blocking = Blocking(QUERY, KEY, 5, 4, 53)
    indices = jnp.arange(5 * QUERY)[None, :]
    for bounds in (problem.key_bounds, problem.query_bounds):

        def known(bounds: Callable = bounds) -> tuple[jax.Array, jax.Array]:
            return bounds(static, blocking, Places(None, None, None, None))[:2]

        computed = bounds(static, blocking, Places(indices, None, None, None))
        for actual, expected in zip(known(), computed[:2], strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert not jax.make_jaxpr(known)().eqns
