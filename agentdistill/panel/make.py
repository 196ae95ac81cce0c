"""Panels from environments: making one, and whether an environment or a run is a panel's.

Invariants: what can change a result is compared; places on a machine (options that are paths) are
not in a panel and not compared: the version of the data stands for them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from agentdistill.config import PROMPTS, EvaluateConfig, RunConfig, SamplingConfig
from agentdistill.envs.base import TextEnv
from agentdistill.errors import ConfigError
from agentdistill.panel.file import Panel, PanelTask, load
from agentdistill.tasks import draw

MOST = 100_000
"""Tasks of a split among which those of a panel are looked for."""

FREE = ("render_mode",)
"""Options that change no outcome, wherever they are."""


def make(
    env: TextEnv,
    split: str,
    number: int,
    seed: int = 0,
    *,
    name: str = "",
    target: str = "",
    options: Mapping[str, Any] | None = None,
    free: Sequence[str] = (),
    max_turns: int | None = None,
    prompt: str = "chat",
    sampling: SamplingConfig | None = None,
    notes: Sequence[str] = (),
) -> Panel:
    """A panel of ``number`` tasks of ``split``, without references.

    Args:
        env: the environment.
        split: part of its tasks, or a role such as ``report``.
        number: distinct tasks; fewer in the split is a ConfigError.
        seed: of the choice of tasks, and of the episodes.
        name: of the panel.
        target: how ``env`` was made, where that is not its id.
        options: with which ``env`` was made; those that are places are left out.
        free: options that may differ because they change no outcome.
        max_turns: responses per episode.
        prompt: preset for models.
        sampling: for models.
        notes: what a reader should know, besides the card's own.
    """
    card = env.card
    tasks = draw(env, split, number, seed)
    return Panel(
        name=name,
        env=card.id,
        target="" if target == card.id else target,
        options=lasting(options or {}),
        free=list(free),
        version=card.version,
        data=card.data,
        licence=card.licence,
        notes=[*card.notes, *notes],
        split=card.split(split),
        max_steps=env.step_limit,
        max_turns=max_turns,
        prompt=prompt,
        sampling=sampling or SamplingConfig(),
        seed=seed,
        tasks=[
            PanelTask(split=t.split, payload=dict(t.payload), data=t.data, key=t.key) for t in tasks
        ],
    )


def lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as a file can hold them, without places on this machine (paths)."""
    found = {name: value for name, value in options.items() if not _is_place(value)}
    return dict(json.loads(json.dumps(found, default=str)))


def _is_place(value: Any) -> bool:
    text = isinstance(value, str) and ("/" in value or value.startswith(("~", ".")))
    return isinstance(value, Path) or text


def check(panel: Panel, env: TextEnv, options: Mapping[str, Any] | None = None) -> list[str]:
    """What of ``env`` is not as in ``panel``, a line each; empty where numbers can be compared.

    Args:
        panel: the panel.
        env: the environment that is to play it.
        options: with which ``env`` was made, where they are known; what is not named has the
            default of the constructor, and places on a machine are not compared.
    """
    card = env.card
    pairs = {
        "environment": (panel.env, card.id),
        "engine": (panel.version, card.version),
        "step limit": (panel.max_steps, env.step_limit),
    }
    found = [
        f"{what}: {wanted or 'none'} in the panel, {is_ or 'none'} here"
        for what, (wanted, is_) in pairs.items()
        if wanted != is_
    ]
    if panel.split not in card.splits:
        found.append(f"split {panel.split} is not among {', '.join(card.splits)}")
    elif panel.data != card.data:
        found += _other_data(panel, env)
    if options is not None:
        usual = _defaults(env)
        wanted, given = ({**usual, **lasting(each)} for each in (panel.options, options))
        found += [
            f"option {name}: {wanted.get(name)!r} in the panel, {given.get(name)!r} here"
            for name in sorted({*wanted, *given} - {*FREE, *panel.free, "max_steps"})
            if wanted.get(name) != given.get(name)
        ]
    return found


def _other_data(panel: Panel, env: TextEnv) -> list[str]:
    """Whether other data than the panel's has its tasks nevertheless.

    It may have more than the data that the panel was made with. That can be said where the payload
    of a task is its content; a task that names its data is another one with other data.
    """
    if any(task.data for task in panel.tasks):
        return [f"data: {panel.data or 'none'} in the panel, {env.card.data or 'none'} here"]
    keys = {task.key for task in panel.tasks}
    for task in islice(env.tasks(panel.split, seed=panel.seed), MOST):
        keys.discard(task.key)
        if not keys:
            return []
    return [f"data: {len(keys)} of the panel's {len(panel.tasks)} tasks are not in the data here"]


