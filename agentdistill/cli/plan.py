"""The verb that says what a run will need before it starts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agentdistill.cli.base import Config, Json, Overrides, app, document

GB = 1e9


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    step: Annotated[
        bool, typer.Option("--step/--no-step", help="Measure a small iteration of every stage.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Estimate memory, time and iterations of a configuration; nothing is trained or kept."""
    from agentdistill.config import load
    from agentdistill.plan import plan as make

    found = make(load(config, overrides or ()), step=step)
    if as_json:
        document(found)
        return
    for stage in found["stages"]:
        _show(stage)
    if found["evaluation"]:
        _panel(found["evaluation"])
    print(f"step: {found['step']}")
    if found["hours"] is None:
        print("hours: unknown without a measured step")
    else:
        print(f"hours: {found['hours']:.3g} for the whole run, without checkpoints")


def _show(stage: dict[str, Any]) -> None:
    """One stage: facts, memory by part, peak against the device."""
    if stage["do"] == "collect":
        print(f"{stage['stage']}: collect, {stage['episodes']:,} episodes{_hours(stage)}\n")
        return
    from agentdistill import display

    print(
        f"{stage['stage']}: {stage['method']}, {_count(stage['student'])} student"
        + (f", {_count(stage['teacher'])} teacher" if stage["teacher"] else "")
    )
    lines = [
        [p["name"], p["device"], _held(p), "yes" if p["exact"] else "", _gb(p["bytes"])]
        for p in stage["parts"]
    ]
    for device, facts in stage["devices"].items():
        worst = max(("generate", "score", "update", "step"), key=lambda phase: facts[phase])
        lines.append([f"at most, in {worst}", device, "", "", _gb(facts["peak"])])
    display.show(("memory", "device", "held in", "exact", "GB"), lines, left=4)
    for device, facts in stage["devices"].items():
        print(f"{device} ({facts['name']}): {_fits(facts)}")
    _speed(stage)


def _speed(stage: dict[str, Any]) -> None:
    """What an iteration plays, how long it takes, and how many there are."""
    lengths = stage["lengths"]
    print(
        f"an iteration: {lengths['episodes']:,} episodes, {lengths['tokens']:,} tokens, "
        f"{lengths['rows']:,} of them trained, longest {lengths['context']:,} "
        f"(from {lengths['source']})"
    )
    if stage["seconds"]:
        told = ", ".join(f"{phase} {value:.2f}" for phase, value in stage["seconds"].items())
        print(f"seconds of an iteration: {told}")
    steps = f", {stage['env_steps']:,} environment steps" if stage["env_steps"] else ""
    print(f"{stage['iterations']:,} iterations{steps}{_hours(stage)}\n")


def _panel(panel: dict[str, Any]) -> None:
    lacks = f"; without {', '.join(panel['unknown'])}" if panel["unknown"] else ""
    print(f"evaluation: {panel['episodes']:,} episodes{_hours(panel)}{lacks}")


def _count(model: dict[str, Any]) -> str:
    number, trained = model["parameters"], model["trained"]
    words = f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"
    return words if trained == number else f"{words} ({trained:,} trained)"


def _held(part: dict[str, Any]) -> str:
    phases = part["phases"]
    return "always" if len(phases) == 4 else ", ".join(phases)


def _gb(size: int) -> str:
    """Gigabytes, with three digits however small."""
    return f"{size / GB:.3f}" if size >= GB else f"{size / GB:.3g}"


def _fits(facts: dict[str, Any]) -> str:
    if facts["bytes"] is None:
        return f"needs {_gb(facts['peak'])} GB"
    verdict = "fits" if facts["fits"] else "does not fit"
    return f"{verdict}: {_gb(facts['peak'])} of {_gb(facts['bytes'])} GB"


def _hours(entry: dict[str, Any]) -> str:
    return "" if entry["hours"] is None else f", {entry['hours']:.3g} hours"
