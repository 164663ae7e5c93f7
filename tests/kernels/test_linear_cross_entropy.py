"""The cross-entropy head, lean and reference, against the float64 oracle."""

from typing import ClassVar

import pytest

from tests.kernels.linear_cross_entropy_tests import (
    HEAD,
    HIDDEN,
    LinearCrossEntropyTests,
    assert_equals_oracle,
    compiled,
)


class TestReference(LinearCrossEntropyTests):
    implementation = "reference"
    chunks: ClassVar[dict[str, int]] = {}
    products = 3

    def by_default(self, vocab_size: int, place: str, dtype: str) -> bool:
        return (vocab_size, place, dtype) == (65, "jit", "float32")

    several_by_default = by_default


class TestXla(LinearCrossEntropyTests):
    """Chunks that divide neither the tokens nor the columns."""

    implementation = "xla"
    chunks: ClassVar[dict[str, int]] = {"chunk_tokens": 5, "chunk_vocab": 16}

    def several_by_default(self, vocab_size: int, place: str, dtype: str) -> bool:
        few = {(64, "jit", "float32"), (65, "jit", "float32")}
        few |= {(67, "jit", "bfloat16"), (67, "shard_map", "float32")}
        return (vocab_size, place, dtype) in few


@pytest.mark.parametrize(("chunk_tokens", "chunk_vocab"), [(None, None), (1, 261), (64, 70)])
def test_sizes_of_chunks_change_nothing(chunk_tokens: int | None, chunk_vocab: int | None) -> None:
    sizes = {"chunk_tokens": chunk_tokens, "chunk_vocab": chunk_vocab}
    outputs, gradients = compiled(implementation="xla", **sizes)(HIDDEN, HEAD)
    assert_equals_oracle(outputs, *gradients)
