"""The demonstrations of a collect stage, on disk beside its episodes.

Invariant: they are built once, and again when the stage has been played anew; whoever needs them at
the same time opens the same file.
"""

from __future__ import annotations

import time
from pathlib import Path

from agentdistill.demos.store import FILE, Demos
from agentdistill.errors import ConfigError, StoreError
from agentdistill.store import Store

WAIT = 60.0
"""Seconds for another process that builds the same demonstrations."""


def of_stage(folder: Path) -> Demos:
    """The demonstrations of the finished collect stage in ``folder``.

    Raises:
        ConfigError: it is not finished.
        StoreError: the disk refuses.
    """
    done, demos = folder / "done.json", folder / "demos"
    if not done.exists():
        raise ConfigError(
            "has no episodes yet; run that stage first", key="demos", value=folder.name
        )
    deadline = time.monotonic() + WAIT
    while not _current(demos / FILE, done):
        try:
            with Store(folder, readonly=True) as store:
                return Demos.build(store.trajectories(folder.name, committed=True), demos)
        except StoreError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # another process of the same run builds them
    return Demos.open(demos)


def named(where: str, stage: Path | None, key: str) -> Demos:
    """The demonstrations called ``where``.

    Args:
        where: a collect stage, or a folder of demonstrations.
        stage: folder of that stage; None where there is none of this name.
        key: what names them in the configuration.

    Raises:
        ConfigError: there are none.
        StoreError: the disk refuses.
    """
    if stage is not None:
        return of_stage(stage)
    if not (Path(where) / FILE).exists():
        remedy = "neither a collect stage nor a folder of demonstrations"
        raise ConfigError(remedy, key=key, value=where)
    return Demos.open(where)


def _current(built: Path, episodes: Path) -> bool:
    return built.exists() and built.stat().st_mtime_ns >= episodes.stat().st_mtime_ns
