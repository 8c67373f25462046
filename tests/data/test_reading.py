"""Tests of sret_jax.data.reading."""

import errno
import os

import pytest

from sret_jax.data import reading
from sret_jax.data.reading import UnreadableError, read_patiently


class Disk:
    """Fails with each of some errors, then gives what it has; notes the pauses between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors, self.pauses = list(errors), list[float]()
        monkeypatch.setattr(reading.time, "sleep", self.pauses.append)

    def read(self) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        return b"content"


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/1.jpg")


def test_what_is_there_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    assert read_patiently(disk.read, "it") == b"content"
    assert disk.pauses == []


def test_a_disk_that_comes_back_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passing = (_os_error(errno.ESTALE), _os_error(errno.EIO), RuntimeError("open() failed: Too many open files"))
    disk = Disk(monkeypatch, *passing, _os_error(errno.ENOTCONN))
    assert read_patiently(disk.read, "/data/1.jpg") == b"content"
    assert disk.pauses == [0.1, 1.0, 10.0, 60.0]
    assert caplog.messages == [
        "/data/1.jpg cannot be read (open() failed: Too many open files): tried again in 10 seconds",
        f"/data/1.jpg cannot be read ({os.strerror(errno.ENOTCONN)}): tried again in 60 seconds",
    ]


def test_a_disk_that_stays_away_is_given_up_with_its_last_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, *[_os_error(errno.EIO)] * 4, _os_error(errno.ESTALE))
    with pytest.raises(UnreadableError, match=f"^{os.strerror(errno.ESTALE)}$"):
        read_patiently(disk.read, "it")
    assert len(disk.pauses) == 4


@pytest.mark.parametrize(
    "error",
    [
        _os_error(errno.ENOENT),
        _os_error(errno.EACCES),
        _os_error(errno.EISDIR),
        RuntimeError("open() failed: No such file or directory; opening x"),
        RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch"),
    ],
)
def test_what_no_pause_mends_is_given_up_at_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, error)
    with pytest.raises(UnreadableError):
        read_patiently(disk.read, "it")
    assert disk.pauses == []


def test_other_errors_are_not_the_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IndexError):
        read_patiently(Disk(monkeypatch, IndexError()).read, "it")
