"""What every environment is: a gymnasium environment whose observations and actions are text.

Invariants
----------
* ``reset(options={"task": task})`` followed by the same actions gives the same observations,
  rewards and ends, in every process (``check.py`` tests it).
* Observations never contain privileged information; ``info`` has ``success``, ``score`` and
  ``valid`` after every step, and ``optimal`` where the environment knows the best actions.
* ``terminated`` means the problem itself ended; ``truncated`` means the step limit of the card (or
  of the constructor) was reached.
* An invalid action is never an exception: it is a step with ``valid=False``.

Subclasses write ``card``, ``tasks``, ``_begin``, ``_advance`` and what they can of
``expert_action``, ``optimal_actions``, ``admissible``, ``_save`` and ``_load``; the bookkeeping is
here, once.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from agentdistill.errors import ConfigError, EnvError
from agentdistill.records import StepResult, Task

ISOLATIONS = ("inline", "thread", "process", "server")
"""Where an environment's work happens: in the caller's thread because it is quick, in a thread
because it blocks, or in a process or server of its own that the environment itself starts and talks
to (the rollout then waits for it in a thread)."""


class AnyText(gym.spaces.Space[str]):
    """All strings. gymnasium's ``Text`` refuses newlines and characters such as "√"."""

    def __init__(self, examples: Sequence[str] = ("",), seed: int | None = None) -> None:
        """``examples`` are what :meth:`sample` draws from (for actions: the known ones)."""
        self.examples = tuple(examples)
        super().__init__(shape=(), dtype=None, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """One of the examples."""
        return self.examples[int(self.np_random.integers(len(self.examples)))]

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string."""
        return isinstance(x, str)

    @property
    def is_np_flattenable(self) -> bool:
        """Text does not flatten."""
        return False

    def __eq__(self, other: object) -> bool:
        """Equal when the examples are."""
        return isinstance(other, AnyText) and self.examples == other.examples

    def __repr__(self) -> str:
        """Short."""
        return f"AnyText({len(self.examples)} examples)"


@dataclass(frozen=True, slots=True)
class Card:
    """The facts a result needs to be comparable.

    Attributes:
        id: versioned gymnasium id.
        version: version of the engine underneath.
        data: version or hash of the data, "" when there is none.
        licence: SPDX expression of the engine and its data.
        splits: names of the parts.
        step_limit: environment steps after which an episode is truncated.
        isolation: one of :data:`ISOLATIONS`; how a rollout must run it.
        metrics: which of ``success``, ``score``, ``optimal`` mean something here.
        source: paper or repository.
        slots: episodes that one machine should play at once (memory, processes); None: any number.
        roles: the environment's own names of the parts called ``tune`` and ``report``, where they
            are others.
        notes: what else makes numbers comparable, a line each (wording of the data, rules).
        expert_rate: share of the tasks that the expert is known to solve; None: nobody knows.
        restores: whether :meth:`TextEnv.restore` brings everything back; an environment whose
            actions have effects that stay (a mail that is sent) says False.
    """

    id: str
    version: str
    data: str
    licence: str
    splits: tuple[str, ...]
    step_limit: int
    isolation: str = "inline"
    metrics: tuple[str, ...] = ("success", "score")
    source: str = ""
    slots: int | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    expert_rate: float | None = None
    restores: bool = True

    def split(self, name: str) -> str:
        """The environment's own name of the part called ``name``, which may be a role."""
        return self.roles.get(name, name) if name not in self.splits else name

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Availability:
    """What of an environment is on this machine; found without starting anything.

    Attributes:
        package: the software underneath and its version, "" where it is missing.
        data: what data there is, in a few words.
        missing: what is not there and how to get it, a line each.
        needs: what must be there before the environment runs at all; a line each, and empty where
            it does run.
    """

    package: str
    data: str
    missing: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Moved:
    """What :meth:`TextEnv._advance` returns: the outcome of one action.

    ``optimal`` judges the action in the state it was taken in: None where nobody knows.
    """

    observation: str
    reward: float
    terminated: bool = False
    success: bool = False
    score: float = 0.0
    valid: bool = True
    optimal: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class TextEnv(gym.Env[str, str]):
    """Base class of all environments. See the module docstring for what holds."""

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  (gymnasium's convention)

    def __init__(
        self,
        *,
        max_steps: int | None = None,
        render_mode: str | None = None,
        actions: Sequence[str] = ("",),
    ) -> None:
        """Set up the spaces.

        Args:
            max_steps: step limit; None takes the card's.
            render_mode: ``ansi`` or None.
            actions: example actions, for ``action_space.sample()``.
        """
        if max_steps is not None and max_steps < 1:
            raise ConfigError("must be at least 1", key="max_steps", value=max_steps)
        self.render_mode = render_mode
        self.observation_space = AnyText()
        self.action_space = AnyText(actions)
        self._max_steps = max_steps
        self._task: Task | None = None
        self._actions: list[str] = []
        self._observation = ""

    # -- what a subclass must say ---------------------------------------------------------------

    @property
    @abstractmethod
    def card(self) -> Card:
        """The facts about this environment."""

    @property
    @abstractmethod
    def instruction(self) -> str:
        """What an agent must know before the first observation (rules, actions, symbols)."""

    @abstractmethod
    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """Distinct tasks of ``split``, lazily; a generator of levels may go on for ever.

        The same ``seed`` gives the same sequence. Raises ConfigError for an unknown split.
        """

    @abstractmethod
    def _begin(self, task: Task) -> str:
        """Set the state to the start of ``task``; return the first observation."""

    @abstractmethod
    def _advance(self, action: str) -> Moved:
        """Execute one action (never raises for a bad one)."""

    # -- what a subclass may know ---------------------------------------------------------------

    @classmethod
    def availability(cls) -> Availability:
        """What is installed and what data is there."""
        return Availability("built in", "needs none")

    @property
    def goal(self) -> str:
        """What is to be done in the current task, for prompts that forget the first observation.

        "" where every observation says it, or the instruction does.
        """
        return ""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the actions as tools (OpenAI's function format)."""
        return []

    def tool_action(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The action that a native tool call asks for; never raises for a bad call.

        By default the value of the only argument, as text; a call of an unknown tool, or one with
        other arguments, becomes an action that is invalid here.
        """
        known = any(tool["function"]["name"] == name for tool in self.tools)
        values = [value for value in arguments.values() if isinstance(value, str)]
        if known and len(arguments) == len(values) == 1:
            return values[0]
        return f"{name}({json.dumps(dict(arguments), default=str)})"

    def meaning(self, action: str) -> str:
        """What actions that do the same have in common, by default their text; never raises.

        A cascade asks it whether a model's samples agree. :mod:`agentdistill.equivalence` has a
        form for code; it must not depend on the state.
        """
        return action

    def admissible(self) -> list[str] | None:
        """Actions that would be valid now; None where the environment cannot list them."""
        return None

    def expert_action(self) -> str | None:
        """What the expert would do now; None without an expert or when it is too late."""
        return None

    def optimal_actions(self) -> frozenset[str] | None:
        """All best actions now; None where unknown or when the task cannot be solved any more."""
        return None

    def held_out(self, observation: str) -> bool:
        """Whether ``observation`` shows the start of a task outside the training split.

        False where states cannot be told from observations.
        """
        return False

    def _save(self) -> Any:
        """State for :meth:`restore`; None asks for a replay instead."""
        return None

    def _load(self, state: Any) -> None:
        """Set the state saved by :meth:`_save`."""
        raise EnvError(f"{type(self).__name__} saves state but cannot load it")

    # -- gymnasium's interface --------------------------------------------------------------------

    @property
    def step_limit(self) -> int:
        """Steps after which an episode is truncated."""
        return self._max_steps or self.card.step_limit

    @property
    def task(self) -> Task:
        """The current task; EnvError before the first reset."""
        if self._task is None:
            raise EnvError("reset the environment first")
        return self._task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seeds the choice of a task where ``options`` names none.
            options: ``task`` (a Task of this environment).
        """
        super().reset(seed=seed)
        options = dict(options or {})
        task = options.pop("task", None) or self._any_task()
        if options:
            raise ConfigError(
                "unknown reset option; known: task", key=next(iter(options)), value="…"
            )
        if task.env != self.card.id:
            raise ConfigError(f"this environment is {self.card.id}", key="task.env", value=task.env)
        self._task, self._actions = task, []
        self._observation = self._begin(task)
        return self._observation, {"task": task.key, "success": False, "score": 0.0, "valid": True}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Execute ``action``; see the module docstring for ``info``."""
        if self._task is None:
            raise EnvError("reset the environment before the first step")
        moved = self._advance(action)
        self._actions.append(action)
        self._observation = moved.observation
        truncated = not moved.terminated and len(self._actions) >= self.step_limit
        info = {"success": moved.success, "score": moved.score, "valid": moved.valid}
        if moved.optimal is not None:
            info["optimal"] = moved.optimal
        info.update(moved.extra)
        return moved.observation, moved.reward, moved.terminated, truncated, info

    def render(self) -> str | None:
        """The current observation in ``ansi`` mode."""
        return self._observation if self.render_mode == "ansi" else None

    # -- for agents and rollouts ------------------------------------------------------------------

    def act(self, action: str) -> StepResult:
        """:meth:`step` as a record."""
        observation, reward, terminated, truncated, info = self.step(action)
        return StepResult(
            observation,
            float(reward),
            terminated,
            truncated,
            bool(info["success"]),
            float(info["score"]),
            bool(info["valid"]),
            info.get("optimal"),
        )

    def replay(self, actions: Sequence[str]) -> list[StepResult]:
        """Execute ``actions`` in order, stopping where the episode ends."""
        results: list[StepResult] = []
        for action in actions:
            results.append(self.act(action))
            if results[-1].terminated or results[-1].truncated:
                break
        return results

    def attempt(self, actions: Sequence[str]) -> list[StepResult]:
        """What would come of ``actions``; afterwards everything is as it was.

        Raises:
            EnvError: the card says that states cannot be restored, or this one was not.
        """
        if not self.card.restores:
            raise EnvError(f"{self.card.id} cannot restore a state, so nothing can be tried in it")
        before = self.snapshot()
        observation, done = self._observation, list(self._actions)
        try:
            return self.replay(actions)
        finally:
            if self.restore(before) != observation or self._actions != done:
                raise EnvError(f"{self.card.id} is not where it was after its state was restored")

    def snapshot(self) -> Any:
        """Everything :meth:`restore` needs to come back to this moment."""
        saved = self._save()
        return (self.task, list(self._actions), self._observation, copy.deepcopy(saved))

    def restore(self, snapshot: Any) -> str:
        """Return to a snapshot of this environment (of any instance); give its observation."""
        task, actions, observation, state = snapshot
        if state is None:
            self.reset(options={"task": task})
            self.replay(actions)
        else:
            self._task, self._actions, self._observation = task, list(actions), observation
            self._load(copy.deepcopy(state))
        return self._observation

    def _any_task(self) -> Task:
        seed = int(self.np_random.integers(np.iinfo(np.int32).max))
        return next(iter(self.tasks(self.card.splits[0], seed=seed)))
