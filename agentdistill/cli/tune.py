"""The verbs that choose settings on the tune split: tune cascade."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agentdistill.cli.base import Config, Json, Overrides, app, document
from agentdistill.errors import ConfigError

tune = typer.Typer(no_args_is_help=True, help="Choose settings on the tune split.")
app.add_typer(tune, name="tune")


@tune.callback()
def _top() -> None:
    pass


@tune.command("cascade")
def cascade(
    config: Config,
    overrides: Overrides = None,
    policy: Annotated[str, typer.Option(help="Which of the configuration's policies.")] = "",
    samples: Annotated[str, typer.Option(help="Numbers of samples.")] = "1,2,3,5",
    k: Annotated[str, typer.Option(help="Numbers of demonstrations.")] = "0,3,6",
    rule: Annotated[
        list[str] | None,
        typer.Option(help="unanimous, majority, threshold=0.6, confidence=-0.5; repeatable."),
    ] = None,
    chance: Annotated[
        str, typer.Option(help="Probabilities of the teacher in random escalation.")
    ] = "0.25,0.5,0.75",
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: in the run's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Play settings of a cascade: success against teacher calls and cost, in one HTML file."""
    from agentdistill.config import load
    from agentdistill.display import show
    from agentdistill.files import refusing, write_text
    from agentdistill.recipe import validate
    from agentdistill.report import sweep as report
    from agentdistill.report.page import environment
    from agentdistill.tuning import sweep

    environment()
    loaded = load(config, overrides or ())
    validate(loaded)
    policy = policy or next(iter(loaded.policies), "")
    found = sweep(
        loaded,
        policy,
        samples=_whole("samples", samples, 1),
        ks=_whole("k", k, 0),
        rules=[_rule(text) for text in rule or ["unanimous"]],
        chances=_numbers("chance", chance),
        say=lambda line: print(line, file=sys.stderr),
    )
    target = output or loaded.path / "tuning" / f"{policy}.html"
    with refusing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, report.page(found))
    if as_json:
        document({**found.to_json(), "file": str(target)})
        return
    show(report.COLUMNS, [report.cells(point) for point in found.points])
    for line in report.areas(found):
        print(line)
    print(f"{found.tasks} tasks of the tune split. {report.NOTE}")
    print(f"curves: {target}")


def _numbers(key: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        remedy = "give numbers with commas between them"
        raise ConfigError(remedy, key=key, value=text) from None


def _whole(key: str, text: str, least: int) -> list[int]:
    found = _numbers(key, text)
    if not found or any(number != int(number) or number < least for number in found):
        remedy = f"give whole numbers of at least {least}, with commas between them"
        raise ConfigError(remedy, key=key, value=text)
    return [int(number) for number in found]


def _rule(text: str) -> tuple[str, float | None]:
    """A rule with its threshold, as ``threshold=0.6``."""
    name, _, least = text.partition("=")
    return name, next(iter(_numbers("rule", least)), None)
