"""The same numbers again: a result that is on record, or a panel's reference checkpoint.

Invariants: a result is played again with what it says of itself (tasks, seeds, prompt, sampling,
limits), and refused where this machine plays otherwise; ``identical`` means every number and every
outcome on record, ``within`` a difference of at most two standard errors, ``outside`` a larger one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from statistics import stdev
from tempfile import TemporaryDirectory
from typing import Any, Literal

from agentdistill import panel as panels
from agentdistill.callbacks import Callback
from agentdistill.config import EvaluateConfig, RunConfig, load
from agentdistill.config import read as read_yaml
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result, evaluate
from agentdistill.panel import Panel, Reference
from agentdistill.recipe import execute, validate
from agentdistill.recorded import SCRIPTED, Recorded, differences, read
from agentdistill.run import Run, need_torch
from agentdistill.statistics import tolerance

NUMBERS = ("episodes", "faults", "success", "optimal", "turns", "invalid", "score")

# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reproduction:
    """One result, played again.

    Attributes:
        policy: whose.
        mode: in which.
        status: ``identical``, ``within`` or ``outside``.
        known: success on record.
        found: success now.
        tolerance: the difference that two standard errors allow.
        result: all that was found.
    """

    policy: str
    mode: str
    status: Literal["identical", "within", "outside"]
    known: float
    found: float
    tolerance: float
    result: Result

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def reproduce(
    file: str | Path,
    policy: str | Sequence[str] | None = None,
    mode: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Reproduction]:
    """Play the results in ``file`` again: the same tasks, seeds and settings.

    Args:
        file: results of a run (results.json, its folder, ``eval --output``). Trained policies need
            the run's folder around it; for ``expert`` and ``random`` the file is enough.
        policy: only this one, or these.
        mode: ``sampled`` or ``greedy`` only, of policies that have modes.
        overrides: ``key.path=value``, for places on this machine.

    Raises:
        ConfigError: nothing to play again, no checkpoint, or this machine plays otherwise.
    """
    recorded = read(file)
    names = [policy] if isinstance(policy, str) else policy
    chosen = [
        result
        for result in recorded.results
        if (not names or result.policy in names) and mode in (None, result.mode, *_only(result))
    ]
    if not chosen:
        known = ", ".join(f"{r.policy} {r.mode}" for r in recorded.results)
        raise ConfigError(f"no such result; there are {known}", key="policy", value=policy)
    return [_again(recorded, result, overrides) for result in chosen]


def _only(result: Result) -> list[str | None]:
    """Every mode, for a policy without modes."""
    return ["sampled", "greedy"] if result.mode == "-" else []


def _again(recorded: Recorded, known: Result, overrides: Sequence[str]) -> Reproduction:
    config = _config(recorded, known, overrides)
    with Run(config) as the_run:
        found = evaluate(the_run, known.policy, known.mode, config.evaluate)
    # A results.json has no columns by task; then the hash of the tasks speaks for them.
    if other := differences(known, found, ("the result", "what is played here")):
        raise ConfigError("; ".join(other), key="result", value=f"{known.policy} {known.mode}")
    allowed = tolerance(known.success, known.episodes, found.success, found.episodes)
    return Reproduction(
        known.policy,
        known.mode,
        _status(known, found, allowed),
        known.success,
        found.success,
        allowed,
        found,
    )


def _status(
    known: Result, found: Result, allowed: float
) -> Literal["identical", "within", "outside"]:
    same = all(getattr(known, name) == getattr(found, name) for name in NUMBERS)
    if same and (not known.outcomes or _by_key(known) == _by_key(found)):
        return "identical"
    measured = bool(known.episodes and found.episodes)
    return "within" if measured and abs(known.success - found.success) <= allowed else "outside"


def _by_key(result: Result) -> dict[str, tuple[bool | None, ...]]:
    size = len(result.outcomes) // len(result.keys)
    return {
        key: result.outcomes[place * size : (place + 1) * size]
        for place, key in enumerate(result.keys)
    }


def _config(recorded: Recorded, known: Result, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration with what the result says of itself."""
    said, values = known.setting, _base(recorded, known)
    values["env"] = {**values.get("env", {}), "max_turns": said["max_turns"]}
    values["env"]["options"] = said["options"]
    values.update({name: said[name] for name in ("prompt", "limits", "sampling") if said[name]})
    samples = (values.get("evaluate") or {}).get("samples", 1)
    samples = len(known.outcomes) // len(known.keys) if known.keys else samples
    episodes = known.episodes + known.faults
    played = episodes // samples if known.mode == "sampled" else episodes
    values["evaluate"] = {
        **_tasks(said["panel"], played, (values.get("evaluate") or {}).get("panel")),
        "policies": [known.policy],
        "samples": samples if known.mode == "sampled" else 1,
    }
    return load(values, overrides)


