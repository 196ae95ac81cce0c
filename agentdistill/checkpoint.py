"""Checkpoints: directories that are complete or not there.

Invariants
----------
* A checkpoint is filled under a temporary name, flushed to the disk and then renamed; it counts
  only while the files that ``complete.json`` names are there, with the sizes it gives.
* At no moment is there less than before: older ones go after the new one is in place, and an old
  one of the same step steps aside and comes back if the process dies before its replacement.
* What :func:`save_state` accepts, :func:`load_state` reads with ``weights_only=True``: a checkpoint
  from somebody else cannot run code. What it could not read back is refused when it is saved.
* Only the process that trains opens a directory without ``readonly`` (the store's lock says who).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentdistill.crash import crash_point
from agentdistill.errors import ConfigError, StoreError
from agentdistill.files import failed, refusing, sync
from agentdistill.records import Json

_MARK = "complete.json"
_DISK_ERRORS = ("inline_container.cc", "(os error ")
"""How torch and safetensors word a refusal of the disk; neither raises OSError for it."""


class Checkpoints:
    """The checkpoints of one run, in directories named by step; see the module docstring."""

    def __init__(self, directory: str | Path, keep: int = 2, *, readonly: bool = False) -> None:
        """Open ``directory``; unless ``readonly``, make it and clean up after a crash.

        Args:
            directory: where they are.
            keep: how many of the newest to keep, at least 1.
            readonly: only look; for everybody but the process that trains.

        Raises:
            ConfigError: keep < 1.
            StoreError: the disk refuses.
        """
        if keep < 1:
            raise ConfigError("must be at least 1", key="keep", value=keep)
        self.directory = Path(directory)
        self.keep = keep
        self._readonly = readonly
        if not readonly:
            with refusing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._recover()

    def save(self, step: int, *, write: Callable[[Path], object]) -> Path:
        """Make the checkpoint of ``step``, replacing an earlier one of the same step.

        Args:
            step: at least 0; the highest one is the latest.
            write: fills the empty directory that it is given.

        Returns:
            The directory of the finished checkpoint.

        Raises:
            StoreError: the disk refuses; the checkpoints that were there still are.
        """
        target = self._target(step)
        temporary = self.directory / f".{step:08d}.tmp"
        crash_point("checkpoint:before-write")
        try:
            with refusing(target):
                temporary.mkdir()
                write(temporary)
                _finish(temporary, step)
                self._place(temporary, target)
        except StoreError:
            raise
        except Exception as error:
            if any(words in str(error) for words in _DISK_ERRORS):
                raise failed(target, error) from error
            raise
        finally:
            with suppress(OSError):  # the disk that refused the checkpoint may refuse this as well
                self._recover()
        with refusing(self.directory):
            for _, path in self.complete()[: -self.keep]:
                self._remove(path)
        return target

    def complete(self) -> list[tuple[int, Path]]:
        """All complete checkpoints as (step, directory), oldest first."""
        if not self.directory.is_dir():
            return []
        with refusing(self.directory):
            paths = [path for path in self.directory.iterdir() if path.name.isdecimal()]
            return sorted((int(path.name), path) for path in paths if _is_complete(path))

    def latest(self) -> tuple[int, Path] | None:
        """The newest complete checkpoint as (step, directory)."""
        found = self.complete()
        return found[-1] if found else None

    def rollback(self, step: int) -> None:
        """Remove the checkpoints after ``step``, to go on from there (-1: all of them)."""
        self._target(max(step, 0))
        with refusing(self.directory):
            for later, path in reversed(self.complete()):
                if later > step:
                    self._remove(path)

    def _target(self, step: int) -> Path:
        if self._readonly:
            raise StoreError(f"{self.directory} is open for reading only: leave out readonly")
        if step < 0:
            raise ConfigError("must be at least 0", key="step", value=step)
        return self.directory / f"{step:08d}"

    def _place(self, temporary: Path, target: Path) -> None:
        """Give ``temporary`` its name; a directory cannot be replaced in one move."""
        aside = self.directory / f".{target.name}.old"
        crash_point("checkpoint:before-rename")
        if target.exists():
            target.rename(aside)
            crash_point("checkpoint:replacing")
        temporary.rename(target)
        sync(self.directory)
        crash_point("checkpoint:after-rename")

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint; it loses its name first, so that no half of it can count."""
        doomed = self.directory / f".{path.name}.tmp"
        path.rename(doomed)
        crash_point("checkpoint:pruning")
        shutil.rmtree(doomed)

    def _recover(self) -> None:
        for aside in self.directory.glob(".*.old"):
            target = self.directory / aside.name[1:-4]
            if target.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(target)
        for leftover in self.directory.glob(".*.tmp"):
            shutil.rmtree(leftover)


