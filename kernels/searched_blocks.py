"""Sizes of blocks found by search, with the TPU compiler's static estimate.

Written by `python -m benchmarks.search_blocks`. Where a problem is not here, `blocks` and
`attention.pallas_grid` reckon.
"""

# Kernel, generation, widths, bytes of a number -> tokens, columns and parts of the width.
HEADS: dict[tuple[str, str, tuple[int, ...], int], tuple[int, int, int]] = {}

# Generation, width of a head, bytes of a number -> rows and keys of a tile.
ATTENTION: dict[tuple[str, int, int], tuple[int, int]] = {}
