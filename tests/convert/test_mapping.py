"""The rotary permutation and the checks shared by every format."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdistill.convert import mapping
from jaxdistill.models import decoder
from jaxdistill.models.config import DecoderConfig
from tests.convert import reference

CONFIG = DecoderConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12,
    max_length=16, padded_vocab_size=16, query_key_norm=True, attention_bias=True,
    attention_output_bias=True, mlp_bias=True,
)  # fmt: skip


@pytest.mark.parametrize("head_dim", [2, 4, 10])
def test_permuted_projections_give_the_same_attention_scores(head_dim):
    heads, width, tokens = 3, 7, 9
    generator = np.random.default_rng(head_dim)
    query_rows, key_rows = generator.normal(size=(2, heads * head_dim, width))
    x = generator.normal(size=(tokens, width))

    def scores(query, key, interleaved):
        turned = (
            reference.rotate((x @ rows.T).reshape(tokens, heads, head_dim), 100.0,
                             interleaved=interleaved)
            for rows in (query, key)
        )  # fmt: skip
        return np.einsum("thk,shk->hts", *turned)

    moved = (mapping.deinterleave(rows, heads) for rows in (query_rows, key_rows))
    np.testing.assert_allclose(
        scores(*moved, interleaved=False), scores(query_rows, key_rows, interleaved=True), rtol=1e-9
    )


def test_layouts_round_trip_for_every_leaf():
    generator = np.random.default_rng(0)
    for path, slot in mapping.slots(CONFIG).items():
        values = generator.normal(size=slot.shape)
        in_file = slot.to_file(values)
        assert in_file.shape == slot.file_shape, path
        np.testing.assert_array_equal(slot.from_file(in_file), values, err_msg=path)


def test_a_square_projection_is_still_transposed():
    slot = mapping.slots(
        DecoderConfig(vocab_size=5, width=6, num_layers=1, num_heads=1, num_kv_heads=1,
                      head_dim=6, mlp_width=6, max_length=4)
    )["layers/mlp/gate/kernel"]  # fmt: skip
    values = np.arange(36.0).reshape(6, 6)
    np.testing.assert_array_equal(slot.from_file(values), values.T)


def test_slots_are_the_decoders_own_tree():
    expected = {
        path: leaf.shape
        for path, leaf in flatten_dict(decoder.abstract_params(CONFIG), sep="/").items()
    }
    found = {
        path: ((CONFIG.num_layers,) if path.startswith("layers/") else ()) + slot.shape
        for path, slot in mapping.slots(CONFIG).items()
    }
    assert found == expected
