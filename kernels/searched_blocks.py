"""Sizes of blocks found by search, with the TPU compiler's static estimate.

Written by `python -m benchmarks.search_blocks`. Where a problem is not here, `blocks` and
`attention.pallas_grid` reckon.
"""

# Kernel, generation, widths, bytes of a number -> tokens, columns and parts of the width.
HEADS: dict[tuple[str, str, tuple[int, ...], int], tuple[int, int, int]] = {
    ("linear_cross_entropy_forward", "v5e", (576,), 2): (1024, 512, 1),
    ("linear_cross_entropy_hidden_gradient", "v5e", (576,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v5e", (576,), 2): (1024, 512, 1),
    ("linear_cross_entropy_forward", "v5e", (2048,), 2): (1024, 512, 1),
    ("linear_cross_entropy_hidden_gradient", "v5e", (2048,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v5e", (2048,), 2): (1024, 512, 1),
    ("linear_cross_entropy_forward", "v5e", (4096,), 2): (1024, 512, 1),
    ("linear_cross_entropy_hidden_gradient", "v5e", (4096,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v5e", (4096,), 2): (1024, 256, 1),
    ("linear_divergence_forward", "v5e", (576, 576), 2): (1024, 256, 1),
    ("linear_divergence_hidden_gradient", "v5e", (576, 576), 2): (512, 512, 1),
    ("linear_divergence_head_gradient", "v5e", (576, 576), 2): (1024, 256, 1),
    ("linear_divergence_forward", "v5e", (2048, 4096), 2): (1024, 256, 1),
    ("linear_divergence_hidden_gradient", "v5e", (2048, 4096), 2): (512, 512, 1),
    ("linear_divergence_head_gradient", "v5e", (2048, 4096), 2): (1024, 256, 1),
    ("linear_cross_entropy_forward", "v5p", (576,), 2): (512, 1024, 1),
    ("linear_cross_entropy_hidden_gradient", "v5p", (576,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v5p", (576,), 2): (1024, 512, 1),
    ("linear_cross_entropy_forward", "v5p", (2048,), 2): (512, 1024, 1),
    ("linear_cross_entropy_hidden_gradient", "v5p", (2048,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v5p", (2048,), 2): (1024, 512, 1),
    ("linear_cross_entropy_forward", "v5p", (4096,), 2): (512, 256, 1),
    ("linear_cross_entropy_hidden_gradient", "v5p", (4096,), 2): (256, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v5p", (4096,), 2): (1024, 128, 1),
    ("linear_divergence_forward", "v5p", (576, 576), 2): (512, 512, 1),
    ("linear_divergence_hidden_gradient", "v5p", (576, 576), 2): (512, 512, 1),
    ("linear_divergence_head_gradient", "v5p", (576, 576), 2): (1024, 256, 1),
    ("linear_divergence_forward", "v5p", (2048, 4096), 2): (512, 512, 1),
    ("linear_divergence_hidden_gradient", "v5p", (2048, 4096), 2): (512, 256, 1),
    ("linear_divergence_head_gradient", "v5p", (2048, 4096), 2): (1024, 128, 1),
    ("linear_cross_entropy_forward", "v6e", (576,), 2): (512, 1024, 1),
    ("linear_cross_entropy_hidden_gradient", "v6e", (576,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v6e", (576,), 2): (1024, 512, 1),
    ("linear_cross_entropy_forward", "v6e", (2048,), 2): (1024, 512, 1),
    ("linear_cross_entropy_hidden_gradient", "v6e", (2048,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v6e", (2048,), 2): (1024, 512, 1),
    ("linear_cross_entropy_forward", "v6e", (4096,), 2): (1024, 512, 1),
    ("linear_cross_entropy_hidden_gradient", "v6e", (4096,), 2): (512, 1024, 1),
    ("linear_cross_entropy_head_gradient", "v6e", (4096,), 2): (1024, 512, 1),
    ("linear_divergence_forward", "v6e", (576, 576), 2): (512, 512, 1),
    ("linear_divergence_hidden_gradient", "v6e", (576, 576), 2): (512, 512, 1),
    ("linear_divergence_head_gradient", "v6e", (576, 576), 2): (1024, 256, 1),
    ("linear_divergence_forward", "v6e", (2048, 4096), 2): (512, 512, 1),
    ("linear_divergence_hidden_gradient", "v6e", (2048, 4096), 2): (512, 512, 1),
    ("linear_divergence_head_gradient", "v6e", (2048, 4096), 2): (1024, 256, 1),
}

# Generation, width of a head, bytes of a number -> rows and keys of a tile.
ATTENTION: dict[tuple[str, int, int], tuple[int, int]] = {
    ("v5e", 64, 2): (1024, 1024),
    ("v5e", 128, 2): (1024, 1024),
    ("v5e", 256, 2): (1024, 1024),
    ("v5p", 64, 2): (1024, 1024),
    ("v5p", 128, 2): (1024, 1024),
    ("v5p", 256, 2): (1024, 1024),
    ("v6e", 64, 2): (1024, 1024),
    ("v6e", 128, 2): (1024, 1024),
    ("v6e", 256, 2): (1024, 1024),
}
