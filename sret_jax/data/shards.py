"""The files of a packed dataset: which images go into which, written in parallel, each read back before it counts."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from sret_jax.data.folder import FolderExamples
from sret_jax.data.workers import pool_died, start_worker
from sret_jax.errors import UserError
from sret_jax.files import LockedError, lock, naming, refused
from sret_jax.interrupts import deaf_children

_SHARD_BYTES = 256 * 2**20

# One image in a group, so that reading one decodes no other. Images are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"

_INCOMPLETE = ".incomplete-"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a dataset.

    Attributes:
      path: the file.
      examples: what belongs into it.
      image_bytes: sizes of its images, added up.
    """

    path: Path
    examples: FolderExamples
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
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    paths = template.sharded_filepaths(len(starts))
    # Examples of their own, so that a worker is sent the names that it needs and no others.
    names, labels, sizes_in = (np.split(column, starts[1:]) for column in (examples.names, examples.labels, sizes))
    return [
        Shard(Path(path), dataclasses.replace(examples, names=names, labels=labels), int(sizes.sum()))
        for path, names, labels, sizes in zip(paths, names, labels, sizes_in, strict=True)
    ]


def write_shards(shards: list[Shard], workers: int, advance: Callable[[int, int], object]) -> None:
    """Writes those files of a dataset of images that are not there, as `write_files` does.

    Args:
      shards: of one dataset.
      workers: processes; each writes one file at a time.
      advance: called with the images in a file that is complete, and those in all files.

    Raises:
      UserError: if an image cannot be read, and as `write_files`.
    """
    lengths = {shard.path: len(shard.examples) for shard in shards}
    total = sum(lengths.values())
    files = {shard.path: functools.partial(_records, shard) for shard in shards}
    write_files(files, _WRITER_OPTIONS, workers, lambda path: advance(lengths[path], total))


def write_files(
    files: Mapping[Path, Callable[[], Iterable[bytes]]],
    options: str,
    workers: int,
    complete: Callable[[Path], object],
) -> None:
    """Writes those ArrayRecord files that are not there, each under another name until it has been read back.

    Args:
      files: the records of each file, given by a function that can be sent to another process.
      options: of ArrayRecord's writer.
      workers: processes; each writes one file at a time.
      complete: called with the path of a file that is complete.

    Raises:
      UserError: if a file cannot be written or reads back as something else, or a worker was killed. What other
        workers had begun is complete by then.
    """
    for folder in {path.parent for path in files}:
        for left_by_a_kill in folder.glob(f"*{_INCOMPLETE}*"):
            left_by_a_kill.unlink()
    with _executor(workers) as executor:
        with deaf_children():
            running = {executor.submit(_write_file, path, records, options): path for path, records in files.items()}
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
                complete(running[future])
        except BrokenProcessPool as error:
            raise pool_died() from error
        finally:
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Keep a second process from packing into `out`, by a lock's file, whose folder is made if missing."""
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = lock(path)
    except LockedError as error:
        raise UserError(f"another process is packing into {out}: wait for it, or stop it") from error
    with held:
        yield


def _executor(workers: int) -> concurrent.futures.Executor:
    """Processes, because ArrayRecord's writer keeps other threads waiting; for one worker this process will do."""
    if workers == 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (signal.SIGINT,))


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


def _write_file(path: Path, records: Callable[[], Iterable[bytes]], options: str) -> None:
    if path.exists():
        return
    # Under a name of this process's own: a worker whose parent was killed may still be writing for a moment.
    new = path.with_name(f"{path.name}{_INCOMPLETE}{os.getpid()}")
    try:
        count, checksum = 0, 0
        with _refusals(path):
            writer = ArrayRecordWriter(str(new), options)
        try:
            for record in records():
                count, checksum = count + 1, zlib.crc32(record, checksum)
                with _refusals(path):
                    writer.write(record)
        finally:
            with _refusals(path):
                writer.close()
        with naming(path), _refusals(path):
            with new.open("rb") as file:
                os.fsync(file.fileno())
            if _count_and_checksum(new) != (count, checksum):
                raise UserError(f"{new} does not read back as it was written. Expected a sound disk: check it")
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Names the file in what ArrayRecord makes of the system's refusals."""
    try:
        yield
    except RuntimeError as error:
        raise refused(path, error) from error


def _records(shard: Shard) -> Iterator[bytes]:
    serializer = ExampleSerializer(example_features(shard.examples.class_names).get_serialized_info())
    return (_record(shard.examples, index, serializer) for index in range(len(shard.examples)))


def _record(examples: FolderExamples, index: int, serializer: ExampleSerializer) -> bytes:
    with naming(path := Path(examples.file_name(index))):
        image = path.read_bytes()
    example = {"image": image, "label": int(examples.labels[index]), "file_name": bytes(examples.names[index])}
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _count_and_checksum(path: Path) -> tuple[int, int]:
    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        count = reader.num_records()
        return count, functools.reduce(lambda checksum, _: zlib.crc32(reader.read(), checksum), range(count), 0)
