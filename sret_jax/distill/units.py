"""The pieces that the making of soft labels is shared out in, each a file that is there when it is complete."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from sret_jax.data.soft_labels import SoftLabels
from sret_jax.errors import UserError
from sret_jax.files import naming, replace

# In a unit, about: little is lost at a kill, and little of its last batch is empty.
_CROPS = 32_768


class Unit(NamedTuple):
    """Some images, one behind the other.

    Attributes:
      path: of the file with their labels.
      images: their numbers in the source.
    """

    path: Path
    images: range


def plan_units(home: Path, images: int, num_crops: int) -> list[Unit]:
    """Cuts the images of a source into units.

    Args:
      home: the folder of the units' files.
      images: how many there are.
      num_crops: of each.
    """
    size = max(_CROPS // num_crops, 1)
    starts = range(0, images, size)
    return [Unit(home / f"unit-{start:08d}.safetensors", range(start, min(start + size, images))) for start in starts]


def write_unit(unit: Unit, labels: Mapping[str, SoftLabels]) -> None:
    """Writes the labels of a unit's images by their keys; numbers are float16.

    Raises:
      UserError: the file cannot be written.
    """
    content = {
        "crops": np.array([len(one.boxes) for one in labels.values()], np.int64),
        "keys": np.frombuffer("\n".join(labels).encode("utf-8", "surrogateescape"), np.uint8),
        **{
            name: np.concatenate([getattr(one, name) for one in labels.values()])
            for name in SoftLabels._fields
            if labels
        },
    }
    replace(unit.path, safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in content.items()}))


def read_unit(path: Path) -> Iterator[tuple[str, SoftLabels]]:
    """Keys and labels of a unit's images.

    Raises:
      UserError: the file cannot be read, or is not what was written.
    """
    with naming(path):
        encoded = path.read_bytes()
    try:
        content = safetensors.numpy.load(encoded)
        keys = content["keys"].tobytes().decode("utf-8", "surrogateescape")
        ends = np.cumsum(content["crops"])
        for number, key in enumerate(keys.split("\n") if keys else []):
            own = slice(ends[number] - content["crops"][number], ends[number])
            yield key, SoftLabels(*(content[name][own] for name in SoftLabels._fields))
    except (SafetensorError, LookupError, ValueError) as error:
        raise UserError(
            f"{path} is not what was written: {error}. Expected a sound disk: delete this file and run the same "
            "command again, which makes it anew"
        ) from error


def read_units(paths: Sequence[Path]) -> Iterator[tuple[str, SoftLabels]]:
    """Keys and labels of several units' images."""
    for path in paths:
        yield from read_unit(path)
