"""Bad arguments of attention stop before anything is compiled, in one sentence."""

import re

import numpy as np
import pytest
from jaxdistill.kernels import ImplementationError, attention

QUERY = np.ones((2, 3, 4, 8), np.float32)
KEY = np.ones((2, 5, 2, 8), np.float32)
IDS = np.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": QUERY[0]},
            "query must be floating with shape [B, T, H, K], none of them 0, but",
        ),
        ({"query": QUERY.astype(int)}, "query must be floating with shape [B, T, H, K], none of"),
        ({"query": QUERY[:, :0]}, "none of them 0, but it is float32 with shape (2, 0, 4, 8)"),
        ({"query": QUERY[:, :, :3]}, "query must have a multiple of key's 2 heads, but it has 3"),
        ({"key": KEY[..., :4]}, "key must be float32 with shape (2, 5, 2, 8) for query of shape"),
        ({"key": KEY[0]}, "key must have shape [B, S, G, K], none of them 0, but its shape is"),
        ({"value": KEY[:1]}, "value must be float32 with shape (2, 5, 2, 8) for query of shape"),
        ({"value": KEY.astype(np.float16)}, "but it is float16 with shape (2, 5, 2, 8)"),
        (
            {"segment_ids": IDS},
            "key_segment_ids must be given where there are 3 queries and 5 keys",
        ),
        ({"key_segment_ids": np.zeros((2, 5), int)}, "segment_ids must be given with key_segment"),
        ({"positions": IDS[:1]}, "positions must have shape (2, 3), but the shape is (1, 3)"),
        ({"positions": IDS * 1.0}, "positions must be integers, but the type is float"),
        ({"lengths": IDS}, "lengths must have shape (2,), but the shape is (2, 3)"),
        ({"window": 0}, "window must be a whole number above 0 or None, but it is 0"),
        ({"soft_cap": 0.0}, "soft_cap must be finite and above 0, but it is 0.0"),
        ({"scale": float("inf")}, "scale must be finite, but it is inf"),
        ({"block_query": 2.5}, "block_query must be a whole number above 0 or None, but it is 2.5"),
        ({"block_key": -1}, "block_key must be a whole number above 0 or None, but it is -1"),
    ],
)
def test_says_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": KEY} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**arguments)


def test_a_name_that_does_not_exist_raises() -> None:
    with pytest.raises(ImplementationError, match="attention knows no implementation 'triton'"):
        attention(QUERY, KEY, KEY, implementation="triton")
