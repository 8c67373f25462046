"""Fetching the authors' checkpoints: gdown's own code and Google's own addresses, answered by a server on this machine.

The server answers as Google Drive does: a redirect to another host, a page that asks to confirm the download of a large
file, then the file, whole or from a byte on.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.server
import io
import random
import re
import resource
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import gdown
import pytest
import requests

from sret_jax.errors import UserError
from sret_jax.models.zoo import PUBLISHED, canonical_name
from sret_jax.weights import download as module
from sret_jax.weights.download import download, sha256

# The column "weights (last)" of the table in the original's README.
WEIGHTS_LAST = [
    ("SReT_⋇T", "1wHM7NRSkz-WykCSES17xFV56h_m5RMXj"),
    ("SReT_T", "1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni"),
    ("SReT_⋇LT", "1EXwfiMMa1UVQ_tmY6YQJ-Se0b3bW5NpC"),
    ("SReT_LT [8-4-1,2-1-1]", "1uSWvoVLHmOH6rNYiXSxD_rlN5dSBvEm3"),
    ("SReT_LT [16-14-1,1-1-1]", "1sKW9KJ5PLkDVXcW6m7dp8ieLwyCJNRqV"),
    ("SReT_⋇S", "1vlsxJieKhfnw-F6xFiwczvXBuk7ugXxm"),
    ("SReT_S", "1y6F_bCgS1sagm7pxjAtuSPUB5HoNb8Ed"),
    ("SReT_⋇T_Distill", "1P1qK-j1Cac5le8-DNUFBbjmIpRThuiVp"),
    ("SReT_T_Distill", "1xzG4VQyQyxWJfQTcGCE-fuMuK3BwPCjK"),
    ("SReT_⋇LT_Distill", "1FDqkfkw5nZEuTcBmiBKg3lvPJOPQWS6i"),
    ("SReT_LT_Distill", "1l6u0q4kwli5czEyo4TeJANtqsulh-J5G"),
    ("SReT_⋇T_Distill_Finetune384", "11mWAktu6LrNa0Qt61WJGA0eTWoKYD1Be"),
    ("SReT_⋇S_Distill_Finetune384", "1z5whJpXbbtFdjLpS1pCPvKcJhVnYCeo-"),
    ("SReT_⋇S_Distill_Finetune512", "1AZXIGMiGboI-nkoKuPnHnhDlBwZumuiB"),
]

LINK = "https://drive.google.com/file/d/1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni/view"  # of SReT-T
CHECKPOINT = b"PK\x03\x04" + random.Random(0).randbytes(1_500_000)  # three of gdown's chunks
QUOTA_PAGE = (
    '<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body><div id="uc-text">'
    '<p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>'
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently. Please try '
    "accessing the file again later.</p></div></body></html>"
)
NOT_FOUND_PAGE = "<!DOCTYPE html><html lang=en><title>Error 404 (Not Found)!!1</title><p>That’s an error.</html>"


class Drive(http.server.ThreadingHTTPServer):
    """What this Google Drive holds and how it fails; and what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.content = CHECKPOINT
        self.page: tuple[int, str] | None = None  # instead of a file
        self.cuts: list[int] = []  # the connections that send files break at these bytes, one after the other
        self.honours_ranges = True
        self.seconds_before_file = 0.0
        self.requests: list[tuple[str, http.client.HTTPMessage]] = []

    @property
    def ranges(self) -> list[str | None]:
        """The header "Range" of every request for the file."""
        return [headers["Range"] for url, headers in self.requests if "confirm=t" in url]


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Drive

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(f"https://{self.headers['Host']}{self.path}")
        query = dict(urllib.parse.parse_qsl(url.query))
        self.server.requests.append((url.geturl(), self.headers))
        if (url.netloc, url.path) == ("drive.google.com", "/uc"):
            self.send(
                303,
                Location=f"https://drive.usercontent.google.com/download?id={query['id']}&export=download",
                Set_Cookie="NID=1; Domain=.google.com; Path=/; Secure",
            )
        elif (url.netloc, url.path) != ("drive.usercontent.google.com", "/download"):
            self.send(404, NOT_FOUND_PAGE.encode(), Content_Type="text/html; charset=utf-8")
        elif self.server.page:
            status, page = self.server.page
            self.send(status, page.encode(), Content_Type="text/html; charset=utf-8")
        elif query == {"id": query["id"], "export": "download", "confirm": "t", "uuid": f"uuid-of-{query['id']}"}:
            self.send_file()
        else:
            page = (
                '<!DOCTYPE html><html><body><p class="uc-warning-caption">Google Drive can\'t scan this file for '
                'viruses.</p><form id="download-form" action="https://drive.usercontent.google.com/download" '
                'method="get"><input type="submit" id="uc-download-link" value="Download anyway"/>'
                f'<input type="hidden" name="id" value="{query["id"]}">'
                '<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t">'
                f'<input type="hidden" name="uuid" value="uuid-of-{query["id"]}"></form></body></html>'
            )
            self.send(200, page.encode(), Content_Type="text/html; charset=utf-8")

    def send_file(self) -> None:
        time.sleep(self.server.seconds_before_file)
        content, start, status, content_range = self.server.content, 0, 200, {}
        if (asked := self.headers["Range"]) and self.server.honours_ranges:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            content_range = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        end = self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.send(
            status,
            content[start:end],
            Content_Length=str(len(content) - start),
            Content_Type="application/octet-stream",
            Content_Disposition='attachment; filename="SReT.pth"',
            Last_Modified="Tue, 30 Nov 2021 12:00:00 GMT",
            **content_range,
        )

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        with contextlib.suppress(ConnectionError):  # gdown leaves an answer that it does not want
            self.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drive]:
    """Google Drive; no request of this process goes anywhere else."""
    server = Drive()

    class ToServer(requests.adapters.HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *args: object, **kwargs: object) -> requests.Response:
            url = urllib.parse.urlsplit(request.url)
            assert url.scheme == "https"
            to_server = request.copy()
            to_server.url = url._replace(scheme="http", netloc=f"127.0.0.1:{server.server_port}").geturl()
            to_server.headers["Host"] = url.netloc
            response = super().send(to_server, *args, **{**kwargs, "proxies": {}})
            response.request, response.url = request, request.url
            return response

    monkeypatch.setattr(requests.Session, "get_adapter", lambda session, url: ToServer())
    monkeypatch.setattr(random, "uniform", lambda low, high: low)  # how long gdown waits before it tries again
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def failure(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        download("sret_t", folder)
    return str(error.value)


@pytest.mark.parametrize(("official_name", "drive_id"), WEIGHTS_LAST)
def test_ids_are_those_of_the_authors_table(official_name: str, drive_id: str) -> None:
    assert PUBLISHED[canonical_name(official_name)].drive_id == drive_id


def test_every_model_has_an_id_of_its_own_in_googles_form() -> None:
    ids = [row.drive_id for row in PUBLISHED.values()]
    assert all(re.fullmatch(r"1[\w-]{32}", drive_id) for drive_id in ids)
    assert len(set(ids)) == len(WEIGHTS_LAST) == 14


@pytest.mark.parametrize("name", ["sret_lt_16_14_1", "SReT_LT [16-14-1,1-1-1]", "sret_s_wo_slice_distill_384"])
def test_the_checkpoint_of_the_model_comes_through_the_confirmation_page(drive: Drive, name: str, tmp_path) -> None:
    path = download(name, tmp_path / "a" / "cache")
    assert path == tmp_path / "a" / "cache" / f"{canonical_name(name)}.pth"
    assert path.read_bytes() == CHECKPOINT
    assert sha256(path) == hashlib.sha256(CHECKPOINT).hexdigest()
    drive_id = PUBLISHED[canonical_name(name)].drive_id
    assert [url for url, _ in drive.requests] == [
        f"https://drive.google.com/uc?id={drive_id}",
        f"https://drive.usercontent.google.com/download?id={drive_id}&export=download",
        f"https://drive.usercontent.google.com/download?id={drive_id}&export=download&confirm=t&uuid=uuid-of-{drive_id}",
    ]
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", path.name]


def test_a_checkpoint_in_the_old_format_is_one_too(drive: Drive, tmp_path: Path) -> None:
    drive.content = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    assert download("sret_t", tmp_path).read_bytes() == drive.content


def test_a_checkpoint_that_is_there_is_not_fetched_again(drive: Drive, tmp_path: Path) -> None:
    path = download("sret_t", tmp_path)
    del drive.requests[:]
    assert download("SReT_T", tmp_path) == path
    assert drive.requests == []


def test_a_checkpoint_that_was_put_there_by_hand_needs_no_right_to_write(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "sret_t.pth").write_bytes(CHECKPOINT)
    assert download("sret_t", tmp_path) == tmp_path / "sret_t.pth"
    assert list(tmp_path.iterdir()) == [tmp_path / "sret_t.pth"]
    assert drive.requests == []


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({"XDG_CACHE_HOME": "{}/x"}, "x/sret_jax"), ({"XDG_CACHE_HOME": ""}, ".cache/sret_jax"), ({}, ".cache/sret_jax")],
)
def test_checkpoints_are_kept_in_the_users_cache(variables, folder, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable, value in {"HOME": "{}", **variables}.items():
        monkeypatch.setenv(variable, value.format(tmp_path))
    assert download("sret_t") == tmp_path / folder / "sret_t.pth"


def test_a_cut_connection_is_taken_up_again_at_once(drive: Drive, tmp_path: Path) -> None:
    drive.cuts = [1_200_000]
    assert download("sret_t", tmp_path).read_bytes() == CHECKPOINT
    assert [bool(asked) for asked in drive.ranges] == [False, True]


def test_a_download_that_broke_off_goes_on_where_it_was(drive: Drive, tmp_path: Path) -> None:
    drive.cuts = [1_200_000] * 4
    message = failure(tmp_path)
    (part,) = tmp_path.glob("*.part")
    come = part.stat().st_size
    assert 0 < come <= 1_200_000
    assert CHECKPOINT.startswith(part.read_bytes())
    assert LINK in message
    assert f"The {come:,} bytes that came are kept in {part}" in message
    assert "failed: IncompleteRead" in message
    assert not (tmp_path / "sret_t.pth").exists()

    del drive.requests[:]
    assert download("sret_t", tmp_path).read_bytes() == CHECKPOINT
    assert drive.ranges == [None, f"bytes={come}-"]  # gdown looks at the whole file's headers first
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "sret_t.pth"]


