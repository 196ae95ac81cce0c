"""Our environments in trl: what ``GRPOTrainer(environment_factory=…, train_dataset=…)`` asks for.

Uses trl's public surface only (flagged experimental there, so it is smoke-tested here): a class
with ``reset``, one method per tool, and ``get_reward``.

Invariants
----------
* A tool's method has the name, the arguments and the description of the environment's own schema,
  so that the model reads the same tool here as anywhere else.
* Every row of :func:`dataset` holds its task, so that the samples of a group play the same one.
* A fault of the environment is no reward: trl leaves that sample out of the mean (NaN).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from agentdistill.envs.base import TextEnv
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError, EnvError, MissingExtraError
from agentdistill.records import StepResult, Task

if TYPE_CHECKING:
    from datasets import Dataset

Reward = Literal["score", "success", "return"]

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
_OVER = "The episode has ended."


def dataset(
    target: str,
    *,
    options: Mapping[str, Any] | None = None,
    split: str = "train",
    number: int = 256,
    seed: int = 0,
) -> Dataset:
    """Prompts for :func:`environment_factory`: the instruction, and a task in each row.

    Args:
        target: a gymnasium id or ``module:Class``.
        options: arguments of its constructor.
        split: its name of a split, or a role (``tune``, ``report``).
        number: rows; fewer where the split has fewer tasks.
        seed: order of the tasks.
    """
    try:
        from datasets import Dataset
    except ImportError:
        raise MissingExtraError("a dataset for trl", "train") from None
    env = make(target, options)
    try:
        tasks = list(islice(env.tasks(env.card.split(split), seed=seed), number))
        prompt = [
            {"role": "system", "content": env.instruction},
            {"role": "user", "content": ""},  # trl appends what reset() returns
        ]
    finally:
        env.close()
    return Dataset.from_list([{"prompt": prompt, "task": _to_json(task)} for task in tasks])


def environment_factory(
    target: str,
    *,
    options: Mapping[str, Any] | None = None,
    reward: Reward = "score",
) -> type[Playground]:
    """The class that trl instantiates once for every rollout that runs at the same time.

    Args:
        target: a gymnasium id or ``module:Class``; it must describe its actions as ``tools``.
        options: arguments of its constructor.
        reward: what a rollout earns: the last ``score`` in [0, 1], ``success`` as 0 or 1, or the
            ``return``, which is the sum of the environment's rewards.

    Raises:
        ConfigError: unknown environment or reward, or an environment without tools.
    """
    if reward not in ("score", "success", "return"):
        raise ConfigError("one of score, success, return", key="reward", value=reward)
    env = make(target, options)
    tools, name = env.tools, type(env).__name__
    env.close()
    if not tools:
        raise ConfigError("this environment describes no tools", key="target", value=target)
    members: dict[str, Any] = {"_make": lambda self: make(target, options), "_reward": reward}
    members |= {tool["function"]["name"]: _method(tool["function"]) for tool in tools}
    taken = set(members) & {"reset", "get_reward"}
    if taken:
        raise ConfigError("trl keeps this name for itself", key="tool", value=taken.pop())
    return type(name, (Playground,), members)


class Playground:
    """One environment as trl plays it; see :func:`environment_factory`."""

    _make: Callable[[], TextEnv]
    _reward: str

    def __init__(self) -> None:
        """Make the environment; it starts at the first reset."""
        self._env = self._make()
        self._results: list[StepResult] = []
        self._fault = ""

    def reset(self, task: str = "", **_: Any) -> str:
        """Begin the row's task; the first observation (trl passes the row's other columns too)."""
        self._results, self._fault = [], ""
        options = {"task": _from_json(task)} if task else None
        try:
            return self._env.reset(options=options)[0]
        except EnvError as error:
            self._fault = str(error)
            return _OVER

    def get_reward(self) -> float | None:
        """What the rollout earned, None after a fault."""
        if self._fault:
            return None
        if self._reward == "return":
            return sum(result.reward for result in self._results)
        last = self._results[-1] if self._results else StepResult("", 0.0)
        return float(last.success) if self._reward == "success" else last.score

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Execute one tool call; the observation."""
        ended = self._results and (self._results[-1].terminated or self._results[-1].truncated)
        if ended or self._fault:
            return _OVER
        try:
            self._results.append(self._env.act(self._env.tool_action(name, arguments)))
        except EnvError as error:
            self._fault = str(error)
            return _OVER
        return self._results[-1].observation


def _method(function: Mapping[str, Any]) -> Callable[..., str]:
    """A method with the signature and the docstring that make trl describe ``function`` again."""
    name: str = function["name"]
    schema = function["parameters"]

    def call(self: Playground, **arguments: Any) -> str:
        return self._call(name, {k: v for k, v in arguments.items() if v is not None})

    described = {key: _hint(value) for key, value in schema["properties"].items()}
    call.__name__ = call.__qualname__ = name
    call.__annotations__ = {**described, "return": str}
    call.__signature__ = _signature(described, schema.get("required", ()))  # type: ignore[attr-defined]
    call.__doc__ = _docstring(function["description"], schema["properties"])
    return call


def _hint(schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    return _TYPES.get(schema.get("type", "string"), str)


def _signature(described: Mapping[str, Any], required: Sequence[str]) -> inspect.Signature:
    """Of the method: keywords only, those without a default first."""
    empty = inspect.Parameter.empty
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(
            key,
            inspect.Parameter.KEYWORD_ONLY,
            default=empty if key in required else None,
            annotation=described[key],
        )
        for key in sorted(described, key=lambda key: key not in required)
    ]
    return inspect.Signature(parameters, return_annotation=str)


def _docstring(description: str, properties: Mapping[str, Any]) -> str:
    """In the form that transformers reads: every argument must have a line."""
    lines = [f"    {key}: {value.get('description', key)}" for key, value in properties.items()]
    arguments = "\n\nArgs:\n" + "\n".join(lines) if lines else ""
    return f"{description}{arguments}\n\nReturns:\n    What the environment shows next."


def _to_json(task: Task) -> str:
    """As text: rows of a table must all have the same columns."""
    return json.dumps([task.env, task.split, dict(task.payload), task.data, task.index])


def _from_json(text: str) -> Task:
    return Task(*json.loads(text))
