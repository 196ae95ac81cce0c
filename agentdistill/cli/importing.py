"""The verbs that make use of episodes played elsewhere: import, and demos of what was imported."""

from __future__ import annotations

import sys
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentdistill.cli.base import EnvOptions, Json, app, document

if TYPE_CHECKING:
    from agentdistill.importing import Imported

_SHOWN = 20


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="OpenAI-style chats, JSON Lines.")],
    to: Annotated[Path, typer.Option(metavar="RUN", help="Run folder that they are added to.")],
    env: Annotated[
        str | None, typer.Option(help="Environment that was played; none for an agent without.")
    ] = None,
    option: EnvOptions = None,
    split: Annotated[str, typer.Option(help="Of the tasks, where a line does not say.")] = "train",
    grammar: Annotated[
        str, typer.Option(help="How answers without tool calls act: plain, action, answer, code.")
    ] = "plain",
    assume_success: Annotated[
        bool,
        typer.Option("--assume-success", help="Take chats without an outcome for successful."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn chat logs into trajectories; lines that cannot be read are refused and counted."""
    from agentdistill.config import load
    from agentdistill.envs.make import make
    from agentdistill.importing import import_log
    from agentdistill.store import Store

    options = load({}, [f"env.options.{text}" for text in option or ()]).env.options
    with closing(make(env, options)) if env else nullcontext() as made, Store(to) as store:
        done = import_log(
            file, store, env=made, split=split, grammar=grammar, assume_success=assume_success
        )
    if as_json:
        document({**_counts(done), "refusals": [asdict(each) for each in done.log.refused]})
    else:
        _tell(file, to, done)
    if done.log.lines == len(done.log.refused):
        raise typer.Exit(1)


def _counts(done: Imported) -> dict[str, Any]:
    log = done.log
    return {
        "lines": log.lines,
        "trajectories": len(log.trajectories),
        "added": done.added,
        "known": done.known,
        "successful": sum(each.success for each in log.trajectories),
        "unknown_outcome": sum(not each.reward_valid for each in log.trajectories),
        "joined": log.joined,
        "repeated": log.repeated,
        "refused": len(log.refused),
    }


def _tell(file: Path, to: Path, done: Imported) -> None:
    counts, refused = _counts(done), done.log.refused
    for each in refused[:_SHOWN]:
        print(f"{file}:{each.line}: {each.reason}", file=sys.stderr)
    if len(refused) > _SHOWN:
        print(f"… and {len(refused) - _SHOWN} more lines refused", file=sys.stderr)
    print(
        "{lines} lines: {joined} continued by others, {repeated} repeated, {refused} refused; "
        "{trajectories} trajectories, {successful} successful, {unknown_outcome} of unknown "
        "outcome".format(**counts)
    )
    print(f"{done.added} added to {to}, {done.known} were there")
    if counts["unknown_outcome"]:
        print("for demonstrations of those whose outcome is unknown: --assume-success")


@app.command()
def demos(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the demonstrations go.")],
    embed: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare by this sentence-transformers model."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Collect the successful episodes of runs as demonstrations, in place of those in FOLDER."""
    from itertools import chain

    from agentdistill.demos import Demos, SentenceEmbedder
    from agentdistill.store import Store

    stores = [Store(run, readonly=True) for run in runs]
    episodes = chain.from_iterable(store.trajectories() for store in stores)
    found = Demos.build(episodes, to, embedder=SentenceEmbedder(embed) if embed else None)
    facts = {"steps": len(found), "episodes": found.episodes, "version": found.version}
    skipped = asdict(found.skipped)
    if as_json:
        document({**facts, "skipped": skipped})
        return
    left = ", ".join(f"{number} {reason}" for reason, number in skipped.items() if number)
    print(f"{len(found)} steps of {found.episodes} episodes in {to}, version {found.version}")
    print(f"left out: {left or 'none'}")
