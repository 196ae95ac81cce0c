"""Files from the web: resumed where they broke off, and archives unpacked whole or not at all.

Invariants
----------
* A download lives in a part file until it is complete; what has arrived is kept through drops,
  ``^C`` and crashes, and the next call asks for the rest (HTTP Range). A server that cannot do
  that, or answers with another range, makes it start over.
* Nothing is believed complete that is shorter than the server or the caller said.
* An archive's entries can only be written below the target folder: absolute names, ``..``,
  backslashes and links are refused before anything is written.
* A web page in place of the file is an error, except for the one that Google Drive puts before
  large files, whose form is followed once.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlencode, urljoin, urlsplit

from agentdistill.errors import EnvError, StoreError

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are done and, where it is known, their total."""

PAUSES = (1.0, 3.0, 10.0)
"""Seconds between attempts that brought nothing new; then it is an error."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

NOT_THE_FILE = "the server sent a web page in place of the file"

_CHUNK = 1 << 18
_PAGE = 1 << 20
_BUSY = (408, 425, 429)


class _Dropped(Exception):
    """The connection broke or the server is busy: worth another attempt."""


class _Offline(Exception):
    """No connection came about."""


def quiet(done: int, total: int | None) -> None:
    """Show nothing."""


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses about ``path`` into a StoreError of one line."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; free space there or choose another "
            "folder with --to"
        ) from error


@contextmanager
def part_file(path: Path) -> Iterator[BinaryIO]:
    """The part file ``path``, made where it is missing, for this process alone, at its end.

    Raises:
        StoreError: it cannot be written, or another process is at it.
    """
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{path}: another process is fetching this file; let it end"
            ) from error
        yield file


def room(folder: Path, needed: int) -> None:
    """Refuse to begin what will not fit: StoreError unless ``folder`` has ``needed`` bytes free."""
    with disk(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed: free space "
            "there or choose another folder with --to"
        )


def fetch(
    url: str,
    part: BinaryIO,
    size: int | None = None,
    progress: Progress = quiet,
    pauses: Sequence[float] = PAUSES,
) -> None:
    """Append to ``part`` what it lacks of the file at ``url``.

    Args:
        url: where it is.
        part: open for appending, at its end (:func:`part_file`).
        size: its length where that is known beforehand.
        progress: is told how far it is.
        pauses: see :data:`PAUSES`.

    Raises:
        EnvError: no network, an answer that is not the file, or a connection that keeps breaking;
            the message has no remedy, which only the caller knows.
        StoreError: the disk is full or not writable; what arrived is kept.
    """
    best, failures, met, asked = part.tell(), 0, False, url
    while part.tell() != size:
        try:
            form = _receive(url, part, size, progress)
            if form is None:
                return
            if url != asked:
                raise EnvError(NOT_THE_FILE)
            url = form
            continue
        except _Offline as error:
            if not met:
                raise EnvError(f"cannot reach {urlsplit(url).hostname} ({error})") from error
            reason = str(error)
        except _Dropped as error:
            reason, met = str(error), True
        failures = 0 if part.tell() > best else failures + 1
        best = max(best, part.tell())
        if failures > len(pauses):
            raise EnvError(f"{reason}; {failures} attempts ended at byte {best:,}")
        time.sleep(pauses[failures - 1] if failures else 0)


def _receive(url: str, part: BinaryIO, size: int | None, progress: Progress) -> str | None:
    """One request; returns the address behind the form where the answer was Drive's page."""
    start = part.tell()
    with _open(url, start) as answer:
        if answer.headers.get_content_type() == "text/html" and answer.status != 416:
            return _confirmed(answer.read(_PAGE).decode(errors="replace"), answer.url)
        if answer.status == 416:
            _beyond(answer, part)
            return None
        total = _total(answer, start)
        if total is None:
            _cut(part)
            if answer.status == 206:
                raise _Dropped("the server sent another part than the one asked for")
            start, total = 0, _length(answer)
        if size is not None and total is not None and total != size:
            raise EnvError(f"the server has {total:,} bytes, not {size:,}: its owner replaced it")
        room(Path(part.name).parent, (total or size or start) - start)
        _copy(answer, part, start, total or size, progress)
    return None