def save_state(
    path: str | Path, optimizer: Any = None, scheduler: Any = None, state: Json = None
) -> None:
    """Write the state of torch objects and ``state`` to the file ``path``.

    Args:
        path: a file, usually inside the directory that ``Checkpoints.save`` hands out.
        optimizer: has ``state_dict()``, or None.
        scheduler: likewise.
        state: tensors, numbers, strings, None, and lists, tuples and dicts of those.

    Raises:
        TypeError: something that ``weights_only=True`` would not load; the message says where.
        StoreError: the disk refuses.
    """
    import torch

    whole = {
        "optimizer": optimizer.state_dict() if optimizer is not None else None,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "state": state,
    }
    _check(whole, "checkpoint")
    try:
        with refusing(Path(path)):
            torch.save(whole, path)
    except RuntimeError as error:  # what torch makes of a disk that refuses
        raise failed(Path(path), error) from error


def load_state(
    path: str | Path, optimizer: Any = None, scheduler: Any = None, *, device: str = "cpu"
) -> Any:
    """Read what :func:`save_state` wrote; return its ``state``.

    Args:
        path: the file.
        optimizer: gets the saved state, if there is one for it.
        scheduler: likewise.
        device: where tensors go.

    Raises:
        StoreError: the file is missing, damaged, or holds more than plain data, or lacks the state
            of an object that was given.
    """
    import pickle

    import torch

    try:
        with refusing(Path(path)):
            whole = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise StoreError(f"{path} is not a complete checkpoint: use an older one") from error
    if not isinstance(whole, dict) or set(whole) != {"optimizer", "scheduler", "state"}:
        raise StoreError(f"{path} was not written by save_state: check the path")
    for name, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        if target is None:
            continue
        if whole[name] is None:
            raise StoreError(f"{path} was saved without {name}: load it without one")
        target.load_state_dict(whole[name])
    return whole["state"]


def _check(value: Any, where: str) -> None:
    """Refuse what ``weights_only=True`` would not load, while it can still be put right."""
    import torch

    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if isinstance(value, Mapping) and type(value).__name__ in ("dict", "OrderedDict"):
        for key, part in value.items():
            _check(key, f"a key of {where}")
            _check(part, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, part in enumerate(value):
            _check(part, f"{where}[{index}]")
    else:
        kind = type(value).__name__
        raise TypeError(f"{where} is {kind}: save tensors, numbers, strings, lists and dicts")


_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def _finish(directory: Path, step: int) -> None:
    """Flush everything to the disk, then say that it is complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    crash_point("checkpoint:before-complete")
    mark = directory / _MARK
    mark.write_text(json.dumps({"step": step, "files": sizes}, indent=1))
    folders = [path for path in directory.rglob("*") if path.is_dir()]
    for path in [*files, mark, *folders, directory]:
        sync(path)


def _is_complete(directory: Path) -> bool:
    try:
        mark = json.loads((directory / _MARK).read_text())
        return int(directory.name) == mark["step"] and all(
            (directory / name).stat().st_size == size for name, size in mark["files"].items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
