"""Every key that a run understands, and the check that a config has no other."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sret_jax.data.augment import MEAN, STD
from sret_jax.data.image_file import WHITE
from sret_jax.data.soft_labels import LabelType
from sret_jax.data.workers import MOST_THREADS, MOST_WORKERS
from sret_jax.errors import UserError, brief

# Keys that say where or how a run computes, not what comes out. The others cannot change when a run goes on.
HOW_NOT_WHAT = (
    "checkpoint",
    "compilation_cache",
    "data.max_broken",
    "data.path",
    "data.threads",
    "data.workers",
    "distill.soft_labels",  # what they hold decides, wherever they are; so it is with teachers
    "distill.teacher",
    "distributed",
    "log_every_steps",
    "max_skipped_steps",
    "mesh",
    "mode",
    "model.attention",
    "model.mlp",
    "model.platform",
    "model.remat",
    "model.scan_unroll",
    "profile_steps",
    "wandb_project",
)

# Keys that each of several hosts may have its own value of: where its files are, and how it reads them.
OF_EACH_HOST = (
    "compilation_cache",
    "data.max_broken",
    "data.path",
    "data.threads",
    "data.workers",
    "distill.soft_labels",
    "distill.teacher",
    "distributed",
)

_CHOICES = {
    "augment.partner": ("reversed", "permuted"),
    "distill.dtype": ("float32", "bfloat16"),
    "distill.interpolation": ("bilinear", "bicubic"),
    "mode": ("train", "eval"),
    "optimizer.schedule": ("cosine", "constant"),
}
# What 32 bits count: steps on the devices, and most else.
_MOST = 2**31 - 1

# Smallest and largest of the whole numbers; of others 1 and `_MOST`. No machine has more, or JAX does not take more.
_COUNTS = {
    "batch_size": (1, 2**24),
    "checkpoint.every_steps": (0, _MOST),
    "data.max_broken": (0, _MOST),
    "data.repeats": (1, 2**16),
    "data.threads": (1, MOST_THREADS),
    "data.workers": (0, MOST_WORKERS),
    "distill.image_size": (0, 2**14),
    "distill.num_crops": (1, 2**16),
    "distributed.process": (-1, 2**20),
    "distributed.processes": (0, 2**20),
    "epochs": (1, 10**6),
    "profile_steps": (0, _MOST),
    "seed": (0, 2**32 - 1),
}

# Of float32, with room for what it is multiplied with.
_LARGEST = 1e30

_POSITIVE = (1e-30, _LARGEST, "a number above 0, at most 1e30")
_PROBABILITY = (0.0, 1.0, "a probability, 0 to 1")
_DECAY = (0.0, 1 - 1e-9, "a number of at least 0 and below 1")
_MODERATE = (0.0, 1e6, "a number of at least 0, at most 1e6")
_RANGES = {
    "augment.cutmix": _MODERATE,
    "augment.flip": _PROBABILITY,
    "augment.erasing": _PROBABILITY,
    "augment.label_smoothing": _PROBABILITY,
    "augment.mixup": _MODERATE,
    "ema_decay": _DECAY,
    "data.eval_crop_ratio": (1e-9, 1.0, "a number above 0, at most 1"),
    "distill.label_weight": _PROBABILITY,
    "distill.temperature": _POSITIVE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _POSITIVE,
    "optimizer.warmup_epochs": _MODERATE,
}

# Without effect where there is no teacher, or where there are no soft labels.
_OF_TEACHERS = ("distill.dtype", "distill.image_size", "distill.mean", "distill.std")
_OF_SOFT_LABELS = ("distill.interpolation", "distill.label_type")

# What soft labels decide, or would be wrong after: these keys must be as `base_config` has them.
_NOT_WITH_SOFT_LABELS = (
    "augment.erasing",
    "augment.flip",
    "augment.label_smoothing",
    "data.crop_area",
    "data.crop_aspect",
    "data.rand_augment",
    "data.repeats",
    "distill.label_weight",
    "distill.teacher",
)


def base_config() -> ConfigDict:
    """All keys with values that change nothing: no augmentation, no smoothing, a constant learning rate of zero.

    A file in `configs/` starts here and sets what its recipe sets. Keys that do not exist here are refused, in the
    file and on the command line. The keys of `model` that stay None are as the named model has them.
    """
    config = ConfigDict()
    config.mode = "train"  # or "eval": evaluate the weights at init_from, or the workdir's latest, and end
    config.init_from = ""  # weights to start from: a converted file, a .pth, a workdir; empty is at random
    config.init_ema = False  # of these, the moving average
    config.seed = 0  # decides on initialisation, order, augmentation, dropout and permutations
    config.epochs = 1
    config.batch_size = 1  # images in a step, over all devices
    config.accumulation = 1  # parts that a batch is computed in, one behind the other
    config.ema_decay = 0.0  # of the weights' moving average, evaluated beside them; 0 is off
    config.max_skipped_steps = 10  # in a row, for a loss or gradient that is not finite, before the run is given up
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # sizes of the mesh of devices; -1 is "all that are left"
    config.distributed = ConfigDict()  # where no TPU pod, SLURM, Open MPI or Kubernetes says it:
    config.distributed.coordinator = ""  # "host:port" of process 0
    config.distributed.processes = 0  # how many processes
    config.distributed.process = -1  # which of them this is

    config.model = ConfigDict({"name": "sret_t"})
    config.model.image_size = placeholder(int)
    for field in ("widths", "heads", "blocks", "recursions", "slices"):
        config.model[field] = placeholder(tuple)
    for field in ("mlp_ratio", "nll_ratio", "drop_path_rate", "drop_rate", "attn_drop_rate"):
        config.model[field] = placeholder(float)
    config.model.dtype = "float32"  # compute dtype, or "bfloat16"
    config.model.remat = False
    config.model.scan_unroll = placeholder(bool)
    config.model.attention = placeholder(str)  # how it is computed; left alone, as is fastest on the devices
    config.model.mlp = placeholder(str)  # likewise
    config.model.platform = placeholder(str)  # "cpu", "gpu" or "tpu", that the network is written for: the devices'

    config.data = ConfigDict()
    config.data.source = "digits"  # "folder", "digits", "synthetic" or a prepared TFDS dataset, e.g. "imagenet2012"
    config.data.path = ""  # the folder of images, or that with TFDS datasets: empty is TFDS's, ~/tensorflow_datasets
    config.data.synthetic_examples = 10_000  # in each split of "synthetic"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.crop_area = (1.0, 1.0)  # random resized crop: range of its part of the image's area
    config.data.crop_aspect = (1.0, 1.0)  # and of its width / height
    config.data.eval_crop_ratio = 1.0  # part of the shorter side that evaluation's central crop keeps
    config.data.background = WHITE  # RGB, 0 to 255, that images show where they are transparent
    config.data.rand_augment = ""  # timm's policy string, such as "rand-m9-mstd0.5-inc1"; empty is off
    config.data.repeats = 1  # repeated augmentation: how often an image appears in an epoch of unchanged length
    config.data.workers = 0  # processes that read and decode, on each host; 0 is this process
    config.data.threads = 16  # in each of them, at most 256
    config.data.max_broken = 100  # different images on a host that may be unreadable, before the run is given up

    config.augment = ConfigDict()
    config.augment.flip = 0.0  # probability
    config.augment.erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha, 0 is off
    config.augment.cutmix = 0.0  # alpha, 0 is off
    config.augment.partner = "reversed"  # of both: the batch in reverse order, or "permuted" at random
    config.augment.label_smoothing = 0.0

    config.distill = ConfigDict()
    config.distill.teacher = ""  # weights, MODEL=weights or module:function, or several with commas; empty is none
    config.distill.image_size = 0  # of the teacher's input; 0 is its own, and for a function the student's
    config.distill.mean = MEAN  # of a function's input, in RGB from 0 to 1
    config.distill.std = STD
    config.distill.dtype = "float32"  # the teacher's weights and compute dtype, or "bfloat16"
    config.distill.temperature = 1.0  # divides the logits of student and teacher
    config.distill.label_weight = 0.0  # part of the labels in the loss, beside a teacher's
    config.distill.soft_labels = ""  # folder of labels that a teacher gave before, instead of one; empty is none
    config.distill.label_type = "marginal_smoothing_k5"  # of these
    config.distill.interpolation = "bilinear"  # of their crops, as the authors train, or "bicubic"
    config.distill.num_crops = 1  # of an image in a batch; a pass over the images then counts as so many epochs

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.0  # peak for 512 images a step; in proportion for other batches
    config.optimizer.schedule = "cosine"  # after the warm-up, or "constant"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.initial_learning_rate = 0.0  # where the warm-up starts
    config.optimizer.final_learning_rate = 0.0  # where the cosine ends
    config.optimizer.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.0  # largest gradient norm; 0 is off

    config.compilation_cache = "cache"  # folder of compiled programs, in the workdir, or a whole path; empty is off
    config.log_every_steps = 50
    config.profile_steps = 0  # so many steps, from the 10th on, into WORKDIR/profile
    config.wandb_project = ""  # Weights & Biases gets the metrics too; empty is off
    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.every_steps = 0  # and within epochs; 0 is off
    config.checkpoint.keep = 2  # of the latest; the best is kept beside them
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
    for key in given.keys() & known.keys():
        problems += [
            f"config.{key} is {brief(given[key], repr)}, expected {want}"
            for want in _unmet(key, given[key], known[key])
        ]
    if not problems:
        problems = _contradictions(given, known)
    if problems:
        raise UserError("\n".join(sorted(problems)))


def _contradictions(given: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What keys of which each is possible do not mean together, in words."""
    crops, batch_size = given["distill.num_crops"], given["batch_size"]
    try:
        LabelType.parse(given["distill.label_type"])
    except UserError as error:
        return [f"config.distill.label_type: {error}"]
    if given["distill.soft_labels"]:
        problems = [
            f"config.{key} is {given[key]!r}, expected {known[key]!r} with soft labels (config.distill.soft_labels): "
            "they stand for crops and flips of their own, and for what a teacher saw there"
            for key in _NOT_WITH_SOFT_LABELS
            if given[key] != known[key]
        ]
        if batch_size % crops:
            problems.append(f"config.distill.num_crops is {crops}, expected what divides the batch size, {batch_size}")
        return problems
    problems = []
    if crops != 1:
        problems.append(f"config.distill.num_crops is {crops}, expected 1 without soft labels: set distill.soft_labels")
    if not given["distill.teacher"]:
        problems += [
            f"config.distill.{key} is {given[f'distill.{key}']!r}, expected {known[f'distill.{key}']!r} where there is "
            "nothing to learn from: set config.distill.teacher"
            for key in ("temperature", "label_weight")
            if given[f"distill.{key}"] != known[f"distill.{key}"]
        ]
    return problems


