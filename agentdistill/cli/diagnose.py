"""The verb that holds the episodes of a run against its models: diagnose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentdistill.cli.base import Json, app, document
from agentdistill.errors import ConfigError

if TYPE_CHECKING:
    from agentdistill.diagnostics import Diagnosis, Means, Part, StepWeights

ABOUT = ("tokens", "per token", "exact", "H student", "H teacher", "agree", "TV")


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="Default: the last one that trains.")
    ] = None,
    iterations: Annotated[
        str, typer.Option(metavar="A:B", help="From A to before B, counted from 0.")
    ] = ":",
    last: Annotated[int | None, typer.Option(min=1, help="Only the N latest iterations.")] = None,
    student: Annotated[
        str | None, typer.Option(help="Train stage or model. Default: the stage's own.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Train stage or model. Default: the stage's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold episodes of a stage against student and teacher: KL, steps, entropy, agreement."""
    from agentdistill import api

    found = api.diagnose(
        run, stage, iterations=_span(iterations), last=last, student=student, teacher=teacher
    )
    if as_json:
        document(found.to_json())
        return
    first, end = found.iterations or (0, 0)
    print(
        f"stage {found.stage}, iterations {first} to {end}: "
        f"student {found.student}, teacher {found.teacher} (nats)"
    )
    if found.all is None:
        print("No token of these episodes could be read by both.")
    else:
        _show(found, found.all)
    for note in _notes(found):
        print(note)


def _span(text: str) -> tuple[int | None, int | None]:
    first, colon, second = text.partition(":")
    try:
        span = tuple(int(part) if part else None for part in (first, second))
    except ValueError:
        span = ()
    if len(span) != 2 or not colon or any(part is not None and part < 0 for part in span):
        raise ConfigError("give two numbers as A:B, :B or A:", key="--iterations", value=text)
    return span


def _show(found: Diagnosis, whole: Part) -> None:
    """Every table."""
    from agentdistill.display import show

    parts = {"all": whole, "success": found.success, "failure": found.failure}
    known = {name: part for name, part in parts.items() if part is not None}
    columns = ("episodes", "number", "KL of a trajectory", "as drawn", *ABOUT, "no signal")
    show(columns, [_total(name, part.total) for name, part in known.items()])
    print("\nBy turn, over the episodes that still went on")
    turns = ((n, means) for n, means in enumerate(whole.by_turn, 1) if means is not None)
    show(("turn", "episodes", "KL", *ABOUT), (_turn(n, means) for n, means in turns))
    print("\nStep divergence: mean |log-ratio| over the k-th step of an episode")
    show(
        ("k", *(f"{name}{part}" for name in known for part in (": d", ", episodes"))),
        _steps(list(known.values())),
    )
    if weights := whole.steps.weights:
        print("\nStep weights of SOD, min(d_1 / d_k, 1 + delta), of the steps after the first")
        spread = ("least", "5%", "25%", "median", "75%", "95%", "most")
        head = ("delta", "mean", *spread, "at the cap", "episodes with all at it")
        show(head, [_weights(each) for each in weights])


def _number(value: float | None) -> str:
    from agentdistill.display import NOTHING

    return NOTHING if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    from agentdistill.display import percent

    return percent(value)


def _spread(mean: float | None, sd: float | None) -> str:
    return _number(mean) if sd is None else f"{_number(mean)} (sd {_number(sd)})"


def _about(means: Means) -> list[str]:
    """The cells of :data:`ABOUT`."""
    entropies = means.student_entropy, means.teacher_entropy
    return [
        f"{means.tokens:,}",
        *map(_number, (means.log_ratio, means.reverse_kl, *entropies)),
        _share(means.agreement),
        _number(means.tvd),
    ]


def _total(name: str, means: Means) -> list[str]:
    return [
        name,
        f"{means.trajectories:,}",
        _spread(means.kl, means.kl_sd),
        _spread(means.drawn_kl, means.drawn_kl_sd),
        *_about(means),
        _share(means.zero_signal),
    ]


def _turn(number: int, means: Means) -> list[str]:
    return [str(number), f"{means.trajectories:,}", _number(means.kl), *_about(means)]


def _steps(parts: Sequence[Part]) -> Iterator[list[str]]:
    for k in range(max(len(part.steps.divergence) for part in parts)):
        cells = []
        for part in parts:
            there = k < len(part.steps.divergence)
            cells.append(_number(part.steps.divergence[k] if there else None))
            cells.append(f"{part.steps.trajectories[k]:,}" if there else "0")
        yield [str(k + 1), *cells]


def _weights(each: StepWeights) -> list[str]:
    numbers = (each.delta, each.mean, *each.quantiles)
    return [*map(_number, numbers), _share(each.at_cap), _share(each.all_at_cap)]


def _notes(found: Diagnosis) -> Iterator[str]:
    """What else a reader has to know."""
    if found.all is not None and found.all.steps.first_largest is not None:
        steps = found.all.steps
        yield (
            f"{_share(steps.first_largest)} of the episodes with later steps diverge most at the "
            f"first one; in {steps.zero_first} it does not diverge at all."
        )
    if found.undecided:
        yield f"{found.undecided} episodes ended before they had an outcome."
    if found.faults:
        yield f"{found.faults} episodes were lost to faults and are left out."
    if found.dropped:
        yield f"{found.dropped} streams are too long for the student and are left out."
    if found.from_text:
        yield f"{found.from_text} episodes were read from their texts: nobody drew these tokens."
