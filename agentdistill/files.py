"""Files that survive a crash: written aside and renamed, flushed to the disk, locked.

Invariants: a path that :func:`replacing` writes holds its old content or the whole new one, never
a part; what the operating system refuses becomes a StoreError of one line that names the path and
the remedy.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from agentdistill.crash import crash_point
from agentdistill.errors import StoreError

_ELSEWHERE = "choose another run directory"
_REMEDIES = {
    errno.ENOSPC: f"free space on that disk or {_ELSEWHERE}",
    errno.EDQUOT: f"free space in your quota or {_ELSEWHERE}",
    errno.EFBIG: f"raise the limit on file size (ulimit -f) or {_ELSEWHERE}",
    errno.EACCES: f"make it writable for this user or {_ELSEWHERE}",
    errno.EPERM: f"make it writable for this user or {_ELSEWHERE}",
    errno.EROFS: f"the disk is mounted read-only: {_ELSEWHERE}",
    errno.ENOENT: "check the path",
}


def failed(path: Path, error: BaseException) -> StoreError:
    """``error`` as one line that names ``path`` and the remedy."""
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    remedy = _REMEDIES.get(number or 0, f"check the disk or {_ELSEWHERE}")
    return StoreError(f"cannot use {path}: {' '.join(reason.split())}; {remedy}")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into a StoreError about ``path``."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise failed(path, error) from error


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file to write that takes the name ``path`` when the block ends, complete or not at all.

    Args:
        path: where it shall be; what is there stays as it is until the last moment.
        what: names the crash points, ``shard`` or ``export``.

    Raises:
        StoreError: the disk is full, read-only or not ours; the temporary file is gone again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    crash_point(f"{what}:before-write")
    try:
        with refusing(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            crash_point(f"{what}:before-rename")
            temporary.replace(path)
            sync(path.parent)
            crash_point(f"{what}:after-rename")
    finally:
        with suppress(OSError):  # the disk that refused the file may refuse this as well
            temporary.unlink(missing_ok=True)


def locked(path: Path) -> BinaryIO:
    """The file ``path``, locked until it is closed, with our process id in it.

    Raises:
        StoreError: another process, which the message names, has locked it.
    """
    file = path.open("ab+", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "unknown"
        file.close()
        raise StoreError(
            f"{path.parent} is in use by process {holder}: wait until it ends, end it, "
            "or choose another run directory"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}".encode())
    return file


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, complete or not at all; see :func:`replacing`."""
    with replacing(path, "file") as file:
        file.write(text.encode())
