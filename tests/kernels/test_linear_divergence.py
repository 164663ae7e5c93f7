"""The divergence head, lean and reference, against the float64 oracle."""

from typing import ClassVar

from tests.kernels.linear_divergence_tests import (
    SMALL,
    LinearDivergenceTests,
    check_against_oracle,
    each_kind,
)


class TestReference(LinearDivergenceTests):
    implementation = "reference"
    chunks: ClassVar[dict[str, int]] = {}
    layouts = ("vd",)

    def by_default(self, kind: str, vocab_size: int, place: str, dtype: str) -> bool:
        return (kind, vocab_size, place, dtype) == ("reverse_kl", 65, "jit", "float32")


class TestXla(LinearDivergenceTests):
    """Chunks that divide neither the tokens nor the columns."""

    implementation = "xla"
    chunks: ClassVar[dict[str, int]] = {"chunk_tokens": 5, "chunk_vocab": 16}


@each_kind
def test_chunks_of_its_own_choice(kind: str) -> None:
    check_against_oracle(kind, SMALL, "vd", implementation="xla")
