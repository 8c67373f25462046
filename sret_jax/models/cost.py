"""What a network costs: parameters and multiply-accumulates."""

import jax

from sret_jax.models.sret import SReT, variable_shapes


def count_params(model: SReT) -> int:
    """Trainable parameters; a shared block counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(model)["params"]))


def count_macs(model: SReT) -> int:
    """Multiply-accumulates of one forward pass of one image: convolutions and matrix products, no elementwise work.

    Papers of this field, SReT's included, call this number FLOPs.
    """
    total, width = 0, model.widths[0]
    size, channels = model.image_size, 3
    for features in (width // 2, width, width):
        size = (size + 1) // 2
        total += size**2 * 9 * channels * features
        channels = features

    for s, (width, blocks, recursions) in enumerate(zip(model.widths, model.blocks, model.recursions, strict=True)):
        tokens = model.grid_sizes[s] ** 2
        if s:
            total += tokens * 9 * width  # depthwise: one input channel for each output channel
        mlp = 2 * tokens * width * int(width * model.mlp_ratio)
        nll = 2 * tokens * width * int(width * model.nll_ratio)
        projections = 4 * tokens * width**2  # query, key, value, output
        first, later = (2 * tokens * (tokens // groups) * width for groups in model.slices[s])
        total += blocks * (recursions * (projections + mlp + nll) + first + (recursions - 1) * later)

    return total + model.widths[-1] * model.num_classes
