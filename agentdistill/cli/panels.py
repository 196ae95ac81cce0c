"""Verbs about panels: list, show, make, check."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentdistill.cli.base import EnvOptions, Json, app, document, need
from agentdistill.errors import ConfigError

if TYPE_CHECKING:
    from agentdistill.panel import Panel, Reference
    from agentdistill.records import Trajectory

panels = typer.Typer(rich_markup_mode=None, help="List panels, or show, make or check one.")
app.add_typer(panels, name="panels")

STUDENT = "student"
"""The reference that is trained from a recipe."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="A built-in panel, or a panel's file.")]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="expert or random; repeatable. Default: all."),
]
EVERY = 10.0
"""Seconds between lines of progress where nobody looks at a terminal."""


@panels.callback(invoke_without_command=True)
def list_panels(ctx: typer.Context, as_json: Json = False) -> None:
    """List panels, or show, make or check one."""
    if ctx.invoked_subcommand is not None:
        return
    from agentdistill import display, panel

    found = [panel.load(name) for name in panel.names()]
    if as_json:
        document([each.facts() for each in found])
        return
    lines = [
        [
            each.name,
            each.env,
            each.split,
            str(len(each.tasks)),
            *(_rate(each.references.get(policy)) for policy in (*panel.POLICIES, STUDENT)),
        ]
        for each in found
    ]
    columns = ("name", "environment", "split", "tasks", *panel.POLICIES, STUDENT)
    display.show(columns, lines, left=3)


def _rate(reference: Reference | None) -> str:
    from agentdistill import display

    if reference is None or not reference.episodes:
        return display.NOTHING
    low, high = reference.interval
    return f"{display.percent(reference.success)} ({100 * low:.0f} to {100 * high:.0f})"


@panels.command("show")
def show_panel(name: Name, as_json: Json = False) -> None:
    """Show what a panel fixes, and its references; with --json its tasks too."""
    import yaml

    from agentdistill import panel

    found = panel.load(name)
    if as_json:
        document(found.model_dump(mode="json"))
        return
    facts = {key: value for key, value in found.facts().items() if value not in ("", [], {}, None)}
    print(yaml.safe_dump(facts, sort_keys=False, width=100).rstrip())


