"""The decoder against a float64 oracle, and every way of running it against every other.

Nearly all forward calls share one shape, so that few programs are compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import RopeScaling, decoder
from tests.models import oracle
from tests.models.tiny import FULL, PLAIN, apply, quick_jit, random_params, random_tokens

YARN = RopeScaling("yarn", 4.0, original_max_length=300)
TIED = dataclasses.replace(PLAIN, tie_embeddings=True, rope_scaling=YARN)
ROWS, LENGTH = 2, 12


def assert_exact(given, expected):
    """float32 rounding over three layers, measured against the largest entry."""
    np.testing.assert_allclose(given, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def params():
    return random_params(FULL)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(FULL, ROWS, LENGTH)


@pytest.fixture(scope="module")
def whole(params, tokens):
    return apply(params, tokens, config=FULL, taps=True)


@pytest.mark.parametrize("config", [PLAIN, FULL, TIED], ids=["plain", "full", "tied"])
def test_forward_matches_float64(config, tokens):
    params = random_params(config)
    hidden, taps, logits = oracle.forward(params, tokens, config)
    output = apply(params, tokens, config=config, taps=True)
    assert_exact(output.hidden, hidden)
    assert_exact(output.taps, taps)
    assert_exact(decoder.logits(params, output.hidden, config), logits)


OTHERWISE = {
    "rope_theta": 100.0,
    "rope_scaling": None,
    "norm_epsilon": 0.1,
    "tie_embeddings": True,
    "query_key_norm": False,
    "attention_soft_cap": None,
    "logit_soft_cap": None,
    "sliding_window": None,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_every_switch_is_felt_by_the_oracle(name, params, tokens):
    """So a decoder that ignored one could not have matched it above."""
    changed = dataclasses.replace(FULL, **{name: OTHERWISE[name]})
    _, _, logits = oracle.forward(params, tokens, FULL)
    _, _, others = oracle.forward(params, tokens, changed)
    assert np.abs(logits - others).max() > 0.01


def test_token_by_token_decode_equals_full_forward(params, tokens, whole):
    cache = decoder.init_cache(FULL, ROWS, 16)
    for t in range(LENGTH):
        positions = np.full((ROWS, 1), t, np.int32)
        newest = tokens[:, t : t + 1]
        output = apply(params, newest, config=FULL, positions=positions, cache=cache)
        cache = output.cache
        assert_exact(output.hidden[:, 0], whole.hidden[:, t])


def test_ragged_prompts_in_a_cache_need_no_mask(params, tokens, whole):
    lengths = np.array([3, 7])
    prompts = np.where(np.arange(LENGTH)[None] < lengths[:, None], tokens, 0)
    empty = decoder.init_cache(FULL, ROWS, 16)
    cache = apply(params, prompts, config=FULL, cache=empty).cache
    for step in range(4):
        positions = (lengths + step)[:, None]
        newest = np.take_along_axis(tokens, positions, axis=1)
        output = apply(params, newest, config=FULL, positions=positions, cache=cache)
        cache = output.cache
        assert_exact(output.hidden[:, 0], whole.hidden[np.arange(ROWS), lengths + step])


def test_unrolled_layers_equal_scanned_ones(params, tokens, whole):
    unrolled = dataclasses.replace(FULL, scan_layers=False)
    cache = decoder.init_cache(unrolled, ROWS, 16)
    output = apply(params, tokens, config=unrolled, cache=cache, taps=True)
    assert_exact(output.hidden, whole.hidden)
    assert_exact(output.taps, whole.taps)
    scanned = apply(params, tokens, config=FULL, cache=cache).cache
    jax.tree.map(assert_exact, output.cache, scanned)


def test_packed_equals_unpacked(params, tokens):
    pieces = [tokens[:1, :5], tokens[1:, :4]]
    packed = np.concatenate([*pieces, np.zeros((1, 3), np.int32)], axis=1).repeat(ROWS, axis=0)
    segment_ids = np.repeat([1, 2, 0], [5, 4, 3])[None].repeat(ROWS, axis=0).astype(np.int32)
    positions = np.r_[:5, :4, :3][None].repeat(ROWS, axis=0)
    output = apply(params, packed, config=FULL, segment_ids=segment_ids, taps=True)
    hidden, taps, _ = oracle.forward(params, packed, FULL, positions, segment_ids)
    assert_exact(output.hidden, hidden)
    assert_exact(output.taps, taps)
    for piece, inside in zip(pieces, (slice(0, 5), slice(5, 9)), strict=True):
        alone, _, _ = oracle.forward(params, piece, FULL)
        assert_exact(output.hidden[:1, inside], alone)


def test_given_positions_are_used(params, tokens):
    positions = np.arange(LENGTH)[None].repeat(ROWS, axis=0) ** 2
    hidden, _, _ = oracle.forward(params, tokens, FULL, positions)
    assert_exact(apply(params, tokens, config=FULL, positions=positions).hidden, hidden)


def test_what_follows_and_other_rows_change_nothing(params, tokens, whole):
    other = tokens.copy()
    other[0, 7:] = 0
    other[1] = tokens[1, ::-1]
    output = apply(params, other, config=FULL, taps=True)
    np.testing.assert_array_equal(output.hidden[0, :7], whole.hidden[0, :7])
    assert np.abs(output.hidden[0, 7:] - whole.hidden[0, 7:]).min(axis=0).max() > 0.01


def test_padded_vocabulary_never_appears(params, tokens, whole):
    spoilt = jax.tree.map(np.copy, params)
    spoilt["head"]["kernel"][FULL.vocab_size :] = np.nan
    spoilt["embed"]["embedding"][FULL.vocab_size :] = np.nan
    output = apply(spoilt, tokens, config=FULL, taps=True)
    np.testing.assert_array_equal(output.hidden, whole.hidden)
    logits = decoder.logits(spoilt, output.hidden, FULL)
    assert logits.shape == (ROWS, LENGTH, FULL.vocab_size)
    assert np.isfinite(logits).all()
    assert decoder.head(params, FULL).shape == (FULL.padded_vocab_size, FULL.width)
    tied = dataclasses.replace(FULL, tie_embeddings=True)
    assert decoder.head(params, tied) is params["embed"]["embedding"]


def test_an_id_past_the_embedding_is_not_another_token(params, tokens):
    wrong = tokens.copy()
    wrong[0, 0] = FULL.padded_vocab_size
    hidden = apply(params, wrong, config=FULL, taps=True).hidden
    assert np.isnan(hidden[0, 0]).all()
    assert np.isfinite(hidden[1]).all()


def gradients(config, params, tokens):
    def loss(params):
        logits = decoder.logits(params, decoder.apply(params, tokens, config).hidden, config)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    return quick_jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("full", True),
        ("dots", False),
        ("dots_no_batch", True),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
        pytest.param("dots", True, marks=pytest.mark.slow),
        pytest.param("dots_no_batch", False, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_do_not_change_gradients(
    remat, scan_layers, params, tokens, plain_gradients
):
    changed = dataclasses.replace(FULL, remat=remat, scan_layers=scan_layers)
    jax.tree.map(assert_exact, gradients(changed, params, tokens), plain_gradients)


@pytest.fixture(scope="module")
def plain_gradients(params, tokens):
    return gradients(FULL, params, tokens)


def test_gradients_match_finite_differences_in_float64(params, tokens, plain_gradients):
    direction = random_params(FULL, seed=3)
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, plain_gradients, direction)))

    def exact(step):
        moved = jax.tree.map(lambda p, d: p.astype(np.float64) + step * d, params, direction)
        _, _, logits = oracle.forward(moved, tokens, FULL)
        return np.mean(logits[..., 0] - np.log(np.exp(logits).sum(-1)))

    np.testing.assert_allclose(slope, (exact(1e-6) - exact(-1e-6)) / 2e-6, rtol=1e-4)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_keeps_what_its_name_says(scan_layers, params, tokens):
    def kept(remat):
        config = dataclasses.replace(FULL, remat=remat, scan_layers=scan_layers)

        def backward(params):
            return jax.vjp(lambda p: decoder.apply(p, tokens, config).hidden, params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, params)))

    none, full, dots, no_batch = map(kept, ("none", "full", "dots", "dots_no_batch"))
    assert full < no_batch < dots < none


def test_bfloat16_stays_close_to_float64(params, tokens):
    config = dataclasses.replace(FULL, dtype="bfloat16", param_dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), rounded)
    hidden, _, logits = oracle.forward(exact, tokens, config)
    output = apply(rounded, tokens, config=config)
    assert output.hidden.dtype == jnp.bfloat16
    given = decoder.logits(rounded, output.hidden, config)
    assert given.dtype == jnp.float32
    # Relative to the size of the values: bfloat16 keeps 8 bits, and three layers add them up.
    for value, exact_value in ((output.hidden, hidden), (given, logits)):
        error = np.asarray(value, np.float64) - exact_value
        assert np.sqrt((error**2).mean() / (exact_value**2).mean()) < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_types_of_activations_and_parameters_are_free(dtype, param_dtype, tokens):
    config = dataclasses.replace(FULL, dtype=dtype, param_dtype=param_dtype)
    abstract = decoder.abstract_params(config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract)} == {param_dtype}

    def loss(params):
        output = decoder.apply(params, tokens, config, taps=True)
        assert output.hidden.dtype == output.taps.dtype == dtype
        return jnp.sum(decoder.logits(params, output.hidden, config))

    gradient = jax.eval_shape(jax.grad(loss), abstract)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradient)} == {param_dtype}
    cache = decoder.init_cache(config, ROWS, LENGTH)
    given = jax.eval_shape(lambda p: decoder.apply(p, tokens, config, cache=cache).cache, abstract)
    assert given.key.dtype == cache.key.dtype == dtype


def test_repeated_kv_heads_are_never_materialised():
    config = dataclasses.replace(PLAIN, num_heads=12, num_kv_heads=2)
    abstract = decoder.abstract_params(config)
    tokens = np.zeros((1, 7), np.int32)
    program = str(jax.make_jaxpr(lambda p: decoder.apply(p, tokens, config).hidden)(abstract))
    # Twelve heads of queries appear twice a projection; no key or value is broadcast to them.
    assert "f32[1,7,2,6,8]" in program
    assert not [line for line in program.splitlines() if "broadcast" in line and ",12,8]" in line]
    assert not [line for line in program.splitlines() if "broadcast" in line and ",6,8]" in line]
