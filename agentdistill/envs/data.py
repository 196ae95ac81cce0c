"""Official data of the environments: what of it is here, and how the rest gets here.

Invariants
----------
* What is published where stands in sources.py and nowhere else.
* Nothing is fetched unless :func:`get` is called: no environment calls it.
* What stands under its final name is complete: files are downloaded, and archives unpacked, under
  another name and renamed at the end.
* Whatever is there is left alone: :func:`get` never replaces a file or a folder.
* Hashes: where one is known beforehand, a file that differs is not accepted. Where none is, the
  hash of the first download is written beside the file (``NAME.sha256``), and later downloads are
  compared with it. An unpacked folder holds a ``SHA256SUMS`` of its files, in the format of
  ``sha256sum -c``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from agentdistill.envs import download
from agentdistill.envs.sources import Source
from agentdistill.errors import EnvError
from agentdistill.files import sync

SUMS = "SHA256SUMS"
"""Name of the list of hashes in a folder that was unpacked here."""

Watch = Callable[[str, int, int | None], None]
"""Called with what is being done, how many bytes of it are done, and their total if known."""


@dataclass(frozen=True, slots=True)
class State:
    """What of a source is on this machine.

    Attributes:
        name: the source's.
        path: where it is or belongs.
        state: ``absent``; ``partial`` (a download that broke off); ``present`` (not looked into);
            ``verified`` (every hash agrees); ``unverified`` (nothing to compare it with);
            ``damaged``.
        detail: one line for a person.
    """

    name: str
    path: Path
    state: str
    detail: str

    @property
    def ok(self) -> bool:
        """Whether it is there and nothing speaks against it."""
        return self.state in ("present", "verified", "unverified")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "detail": self.detail,
        }


def _nothing(what: str, done: int, total: int | None) -> None:
    """Show nothing."""


# -- what is here ----------------------------------------------------------------------------------


def look(source: Source, folder: Path) -> State:
    """Whether ``source`` is in ``folder``, by names and lengths only."""
    path, part = folder / source.name, _part(source, folder)
    if not path.exists():
        if part.exists():
            return State(source.name, path, "partial", f"{part.stat().st_size:,} bytes arrived")
        return State(source.name, path, "absent", f"not in {folder}")
    if not source.member and source.size not in (None, path.stat().st_size):
        detail = f"{path.stat().st_size:,} bytes instead of {source.size:,}"
        return State(source.name, path, "damaged", detail)
    return State(source.name, path, "present", "there")


def check(source: Source, folder: Path, watch: Watch = _nothing) -> State:
    """Compare all that is there of ``source`` with the hashes that are known; changes nothing."""
    found = look(source, folder)
    if found.state != "present":
        return found
    if found.path.is_dir():
        return _check_folder(found, watch)
    expected = source.sha256 or _recorded(folder / f"{source.name}.sha256")
    if expected is None:
        return State(*_of(found), "unverified", "there, but no hash of it is known")
    seen = download.sha256(found.path, lambda done, total: watch("checking", done, total))
    if seen != expected:
        return State(*_of(found), "damaged", f"its SHA-256 is {seen}, not {expected}")
    known = "the known hash" if source.sha256 else "the hash of its first download"
    return State(*_of(found), "verified", f"agrees with {known}")


def _check_folder(found: State, watch: Watch) -> State:
    """Compare an unpacked folder with its list of hashes."""
    if not (found.path / SUMS).exists():
        detail = f"there, but not put there by this command: no {SUMS} to compare it with"
        return State(*_of(found), "unverified", detail)
    sums = _read_sums(found.path / SUMS)
    sizes = {name: _size(found.path / name) for name in sums}
    wrong, done = [], 0
    for name, expected in sums.items():
        if sizes[name] is None or download.sha256(found.path / name) != expected:
            wrong.append(name)
        done += sizes[name] or 0
        watch("checking", done, sum(size or 0 for size in sizes.values()))
    if wrong or not sums:
        first = f", such as {wrong[0]}" if wrong else ""
        detail = f"{len(wrong):,} of {len(sums):,} files are missing or changed{first}"
        return State(*_of(found), "damaged", detail)
    return State(*_of(found), "verified", f"{len(sums):,} files agree with {SUMS}")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _of(state: State) -> tuple[str, Path]:
    return state.name, state.path


def _part(source: Source, folder: Path) -> Path:
    return folder / f".{source.file}.part"


def _recorded(path: Path) -> str | None:
    """The hash in a file written by :func:`_record`."""
    return next(iter(_read_sums(path).values()), None) if path.exists() else None


def _read_sums(path: Path) -> dict[str, str]:
    """File name → hash; lines that are none are ignored."""
    lines = path.read_text(errors="replace").splitlines()
    pairs = (line.split("  ", 1) for line in lines if not line.startswith("#"))
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


# -- bringing it here ------------------------------------------------------------------------------


def get(
    source: Source,
    folder: Path,
    watch: Watch = _nothing,
    pauses: Sequence[float] = download.PAUSES,
) -> State:
    """Download ``source`` into ``folder``, or go on where an earlier attempt ended.

    A file that a person downloaded is taken as well: an archive may lie in ``folder`` under its own
    name.

    Raises:
        EnvError: it cannot be had, or is not the file it should be; the message says what to do.
        StoreError: the disk is full or not writable, or another process is at it.
    """
    found = look(source, folder)
    if found.state == "damaged":
        raise EnvError(f"{found.path} has {found.detail}; move it away and run this again")
    if found.ok:
        return found
    path = _part(source, folder)
    with download.part_file(path) as part:
        try:
            if not look(source, folder).ok:  # another process may just have finished
                _bring(source, folder, part, watch, pauses)
        finally:
            if path.exists() and (part.tell() == 0 or look(source, folder).ok):
                path.unlink()
    return look(source, folder)


def _bring(
    source: Source, folder: Path, part: BinaryIO, watch: Watch, pauses: Sequence[float]
) -> None:
    """From a file that a person put there, or from the web."""
    given = folder / source.file
    if source.member and given.is_file():
        _unpack(source, folder, given, _judged(source, folder, given, str(given), watch), watch)
        return
    digest = _download(source, folder, part, watch, pauses)
    if source.member:
        try:
            _unpack(source, folder, _part(source, folder), digest, watch)
        except EnvError:
            _empty(part)  # going on with it would never help
            raise
        return
    with download.disk(folder):
        sync(_part(source, folder))
        _record(source, folder, digest)
        _part(source, folder).replace(folder / source.name)


def _download(
    source: Source, folder: Path, part: BinaryIO, watch: Watch, pauses: Sequence[float]
) -> str:
    """Complete the part file and judge it; a resumed one that is wrong is fetched once more."""
    path = _part(source, folder)
    while True:
        resumed = part.tell() > 0
        try:
            download.fetch(
                source.url, part, source.size, lambda d, t: watch("downloading", d, t), pauses
            )
        except EnvError as error:
            raise EnvError(
                f"cannot fetch {source.url}: {error}; {_by_hand(source, folder)}"
            ) from error
        try:
            return _judged(source, folder, path, f"the file from {source.url}", watch)
        except EnvError:
            _empty(part)
            if not resumed:
                raise


def _empty(part: BinaryIO) -> None:
    """Begin again; :func:`get` removes an empty part file."""
    part.truncate(0)
    part.seek(0)


def _judged(source: Source, folder: Path, path: Path, what: str, watch: Watch) -> str:
    """The hash of a download; EnvError if another one is known or was recorded."""
    record = folder / f"{source.name}.sha256"
    expected = source.sha256 or _recorded(record)
    seen = download.sha256(path, lambda done, total: watch("checking", done, total))
    if expected in (None, seen):
        return seen
    known = "the known one" if source.sha256 else f"the one in {record}, of the first download"
    raise EnvError(
        f"{what} has SHA-256 {seen}, which is not {known} ({expected}): damaged on its way, or "
        f"replaced by its owner; {_by_hand(source, folder)}"
    )


def _by_hand(source: Source, folder: Path) -> str:
    """What a person can do instead."""
    then = "run this again" if source.member else "run this with --check"
    url, path = source.page or source.url, folder / source.file
    return f"by hand: download {url}, save it as {path}, and {then}"


def _unpack(source: Source, folder: Path, archive: Path, digest: str, watch: Watch) -> None:
    """Unpack aside, add the list of hashes, rename."""
    aside = folder / f".{source.name}.unpacking"
    with download.disk(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    try:
        sums = download.unpack(
            archive, source.member, aside, lambda done, total: watch("unpacking", done, total)
        )
        head = f"# from {source.url}\n# SHA-256 of the archive: {digest}\n"
        with download.disk(folder):
            lines = [f"{value}  {name}\n" for name, value in sums.items()]
            (aside / SUMS).write_text(head + "".join(lines))
            _record(source, folder, digest)
            aside.rename(folder / source.name)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(aside)
        raise


def _record(source: Source, folder: Path, digest: str) -> None:
    """Note the hash of a first download that has no known one."""
    if source.sha256 is None:
        (folder / f"{source.name}.sha256").write_text(f"{digest}  {source.file}\n")
