"""A recipe in small: the same stages and methods, on random models, on any machine.

Invariants: methods, axes, schedules, prompts and the order of the stages stay as they are; what is
replaced is what needs a model hub, a GPU, official data or time, and :func:`changes` lists all of
it. What a rehearsal computes says that a recipe runs, and nothing about its results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agentdistill.config import (
    CollectStage,
    LocalModel,
    ModelConfig,
    RunConfig,
    StageConfig,
    TinyModel,
    TokenizerConfig,
    VllmModel,
    load,
)

TINY = TinyModel(
    hidden=16, layers=1, heads=1, tokenizer=TokenizerConfig(vocabulary=400, episodes=2)
)
"""In place of every model from a folder or hub. One configuration, hence one tokenizer."""

TOKENS = 8
"""Tokens of a response."""


@dataclass(frozen=True, slots=True)
class World:
    """What an environment is rehearsed with.

    Attributes:
        options: data that is made on the spot, in place of what has to be fetched.
        turns: of an episode at most, None for all; the expert's ways are short enough.
        at_once: episodes at once.
    """

    options: Mapping[str, Any]
    turns: int | None
    at_once: int = 2


WORLDS = {
    # Rooms with lamps are small, so that their games load fast and are won in a few turns. Every
    # episode at once is a process, whose start takes longer than all that is played in it.
    "agentdistill/ALFWorld-v0": World(
        {"games": "generated", "types": ["look_at_obj_in_light"]}, turns=8, at_once=1
    ),
    "agentdistill/WebShop-v0": World(
        {"catalogue": "generated", "goals": "synthetic", "products": 40}, turns=10
    ),
}
"""By id."""

ELSEWHERE = World({}, turns=None)
"""Other environments are played as the recipe has them."""


def rehearse(config: RunConfig) -> RunConfig:
    """``config`` in small, under the name ``<name>-rehearsal``; nothing is run or written.

    Collect stages that keep successes only are played by the expert: random models have none.
    """
    world = WORLDS.get(config.env.id, ELSEWHERE)
    values = config.model_dump()
    values.update(name=f"{config.name}-rehearsal", workers=1, concurrency=world.at_once)
    values["models"] = {name: _model(model) for name, model in config.models.items()}
    values["budget"] = {}
    values["stages"] = [_stage(stage) for stage in config.stages]
    _at_most(values["sampling"], max_tokens=TOKENS)
    values["env"]["options"] = {**config.env.options, **world.options}
    if world.turns is not None:
        values["env"]["max_turns"] = min(config.env.max_turns or world.turns, world.turns)
    _at_most(values["evaluate"], tasks=2, samples=1, concurrency=world.at_once)
    if config.evaluate.panel is not None:
        values["evaluate"]["panel"] = None  # its tasks are those of the official data
    return load(values)


def _model(model: ModelConfig) -> ModelConfig:
    """``model``, or a random one in its place; nothing is on a server, and nobody is paid."""
    return model.model_copy(update={"server": None}) if isinstance(model, TinyModel) else TINY


def _stage(stage: StageConfig) -> dict[str, Any]:
    """``stage`` with a few short episodes."""
    values = stage.model_dump()
    if values["sampling"] is not None:
        _at_most(values["sampling"], max_tokens=TOKENS)
    if isinstance(stage, CollectStage):
        _at_most(values, episodes=4, batch=4)
        if stage.only_success:
            values.update(policy="expert", first_thought=False)
        return values
    values.update(env_steps=None, turns=None, iterations=min(stage.iterations or 2, 2))
    _at_most(values, tasks=2, samples=2, updates=2, limit=4, evaluate_every=1)
    return values


def _at_most(values: dict[str, Any], **bounds: int) -> None:
    """Lower the numbers that are above their bounds; what is None stays."""
    for key, bound in bounds.items():
        if values[key] is not None:
            values[key] = min(values[key], bound)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """One line for every key in which two configurations differ, ``key: old → new``."""
    old, new = dict(_leaves(_facts(before))), dict(_leaves(_facts(after)))
    return [
        f"{key}: {old.get(key, 'unset')} → {new.get(key, 'unset')}"
        for key in {**old, **new}
        if old.get(key, ...) != new.get(key, ...)
    ]


def _facts(config: RunConfig) -> dict[str, Any]:
    """What ``config`` says, with a model as one fact."""
    models = {name: _source(model) for name, model in config.models.items()}
    return {**config.model_dump(), "models": models}


def _source(model: ModelConfig) -> str:
    if isinstance(model, TinyModel):
        return "a random model"
    if isinstance(model, VllmModel):
        return model.base_url
    return model.path if isinstance(model, LocalModel) else model.model


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in ``values``; stages by their names."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and prefix == "stages":
        for stage in values:
            yield from _leaves(stage, f"stages.{stage['name']}")
    else:
        yield prefix, values
