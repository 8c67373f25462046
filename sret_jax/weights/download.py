"""Fetches the checkpoints that the authors published on Google Drive, each once, into a cache folder."""

import hashlib
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sret_jax.errors import UserError
from sret_jax.files import expand, lock
from sret_jax.models.zoo import PUBLISHED, canonical_name

_RETRIES = 3
_MOST_SECONDS_WITHOUT_DATA = 60.0
_BEGINNINGS = (b"PK\x03\x04", b"\x80")  # of what torch.save writes: a zip archive since PyTorch 1.6, pickles before


class _FailedError(Exception):
    """What went wrong, and what to do."""


def download(name: str, folder: Path | None = None) -> Path:
    """The authors' checkpoint of a model, fetched with gdown unless it is there already.

    It appears as NAME.pth when all of it has come. Until then, what came is kept as NAME.pth.new????????.part beside
    it, and the next call goes on from there, also after a kill. Processes that share the folder take turns: gdown would
    let them append to one partial file. On a terminal, stderr shows a progress bar. No cookies are read or kept.

    Args:
      name: as for `create_model`.
      folder: where checkpoints are kept; by default `$XDG_CACHE_HOME/sret_jax`, or `~/.cache/sret_jax`.

    Returns:
      The file, `folder/NAME.pth` with the name of `list_models()`.

    Raises:
      UserError: an unknown name; or gdown is not installed, Google Drive cannot be reached, does not give the file or
        gives something else, or the folder cannot be written to, each with the link at which a browser gets the file.
    """
    name = canonical_name(name)
    drive_id = PUBLISHED[name].drive_id
    path = Path(expand(folder or _cache_folder())) / f"{name}.pth"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock(path.parent / ".lock", wait=True):
                if not path.exists():  # nor did the process fetch it that held the lock
                    _fetch(drive_id, path)
    except (_FailedError, OSError) as error:
        reason = str(error) if isinstance(error, _FailedError) else _disk_failure(path.parent, error)
        kept = "".join(
            f". The {part.stat().st_size:,} bytes that came are kept in {part}: the next download goes on from there, "
            "or from the start if you delete it"
            for part in _parts(path)
            if part.stat().st_size
        )
        link = f"https://drive.google.com/file/d/{drive_id}/view"
        raise UserError(
            f"cannot download {name}: {reason}; or open {link} in a browser and save the file as {path}{kept}"
        ) from error
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sret_jax")


def _fetch(drive_id: str, path: Path) -> None:
    """Download under another name first, so that what comes is looked at before it counts."""
    new = _new(path)
    for left in (new, *_parts(path)):
        if left.is_symlink():
            left.unlink()  # gdown would add to what it points to
    if not new.exists():  # complete, but left by a kill that came before the end of this function
        _fetch_with_gdown(drive_id, path)
    with new.open("rb") as file:
        beginning = file.read(40)
        os.fsync(file.fileno())
    if not beginning.startswith(_BEGINNINGS):
        new.unlink()
        raise _FailedError(
            f"what Google Drive sent begins with {beginning!r}, expected a file that torch.save wrote; it was deleted. "
            "Run the same command again later"
        )
    os.replace(new, path)


def _fetch_with_gdown(drive_id: str, path: Path) -> None:
    try:
        import gdown
        import requests
    except ModuleNotFoundError as error:
        raise _FailedError(f"{error.name} is not installed. Run pip install 'sret_jax[download]'") from error

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(path.name, total=None)
        try:
            gdown.download(
                id=drive_id,
                output=str(_new(path)),
                quiet=True,
                use_cookies=False,
                resume=True,
                retries=_RETRIES,
                timeout=_MOST_SECONDS_WITHOUT_DATA,
                progress=lambda received, total: bar.update(task, completed=received, total=total),
            )
        except gdown.FileURLRetrievalError as error:
            raise _FailedError(_page_failure(error)) from error
        # gdown reads web pages that may change, so that more can go wrong in it than it says.
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                raise  # the disk's refusal
            raise _FailedError(
                f"the transfer from Google Drive failed: {_first_cause(error)}. Check the network and run the same "
                "command again"
            ) from error


def _page_failure(error: Exception) -> str:
    if "Too many users have viewed or downloaded this file" in " ".join(str(error).split()):
        return (
            "Google Drive says that too many users have viewed or downloaded it recently. Run the same command again "
            "in a day"
        )
    return (
        "Google Drive answers with a page that does not offer it. It was removed, is not public, or too many requests "
        "came from your network: run the same command again later"
    )


def _disk_failure(folder: Path, error: OSError) -> str:
    return (
        f"cannot write to {folder}: {_first_cause(error)}. Expected a folder that you may write to, on a disk with "
        "free space, by default $XDG_CACHE_HOME/sret_jax: mend that and run the same command again"
    )


def _first_cause(error: BaseException) -> str:
    while cause := error.__cause__ or error.__context__:
        error = cause
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error).split("\n")[0].rstrip(".") or type(error).__name__


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _parts(path: Path) -> list[Path]:
    """What came of a file that is not complete: gdown adds eight random characters to its name, and `.part`."""
    return list(path.parent.glob(f"{_new(path).name}????????.part"))
