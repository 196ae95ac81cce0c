"""Verbs that play and train: quickstart, train, collect, eval, export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentdistill.cli.base import Config, EnvOptions, Json, Overrides, app, document, need
from agentdistill.errors import ConfigError

if TYPE_CHECKING:
    from agentdistill.callbacks import Callback
    from agentdistill.config import RunConfig
    from agentdistill.recipe import Outcome

Board = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard event files.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the run.")]
Name = Annotated[str | None, typer.Option(help="Folder of the run, below the output.")]
Output = Annotated[str | None, typer.Option(help="Folder of all runs.")]


class Mode(StrEnum):
    """How a model plays the panel."""

    sampled = "sampled"
    greedy = "greedy"
    both = "both"


@app.command()
def quickstart(
    method: Annotated[
        str | None, typer.Option(help="How the student is distilled; see `agentdistill methods`.")
    ] = None,
    seed: Seed = None,
    name: Name = None,
    output: Output = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable."),
    ] = None,
    tensorboard: Board = False,
    as_json: Json = False,
) -> None:
    """Train a teacher, distil it into a tiny student, and compare, on a small machine."""
    from agentdistill import api, display
    from agentdistill import quickstart as recipe

    config = recipe.configure(
        method, seed=seed, name=name, output=output, overrides=tuple(changes or ())
    )
    labels = display.labels(config)
    _run(config, lambda callbacks: api.distill(config, (), callbacks), tensorboard, as_json, labels)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[
        str | None, typer.Option(help="Run only this stage and what it needs; no evaluation.")
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Run it in small on random models and generated data, to see that it runs. "
            "In a temporary folder, or in one given as output=FOLDER.",
        ),
    ] = False,
    tensorboard: Board = False,
    as_json: Json = False,
) -> None:
    """Run the stages of a configuration and its evaluation; repeat the command to resume."""
    from agentdistill.config import load

    loaded = load(config, overrides or ())
    if not rehearse:
        _train(loaded, stage, tensorboard, as_json)
        return
    kept = any(change.startswith("output=") for change in overrides or ())
    with _rehearsed(loaded, kept) as (small, replaced):
        if not as_json:
            print("rehearsal, not the run itself; replaced:", *replaced, "", sep="\n")
        _train(small, stage, tensorboard, as_json, {"replaced": replaced})
    if not (kept or as_json):
        print("the folder was temporary; output=FOLDER keeps it")


@contextmanager
def _rehearsed(config: RunConfig, kept: bool) -> Iterator[tuple[RunConfig, list[str]]]:
    """``config`` in small, and what is replaced; its folder vanishes afterwards unless ``kept``."""
    from agentdistill.rehearsal import changes, rehearse

    small = rehearse(config)
    replaced = changes(config, small)
    with TemporaryDirectory(prefix="agentdistill-", ignore_cleanup_errors=True) as folder:
        yield small if kept else small.model_copy(update={"output": folder}), replaced


def _train(
    loaded: RunConfig,
    stage: str | None,
    tensorboard: bool,
    as_json: bool,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Run ``loaded``, or one stage of it, and show the outcome."""
    from agentdistill import api

    def work(callbacks: Sequence[Callback]) -> Outcome:
        if stage is None:
            return api.distill(loaded, (), callbacks)
        return api.train(loaded, stage, (), callbacks)

    _run(loaded, work, tensorboard, as_json, only=stage, facts=facts)


