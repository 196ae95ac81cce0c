"""What a panel is, and its file.

Invariants: what a result depends on is in the file; the keys of the tasks are derived again when it
is read; an episode of a panel has a seed of its own, from the panel's seed, the task and the number
of the sample, so that ``agentdistill eval`` and the references play the same episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from agentdistill.config import PROMPTS, SamplingConfig, Section
from agentdistill.envs.base import TextEnv
from agentdistill.envs.make import make as make_env
from agentdistill.errors import ConfigError, StoreError
from agentdistill.files import write_text
from agentdistill.policy import derive_seed
from agentdistill.records import Task, digest
from agentdistill.rollout import Request


class PanelTask(Section):
    """One task as the file has it."""

    split: str
    payload: dict[str, Any] | None = None
    """None where the content may not be passed on: the data has it, and the key finds it there."""
    data: str = ""
    key: str


class Reference(Section):
    """What a policy did on all tasks of a panel, or on the first of them."""

    episodes: int
    """Those without faults; the rates are over them."""
    faults: int
    success: float
    interval: tuple[float, float]
    """95% Wilson interval of ``success``."""
    score: float
    turns: float
    """Mean turns."""
    exact: bool
    """Whether a second time gave the same episodes (the first few were played twice)."""
    digests: str
    """A word per episode, in the order of the tasks; "fault" for those that were lost."""
    recipe: str = ""
    """Rebuilds the policy from a seed, for one that is trained: a recipe of the package, or a file.
    Its numbers are wanted within two standard errors, not episode by episode."""
    spread: float = 0.0
    """Standard deviation of ``success`` over rebuilds, for one that is trained: machines round
    otherwise, and training makes that large. Over other seeds it is an upper bound."""
    seconds: float
    """Of playing."""
    commit: str
    machine: str
    date: str


class Panel(Section):
    """A panel; see the module docstring."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]*$")
    env: str
    """Id of the environment, as its card has it."""
    target: str = ""
    """How the environment is made (``module:Class``), where that is not its id."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor, without places on a machine."""
    free: list[str] = Field(default_factory=list)
    """Options that may differ because they change no outcome."""
    version: str
    """Of the engine."""
    data: str
    """Version or hash of the data."""
    licence: str = ""
    notes: list[str] = Field(default_factory=list)
    split: str
    """The environment's own name of the part."""
    tune: str = "tune"
    """Part, or role, from which decisions while training are made: tasks of it are drawn with the
    panel's seed, as many as the panel has where there are so many. None of them is the panel's."""
    max_steps: int
    """Environment steps after which an episode is truncated."""
    max_turns: int | None = None
    """Responses per episode; None leaves it to ``max_steps``."""
    prompt: str = "chat"
    """Preset with which models are to be compared."""
    sampling: SamplingConfig = SamplingConfig()
    """How they are to be sampled."""
    seed: int = 0
    references: dict[str, Reference] = Field(default_factory=dict)
    tasks: list[PanelTask]

    @model_validator(mode="after")
    def _keys(self) -> Panel:
        for number, task in enumerate(self.tasks):
            if task.payload is None:
                continue
            key = Task(self.env, task.split, task.payload, task.data).key
            if task.key != key:
                raise ValueError(
                    f"task {number} has the key {task.key} and a content whose key is {key}"
                )
        if len({task.key for task in self.tasks}) != len(self.tasks):
            raise ValueError("a task is there twice")
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt {self.prompt!r} is no preset; known: {', '.join(PROMPTS)}")
        return self

    def listed(self) -> list[Task]:
        """The tasks, in order; those known by their key alone must be filled in (make.filled)."""
        return [
            Task(self.env, task.split, task.payload or {}, task.data, number)
            for number, task in enumerate(self.tasks)
        ]

    def requests(self, samples: int = 1) -> list[Request]:
        """Every task, ``samples`` times, each time with a seed of its own."""
        return requests(self.listed(), samples, self.seed)

    @property
    def hash(self) -> str:
        """Identity of its tasks, in order."""
        return digest([task.key for task in self.tasks])

    def facts(self) -> dict[str, Any]:
        """All but tasks and single episodes, as plain JSON."""
        values = self.model_dump(mode="json", exclude={"tasks"})
        for reference in values["references"].values():
            del reference["digests"]
        return {**values, "tasks": len(self.tasks), "hash": self.hash}

    def make_env(self, options: Mapping[str, Any] | None = None) -> TextEnv:
        """An environment for it; ``options`` add places on this machine."""
        return make_env(self.target or self.env, {**self.options, **(options or {})})


def requests(tasks: Sequence[Task], samples: int, seed: int) -> list[Request]:
    """Every task, ``samples`` times; task by task, sample by sample."""
    return [
        Request(task, derive_seed(seed, "evaluate", task.key, sample), task.key, sample)
        for task in tasks
        for sample in range(samples)
    ]


# -- files -----------------------------------------------------------------------------------------


def names() -> list[str]:
    """The built-in panels."""
    found = (entry.name for entry in files(__package__).joinpath("built_in").iterdir())
    return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


def load(name: str | Path) -> Panel:
    """The built-in panel ``name``, or the one in the file ``name``.

    Raises:
        ConfigError: there is none, or its content is not what it says (a key differs).
    """
    try:
        return Panel.model_validate_json(_read(str(name)))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        remedy = f"is no sound panel: {place + ': ' if place else ''}{message}"
        raise ConfigError(remedy, key="panel", value=str(name)) from None


def _read(name: str) -> str:
    if name in names():
        return files(__package__).joinpath("built_in", f"{name}.json").read_text(encoding="utf-8")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        remedy = f"is neither a file nor one of the built-in panels: {', '.join(names())}"
        raise ConfigError(remedy, key="panel", value=name) from None


def save(panel: Panel, path: Path) -> None:
    """Write ``panel``, a task per line; complete or not at all.

    Raises:
        StoreError: the disk refuses.
    """
    values = panel.model_dump(mode="json")
    tasks = ",\n  ".join(
        json.dumps({k: v for k, v in task.items() if v not in ("", None)})
        for task in values.pop("tasks")
    )
    head = json.dumps(values, indent=1).removesuffix("\n}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot use {path.parent}: {error.strerror}; check the path") from error
    write_text(path, f'{head},\n "tasks": [\n  {tasks}\n ]\n}}\n')
