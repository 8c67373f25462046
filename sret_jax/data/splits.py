"""Which examples the words for a split mean, of a folder of images and of a prepared dataset alike."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import tensorflow_datasets as tfds

# One split under two names: ImageNet's own, and that which TFDS gives it.
_ONE_SPLIT = {"val": "validation", "validation": "val"}


class Part(NamedTuple):
    """Examples of one split, from number `first` on, before number `end`."""

    split: str
    first: int
    end: int


def with_both_names(splits: Iterable[str]) -> dict[str, str]:
    """The names of splits by what they may be called: `val` and `validation` are one split where only one is there."""
    own = {name: name for name in splits}
    return {_ONE_SPLIT[name]: name for name in own if name in _ONE_SPLIT} | own


def named_splits(split: str, splits: Iterable[str]) -> list[str]:
    """The splits that a split in TFDS's words, such as `train[:99%]+val`, speaks of, by their own names."""
    known = with_both_names(splits)
    return [known[name] for name in dict.fromkeys(re.findall(r"[\w-]+", split)) if name in known]


def find_parts(split: str, infos: Mapping[str, tfds.core.SplitInfo]) -> list[Part]:
    """The parts that a split in TFDS's words consists of.

    Args:
      split: those words: `train`, `train[:99%]`, `train[-500:]+val`.
      infos: the splits by their own names.

    Raises:
      ValueError: there is no such split, or the words are none of TFDS's.
    """
    known = with_both_names(infos)
    # Other names only where they are asked for: TFDS's `all` means each split once.
    spoken_of = {name: infos[known[name]] for name in re.findall(r"[\w-]+", split) if name in known}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute({**infos, **spoken_of})
    except NotImplementedError as error:
        raise ValueError(str(error)) from error
    found = []
    for part in parts:
        own = known[part.splitname]
        found.append(Part(own, part.from_ or 0, infos[own].num_examples if part.to is None else part.to))
    return found
