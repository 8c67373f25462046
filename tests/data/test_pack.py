"""Tests of sret_jax.data.pack and sret_jax.data.shards."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sret_jax.data import shards
from sret_jax.data.folder import list_folder
from sret_jax.data.pack import pack
from sret_jax.data.pipeline import eval_batches, train_batches
from sret_jax.data.sources import open_source
from sret_jax.errors import UserError

# The 36 images of train, about 2 kB each, are cut into six files or more.
_SMALL = 8_000


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", _SMALL)


@pytest.fixture(scope="module")
def packed(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The dataset that an undisturbed packing of `image_folder` gives; not to be changed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(shards, "_SHARD_BYTES", _SMALL)
        yield pack(str(image_folder), str(tmp_path_factory.mktemp("packed")), name="small")


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _copy(image_folder: Path, folder: Path) -> Path:
    """A folder that may be changed, with the images linked."""
    for path in image_folder.rglob("*.*"):
        copy = folder / path.relative_to(image_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    return folder


@pytest.mark.parametrize("split", ["train", "validation", "train[:20%]", "train[7:9]+validation[-3:]"])
def test_a_packed_folder_gives_the_examples_of_the_folder(split: str, image_folder: Path, packed: Path) -> None:
    from_folder = open_source("folder", split, str(image_folder))
    from_packed = open_source("small", split, str(packed.parents[1]))
    assert from_packed.class_names == from_folder.class_names == ("ant", "bee", "cat")
    assert len(from_packed.examples) == len(from_folder.examples) > 0
    for index in range(len(from_folder.examples)):
        assert from_packed.examples[index] == from_folder.examples[index]
        name = from_packed.examples.file_name(index)
        assert str(image_folder / name) == from_folder.examples.file_name(index)


def test_a_packed_folder_gives_the_batches_of_the_folder(image_folder: Path, packed: Path) -> None:
    sources = [
        (open_source("folder", split, str(image_folder)), open_source("small", split, str(packed.parents[1])))
        for split in ("train", "validation")
    ]
    (train, packed_train), (val, packed_val) = sources
    options: dict[str, Any] = {"batch_size": 8, "image_size": 16, "num_threads": 2}
    recipe = {**options, "seed": 3, "repeats": 3, "rand_augment": "rand-m9-mstd0.5-inc1"}
    batches, packed_batches = (train_batches(source, **recipe) for source in (train, packed_train))
    for _ in range(10):  # two epochs and more
        np.testing.assert_equal(next(packed_batches), next(batches))
    np.testing.assert_equal(list(eval_batches(packed_val, **options)), list(eval_batches(val, **options)))


def test_plain_tfds_reads_and_decodes_a_packed_folder(image_folder: Path, packed: Path) -> None:
    builder = tfds.builder_from_directory(packed)
    assert (builder.info.full_name, sorted(builder.info.splits)) == ("small/1.0.0", ["train", "validation"])
    assert builder.info.splits["train"].num_shards > 5
    assert builder.info.features["label"].names == ["ant", "bee", "cat"]
    examples = list(builder.as_data_source("train"))
    assert sorted(example["label"] for example in examples) == [0] * 10 + [1] * 14 + [2] * 12
    for example in examples:
        with Image.open(image_folder / example["file_name"].decode()) as image:
            pixels = np.asarray(image)
        # Two decoders of JPEG may round differently; PNG has one meaning.
        atol = 0 if example["file_name"].endswith(b".PNG") else 4
        np.testing.assert_allclose(example["image"].astype(int), pixels.astype(int), atol=atol)


def test_files_are_cut_by_the_size_of_their_images(image_folder: Path, packed: Path) -> None:
    examples = list_folder(str(image_folder), "train")
    sizes = [Path(examples.file_name(index)).stat().st_size for index in range(len(examples))]
    expected: list[int] = []
    for index in range(len(sizes)):
        number = sum(sizes[:index]) // _SMALL
        expected += [0] * (number + 1 - len(expected))
        expected[number] += 1
    lengths = tfds.builder_from_directory(packed).info.splits["train"].shard_lengths
    assert lengths == expected and min(lengths) > 0


@pytest.mark.usefixtures("small_shards")
def test_the_number_of_workers_changes_no_byte(image_folder: Path, packed: Path, tmp_path: Path) -> None:
    done = pack(str(image_folder), str(tmp_path), name="small", workers=3)
    assert _content(done) == _content(packed)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["1.0.0", "small"]


@pytest.mark.usefixtures("small_shards")
def test_a_killed_packing_goes_on_where_it_was_and_ends_the_same(
    image_folder: Path, packed: Path, tmp_path: Path
) -> None:
    # One process that forks, since importing takes longer than packing. Each child is killed at the `moment`th call of
    # anything that makes progress: reading an image, writing a record, reading back, renaming, writing metadata.
    program = f"""
