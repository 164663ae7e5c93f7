"""Find the blocks of the TPU kernels by the compiler's static estimate, and write them down.

    pip install -e '.[test]'                     # libtpu among it, on x86-64 Linux
    python -m benchmarks.search_blocks           # half an hour on 2 cores

The tiles that `kernels.blocks` reckons best are compiled for each generation that has an estimate
(v4 has none, tpu7x none of some kernels), at widths of common models in bfloat16, and the best of
each kernel is written to `kernels/searched_blocks.py`. A tile of attention serves all three of its
kernels, so their sum counts.
"""

import itertools
import pathlib

from jaxdistill.kernels import blocks, compiling_for, searched_blocks

from benchmarks import kernel_programs
from benchmarks.kernel_programs import Head
from jaxdistill.parallel.ahead_of_time import Compiled, Program, compile_all

FILE = pathlib.Path(__file__).parents[1] / "kernels" / "searched_blocks.py"
GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")
ITEMSIZE = 2
TOKENS, VOCABULARY = 1024, 4096  # of the programs that are compiled
WIDTHS = {
    "cross_entropy": ((576,), (2048,), (4096,)),
    "forward_kl": ((576, 576), (2048, 4096)),
}
OPERATIONS = {"cross_entropy": "linear_cross_entropy", "forward_kl": "linear_divergence"}
SWEEPS = (blocks.FORWARD, blocks.HIDDEN_GRADIENT, blocks.HEAD_GRADIENT)
CANDIDATES = 3  # of each kernel
TILES = tuple(itertools.product((512, 1024), (512, 1024)))
ATTENTION_WIDTHS = (64, 128, 256)
KERNELS = ("forward", "query gradient", "key gradient")

HeadTiles = dict[tuple[str, str, tuple[int, ...], int], tuple[int, int, int]]


def candidates(widths: tuple[int, ...]) -> list[blocks.Tile]:
    """The tiles reckoned best for any of the kernels, at the size of a real vocabulary."""
    sizes = blocks.Sizes(8 * TOKENS, 128_000, widths, ITEMSIZE)
    found: dict[blocks.Tile, None] = {}
    for sweep in SWEEPS:
        for tile in blocks.ranked(sweep, sizes)[:CANDIDATES]:
            found[tile] = None
    return [tile for tile in found if VOCABULARY % tile.vocab == 0 and TOKENS % tile.tokens == 0]


def search_heads(generation: str) -> HeadTiles:
    best: HeadTiles = {}
    for operation, every in WIDTHS.items():
        for widths in every:
            with compiling_for(generation):
                tiles = candidates(widths)
            head = Head(TOKENS, VOCABULARY, widths[0], widths[-1])
            arguments = {"operation": operation, "head": head, "implementation": "pallas"}
            programs = [
                Program(kernel_programs.__name__, "lower_head", arguments | {"chunks": x[:2]})
                for x in tiles
            ]
            found = compile_all(generation, programs, with_cycles=True)
            for sweep in SWEEPS:
                name = f"{OPERATIONS[operation]}_{sweep.name}"
                counted = {
                    tile: cycles
                    for tile, result in zip(tiles, found, strict=True)
                    if isinstance(result, Compiled) and (cycles := _cycles_of(name, result))
                }
                print(generation, name, widths, {tuple(x): y for x, y in counted.items()})
                if len(counted) > 1:  # else there was nothing to choose from
                    best[name, generation, widths, ITEMSIZE] = min(counted, key=counted.__getitem__)
    return best


def _cycles_of(name: str, result: Compiled) -> int:
    return sum(cycles for operation, cycles in result.cycles.items() if name in operation)


def search_attention(generation: str) -> dict[tuple[str, int, int], tuple[int, int]]:
    best = {}
    for width in ATTENTION_WIDTHS:
        cases = list(itertools.product(TILES, KERNELS))
        programs = [
            Program(
                kernel_programs.__name__,
                "lower_tile",
                {
                    "kernel": kernel,
                    "width": width,
                    "rows": rows,
                    "keys": keys,
                    "heads": 8,
                    "ours": True,
                },
            )
            for (rows, keys), kernel in cases
        ]
        found = compile_all(generation, programs, with_cycles=True)
        cycles: dict[tuple[int, int], float] = dict.fromkeys(TILES, 0.0)
        for (tile, _), result in zip(cases, found, strict=True):
            counted = isinstance(result, Compiled)
            area = tile[0] * tile[1]
            cycles[tile] += sum(result.cycles.values()) / area if counted else float("inf")
        print(generation, "attention", width, {x: round(y, 4) for x, y in cycles.items()})
        best[generation, width, ITEMSIZE] = min(cycles, key=cycles.__getitem__)
    return best


def write(heads: HeadTiles, attention: dict[tuple[str, int, int], tuple[int, int]]) -> None:
    """Replace the two tables of the file; what stands above them stays."""
    text = FILE.read_text()
    for name, table in (("HEADS", heads), ("ATTENTION", attention)):
        start = text.index(f"\n{name}: ") + 1
        opening = text.index("= {", start) + len("= {")
        end = text.index("}", opening)
        entries = "".join(f"    {key!r}: {tuple(value)!r},\n" for key, value in table.items())
        text = text[:opening] + "\n" + entries.replace("'", '"') + text[end:]
    FILE.write_text(text)


def main() -> None:
    searched_blocks.HEADS.clear()  # the search starts from what is reckoned
    heads: HeadTiles = {}
    attention: dict[tuple[str, int, int], tuple[int, int]] = {}
    for generation in GENERATIONS:
        attention |= search_attention(generation)
        heads |= search_heads(generation)
        write(heads, attention)


if __name__ == "__main__":
    main()