@panels.command("make")
def make_panel(
    env: Annotated[str, typer.Option(help="Environment; see `agentdistill envs`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, NAME.json.")],
    split: Annotated[str, typer.Option(help="Part of its tasks, or report or tune.")] = "report",
    tasks: Annotated[int, typer.Option(min=1, help="Distinct tasks.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the tasks and of the episodes.")] = 0,
    option: EnvOptions = None,
    free: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Option that changes no outcome; repeatable."),
    ] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Responses per episode.")] = None,
    prompt: Annotated[str, typer.Option(help="Preset with which models are compared.")] = "chat",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per response.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of models.")] = None,
    note: Annotated[
        list[str] | None, typer.Option(help="What a reader should know; repeatable.")
    ] = None,
    keys_only: Annotated[
        bool, typer.Option(help="Leave the contents of tasks out; who plays it needs the data.")
    ] = False,
    policy: Policies = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Also a reference that this recipe trains (student)."),
    ] = None,
    rebuilds: Annotated[
        int, typer.Option(min=0, help="Other seeds of RECIPE, for the spread of that reference.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Choose tasks, let the scripted policies play them, and write both to a file."""
    from contextlib import closing

    from agentdistill import panel
    from agentdistill.config import SamplingConfig, load
    from agentdistill.envs.make import make

    given = {"max_tokens": max_tokens, "temperature": temperature}
    sampling = SamplingConfig(**{key: value for key, value in given.items() if value is not None})
    options = load({}, [f"env.options.{text}" for text in option or ()]).env.options
    _known(policy)
    with closing(make(env, options)) as made:
        found = panel.make(
            made,
            split,
            tasks,
            seed,
            name=_name(output),
            target=env,
            options=options,
            free=free or (),
            max_turns=max_turns,
            prompt=prompt,
            sampling=sampling,
            notes=note or (),
        )
    references = {}
    for each in policy or panel.POLICIES:
        with _watching(each, tasks) as watch:
            references[each] = panel.score(found, each, options=options, on_end=watch)
        print(f"{each}: {_said(references[each])}", file=sys.stderr)
    if checkpoint:
        from agentdistill import reproduction

        references[STUDENT] = reproduction.reference(
            found,
            checkpoint,
            rebuilds=rebuilds,
            options=options,
            on_end=lambda each: print(f"{STUDENT}: {_said(each)}", file=sys.stderr),
        )
    found = found.model_copy(update={"references": references})
    panel.save(panel.bare(found) if keys_only else found, output)
    if as_json:
        document(found.facts())
    else:
        print(f"wrote {len(found.tasks)} tasks and {len(references)} references: {output}")


def _name(output: Path) -> str:
    if output.suffix != ".json":
        raise ConfigError("name the file NAME.json", key="--output", value=str(output))
    return output.stem


def _known(policies: Sequence[str] | None) -> None:
    from agentdistill.panel import POLICIES

    for policy in policies or ():
        if policy not in POLICIES:
            raise ConfigError(f"one of {', '.join(POLICIES)}", key="--policy", value=policy)


def _train(found: Panel, recipe: str, options: Mapping[str, Any]) -> Reference:
    """The reference checkpoint of ``recipe``, trained here; progress goes to stderr."""
    from agentdistill import reproduction
    from agentdistill.progress import watch

    with watch([], stderr=True) as bars:
        return reproduction.checkpoint(found, recipe, options=options, callbacks=[bars])


def _said(found: Reference) -> str:
    words = f"success {_rate(found)} of {found.episodes}, score {found.score:.3f}"
    faults = f", {found.faults} faults" if found.faults else ""
    exact = "" if found.exact else ", not the same when played twice"
    return f"{words}, {found.turns:.1f} turns{faults}{exact} ({found.seconds:.0f} s)"


@panels.command("check")
def check_panel(
    name: Name,
    option: EnvOptions = None,
    policy: Policies = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many tasks. Default: all.")
    ] = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Also train the reference checkpoint again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Play a panel's references again; exit with 1 when they are not reproduced."""
    from contextlib import ExitStack, closing
    from dataclasses import asdict

    from agentdistill import panel
    from agentdistill.config import load

    found = panel.load(name)
    options = load({}, [f"env.options.{text}" for text in option or ()]).env.options
    recipe = _recipe(found) if checkpoint else ""
    with closing(found.make_env(options)) as env:
        problems = [*env.availability().needs]
        problems = problems or panel.check(found, env, {**found.options, **options})
    number = min(tasks or len(found.tasks), len(found.tasks))
    replays: list[panel.Replay] = []
    if not problems:
        with ExitStack() as stack:

            def watch(each: str) -> Callable[[Trajectory], None]:
                stack.close()  # the display of the one before
                return stack.enter_context(_watching(each, number))

            replays = panel.reproduces(found, policy, options=options, tasks=number, on_end=watch)
        if recipe:
            replays.append(panel.judge(found, STUDENT, _train(found, recipe, options)))
    good = not problems and all(replay.status != "differs" for replay in replays)
    if as_json:
        lines = [_plain(asdict(replay), replay.found) for replay in replays]
        document({"panel": found.name, "ok": good, "problems": problems, "references": lines})
    else:
        for problem in problems:
            print(f"failed    {problem}")
        for replay in replays:
            print(f"{replay.status:10}{replay.policy}: {replay.message}")
        print(f"{found.name}: {'ok' if good else 'FAILED'}")
    if not good:
        raise typer.Exit(1)


def _recipe(found: Panel) -> str:
    """What trains the reference checkpoint of ``found``; refused where there is none."""
    known = found.references.get(STUDENT)
    if known is None or not known.recipe:
        remedy = "this panel has no reference checkpoint; `panels make --checkpoint` adds one"
        raise ConfigError(remedy, key="--checkpoint", value=found.name)
    need("--checkpoint", "torch", "transformers")
    return known.recipe


def _plain(values: dict[str, Any], found: Reference) -> dict[str, Any]:
    return {**values, "found": found.model_dump(mode="json", exclude={"digests"})}


# -- progress --------------------------------------------------------------------------------------


@contextmanager
def _watching(title: str, total: int) -> Iterator[Callable[[Trajectory], None]]:
    """Count episodes: a live bar on a terminal, a line now and then elsewhere; on stderr."""
    seen = {"episodes": 0, "success": 0, "faults": 0}

    def counted(trajectory: Trajectory) -> str:
        seen["episodes"] += 1
        seen["faults"] += bool(trajectory.faults)
        seen["success"] += trajectory.success and not trajectory.faults
        faults = f", {seen['faults']} faults" if seen["faults"] else ""
        return f"{seen['episodes']}/{total}, {seen['success']} solved{faults}"

    if sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield lambda trajectory: advance(counted(trajectory))
        return
    last = time.monotonic()

    def line(trajectory: Trajectory) -> None:
        nonlocal last
        said = counted(trajectory)
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{title}: {said}", file=sys.stderr, flush=True)

    yield line


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(file=sys.stderr),
    )
    with bar:
        task = bar.add_task(title, total=total, detail="")
        yield lambda said: bar.update(task, advance=1, detail=said)
