"""What a run folder says: configuration, stages, metrics, results. Nothing here writes or trains.

Invariants: a run that is still going, stopped early or has only a collect stage is read like any
other, and what it lacks is None or empty; several folders are seeds of one recipe or are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentdistill.config import CollectStage, RunConfig, StageConfig, TinyModel, TrainStage, load
from agentdistill.errors import ConfigError, StoreError
from agentdistill.evaluation import Result, modes
from agentdistill.files import refusing
from agentdistill.methods.index import get
from agentdistill.methods.space import Axes
from agentdistill.metrics import Interval


@dataclass(frozen=True, slots=True)
class StageData:
    """One stage of one run.

    Attributes:
        config: of the stage.
        folder: where it lies.
        metrics: one mapping per iteration.
        done: its summary, None while it is not finished.
    """

    config: StageConfig
    folder: Path
    metrics: tuple[Mapping[str, Any], ...] = ()
    done: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name

    @property
    def axes(self) -> Axes | None:
        """The method's choices; None for a collect stage."""
        if isinstance(self.config, CollectStage):
            return None
        return get(self.config.method).resolve(self.config.axes)

    @property
    def what(self) -> str:
        """In a few words."""
        if isinstance(self.config, TrainStage):
            return self.config.method
        return f"episodes of {self.config.policy}"

    @property
    def started(self) -> bool:
        """Whether anything was written."""
        return self.folder.is_dir()


@dataclass(frozen=True, slots=True)
class RunData:
    """One run folder.

    Attributes:
        path: the folder, wherever it lies now.
        config: of the run.
        machine: versions, commit, machine; empty where the file is missing.
        stages: in the order of the configuration.
        results: of the evaluations that are there.
    """

    path: Path
    config: RunConfig
    machine: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageData, ...] = ()
    results: tuple[Result, ...] = ()

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.seed

    @property
    def finished(self) -> bool:
        """Whether every stage and every evaluation is there."""
        section = self.config.evaluate
        wanted = sum(len(modes(policy, self.config)) for policy in dict.fromkeys(section.policies))
        return all(stage.done for stage in self.stages) and len(self.results) == wanted

    @property
    def tiny(self) -> bool:
        """Whether all its models are tiny: loading them takes a second."""
        return all(isinstance(model, TinyModel) for model in self.config.models.values())


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in ``folders``.

    Raises:
        ConfigError: a folder is none of a run, or they are not seeds of one recipe.
        StoreError: a file cannot be read.
    """
    found = [_run(folder) for folder in folders]
    if not found:
        raise ConfigError("name at least one folder", key="run", value=[])
    first, *others = found
    for other in others:
        apart = _difference(_recipe(first), _recipe(other))
        if apart:
            raise ConfigError(
                f"differs from {first.path} in {apart}; give runs of one recipe that differ in "
                "their seed only",
                key="run",
                value=str(other.path),
            )
    seeds: dict[int, Path] = {}
    for run in found:
        if run.seed in seeds:
            raise ConfigError(
                f"has seed {run.seed}, as {seeds[run.seed]} has; a band over seeds needs others",
                key="run",
                value=str(run.path),
            )
        seeds[run.seed] = run.path
    return sorted(found, key=lambda run: run.seed)


def _recipe(run: RunData) -> dict[str, Any]:
    """What all seeds of a recipe share."""
    apart = {"name", "output", "seed", "workers", "threads"}
    return run.config.model_dump(mode="json", exclude=apart)


def _difference(one: Any, other: Any, key: str = "") -> str:
    """The first key in which two configurations differ, "" where there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(name, one.get(name), other.get(name)) for name in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(str(place), *both) for place, both in enumerate(zip(one, other, strict=True))]
    else:
        return "" if one == other else key
    inner = (_difference(a, b, f"{key}.{name}".strip(".")) for name, a, b in pairs)
    return next(filter(None, inner), "")


def _run(folder: Path) -> RunData:
    if not folder.is_dir():
        remedy = "there is no such folder; give that of a run (`agentdistill train` prints it)"
        raise ConfigError(remedy, key="run", value=str(folder))
    if not (folder / "config.yaml").is_file():
        remedy = "is not the folder of a run (no config.yaml); `agentdistill train` prints its path"
        raise ConfigError(remedy, key="run", value=str(folder))
    config = load(folder / "config.yaml")
    machine = _json(folder / "machine.json") or {}
    stages = tuple(_stage(folder / "stages" / stage.name, stage) for stage in config.stages)
    return RunData(folder, config, machine, stages, tuple(_results(folder, config)))


def _stage(folder: Path, config: StageConfig) -> StageData:
    metrics = tuple(_lines(folder / "metrics.jsonl"))
    return StageData(config, folder, metrics, _json(folder / "done.json"))


def _results(folder: Path, config: RunConfig) -> Iterator[Result]:
    """The evaluations that are there, in the order of the configuration."""
    for policy in dict.fromkeys(config.evaluate.policies):
        for mode in modes(policy, config):
            file = folder / "evaluation" / f"{policy}{'' if mode == '-' else f'-{mode}'}.json"
            values = _json(file)
            if values is None:
                continue
            try:
                yield Result(**{**values, "interval": Interval(*values["interval"])})
            except (TypeError, KeyError) as error:
                raise _unreadable(file, error) from error


def _json(file: Path) -> dict[str, Any] | None:
    """The mapping in ``file``, None where there is no such file."""
    with refusing(file):
        if not file.exists():
            return None
        text = file.read_bytes()
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise _unreadable(file, error) from error


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a metrics file; the last may be half written."""
    with refusing(file):
        text = file.read_bytes() if file.exists() else b""
    for line in text.split(b"\n")[:-1]:
        try:
            yield dict(json.loads(line))
        except ValueError:  # torn by a crash: that iteration runs again
            continue


def _unreadable(file: Path, error: Exception) -> StoreError:
    reason = " ".join(str(error).split())
    return StoreError(f"cannot read {file}: {reason}; remove it and repeat the run's command")