def _open(url: str, start: int) -> Any:
    """The answer to a request for everything from byte ``start`` on."""
    headers = {"User-Agent": "agentdistill", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return error
        error.close()
        if error.code in _BUSY or error.code >= 500:
            raise _Dropped(f"the server answers {error.code} {error.reason}") from error
        raise EnvError(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Offline(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(f"the connection broke: {error!r}") from error


def _beyond(answer: Any, part: BinaryIO) -> None:
    """Answer 416: we have everything, or more than there is, and then start over."""
    total = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
    if total is None or int(total[1]) != part.tell():
        _cut(part)
        raise _Dropped("the part that was kept is longer than the file")


def _total(answer: Any, start: int) -> int | None:
    """Length of the whole file if the answer begins at byte ``start``, else None."""
    if start == 0 or answer.status != 206:
        return None
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
    return int(found[3]) if found and int(found[1]) == start else None


def _length(answer: Any) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdigit() and answer.status == 200 else None


def _cut(part: BinaryIO) -> None:
    part.truncate(0)
    part.seek(0)


def _copy(answer: Any, part: BinaryIO, start: int, total: int | None, progress: Progress) -> None:
    """Write what comes; _Dropped if that is less than ``total``."""
    done = start
    progress(done, total)
    while True:
        try:
            chunk = answer.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Dropped(f"the connection broke: {error!r}") from error
        if not chunk:
            break
        with disk(Path(part.name)):
            part.write(chunk)
            part.flush()
        done += len(chunk)
        progress(done, total)
    if total is not None and done < total:
        raise _Dropped(f"the connection ended after {done:,} of {total:,} bytes")


# -- Google Drive's page ---------------------------------------------------------------------------


class _Form(HTMLParser):
    """Address and hidden fields of the form ``download-form``."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action, self.fields = "", dict[str, str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the form and what is in it."""
        found = {name: value or "" for name, value in attrs}
        if tag == "form" and found.get("id") == "download-form":
            self.action = found.get("action", "")
        if tag == "input" and self.action and found.get("type") == "hidden":
            self.fields[found.get("name", "")] = found.get("value", "")


def _confirmed(page: str, seen: str) -> str:
    """The address behind the button of Drive's page; EnvError for any other page."""
    form = _Form(page)
    target = f"{urljoin(seen, form.action)}?{urlencode(form.fields)}"
    if not form.action or urlsplit(target)[:2] != urlsplit(seen)[:2]:
        raise EnvError(NOT_THE_FILE)
    return target


# -- archives --------------------------------------------------------------------------------------


def sha256(path: Path, progress: Progress = quiet) -> str:
    """Hash of a file's content, in hexadecimal digits."""
    found, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK << 2):
            found.update(chunk)
            done += len(chunk)
            progress(done, total)
    return found.hexdigest()


def unpack(
    archive: Path, member: str, target: Path, progress: Progress = quiet
) -> Mapping[str, str]:
    """Write the files below the folder ``member`` of a zip to the new folder ``target``.

    Returns:
        The SHA-256 of each, by its name relative to ``target``.

    Raises:
        EnvError: not a zip, damaged, without ``member``, or with entries that would be written
            elsewhere.
        StoreError: the disk is full or not writable.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = _entries(file, member)
            total = sum(entry.file_size for entry in entries.values())
            room(target.parent, total)
            sums, done = {}, 0
            for name, entry in sorted(entries.items()):
                with file.open(entry) as source:
                    sums[name] = _write(source, target / name)
                done += entry.file_size
                progress(done, total)
            return sums
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise EnvError(f"{archive} is no sound zip archive: {error}") from error


def _entries(file: zipfile.ZipFile, member: str) -> dict[str, zipfile.ZipInfo]:
    """The files below ``member`` by relative name, after a look at every name in the archive."""
    found = {}
    for entry in file.infolist():
        path = PurePosixPath(entry.filename)
        odd = stat.S_ISLNK(entry.external_attr >> 16) or entry.flag_bits & 1  # link, encrypted
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or odd:
            raise EnvError(f"{file.filename} has an unsafe entry, nothing unpacked: {path}")
        if path.parts[:1] == (member,) and not entry.is_dir():
            found[str(path.relative_to(member))] = entry
    if not found:
        raise EnvError(f"{file.filename} has no files below {member}/")
    return found


def _write(source: Any, path: Path) -> str:
    found = hashlib.sha256()
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while chunk := source.read(_CHUNK):
                found.update(chunk)
                file.write(chunk)
    return found.hexdigest()
