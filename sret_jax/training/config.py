"""Every key that a run understands, and the check that a config has no other."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sret_jax.errors import UserError

# Keys that say where or how a run computes, not what comes out. The others cannot change when a run goes on.
HOW_NOT_WHAT = (
    "data.path",
    "data.threads",
    "mesh",
    "log_every_steps",
    "checkpoint",
    "model.remat",
    "model.scan_unroll",
)


def base_config() -> ConfigDict:
    """All keys with values that change nothing: no augmentation, no smoothing, a constant learning rate of zero.

    A file in `configs/` starts here and sets what its recipe sets. Keys that do not exist here are refused, in the
    file and on the command line. The keys of `model` that stay None are as the named model has them.
    """
    config = ConfigDict()
    config.seed = 0  # decides on initialisation, order, augmentation, dropout and permutations
    config.epochs = 1
    config.batch_size = 1  # images in a step, over all devices
    config.mesh = ConfigDict({"data": -1})  # size of each named axis of the device mesh; -1 is "all devices"

    config.model = ConfigDict({"name": "sret_t"})
    config.model.image_size = placeholder(int)
    for field in ("widths", "heads", "blocks", "recursions", "slices"):
        config.model[field] = placeholder(tuple)
    for field in ("mlp_ratio", "nll_ratio", "drop_path_rate", "drop_rate", "attn_drop_rate"):
        config.model[field] = placeholder(float)
    config.model.dtype = "float32"  # compute dtype, or "bfloat16"
    config.model.remat = False
    config.model.scan_unroll = placeholder(bool)

    config.data = ConfigDict()
    config.data.source = "digits"  # "digits", "synthetic" or a prepared TFDS dataset, e.g. "imagenet2012"
    config.data.path = ""  # folder with TFDS datasets; empty is TFDS's own, ~/tensorflow_datasets
    config.data.synthetic_examples = 10_000  # in each split of "synthetic"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.crop_area = (1.0, 1.0)  # random resized crop: range of its part of the image's area
    config.data.crop_aspect = (1.0, 1.0)  # and of its width / height
    config.data.eval_crop_ratio = 1.0  # part of the shorter side that evaluation's central crop keeps
    config.data.threads = 16  # that read and decode, on each host

    config.augment = ConfigDict()
    config.augment.flip = 0.0  # probability
    config.augment.erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha, 0 is off
    config.augment.cutmix = 0.0  # alpha, 0 is off
    config.augment.label_smoothing = 0.0

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.0  # peak for 512 images a step; in proportion for other batches
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.initial_learning_rate = 0.0  # where the warm-up starts
    config.optimizer.final_learning_rate = 0.0  # where the cosine ends
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8

    config.log_every_steps = 50
    config.checkpoint = ConfigDict({"every_epochs": 1, "keep": 2})
    return config


def check_config(config: ConfigDict) -> None:
    """Refuse keys that no run understands, missing keys, and numbers out of range.

    Raises:
      UserError: with every such key, and the nearest known ones.
    """
    known, given = flatten(base_config()), flatten(config)
    problems = []
    for key in given.keys() - known.keys():
        nearest = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
        problems.append(f"config.{key} is not a key" + (f"; did you mean {' or '.join(nearest)}?" if nearest else ""))
    problems += [f"config.{key} is missing" for key in known.keys() - given.keys()]
    for key in (
        "epochs",
        "batch_size",
        "log_every_steps",
        "data.synthetic_examples",
        "checkpoint.every_epochs",
        "checkpoint.keep",
        "data.threads",
    ):
        if given.get(key, 1) < 1:
            problems.append(f"config.{key} is {given[key]}, expected at least 1")
    for key in ("augment.flip", "augment.erasing", "augment.label_smoothing"):
        if not 0 <= given.get(key, 0) <= 1:
            problems.append(f"config.{key} is {given[key]}, expected a probability, 0 to 1")
    for key in ("augment.mixup", "augment.cutmix", "optimizer.learning_rate", "optimizer.weight_decay", "seed"):
        if given.get(key, 0) < 0:
            problems.append(f"config.{key} is {given[key]}, expected at least 0")
    for key in ("crop_area", "crop_aspect"):
        low, high = given.get(f"data.{key}", (1, 1))
        if not 0 < low <= high:
            problems.append(f"config.data.{key} is {(low, high)}, expected (low, high) with 0 < low <= high")
    if not 0 < given.get("data.eval_crop_ratio", 1) <= 1:
        problems.append(f"config.data.eval_crop_ratio is {given['data.eval_crop_ratio']}, expected above 0, at most 1")
    if problems:
        raise UserError("\n".join(sorted(problems)))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer.b1": 0.9, ...}`; the mesh, whose keys are its axes' names, stays one value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and prefix + key != "mesh":
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value.to_dict() if isinstance(value, ConfigDict) else value
    return flat


def identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that decide on a run's result, flat, as JSON gives them back (lists for tuples)."""
    deciding = {key: value for key, value in sorted(flatten(config).items()) if not key.startswith(HOW_NOT_WHAT)}
    return json.loads(json.dumps(deciding))
