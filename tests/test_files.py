"""Files that are written whole, locks, paths and JSON, in folders from elsewhere and on disks that lack much."""

import errno
import fcntl
import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest

from sret_jax import UserError
from sret_jax.files import (
    DamagedError,
    LockedError,
    create,
    expand,
    expand_local,
    lock,
    open_to_add,
    read_json,
    read_sealed,
    replace,
    reserve,
    seal,
    write_whole,
)


@pytest.fixture
def victim(tmp_path):
    """A file that no link may give away."""
    file = tmp_path / "victim"
    file.write_text("precious")
    yield file
    assert file.read_text() == "precious"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


LINKS = pytest.mark.parametrize("link", [os.symlink, os.link])


@LINKS
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json.new", lambda folder: replace(folder / "a.json", "{}")),
        ("a.json", lambda folder: replace(folder / "a.json", "{}")),
        (".space", lambda folder: reserve(folder / ".space", 10)),
        ("new", lambda folder: create(folder / "new").close()),
        ("a.incomplete", lambda folder: write_whole(folder / "a", lambda new: new.write_text("{}"))),
        ("a.old", lambda folder: write_whole(folder / "a", lambda new: new.write_text("{}"))),
        ("checksums.json.new", lambda folder: seal(folder)),
        (".lock", lambda folder: lock(folder / ".lock").close()),
    ],
)
def test_nothing_is_written_through_a_link_that_lies_in_the_place_of_a_file(folder, victim, link, name, write):
    link(victim, folder / name)
    if (name, link) == (".lock", os.symlink):
        with pytest.raises(OSError, match="symbolic link"):
            write(folder)
    else:
        write(folder)


def test_a_file_to_add_to_is_no_link(folder, victim):
    os.symlink(victim, folder / "metrics.jsonl")
    with pytest.raises(OSError, match="symbolic link, through which nothing is written: remove it"):
        open_to_add(folder / "metrics.jsonl")


def test_no_file_is_opened_for_writing_but_by_the_functions_that_follow_no_link():
    package = pathlib.Path(__file__).parents[1] / "sret_jax"
    for file in package.rglob("*.py"):
        source = file.read_text()
        for call in ('open("w', 'open("a', '"wb")', '"ab")', "O_CREAT", "O_TRUNC"):
            places = [line.strip() for line in source.splitlines() if call in line and "os.devnull" not in line]
            assert not places or file.name == "files.py", file


LOCK_IN_ANOTHER_PROCESS = """
import pathlib, sys
import fcntl, os
def flock(*_): raise OSError(int(sys.argv[2]), "refused")
if int(sys.argv[2]): fcntl.flock = flock
from sret_jax.files import LockedError, lock
try: lock(pathlib.Path(sys.argv[1]))
except LockedError: print("locked")
else: print("free")
"""


def elsewhere(path, number):
    arguments = [sys.executable, "-c", LOCK_IN_ANOTHER_PROCESS, str(path), str(number)]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("number", [0, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_lock_keeps_others_out_also_where_the_disk_has_none(folder, number, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    if number:
        monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), lock(folder / ".lock"):
        with pytest.raises(LockedError):
            lock(folder / ".lock")
        if number == errno.ENOSYS:
            assert elsewhere(folder / ".lock", number) == "locked"
    with lock(folder / ".lock"):
        pass
    warnings = [record.message for record in caplog.records]
    if not number:
        assert warnings == []
    else:
        assert f"{folder}/.lock cannot be locked: {os.strerror(number)}. " in warnings[0]
        assert "not those of other machines" in warnings[0] and "\n" not in warnings[0]


def test_two_folders_are_locked_apart_where_the_disk_has_no_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path / "a"), lock(tmp_path / "b"):
        (tmp_path / "c").symlink_to(tmp_path)
        with pytest.raises(LockedError):
            lock(tmp_path / "c" / "a")  # the same folder under another name


def test_another_refusal_of_a_lock_is_no_missing_lock(folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        lock(folder / ".lock")


def test_a_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/runs/a") == f"{tmp_path}/runs/a"
    assert expand_local(pathlib.Path("~/runs/a")) == tmp_path / "runs" / "a"
    assert expand("runs/~/a") == "runs/~/a"
    assert expand("gs://bucket/~") == "gs://bucket/~"


def test_a_tilde_that_means_no_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no home folder is known for ~nobody-here.*or \./~nobody-here/runs"):
        expand("~nobody-here/runs")
    (tmp_path / "~$draft").write_text("")
    assert expand("~$draft") == "~$draft"


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "hdfs://x/y"])
def test_a_uri_is_no_place_on_a_disk(path):
    with pytest.raises(UserError, match=f"{path} is not a folder or file of this machine"):
        expand_local(path)


def test_a_null_byte_is_no_path():
    with pytest.raises(UserError, match="null byte"):
        expand("a\0b")


def test_text_with_a_name_that_is_not_utf_8_is_written_as_json_that_gives_it_back(folder):
    name = os.fsdecode(b"caf\xe9 \xc3\x97")
    replace(folder / "a.json", json.dumps({"path": name}, ensure_ascii=False))
    assert read_json(folder / "a.json") == {"path": name}
    assert "×" in (folder / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b'{"a": \xff}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_object_of_json_is_damaged(folder, content):
    (folder / "a.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.json is not what was written"):
        read_json(folder / "a.json")


def test_a_file_of_a_sealed_folder_is_compared_with_its_checksum(folder):
    (folder / "a").write_bytes(b"content")
    seal(folder)
    assert read_sealed(folder, "a") == b"content"
    (folder / "a").write_bytes(b"Content")
    with pytest.raises(DamagedError, match="a is not what was written"):
        read_sealed(folder, "a")
    (folder / "checksums.json").write_text('[["a", 1]]')
    with pytest.raises(DamagedError, match=r"checksums\.json is not what was written"):
        read_sealed(folder, "a")
    (folder / "checksums.json").unlink()
    with pytest.raises(DamagedError, match=r"checksums\.json is missing"):
        read_sealed(folder, "a")
