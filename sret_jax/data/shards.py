"""The files of a packed dataset: which images go into which, written in parallel, each read back before it counts."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from sret_jax.data.folder import FolderExamples
from sret_jax.errors import UserError
from sret_jax.files import naming, refused

_SHARD_BYTES = 256 * 2**20

# One image in a group, so that reading one decodes no other. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a dataset.

    Attributes:
      path: the file.
      examples: the split that it is a part of.
      start: its first example.
      stop: one more than its last example.
      image_bytes: sizes of its images, added up.
    """

    path: Path
    examples: FolderExamples
    start: int
    stop: int
    image_bytes: int


def example_features(class_names: tuple[str, ...]) -> tfds.features.FeaturesDict:
    """What TFDS has to know of the examples in a shard."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=class_names),
            "file_name": tfds.features.Text(),
        }
    )


def plan_shards(examples: FolderExamples, name: str, split: str, folder: Path) -> list[Shard]:
    """Cuts a split wherever another 256 MiB of images are full, whatever has been written yet.

    Args:
      examples: the images of the split.
      name: of the dataset.
      split: its name in the dataset.
      folder: for the files.

    Raises:
      UserError: if the size of an image cannot be read.
    """
    sizes = _file_sizes(examples)
    before = np.cumsum(sizes) - sizes
    starts = np.flatnonzero(np.diff(before // _SHARD_BYTES, prepend=-1))
    stops = [*starts[1:].tolist(), len(examples)]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    columns = template.sharded_filepaths(len(starts)), starts.tolist(), stops, np.add.reduceat(sizes, starts).tolist()
    return [Shard(Path(path), examples, *numbers) for path, *numbers in zip(*columns, strict=True)]


def write_shards(shards: list[Shard], workers: int, advance: Callable[[int, int], object]) -> None:
    """Writes those files that are not there, each under another name until it has been read back.

    Args:
      shards: of one dataset.
      workers: threads; each writes one file at a time.
      advance: called with the images that have been written and that there are, now and then, from several threads.

    Raises:
      UserError: if an image cannot be read, or a file cannot be written or reads back as something else. What other
        threads had begun is complete by then.
    """
    total = sum(shard.stop - shard.start for shard in shards)
    serializer = ExampleSerializer(example_features(shards[0].examples.class_names).get_serialized_info())
    write = functools.partial(_write_shard, serializer=serializer, advance=lambda count: advance(count, total))
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        running = [executor.submit(write, shard) for shard in shards]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def _file_sizes(examples: FolderExamples) -> np.ndarray:
    def sizes(indices: range) -> list[int]:
        found = []
        for index in indices:
            with naming(path := Path(examples.file_name(index))):
                found.append(path.stat().st_size)
        return found

    indices = range(len(examples))
    with concurrent.futures.ThreadPoolExecutor() as executor:
        parts = executor.map(sizes, [indices[start : start + 1000] for start in indices[::1000]])
        return np.array(list(itertools.chain(*parts)), np.int64)


def _write_shard(shard: Shard, serializer: ExampleSerializer, advance: Callable[[int], object]) -> None:
    if shard.path.exists():
        advance(shard.stop - shard.start)
        return
    new = shard.path.with_name(shard.path.name + ".incomplete")
    try:
        with contextlib.closing(ArrayRecordWriter(str(new), _WRITER_OPTIONS)) as writer:
            checksum = 0
            for index in range(shard.start, shard.stop):
                record = _record(shard.examples, index, serializer)
                checksum = zlib.crc32(record, checksum)
                writer.write(record)
                advance(1)
        with naming(shard.path):
            with new.open("rb") as file:
                os.fsync(file.fileno())
            if _count_and_checksum(new) != (shard.stop - shard.start, checksum):
                raise UserError(f"{new} does not read back as it was written. Expected a sound disk: check it")
            os.replace(new, shard.path)
    except RuntimeError as error:  # what ArrayRecord makes of the system's refusals
        raise refused(shard.path, error) from error
    finally:
        new.unlink(missing_ok=True)


def _record(examples: FolderExamples, index: int, serializer: ExampleSerializer) -> bytes:
    with naming(path := Path(examples.file_name(index))):
        image = path.read_bytes()
    example = {"image": image, "label": int(examples.labels[index]), "file_name": bytes(examples.names[index])}
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _count_and_checksum(path: Path) -> tuple[int, int]:
    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        count = reader.num_records()
        return count, functools.reduce(lambda checksum, _: zlib.crc32(reader.read(), checksum), range(count), 0)
