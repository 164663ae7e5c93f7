"""Blocks of the TPU kernels: what the hardware can hold, within the budget, for any shape."""

import itertools

import pytest
from jaxdistill.kernels import blocks

SWEEPS = ("forward", "hidden_gradient", "head_gradient", "all")


@pytest.mark.parametrize("sweep", SWEEPS)
def test_blocks_are_whole_registers_within_the_budget(sweep: blocks.Sweep) -> None:
    shapes = itertools.product((0, 1, 100, 8192), (1, 129, 151936), ((8,), (576,), (2048, 1024)))
    for num_tokens, vocab_size, widths in shapes:
        for itemsize in (2, 4):
            found = blocks.plan(num_tokens, vocab_size, widths, itemsize, sweep=sweep)
            assert found.tokens % 16 == found.vocab % 128 == 0
            assert found.tokens <= max(num_tokens + 15, 16)
            assert found.vocab <= vocab_size + 127
            assert blocks.vmem_of(found, widths, itemsize, sweep) <= blocks.BUDGET_BYTES


def test_more_vmem_moves_fewer_bytes() -> None:
    """A sweep through the vocabulary reads the head once a block of tokens."""
    sizes = [
        blocks.plan(8192, 151936, (4096,), 2, budget * blocks.MIB, "forward").tokens
        for budget in (6, 12, 24, 48)
    ]
    assert sizes == sorted(set(sizes))


def test_each_sweep_has_the_long_side_where_it_saves_reading() -> None:
    forward, hidden, head = (
        blocks.plan(8192, 128256, (1024,), 2, sweep=sweep) for sweep in SWEEPS[:3]
    )
    assert forward.tokens > forward.vocab
    assert forward.tokens >= hidden.tokens  # no accumulator takes its room
    assert head.vocab > head.tokens


def test_what_cannot_fit_is_refused() -> None:
    message = "blocks must fit 1048576 bytes of VMEM, but the smallest of widths \\(4096,\\) take"
    with pytest.raises(ValueError, match=message):
        blocks.plan(8192, 128256, (4096,), 2, blocks.MIB)


def test_a_gradient_needs_its_sum_and_twice_its_output() -> None:
    """In float32 and in the operand's type, for the side it belongs to."""
    pair, widths = blocks.Blocks(256, 128), (2048,)
    forward, hidden, head, both = (blocks.vmem_of(pair, widths, 2, sweep) for sweep in SWEEPS)
    assert hidden - forward == 256 * 2048 * (4 + 2 * 2)
    assert head - forward == 128 * 2048 * (4 + 2 * 2)
    assert both == max(hidden, head)
    assert forward >= 2 * 2 * 2048 * (256 + 128) + 4 * 256 * 128