def _base(recorded: Recorded, known: Result) -> dict[str, Any]:
    if recorded.folder is not None:
        values = read_yaml(recorded.folder / "config.yaml")
        folder = recorded.folder.resolve()
        return {**values, "output": str(folder.parent), "name": folder.name}
    if known.policy not in SCRIPTED:
        remedy = "its checkpoint is not here; give a result that lies in the folder of its run"
        raise ConfigError(remedy, key="policy", value=known.policy)
    return {"env": {"id": known.setting["env"]["id"]}}


def _tasks(said: Mapping[str, Any], number: int, panel: str | None) -> dict[str, Any]:
    """The part of ``evaluate`` that says which tasks; ``panel`` is the run's own."""
    if not said["name"]:
        return {"split": said["split"], "seed": said["seed"], "tasks": number}
    own = panel is not None and panels.load(panel).name == said["name"]
    return {"panel": panel if own else said["name"]}


# -- reference checkpoints -------------------------------------------------------------------------

STUDENT = "student"
"""The reference that is trained, and the stage of its recipe that trains it."""


def checkpoint(
    panel: Panel,
    recipe: str,
    *,
    shift: int = 0,
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Reference:
    """Train the checkpoint of ``recipe`` from its seed, and let it play ``panel``.

    Args:
        panel: the panel.
        recipe: a recipe of the package by name, or a YAML file; its stage ``student`` is the one.
        shift: added to the recipe's seed.
        options: places on this machine, for the environment.
        callbacks: are told of the training.

    Raises:
        ConfigError: the recipe's environment, prompt or sampling is not the panel's.
        MissingExtraError: ``agentdistill[train]`` is not installed.
    """
    need_torch("a reference checkpoint")
    with TemporaryDirectory() as folder, ExitStack() as stack:
        path: Path = Path(recipe)
        packaged = files("agentdistill").joinpath("recipes", f"{recipe}.yaml")
        if packaged.is_file():
            path = stack.enter_context(as_file(packaged))
        places = [
            f"env.options.{key}={json.dumps(value)}" for key, value in (options or {}).items()
        ]
        config = load(path, [f"output={json.dumps(folder)}", *places])
        changes = {"seed": config.seed + shift, "evaluate": EvaluateConfig()}
        config = config.model_copy(update=changes)
        the_run = stack.enter_context(validate(config))
        problems = panels.check(panel, the_run.env, config.env.options)
        problems += panels.deviations(panel, config, "sampled")
        if problems:
            raise ConfigError("; ".join(problems), key="recipe", value=recipe)
        execute(config, callbacks, only=[STUDENT])
        player = the_run.policy(STUDENT, panel.sampling)
        found = panels.score(panel, player, options=options)
    return found.model_copy(update={"recipe": recipe})


def reference(
    panel: Panel,
    recipe: str,
    *,
    rebuilds: int = 0,
    options: Mapping[str, Any] | None = None,
    on_end: Callable[[Reference], None] | None = None,
) -> Reference:
    """The checkpoint of ``recipe`` with the spread of what ``rebuilds`` other seeds make of it.

    Args:
        panel: the panel.
        recipe: as for :func:`checkpoint`.
        rebuilds: with the seeds that follow the recipe's: an upper bound of what rounding does.
            Without them the spread is 0, and a rebuild is judged by its episodes alone.
        options: places on this machine, for the environment.
        on_end: told of every checkpoint.
    """
    found = []
    for shift in range(rebuilds + 1):
        found.append(checkpoint(panel, recipe, shift=shift, options=options))
        if on_end is not None:
            on_end(found[-1])
    rates = [each.success for each in found]
    spread = stdev(rates) if rebuilds else 0.0
    return found[0].model_copy(update={"spread": round(spread, 4)})
