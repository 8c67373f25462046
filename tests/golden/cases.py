"""Golden results in this project's terms: the same network as a module, recorded permutations by stage."""

from typing import Any

import numpy as np

import sret_jax
from tests.golden import golden


def model_of(config: dict, **fields: Any) -> sret_jax.SReT:
    """The network that the original's constructor arguments describe; `fields` override ours."""
    first, later = config["groups"] or ([1, 1, 1], [1, 1, 1])
    described = {
        "image_size": config["image_size"],
        "widths": tuple(config["base_dim"] * heads for heads in config["heads"]),
        "heads": tuple(config["heads"]),
        "blocks": tuple(config["recursive_num"]),
        "recursions": tuple(d // b for d, b in zip(config["depth"], config["recursive_num"], strict=True)),
        "slices": tuple(zip(first, later, strict=True)),
        "mlp_ratio": config["mlp_ratio"],
        "nll_ratio": config["nll_ratio"],
        "num_classes": config["num_classes"],
    }
    return sret_jax.SReT(**{**described, **fields})


def recorded_permutations(case: golden.Case) -> list[np.ndarray | None]:
    """What the original drew, in the order of its blocks, as (blocks, 1, tokens) for each stage that is sliced.

    Every golden network applies its blocks twice, so there is one permutation for each distinct block.
    """
    later_groups = case.config["groups"][1] if case.config["groups"] else [1, 1, 1]
    stages, taken = [], 0
    for blocks, groups in zip(case.config["recursive_num"], later_groups, strict=True):
        if groups == 1:
            stages.append(None)
            continue
        drawn = [case.expected[f"permutation{taken + b}"] for b in range(blocks)]
        stages.append(np.stack(drawn)[:, None].astype(np.int32))
        taken += blocks
    assert f"permutation{taken}" not in case.expected
    return stages