def filled(panel: Panel, env: TextEnv) -> Panel:
    """``panel`` with the contents, from the data here, of the tasks that it knows by key alone.

    Raises:
        ConfigError: the data lacks some of them.
    """
    wanted = {task.key for task in panel.tasks if task.payload is None}
    found: dict[str, dict[str, Any]] = {}
    for task in islice(env.tasks(panel.split, seed=panel.seed) if wanted else (), MOST):
        if task.key in wanted:
            found[task.key] = dict(task.payload)
        if len(found) == len(wanted):
            break
    if lacking := len(wanted) - len(found):
        remedy = f"{lacking} of its {len(panel.tasks)} tasks are not in the data here"
        raise ConfigError(remedy, key="panel", value=panel.name)
    tasks = [t.model_copy(update={"payload": found.get(t.key, t.payload)}) for t in panel.tasks]
    return panel.model_copy(update={"tasks": tasks})


def bare(panel: Panel) -> Panel:
    """``panel`` with the keys of its tasks alone, for contents that may not be passed on."""
    tasks = [task.model_copy(update={"payload": None}) for task in panel.tasks]
    return panel.model_copy(update={"tasks": tasks})


def _defaults(env: TextEnv) -> dict[str, Any]:
    """The defaults of its options, also of those that a class hands on to its base."""
    usual: dict[str, Any] = {}
    for kind in reversed(type(env).__mro__):
        if "__init__" in vars(kind) and issubclass(kind, TextEnv):
            found = inspect.signature(kind.__init__).parameters.values()
            usual.update({p.name: p.default for p in found if p.default is not p.empty})
    return lasting(usual)


def of_config(config: RunConfig, evaluate: EvaluateConfig, env: TextEnv) -> Panel:
    """The panel that a run is evaluated on: the one it names, or one drawn as it says.

    Raises:
        ConfigError: the panel cannot be read, or the configuration contradicts it.
    """
    if evaluate.panel is None:
        panel = make(env, evaluate.split, evaluate.tasks, evaluate.seed)
        return panel.model_copy(update={"max_turns": config.env.max_turns})
    panel = load(evaluate.panel)
    said = {"split": panel.split, "tasks": len(panel.tasks), "seed": panel.seed}
    for key, wanted in said.items():
        value = getattr(evaluate, key)
        usual = EvaluateConfig.model_fields[key].default
        given = env.card.split(value) if key == "split" else value
        if value != usual and given != wanted:
            remedy = f"the panel {panel.name or evaluate.panel} says {wanted!r}; leave this out"
            raise ConfigError(remedy, key=f"evaluate.{key}", value=value)
    problems = check(panel, env, config.env.options)
    if config.env.max_turns != panel.max_turns:
        problems.append(
            f"env.max_turns: {panel.max_turns} in the panel, {config.env.max_turns} here"
        )
    if problems:
        raise ConfigError("; ".join(problems), key="evaluate.panel", value=evaluate.panel)
    return filled(panel, env)


def tuning_part(config: RunConfig) -> str:
    """The part, or role, from which decisions while training are made."""
    panel = config.evaluate.panel
    return "tune" if panel is None else load(panel).tune


def for_tuning(config: RunConfig, env: TextEnv) -> Panel:
    """The tasks of the tune split that are played while training, as many as in the evaluation.

    Raises:
        ConfigError: the split has fewer than ``evaluate.tasks``; beside a named panel, whose size
            nobody chose, fewer will do. Or some are the panel's own.
    """
    evaluate = config.evaluate
    named = None if evaluate.panel is None else load(evaluate.panel)
    number, seed = (len(named.tasks), named.seed) if named else (evaluate.tasks, evaluate.seed)
    part = tuning_part(config)
    if named:
        number = len(draw(env, part, number, seed, fewer=True))
    panel = make(env, part, number, seed)
    if named and (shared := {task.key for task in named.tasks} & {t.key for t in panel.tasks}):
        remedy = (
            f"{len(shared)} of the tasks for tuning are the panel's own; name another tune part"
        )
        raise ConfigError(remedy, key="evaluate.panel", value=evaluate.panel)
    return panel.model_copy(update={"max_turns": config.env.max_turns})


def deviations(panel: Panel, config: RunConfig, mode: str) -> list[str]:
    """In what a model is shown or sampled otherwise than ``panel`` says (that is no error)."""
    found = []
    if config.prompt != PROMPTS[panel.prompt]:
        found.append(f"the prompt is not the preset {panel.prompt}")
    if mode == "sampled":
        for name, wanted in panel.sampling:
            given = getattr(config.sampling, name)
            if given != wanted:
                found.append(f"{name} is {given}, not {wanted}")
    return found