def _run(
    config: RunConfig,
    work: Callable[[Sequence[Callback]], Outcome],
    tensorboard: bool,
    as_json: bool,
    labels: Mapping[str, str] | None = None,
    only: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Do ``work`` with progress, and show its outcome; ``facts`` go into the document."""
    from agentdistill import display
    from agentdistill.progress import watch
    from agentdistill.run import Run

    began = time.monotonic()
    boards = _tensorboard() if tensorboard else []
    left = [stage.name for stage in config.stages if Run(config).done(stage.name) is None]
    evaluation = bool(config.evaluate.policies) and only is None
    with watch(left, evaluation=evaluation, stderr=as_json) as progress:
        outcome = work([progress, *boards])
    seconds = time.monotonic() - began
    written = display.save(outcome, config, seconds, labels) if outcome.results else {}
    if as_json:
        document({"seconds": round(seconds, 3), **outcome.to_json(), **written, **(facts or {})})
        return
    if outcome.results:
        table = display.rows(outcome.results, outcome.stages, labels)
        print()
        display.results(table)
        print("\n".join(display.notes(table, outcome.results, config)))
    print(f"run: {outcome.path} ({seconds:.1f} s)")


def _tensorboard() -> list[Callback]:
    from agentdistill.callbacks import TensorBoard

    need("--tensorboard", "torch", "tensorboard")
    return [TensorBoard()]


@app.command()
def collect(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file of a run whose policies may play."),
    ] = None,
    overrides: Overrides = None,
    env: Annotated[str | None, typer.Option(help="Environment; see `agentdistill envs`.")] = None,
    option: EnvOptions = None,
    policy: Annotated[
        str, typer.Option(help="expert, random, or a model or trained stage of CONFIG.")
    ] = "expert",
    episodes: Annotated[int, typer.Option(min=1, help="How many to keep.")] = 100,
    split: Annotated[str, typer.Option(help="Part of the environment's tasks.")] = "train",
    failures: Annotated[bool, typer.Option("--failures", help="Keep failed episodes too.")] = False,
    seed: Seed = None,
    name: Name = None,
    output: Output = None,
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Also write them to FILE.jsonl or FILE.parquet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Play episodes and keep them."""
    from agentdistill.progress import watch

    form = _format(export_to) if export_to else ""
    stage = {
        "policy": policy,
        "episodes": episodes,
        "split": split,
        "only_success": not failures,
    }
    given = {"env.id": env, "seed": seed, "name": name, "output": output}
    changes = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    changes += [f"env.options.{text}" for text in option or ()]
    with watch([], stderr=as_json) as progress:
        path = _play(config, [*(overrides or ()), *changes], stage, progress)
    summary = {"path": str(path), **json.loads((path / "done.json").read_text())}
    if export_to:
        summary.update(export=str(export_to), rows=_export(path, export_to, form))
    if as_json:
        document(summary)
        return
    print(f"kept {summary['episodes']:,} of {summary['played']:,} episodes")
    if export_to:
        print(f"wrote {summary['rows']:,} rows: {export_to}")
    print(f"episodes: {path}")


def _play(
    config: str | None, changes: Sequence[str], stage: Mapping[str, Any], progress: Callback
) -> Path:
    """Play a collect stage, alone or beside those of ``config``; return its folder."""
    from agentdistill import api, recipe
    from agentdistill.callbacks import Callbacks, JsonLines
    from agentdistill.collection import collect as play
    from agentdistill.config import CollectStage, load
    from agentdistill.records import digest

    loaded = load(config or {"name": "collect"}, changes)
    if config is None:
        own = loaded.model_dump(include={"seed", "name", "output"})
        env, options = loaded.env.id, loaded.env.options
        api.collect(env, options=options, **stage, **own, callbacks=[progress])
        return loaded.path / "stages" / "episodes"
    recipe.validate(loaded).prepare()
    added = CollectStage(
        name=f"episodes_{digest(dict(stage), 8)}",
        avoid_held_out=stage["split"] == "train",
        batch=min(64, stage["episodes"]),
        **stage,
    )
    the_run = recipe.validate(load({**loaded.model_dump(), "stages": [*loaded.stages, added]}))
    if the_run.done(added.name) is None:
        play(the_run, added, Callbacks([JsonLines(), progress]))
    return the_run.folder(added.name)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    stage: Annotated[str, typer.Argument(help="Stage whose episodes are wanted.")],
    file: Annotated[Path, typer.Argument(help="FILE.jsonl or FILE.parquet.")],
    as_json: Json = False,
) -> None:
    """Write the episodes of a stage as a data set."""
    form = _format(file)
    folders = sorted(folder.parent.name for folder in run.glob("stages/*/shards"))
    if stage not in folders:
        known = f"no episodes of this stage in {run}; known: {', '.join(folders) or 'none'}"
        raise ConfigError(known, key="stage", value=stage)
    rows = _export(run / "stages" / stage, file, form)
    if as_json:
        document({"file": str(file), "rows": rows})
    else:
        print(f"wrote {rows:,} rows: {file}")


def _format(file: Path) -> str:
    form = file.suffix.removeprefix(".")
    if form not in ("jsonl", "parquet"):
        raise ConfigError("name the file .jsonl or .parquet", key="file", value=str(file))
    if form == "parquet":
        need("Parquet export", "pyarrow")
    return form


def _export(folder: Path, file: Path, form: str) -> int:
    from agentdistill.export import export as write
    from agentdistill.store import Store

    with Store(folder, readonly=True) as store:
        return write(store, file, form)


@app.command("eval")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Who plays; repeatable. Default: the policies of the configuration."),
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="Default: the configuration's.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Distinct tasks.")] = None,
    split: Annotated[str | None, typer.Option(help="Part of the environment's tasks.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the results, task by task, to this JSON file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let policies of a run play the panel."""
    from agentdistill import api, display
    from agentdistill.config import load
    from agentdistill.evaluation import modes
    from agentdistill.progress import watch
    from agentdistill.run import Run

    chosen = {None: None, Mode.both: ["sampled", "greedy"]}.get(mode, [mode])
    given = {"policies": policy or None, "modes": chosen, "tasks": tasks, "split": split}
    changes = [f"evaluate.{k}={json.dumps(v)}" for k, v in given.items() if v is not None]
    loaded = load(config, [*(overrides or ()), *changes])
    if not loaded.evaluate.policies:
        raise ConfigError("name at least one", key="--policy", value=[])
    results = []
    with watch((), stderr=True) as progress:
        for name in dict.fromkeys(loaded.evaluate.policies):
            for how in modes(name, loaded):
                results.append(api.evaluate(loaded, name, how, callbacks=[progress]))
                progress.say(f"{name}, {how}: {display.percent(results[-1].success)}")
    full = {"path": str(loaded.path), "results": [result.to_json() for result in results]}
    if output:
        from agentdistill.files import refusing, write_text

        with refusing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(full))
    if as_json:
        document(full)
        return
    stages = {name: Run(loaded).done(name) or {} for name in loaded.evaluate.policies}
    table = display.rows(results, stages)
    display.results(table)
    print("\n".join(display.notes(table, results, loaded)))
