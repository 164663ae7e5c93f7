"""Tiles of the fused heads' kernels: what the hardware can hold, within the budget."""

import itertools

import pytest
from jaxdistill.kernels import (
    ImplementationError,
    blocks,
    compiling_for,
    generation,
    searched_blocks,
)
from jaxdistill.kernels.attention import pallas_grid
from jaxdistill.kernels.blocks import FORWARD, HEAD_GRADIENT, HIDDEN_GRADIENT, Sizes, Sweep, Tile

SWEEPS = (FORWARD, HIDDEN_GRADIENT, HEAD_GRADIENT)
GENERATIONS = tuple(generation.PHYSICAL_VMEM_BYTES)
each_sweep = pytest.mark.parametrize("sweep", SWEEPS, ids=lambda x: x.name)
each_generation = pytest.mark.parametrize("name", GENERATIONS)


def choose(sweep: Sweep, sizes: Sizes) -> Tile:
    return blocks.choose_tile("linear_cross_entropy", sweep, sizes)


@each_sweep
def test_tiles_are_whole_registers_within_the_budget(sweep: Sweep) -> None:
    widths = (8,), (576,), (2048, 1024), (2048, 4096)
    shapes = itertools.product((1, 100, 8192), (1, 129, 151936), widths, (2, 4))
    for num_tokens, vocab_size, widths, itemsize in shapes:
        sizes = Sizes(num_tokens, vocab_size, widths, itemsize)
        tile = choose(sweep, sizes)
        assert tile.tokens % 16 == tile.vocab % 128 == 0
        assert tile.tokens <= max(num_tokens + 15, 16)
        assert tile.vocab <= vocab_size + 127
        assert tile.parts == 1 or all(width % (128 * tile.parts) == 0 for width in widths)
        assert blocks.vmem_of(sweep, tile, sizes) <= blocks.budget()


def test_a_width_that_registers_do_not_divide_is_whole() -> None:
    assert choose(HEAD_GRADIENT, Sizes(8192, 49152, (576, 576), 2)).parts == 1


@each_sweep
def test_chunks_that_were_given_stay(sweep: Sweep) -> None:
    assert choose(sweep, Sizes(8192, 151936, (2048,), 2, (128, 256)))[:2] == (128, 256)


@each_generation
def test_multiplying_takes_longer_than_reading(name: str) -> None:
    """Where there is VMEM enough: so the kernel runs at the speed of the matrix unit."""
    sizes = Sizes(8192, 151936, (2048,), 2)
    with compiling_for(name):
        for sweep in SWEEPS:
            tile, speed = choose(sweep, sizes), generation.speed()
            rows = tile.tokens if sweep.over == "vocabulary" else tile.vocab
            products = 1 if sweep is FORWARD else 2
            if name != "v4":
                assert tile.parts == 1
                assert products * rows >= speed.operations / speed.bytes


@each_generation
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [8192, 16384])
def test_wide_models_are_served_in_parts(width: int, itemsize: int, name: str) -> None:
    """Llama-3-70B's width and twice that; the head's gradient sums 128 columns at least."""
    with compiling_for(name):
        tiles = [choose(sweep, Sizes(8192, 128256, (width,), itemsize)) for sweep in SWEEPS]
    assert name != "v4" or width == 8192 or tiles[-1].parts > 1


def test_more_vmem_takes_less_time() -> None:
    sizes = Sizes(8192, 151936, (4096,), 2)
    seconds = []
    for name in ("v4", "v5e"):
        with compiling_for(name):
            tile = choose(FORWARD, sizes)
        with compiling_for("v5e"):
            seconds.append(blocks.seconds_of(FORWARD, tile, sizes))
    assert seconds[1] < seconds[0]


def test_a_sum_takes_room_from_its_block() -> None:
    sizes = Sizes(8192, 128256, (2048,), 2)
    forward, hidden, head = (choose(sweep, sizes) for sweep in SWEEPS)
    assert forward.tokens > hidden.tokens
    assert forward.vocab > head.vocab


def test_what_cannot_fit_is_refused() -> None:
    message = (
        "implementation 'pallas' of linear_cross_entropy cannot fit widths 20000 in blocks of "
        f"16 tokens and 128 columns into {12 * 2**20} bytes of VMEM: choose 'xla'"
    )
    with pytest.raises(ImplementationError, match=message):
        choose(HEAD_GRADIENT, Sizes(8192, 128256, (20000,), 2))


def test_a_gradient_needs_its_sum_and_twice_its_output() -> None:
    """The sum in float32 and whole, the output in the operand's type and by parts."""
    sizes, tile = Sizes(8192, 151936, (2048,), 2), Tile(256, 128, 1)
    forward, hidden, head = (blocks.vmem_of(sweep, tile, sizes) for sweep in SWEEPS)
    product = 4 * blocks.WIDTH_PART
    assert hidden - forward == 256 * (2048 * (4 + 2 * 2) + product)
    assert head - forward == 128 * (2048 * (4 + 2 * 2) + product)
    assert forward >= 2 * 2 * 2048 * (256 + 128) + 4 * 256 * 128
    forward, hidden, _ = (blocks.vmem_of(s, tile._replace(parts=2), sizes) for s in SWEEPS)
    assert hidden - forward == 256 * (2048 * (4 + 2) + product)


def test_what_was_searched_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a problem that fills such tiles, names no size itself and is for that TPU."""
    found = (64, 256, 1)
    monkeypatch.setattr(
        searched_blocks, "HEADS", {("linear_cross_entropy_forward", "v5e", (2048,), 2): found}
    )

    def chosen(sizes: Sizes, sweep: Sweep = FORWARD) -> tuple:
        return blocks.choose_tile("linear_cross_entropy", sweep, sizes)

    large = Sizes(8192, 151_936, (2048,), 2)
    assert chosen(large) != found
    with compiling_for("v6e"):
        assert chosen(large) != found
    with compiling_for("v5e"):
        assert chosen(large) == found
        assert chosen(large, HEAD_GRADIENT) != found
        for change in (
            {"num_tokens": 8193},
            {"vocab_size": 130},
            {"widths": (2049,)},
            {"itemsize": 4},
            {"chunks": (128, 256)},
            {"labels": 2},
        ):
            assert chosen(large._replace(**change)) != found, change


@pytest.mark.parametrize(("key", "tile"), searched_blocks.HEADS.items(), ids=str)
def test_what_was_searched_fits(key: tuple, tile: tuple) -> None:
    name, target, widths, itemsize = key
    sweeps = {"forward": FORWARD, "hidden_gradient": HIDDEN_GRADIENT}
    sweep = next((x for n, x in sweeps.items() if name.endswith(n)), HEAD_GRADIENT)
    sizes = Sizes(8192, 151_936, widths, itemsize)
    with compiling_for(target):
        assert blocks.vmem_of(sweep, Tile(*tile), sizes) <= blocks.budget()
        assert blocks.choose_tile(name.removesuffix(f"_{sweep.name}"), sweep, sizes) == tile


@pytest.mark.parametrize(("key", "tile"), searched_blocks.ATTENTION.items(), ids=str)
def test_what_was_searched_for_attention_fits(key: tuple, tile: tuple[int, int]) -> None:
    target, width, itemsize = key
    with compiling_for(target):
        budget = generation.vmem_limit() - pallas_grid.MARGIN_BYTES
        assert pallas_grid.vmem_of(*tile, width, itemsize) <= budget