import os, signal, sys
from sret_jax.data import pack as packing, shards
shards._SHARD_BYTES = {_SMALL}
folder, out, moments = sys.argv[1], sys.argv[2], range(0, 80, 3)
for moment in moments:
    child = os.fork()
    if child == 0:
        calls = 0
        def killing(function):
            def call(*args, **kwargs):
                global calls
                calls += 1
                if calls > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for owner, name in [
            (shards, "_record"), (shards, "_count_and_checksum"), (os, "replace"), (os, "sync"),
            (packing, "replace"), (packing.tfds.folder_dataset, "write_metadata"),
        ]:
            setattr(owner, name, killing(getattr(owner, name)))
        packing.pack(folder, f"{{out}}/{{moment}}", name="small")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(moment, code, flush=True)
"""
    command = [sys.executable, "-c", program, image_folder, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    codes = dict(map(int, line.split()) for line in done.stdout.splitlines())
    assert codes[0] == -9 and codes[78] == 0, "the moments should reach from before the first call to after the last"
    for moment, code in codes.items():
        found = tmp_path / str(moment) / "small" / "1.0.0"
        assert found.exists() == (code == 0), moment
        complete = {
            p.name: p.stat().st_ino for p in found.with_name("1.0.0.incomplete").glob("*array_record*-of-?????")
        }
        assert pack(str(image_folder), str(tmp_path / str(moment)), name="small") == found
        assert _content(found) == _content(packed), moment
        assert {name: (found / name).stat().st_ino for name in complete} == complete, (
            "a complete file was written again"
        )


@pytest.fixture
def stuck_folder(image_folder: Path, tmp_path: Path) -> Path:
    """A folder of images, the last of which nobody can finish reading: a pipe without a writer."""
    folder = _copy(image_folder, tmp_path / "images")
    os.mkfifo(folder / "train" / "cat" / "z.jpg")
    return folder


@pytest.mark.usefixtures("small_shards")
def test_workers_end_with_their_parent(stuck_folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from sret_jax.data import shards
from sret_jax.data.pack import pack
shards._SHARD_BYTES = {_SMALL}
pack(sys.argv[1], sys.argv[2], name="small", workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", program, stuck_folder, tmp_path])
    _wait_for(lambda: list(tmp_path.rglob("small-validation.array_record*")))
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert len(children) >= 2
    _wait_for(lambda: all(_has_ended(child) for child in children))

    (stuck_folder / "train" / "cat" / "z.jpg").unlink()
    (stuck_folder / "train" / "cat" / "z.jpg").touch()
    done = pack(str(stuck_folder), str(tmp_path), name="small")
    assert _content(done) == _content(pack(str(stuck_folder), str(tmp_path / "undisturbed"), name="small"))


@pytest.mark.usefixtures("small_shards")
def test_a_killed_worker_is_the_users_error(stuck_folder: Path, tmp_path: Path) -> None:
    def kill_workers(*_: int) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(UserError, match=r"a worker process was killed.*with fewer workers"):
        pack(str(stuck_folder), str(tmp_path), name="small", workers=2, advance=kill_workers)


def _wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened in a minute"
        time.sleep(0.001)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_is_one_error_and_keeps_the_complete_files(
    image_folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _copy(image_folder, tmp_path / "images")
    # The file with this one is too large for the limit: nothing that was written before it is missing.
    (folder / "train" / "cat" / "z.jpg").write_bytes(bytes(500_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # Python ignores the signal; writing fails.
    try:
        with pytest.raises(UserError, match=r"cannot read or write .*train\.array_record-000.*: .*File too large"):
            pack(str(folder), str(tmp_path), name="small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (incomplete,) = (tmp_path / "small").glob("1.0.0*")
    assert incomplete.name == "1.0.0.incomplete"
    kept = {path.name for path in incomplete.glob("small-train*")}
    assert len(kept) >= 3 and not any("incomplete" in name for name in kept)
    done = pack(str(folder), str(tmp_path), name="small")
    assert len(tfds.builder_from_directory(done).as_data_source("train")) == 37


@pytest.mark.usefixtures("small_shards")
def test_what_does_not_read_back_as_written_never_looks_complete(
    image_folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def damaging_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "array_record-00003" in path.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    with monkeypatch.context() as damaging:
        damaging.setattr(os, "fsync", damaging_fsync)
        with pytest.raises(UserError, match="array_record-00003"):
            pack(str(image_folder), str(tmp_path), name="small")
    assert not list(tmp_path.rglob("*array_record-00003*")) and not (tmp_path / "small" / "1.0.0").exists()
    assert _content(pack(str(image_folder), str(tmp_path), name="small")) == _content(packed)


@pytest.mark.usefixtures("small_shards")
def test_packing_again_writes_nothing(image_folder: Path, packed: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in packed.rglob("*")}
    assert pack(str(image_folder), str(packed.parents[1]), name="small") == packed
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in packed.rglob("*")} == before


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["an image more", "a longer image", "another class"])
def test_other_images_are_not_mixed_with_what_was_packed(change: str, image_folder: Path, tmp_path: Path) -> None:
    folder = _copy(image_folder, tmp_path / "images")
    done = pack(str(folder), str(tmp_path), name="small")
    interrupted = done.with_name("1.0.0.incomplete")
    if change == "an image more":
        (folder / "val" / "ant" / "new.jpg").write_bytes(b"")
    elif change == "a longer image":
        (folder / "train" / "ant" / "ant_1.JPEG").unlink()
        (folder / "train" / "ant" / "ant_1.JPEG").write_bytes(
            (image_folder / "train/ant/ant_1.JPEG").read_bytes() + b"\0"
        )
    else:
        shutil.copytree(folder / "train" / "ant", folder / "train" / "dog")
    for place in [done, done.rename(interrupted)]:
        with pytest.raises(UserError, match=f"{place} is another dataset"):
            pack(str(folder), str(tmp_path), name="small") if place == interrupted else _repack(
                folder, interrupted, done
            )


def _repack(folder: Path, interrupted: Path, done: Path) -> None:
    interrupted.rename(done)
    try:
        pack(str(folder), str(done.parents[1]), name="small")
    finally:
        done.rename(interrupted)


def test_another_version_or_dataset_in_the_place_is_refused(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    (tmp_path / "cifar10" / "1.0.0").mkdir(parents=True)
    for name, version in [("imagenet2012", "5.1.0"), ("cifar10", "1.0.0")]:
        with pytest.raises(UserError, match=f"{name}/{version} is another dataset.*give another name"):
            pack(str(image_folder), str(tmp_path), name=name)


def test_two_processes_do_not_pack_the_same_dataset(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with (tmp_path / "small" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing"):
            pack(str(image_folder), str(tmp_path), name="small")


def test_broken_images_are_packed_as_they_are(image_folder: Path, tmp_path: Path) -> None:
    folder = _copy(image_folder, tmp_path / "images")
    contents = {"empty.jpg": b"", "half.png": b"\x89PNG\r\n", "zeros.jpg": bytes(100)}
    for name, content in contents.items():
        (folder / "train" / "bee" / name).write_bytes(content)
    pack(str(folder), str(tmp_path), name="small")
    source = open_source("small", "train", str(tmp_path))
    found = {source.examples.file_name(i): source.examples[i]["image"] for i in range(len(source.examples))}
    assert {name: found[f"train/bee/{name}"] for name in contents} == contents


def test_an_image_that_cannot_be_read_is_named(image_folder: Path, tmp_path: Path) -> None:
    folder = _copy(image_folder, tmp_path / "images")
    (folder / "train" / "bee" / "lost.jpg").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"train/bee/lost\.jpg: No such file"):
        pack(str(folder), str(tmp_path), name="small")
    assert not (tmp_path / "small" / "1.0.0").exists()


def test_folders_beside_the_splits_are_left_out_and_named(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _copy(image_folder, tmp_path / "images")
    (folder / "test").mkdir()
    (folder / "test" / "1.jpg").touch()
    done = pack(str(folder), str(tmp_path / "out"))
    assert done == tmp_path / "out" / "images" / "1.0.0", "the folder gives its name to the dataset"
    assert sorted(tfds.builder_from_directory(done).info.splits) == ["train", "validation"]
    assert [record.getMessage() for record in caplog.records if record.name == "sret_jax.data.pack"] == [
        f"{folder}/test is left out: it holds no class of train"
    ]


@pytest.mark.parametrize(
    ("name", "addition", "message"),
    [
        ("ImageNet", "", "cannot be called 'ImageNet'.*another name"),
        ("2012", "", "cannot be called '2012'"),
        ("small", "validation/ant/1.jpg", "has val and validation"),
        ("small", "my split/ant/1.jpg", "cannot be called 'my split'"),
        ("small", "train/two\nlines/1.jpg", r"class 'two\\nlines', which TFDS cannot keep"),
        ("small", "train/ space/1.jpg", "class ' space', which TFDS cannot keep"),
        ("small", "val/dog/1.jpg", "val/dog is not a class"),
    ],
)
def test_what_tfds_cannot_hold_is_the_users_error_before_anything_is_written(
    name: str, addition: str, message: str, image_folder: Path, tmp_path: Path
) -> None:
    folder = _copy(image_folder, tmp_path / "images")
    if addition:
        (folder / addition).parent.mkdir(parents=True)
        (folder / addition).touch()
    with pytest.raises(UserError, match=message):
        pack(str(folder), str(tmp_path / "out"), name=name)
    assert not (tmp_path / "out").exists()


def test_the_command_packs_without_tensorflow_and_says_how_to_read_the_result(
    image_folder: Path, packed: Path, tmp_path: Path
) -> None:
    program = (
        "import runpy, sys\n"
        "runpy.run_module('sret_jax.data.pack', run_name='__main__')\n"
        "assert not any(name.partition('.')[0] == 'tensorflow' for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, image_folder, tmp_path, "--name=small", "--workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: 36 images in 1 files, validation: 6 images in 1 files" in done.stdout
    assert f"--config.data.source=small --config.data.path={tmp_path}" in done.stdout
    assert len(open_source("small", "train", str(tmp_path)).examples) == 36

    failed = subprocess.run([*command[:3], tmp_path / "nowhere", tmp_path], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: cannot list ") and "Traceback" not in failed.stderr


def test_a_disk_without_locks_is_no_obstacle(image_folder, monkeypatch, caplog, tmp_path) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert pack(str(image_folder), str(tmp_path), name="small").is_dir()
    assert "cannot be locked: No locks available" in caplog.text
    with shards.locked(tmp_path / "small" / ".lock", tmp_path), pytest.raises(UserError, match="another process"):
        pack(str(image_folder), str(tmp_path), name="small")


@pytest.mark.parametrize("name", [".lock", "1.0.0.incomplete/dataset_info.json", "1.0.0.incomplete/features.json"])
def test_a_packing_writes_through_no_link(image_folder, tmp_path, name: str) -> None:
    victim, link = tmp_path / "victim", tmp_path / "out" / "small" / name
    victim.write_text("precious")
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(UserError, match="symbolic link") if name == ".lock" else contextlib.nullcontext():
        pack(str(image_folder), str(tmp_path / "out"), name="small")
    assert victim.read_text() == "precious"


def test_paths_may_begin_with_the_home_folder(image_folder, monkeypatch, tmp_path) -> None:
    (tmp_path / "images").symlink_to(image_folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert pack("~/images", "~/out") == tmp_path / "out" / "images" / "1.0.0"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(("folder", "out"), [("gs://bucket/images", "out"), ("images", "gs://bucket/tfds")])
def test_a_bucket_that_is_not_mounted_is_the_users_error(folder: str, out: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    with (
        contextlib.chdir(tmp_path),
        pytest.raises(UserError, match=r"gs://bucket/\w+ is not a folder.*mount the bucket"),
    ):
        pack(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