def _unmet(key: str, value: Any, default: Any) -> list[str]:
    """What a value should have been, in words; nothing if it is that."""
    if default is None:  # fields of the model are checked where they are used
        return []
    if key == "mesh":  # where it is used, its sizes are compared with the devices
        fits = isinstance(value, Mapping) and all(type(size) is int for size in value.values())
        return [] if fits else ["whole numbers for data and fsdp"]
    if isinstance(default, float):
        low, high, words = _RANGES.get(key, (0.0, _LARGEST, "a number of at least 0, at most 1e30"))
        return [] if _is_number(value) and low <= value <= high else [words]
    if key == "data.background":
        is_colour = (
            isinstance(value, tuple) and len(value) == 3 and all(type(x) is int and 0 <= x <= 255 for x in value)
        )
        return [] if is_colour else ["three whole numbers of 0 to 255, for red, green and blue"]
    if isinstance(default, tuple) and len(default) == 3:
        least = 1e-30 if key == "distill.std" else -_LARGEST
        fits = _are_numbers(value, 3) and all(least <= x <= _LARGEST for x in value)
        return [] if fits else ["three numbers, for red, green and blue" + " above 0" * (least > 0)]
    if isinstance(default, tuple):
        high = 1.0 if key == "data.crop_area" else _LARGEST
        fits = _are_numbers(value, 2) and 0 < value[0] <= value[1] <= high
        return [] if fits else [f"(low, high) with 0 < low <= high <= {high:g}"]
    if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
        return [f"a value like {default!r}"]
    if isinstance(value, str) and "\0" in value:
        return ["a text without null bytes"]
    if key in _CHOICES:
        return [] if value in _CHOICES[key] else [" or ".join(map(repr, _CHOICES[key]))]
    if isinstance(default, int) and not isinstance(default, bool):
        least, most = _COUNTS.get(key, (1, _MOST))
        return [] if least <= value <= most else [f"at least {least}, at most {most:,}"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple) and len(value) == count and all(map(_is_number, value))


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
    """The keys that decide on a run's result, as `config.…`, with values as JSON gives them back (lists for tuples)."""
    flat = sorted(flatten(config).items())
    unused = (() if config.distill.teacher else _OF_TEACHERS) + (() if config.distill.soft_labels else _OF_SOFT_LABELS)
    deciding = {
        f"config.{key}": value
        for key, value in flat
        if not any(key == how or key.startswith(how + ".") for how in HOW_NOT_WHAT) and key not in unused
    }
    return json.loads(json.dumps(deciding))