def test_a_download_that_google_drive_does_not_continue_names_the_file_to_delete(drive: Drive, tmp_path: Path) -> None:
    drive.cuts, drive.honours_ranges = [1_200_000], False
    message = failure(tmp_path)
    (part,) = tmp_path.glob("*.part")
    assert "failed: Server did not honor the requested byte range; the partial file is preserved. Check" in message
    assert f"kept in {part}: the next download goes on from there, or from the start if you delete it" in message
    assert LINK in message
    assert failure(tmp_path) == message
    part.unlink()
    assert download("sret_t", tmp_path).read_bytes() == CHECKPOINT


def test_a_download_that_was_killed_when_it_was_complete_is_not_repeated(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "sret_t.pth.new").write_bytes(CHECKPOINT)
    assert download("sret_t", tmp_path).read_bytes() == CHECKPOINT
    assert drive.requests == []


def test_nothing_is_said_to_be_kept_where_nothing_came(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "sret_t.pth.new0a1b2c3d.part").touch()  # gdown makes it before the first byte
    drive.page = (200, QUOTA_PAGE)
    assert "kept" not in failure(tmp_path)


def test_two_downloads_at_once_fetch_it_once(drive: Drive, tmp_path: Path) -> None:
    drive.seconds_before_file = 0.2
    threads = [threading.Thread(target=download, args=("sret_t", tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "sret_t.pth").read_bytes() == CHECKPOINT
    assert len(drive.ranges) == 1


@pytest.mark.parametrize("name", ["sret_t.pth.new", "sret_t.pth.newabcdefgh.part", ".lock"])
def test_a_download_writes_through_no_link(drive: Drive, tmp_path: Path, name: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(b"precious")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    if name == ".lock":
        assert "it is a symbolic link, through which nothing is written: remove it" in failure(folder)
    else:
        assert download("sret_t", folder).read_bytes() == CHECKPOINT
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_no_obstacle(drive: Drive, monkeypatch, caplog, tmp_path: Path, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", flock)
    drive.seconds_before_file = 0.5
    threads = [threading.Thread(target=download, args=("sret_t", tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (tmp_path / "sret_t.pth").read_bytes() == CHECKPOINT
    assert len(drive.ranges) == 1  # the second waited
    assert "cannot be locked: refused" in caplog.text


def test_downloads_of_too_many_users_are_told_apart(drive: Drive, tmp_path: Path) -> None:
    drive.page = (200, QUOTA_PAGE)
    message = failure(tmp_path)
    assert "too many users have viewed or downloaded it recently" in message
    assert LINK in message
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


@pytest.mark.parametrize(
    "page",
    [
        (404, NOT_FOUND_PAGE),
        (403, "<!DOCTYPE html><title>Sorry...</title>"),
        (500, "<!DOCTYPE html><title>Error</title>"),
    ],
)
def test_a_page_without_a_download_says_that_it_may_have_been_removed(drive: Drive, page, tmp_path: Path) -> None:
    drive.page = page
    message = failure(tmp_path)
    assert "answers with a page that does not offer it. It was removed, is not public" in message
    assert LINK in message
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html><title>Sign in</title></html>", b"PK\x05\x06", b""])
def test_what_is_no_checkpoint_is_refused_with_its_beginning(drive: Drive, content: bytes, tmp_path: Path) -> None:
    drive.content = content
    message = failure(tmp_path)
    assert f"what Google Drive sent begins with {content[:40]!r}" in message
    assert LINK in message
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


def test_without_a_network_the_cause_is_named(drive: Drive, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        drive.server_port = silent.getsockname()[1]
        message = failure(tmp_path)
    assert "the transfer from Google Drive failed: Connection refused. Check the network" in message
    assert LINK in message
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


def test_a_server_that_falls_silent_is_not_waited_for(drive: Drive, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_MOST_SECONDS_WITHOUT_DATA", 0.05)
    monkeypatch.setattr(module, "_RETRIES", 1)
    drive.seconds_before_file = 0.5
    message = failure(tmp_path)
    assert "the transfer from Google Drive failed: timed out" in message
    assert LINK in message


@pytest.mark.parametrize(
    ("status", "headers", "cause"),
    [
        (403, {"Content_Type": "text/plain", "Content_Disposition": "attachment"}, "403 Client Error: Forbidden"),
        (200, {}, "'content-type'"),
    ],
)
def test_an_answer_that_gdown_does_not_foresee_is_no_traceback(status, headers, cause, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(_Answer, "send_file", lambda answer: answer.send(status, **headers))
    message = failure(tmp_path)
    assert f"the transfer from Google Drive failed: {cause}" in message
    assert LINK in message
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


def test_without_gdown_the_command_that_installs_it_is_named(drive: Drive, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    message = failure(tmp_path)
    assert "gdown is not installed. Run pip install 'sret_jax[download]'" in message
    assert LINK in message
    assert not (tmp_path / "sret_t.pth").exists()


def test_a_folder_that_cannot_be_written_to_is_named(drive: Drive, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = failure(tmp_path / "file" / "cache")
    assert f"cannot write to {tmp_path}/file/cache: Not a directory" in message
    assert LINK in message
    assert drive.requests == []


def test_a_full_disk_is_named_and_the_download_goes_on_when_there_is_space(drive: Drive, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))  # Python ignores the signal; writing fails.
    try:
        message = failure(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (part,) = tmp_path.glob("*.part")
    come = part.stat().st_size
    assert f"cannot write to {tmp_path}: File too large" in message
    assert LINK in message
    assert f"The {come:,} bytes that came are kept in {part}" in message
    assert not (tmp_path / "sret_t.pth").exists()

    assert download("sret_t", tmp_path).read_bytes() == CHECKPOINT
    assert drive.ranges[-1] == f"bytes={come}-"


def test_gdown_neither_reads_nor_writes_cookies(drive: Drive, monkeypatch, tmp_path: Path) -> None:
    cookies = tmp_path / "cookies.txt"
    cookies.write_text("# Netscape HTTP Cookie File\n.google.com\tTRUE\t/\tTRUE\t4102444800\tSID\tsecret\n")
    before = cookies.read_bytes()
    monkeypatch.setattr(sys.modules[gdown.download.__module__], "DEFAULT_COOKIES_FILE", str(cookies))
    download("sret_t", tmp_path)
    assert "secret" not in "".join(str(headers) for _, headers in drive.requests)
    assert cookies.read_bytes() == before


def test_nothing_is_printed_where_there_is_no_terminal(drive: Drive, monkeypatch, capfd, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich would take anything for a terminal
    drive.cuts = [1_200_000]
    download("sret_t", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_progress_bar_on_stderr(drive: Drive, monkeypatch, capfd, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", Terminal())
    drive.cuts = [1_200_000]
    download("sret_t", tmp_path)
    shown = sys.stderr.getvalue()
    assert "sret_t.pth" in shown
    assert "1.5/1.5 MB" in shown
    assert "Retrying" not in shown
    assert shown.endswith("\x1b[2K")  # the line of the bar is cleared in the end
    assert capfd.readouterr() == ("", "")
