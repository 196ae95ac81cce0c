"""Verbs that show what there is: envs, methods, config."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentdistill.cli.base import EnvOptions, Json, Overrides, app, document
from agentdistill.errors import AgentDistillError, ConfigError

if TYPE_CHECKING:
    from agentdistill.methods.space import Axes

envs = typer.Typer(rich_markup_mode=None, help="List environments, or check one.")
methods = typer.Typer(rich_markup_mode=None, help="List methods, show one, or compare two.")
app.add_typer(envs, name="envs")
app.add_typer(methods, name="methods")


class Preset(StrEnum):
    """Configurations that come with the package."""

    quickstart = "quickstart"


@envs.callback(invoke_without_command=True)
def list_envs(ctx: typer.Context, as_json: Json = False) -> None:
    """List environments, or check one."""
    if ctx.invoked_subcommand is not None:
        return
    import gymnasium

    import agentdistill.envs  # noqa: F401  (registers)
    from agentdistill import display

    names = sorted(name for name in gymnasium.registry if name.startswith("agentdistill/"))
    found = [_card(name) for name in names]
    if as_json:
        document(found)
        return
    nothing: dict[str, Any] = {"package": "", "data": "", "missing": [], "needs": []}
    lines, remarks = [], []
    for card in found:
        here = card.get("availability", nothing)
        facts = (here["package"], here["data"], ", ".join(card.get("splits", [])))
        more = (card.get("isolation"), card.get("licence"))
        lines.append([card["id"], *(text or display.NOTHING for text in (*facts, *more))])
        lines[-1].append("yes" if card["installed"] else "no")
        problems = [card["problem"]] if "problem" in card else [*here["needs"], *here["missing"]]
        remarks += [f"{card['id']}: {text}" for text in dict.fromkeys(problems)]
    columns = ("id", "package", "data", "splits", "isolation", "licence", "installed")
    display.show(columns, lines, left=7)
    if remarks:
        print("\n" + "\n".join(remarks))


def _card(name: str) -> dict[str, Any]:
    """The facts about an environment, as far as they can be had without what it needs."""
    from dataclasses import asdict

    from agentdistill.envs.make import make

    try:
        env = make(name)
        here = type(env).availability()
        facts = {**env.card.to_json(), "installed": not here.needs}
    except AgentDistillError as error:
        return {"id": name, "installed": False, "problem": str(error)}
    return {**facts, "availability": asdict(here)}


@envs.command("check")
def check_one(
    target: Annotated[str, typer.Argument(metavar="ID", help="Id, or module:Class of your own.")],
    option: EnvOptions = None,
    episodes: Annotated[int, typer.Option(min=1, help="Tasks per check.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the tasks and of random play.")] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure the speed.")] = 0.5,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds after which a check begins no further episode.")
    ] = 30.0,
    expert_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Known success rate of the expert.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test whether an environment keeps its promises."""
    from agentdistill.config import load
    from agentdistill.envs.check import Check, check_env

    def say(check: Check) -> None:
        if sys.stderr.isatty() or as_json:
            print(f"{check.name}: {check.status}, {check.seconds:.1f} s", file=sys.stderr)

    report = check_env(
        target,
        episodes=episodes,
        seed=seed,
        seconds=seconds,
        budget=budget,
        expert_rate=expert_rate,
        kwargs=load({}, [f"env.options.{text}" for text in option or ()]).env.options,
        on_check=say,
    )
    if as_json:
        document(report.to_json())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)


@methods.callback(invoke_without_command=True)
def list_methods(ctx: typer.Context, as_json: Json = False) -> None:
    """List methods, show one, or compare two."""
    if ctx.invoked_subcommand is not None:
        return
    from agentdistill import display
    from agentdistill.methods import METHODS

    found = [_method(name) for name in METHODS]
    if as_json:
        document(found)
        return
    lines = [
        [m["name"], m["title"], m["paper"], m["evidence"], ", ".join(n["key"] for n in m["needs"])]
        for m in found
    ]
    display.show(("name", "title", "paper", "evidence", "needs"), lines, left=5)


@methods.command("show")
def show_method(name: Annotated[str, typer.Argument()], as_json: Json = False) -> None:
    """Show every choice that a method makes."""
    found = _method(name)
    if as_json:
        document(found)
        return
    needs = [f"{need['key']}: {need['remedy']}" for need in found["needs"]]
    print(_yaml({**found, "needs": needs}))


@methods.command("diff")
def compare_methods(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    as_json: Json = False,
) -> None:
    """Show in what two methods differ."""
    from agentdistill import display
    from agentdistill.methods.overrides import leaves

    one, two = (dict(leaves(_method(name)["axes"])) for name in (first, second))
    found = {key: [one[key], two[key]] for key in one if one[key] != two[key]}
    if as_json:
        document(found)
        return
    lines = [[key, *(json.dumps(value) for value in pair)] for key, pair in found.items()]
    display.show(("axis", first, second), lines, left=3)


def _method(name: str) -> dict[str, Any]:
    """A method as plain data; what it needs is what a stage that names nothing else lacks."""
    from agentdistill.config import RunConfig, TrainStage
    from agentdistill.methods import get
    from agentdistill.methods.constraints import CONSTRAINTS

    method = get(name)
    run, stage = RunConfig(), TrainStage(name="stage", method=name, iterations=1)
    return {
        "name": name,
        "title": method.title,
        "paper": method.paper,
        "evidence": method.evidence,
        "notes": method.notes,
        "needs": [
            {"key": rule.keys.partition(",")[0], "rule": rule.name, "remedy": rule.remedy}
            for rule in CONSTRAINTS
            if rule.broken(run, stage, method.axes)
        ],
        "requires": _requires(method.axes),
        "axes": method.axes.model_dump(mode="json", by_alias=True),
    }


def _requires(axes: Axes) -> list[str]:
    """What must be there besides a student and an environment, in words."""
    from agentdistill.methods.space import FULL

    found = []
    if axes.needs_teacher:
        acts = axes.actor == "teacher"
        full = any(s.divergence in FULL for s in axes.signals)
        scores = "whole distributions" if full else "log-probabilities of given tokens"
        parts = [*(["acts"] if acts else []), *([f"scores: {scores}"] if axes.scores else [])]
        found.append(f"teacher that {' and '.join(parts)}")
    elif axes.scores:
        found.append(f"no other model: the student's weights, {axes.scorer.update}, are the scorer")
    if axes.needs_base:
        found.append("base: a model, or the student's start")
    if axes.reward.kind != "none":
        found.append(f"reward: {axes.reward.source}, in groups of samples")
    if axes.context.kind != "same":
        found.append(f"privileged text for the {axes.context.reader}: {axes.context.kind}")
    if axes.actor in ("data", "cached", "mixed"):
        found.append("recorded episodes")
    return found


@app.command("config")
def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the run.")
    ] = None,
    overrides: Overrides = None,
    preset: Annotated[
        Preset | None, typer.Option(help="A built-in configuration instead of CONFIG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a configuration and print it with every default filled in."""
    from agentdistill.config import load
    from agentdistill.quickstart import recipe as built_in
    from agentdistill.recipe import validate

    words = [config, *(overrides or ())] if config else []
    source = built_in() if preset else words.pop(0) if words else None
    if source is None:
        raise ConfigError("name a file, or --preset quickstart", key="config", value=None)
    values = validate(load(source, words)).config.model_dump(mode="json")
    if as_json:
        document(values)
    else:
        print(_yaml(values))


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, width=100).rstrip()
