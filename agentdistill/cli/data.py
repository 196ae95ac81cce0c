"""The verb that fetches official data: data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentdistill.cli.base import Json, app, document
from agentdistill.errors import EnvError

if TYPE_CHECKING:
    from agentdistill.envs.data import State, Watch
    from agentdistill.envs.sources import Dataset, Source

_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


@app.command()
def data(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="What to fetch; none lists what there is."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Put it here, not in its usual place.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fetch nothing; compare what is there with its hashes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch an environment's official data from its owner, or check it; repeat to go on."""
    from agentdistill.envs.sources import dataset

    if name is None:
        _list(as_json)
        return
    found = dataset(name)
    folder = (_root() if name == "appworld" and not to else to or found.folder).expanduser()
    folder = folder.absolute()
    if name == "appworld":
        states = [_appworld(folder, check, as_json)]
    else:
        states = [_one(source, folder, check, as_json) for source in found.sources]
    if as_json:
        document(_facts(name, found, folder, states))
    else:
        _tell(found, folder, to is not None, states)
    if check and not all(state.ok for state in states):
        raise typer.Exit(1)


def _one(source: Source, folder: Path, check: bool, as_json: bool) -> State:
    """Fetch or check one source, with a bar on a terminal and lines elsewhere."""
    from agentdistill.envs import data as here

    stream = sys.stderr if as_json else sys.stdout
    before = here.look(source, folder)
    if before.ok and not check:
        return here.State(before.name, before.path, before.state, "already there")
    if not check:
        size = f"{source.size / 1e6:,.1f} MB, " if source.size else ""
        print(f"{source.file}: {size}from {source.owner}, {source.licence}", file=stream)
    with _bar(source.name, as_json) as watch:
        if check:
            return here.check(source, folder, watch)
        after = here.get(source, folder, watch)
    detail = "its hash agrees" if source.sha256 else "its hash was noted: its owner publishes none"
    return here.State(after.name, after.path, after.state, f"fetched; {detail}")


@contextmanager
def _bar(name: str, as_json: bool) -> Iterator[Watch]:
    """A live bar on a terminal, nothing elsewhere."""
    stream = sys.stderr if as_json else sys.stdout
    if not stream.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as bars:
        task = bars.add_task(name, total=None)
        yield lambda what, done, total: bars.update(
            task, description=f"{what} {name}", completed=done, total=total
        )


def _tell(found: Dataset, folder: Path, chosen: bool, states: list[State]) -> None:
    """What is where now, and how to use it."""
    if not states:
        print(f"{found.title}; {found.note}")
        return
    for state in states:
        print(f"{state.name}: {state.state}, {state.detail}: {state.path}")
    if chosen and found.variable and all(state.ok for state in states):
        print(f"use it with {found.variable}={folder}")


def _facts(name: str, found: Dataset, folder: Path, states: list[State]) -> dict[str, Any]:
    """The same as JSON, with where everything comes from."""
    sources = [
        {
            "url": source.url,
            "owner": source.owner,
            "licence": source.licence,
            "bytes": source.size,
            "sha256": source.sha256,
        }
        for source in found.sources
    ] or [{} for _ in states]
    return {
        "name": name,
        "title": found.title,
        "note": found.note,
        "folder": str(folder) if states else None,
        "variable": found.variable or None,
        "ok": all(state.ok for state in states),
        "sources": [
            {**state.to_json(), **source} for state, source in zip(states, sources, strict=True)
        ],
    }


def _list(as_json: bool) -> None:
    """Everything that can be fetched, and what of it is here."""
    from agentdistill import display
    from agentdistill.envs.data import look
    from agentdistill.envs.sources import DATASETS

    found = []
    for name, what in DATASETS.items():
        folder = _root() if name == "appworld" else what.folder
        states = [look(source, folder) for source in what.sources]
        states += [_appworld_state(folder)] if name == "appworld" else []
        found.append(_facts(name, what, folder, states))
    if as_json:
        document(found)
        return
    lines = [
        [
            facts["name"],
            facts["title"],
            _megabytes(DATASETS[facts["name"]]),
            ", ".join(dict.fromkeys(source["state"] for source in facts["sources"]))
            or "needs none",
            facts["folder"] or display.NOTHING,
        ]
        for facts in found
    ]
    display.show(("name", "what", "MB", "here", "folder"), lines, left=5)


def _megabytes(found: Dataset) -> str:
    return f"{found.size / 1e6:,.1f}" if found.size else "–"  # noqa: RUF001  (a dash)


# -- AppWorld --------------------------------------------------------------------------------------


def _root() -> Path:
    """AppWorld's root folder."""
    return _setup("root")()


def _setup(name: str) -> Callable[[], Path]:
    from agentdistill.envs.appworld import setup

    found: Callable[[], Path] = getattr(setup, name)
    return found


def _appworld_state(root: Path) -> State:
    """Whether AppWorld's tasks are there; nobody publishes hashes, and its program keeps none."""
    from agentdistill.envs.data import State

    tasks = root / "data" / "tasks"
    if not tasks.is_dir() or not any(tasks.iterdir()):
        return State("data", root / "data", "absent", f"no tasks in {tasks}")
    detail = "there, but no hash of it is known; AppWorld's own check: `appworld verify tasks`"
    return State("data", root / "data", "unverified", detail)


def _appworld(root: Path, check: bool, as_json: bool) -> State:
    """Let AppWorld's own program fetch its data.

    That program empties the folder before it begins and ends with success when it failed: it is
    called only where there are no tasks, and judged by what is there afterwards.
    """
    found = _appworld_state(root)
    if check or found.ok:
        return found
    program = _setup("home")() / "venv" / "bin" / "appworld"
    if not program.exists():
        raise EnvError(
            f"AppWorld is not set up ({program}): run `agentdistill setup appworld` first"
        )
    environ = {key: value for key, value in os.environ.items() if key not in _OURS}
    command = [str(program), "download", "data", "--root", str(root)]
    stream = sys.stderr if as_json else sys.stdout
    print(f"AppWorld's own program: {' '.join(command)}", file=stream, flush=True)
    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=2 if as_json else None, check=False
    )
    after = _appworld_state(root)
    if not after.ok:
        raise EnvError(
            f"AppWorld's own program ended with {done.returncode} and brought no tasks; see what "
            "it printed (it needs https://s3.us-west-2.amazonaws.com), and run this again"
        )
    return after
