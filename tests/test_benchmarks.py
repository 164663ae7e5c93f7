"""The benchmarks' own parts: what they lower, run and write down."""

import pathlib
import runpy

import pytest
from jaxdistill.kernels import blocks

from benchmarks import kernel_programs, kernels, search_blocks
from benchmarks.kernel_programs import Head, Heads
from jaxdistill.parallel.ahead_of_time import Compiled

SMALL = Head(tokens=16, vocab=256, width=8, teacher_width=12)


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_a_head_runs_in_both_implementations(operation: str) -> None:
    lowered = {
        name: kernel_programs.lower_head(None, operation, SMALL, name, "float32")
        for name in ("xla", "reference")
    }
    arrays = kernels.arrays_for(lowered["xla"])
    lean, full = (lowered[name].compile()(*arrays)[0] for name in lowered)
    assert lean == pytest.approx(float(full), rel=1e-5)
    assert 0 < lean < 10
    assert all(x > 0 for x in kernels.seconds(lowered, repeats=1).values())


def test_attention_runs() -> None:
    heads = Heads(1, 4, 2, 8, 16, {"window": 4})
    lowered = kernel_programs.lower_attention(None, heads, "xla", "float32")
    value, gradients = lowered.compile()(*kernels.arrays_for(lowered))
    assert value > 0
    assert [x.shape for x in gradients] == [(1, 16, 4, 8), (1, 16, 2, 8), (1, 16, 2, 8)]


def test_flash_attention_refuses_what_it_has_not() -> None:
    heads = kernel_programs.ATTENTION["Gemma-2-2B"]
    with pytest.raises(ValueError, match="has no window and no soft cap"):
        kernel_programs.lower_attention(None, heads, "flash")


def test_what_is_found_is_written_beside_what_stands_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "searched_blocks.py"
    before = search_blocks.FILE.read_text()
    file.write_text(before)
    monkeypatch.setattr(search_blocks, "FILE", file)
    heads = {("linear_divergence_forward", "v5e", (576, 2048), 2): blocks.Tile(512, 1024, 1)}
    attention = {("v6e", 128, 2): (1024, 512)}
    for _ in range(2):  # what was found before is replaced
        search_blocks.write(heads, attention)
    written = runpy.run_path(str(file))
    assert written["HEADS"] == heads
    assert written["ATTENTION"] == attention
    assert file.read_text().split("HEADS")[0] == before.split("HEADS")[0]


def test_the_search_takes_the_fewest_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiler that prefers narrow blocks of columns; one program fails."""
    seen = []

    def compile_all(generation: str, programs: list, with_cycles: bool) -> list:
        assert with_cycles
        results: list[Compiled | str] = []
        for program in programs:
            seen.append(generation)
            tokens, vocab = program.arguments["chunks"]
            names = (f"jvp_linear_cross_entropy_{sweep.name}_.1" for sweep in search_blocks.SWEEPS)
            results.append(Compiled(0, dict.fromkeys(names, 100 * vocab + tokens)))
        results[-1] = "out of memory"
        return results

    monkeypatch.setattr(search_blocks, "compile_all", compile_all)
    monkeypatch.setattr(search_blocks, "WIDTHS", {"cross_entropy": ((2048,),)})
    found = search_blocks.search_heads("v5e")
    assert len(found) == 3
    assert set(seen) == {"v5e"}
    with search_blocks.compiling_for("v5e"):
        tiles = search_blocks.candidates((2048,))[:-1]
    best = min(tiles, key=lambda tile: (tile.vocab, tile.tokens))
    assert set(found.values()) == {best}
