"""Chat logs as trajectories: OpenAI-style JSON Lines, so that demonstrations cost nothing.

Invariants
----------
* A line is read as a whole or refused with its number and the reason; nothing is guessed, and a
  line that cannot be read never ends the import.
* A trajectory holds what the log says of the conversation and nothing else of it: no headers, no
  addresses, no keys of requests.
* A request repeats the conversation so far: a line without an outcome that another one continues is
  joined to it, and gives it the thoughts and token counts that a client leaves out.
* The same conversation is the same trajectory (its id comes from its messages), in every file and
  however often it is imported.
* An outcome that the log does not give is unknown, which is no failure: ``end`` is ``horizon`` and
  ``reward_valid`` false.

A line is ``{"messages": […]}``, or a request with its answer, ``{"request": {"messages": […]},
"response": {"choices": […]}}``; each with what is known of the outcome (``success``, ``score``) and
of the task (``task``, ``task_id``, ``goal``, ``plan``, ``split``, ``env``), there or in
``metadata``. Rows of ``agentdistill export`` are such lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agentdistill import actions
from agentdistill.envs.base import TextEnv
from agentdistill.files import refusing
from agentdistill.importing.episodes import CHAT, How, opening_task, trajectory
from agentdistill.importing.lines import Line, Message, read, read_message
from agentdistill.records import Json, Task, Trajectory
from agentdistill.store import Store

__all__ = ["CHAT", "STAGE", "Imported", "Log", "Refusal", "chat_task", "import_log", "read_log"]

STAGE = "imported"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line that cannot be read, counted from 1, and why."""

    line: int
    reason: str


@dataclass(slots=True)
class Log:
    """What a file holds.

    Attributes:
        trajectories: one per conversation, in the order of the file.
        lines: lines that are not blank.
        refused: those of them that cannot be read.
        joined: those that another line continues.
        repeated: those that say what another line says.
    """

    trajectories: list[Trajectory] = field(default_factory=list)
    lines: int = 0
    refused: list[Refusal] = field(default_factory=list)
    joined: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """What :func:`import_log` did: ``added`` new trajectories, ``known`` were there before."""

    log: Log
    added: int
    known: int


def import_log(
    file: str | Path,
    store: Store,
    *,
    env: TextEnv | None = None,
    split: str = "train",
    grammar: str = "plain",
    assume_success: bool = False,
) -> Imported:
    """Read ``file`` and commit what is new of it to ``store`` as one iteration of :data:`STAGE`.

    Arguments and errors as in :func:`read_log`; StoreError where the disk refuses.
    """
    log = read_log(file, env=env, split=split, grammar=grammar, assume_success=assume_success)
    known = {trajectory.id for trajectory in store.trajectories(STAGE)}
    new = [trajectory for trajectory in log.trajectories if trajectory.id not in known]
    if new:
        iteration = max((commit.iteration for commit in store.commits(STAGE)), default=-1) + 1
        shard = store.write(STAGE, iteration, new)
        info = {"file": Path(file).name, "lines": log.lines, "refused": len(log.refused)}
        store.commit(STAGE, iteration, [shard], info)
    return Imported(log, len(new), len(log.trajectories) - len(new))


def read_log(
    file: str | Path,
    *,
    env: TextEnv | None = None,
    split: str = "train",
    grammar: str = "plain",
    assume_success: bool = False,
) -> Log:
    """The conversations of a file; all of it is in memory.

    Args:
        file: JSON Lines, see the module docstring.
        env: the environment that was played; it says what tool calls mean. Without one a call is
            the action ``name({"argument": value})``.
        split: of the tasks, where a line does not say.
        grammar: how an answer without tool calls says what to do.
        assume_success: take conversations without an outcome for successful ones.

    Raises:
        ConfigError: no such grammar.
        StoreError: the file cannot be read.
    """
    how = How(env, split, grammar, assume_success)
    actions.grammar(grammar)  # refuses an unknown one before anything is read
    log = Log()
    with refusing(Path(file)):
        lines = list(_lines(Path(file), env, log))
    known = {prefix for line in lines for prefix in line.prefixes[:-1]}
    told = {line.prefixes[-1]: line.messages[-1] for line in lines}
    kept: dict[str, Line] = {}
    for line in lines:
        last = line.prefixes[-1]
        if last in known and not line.finished:
            log.joined += 1
            continue
        if last in kept:
            log.repeated += 1
            line = line if line.finished and not kept[last].finished else kept[last]
        kept[last] = line
    for line in kept.values():
        pairs = zip(line.messages, line.prefixes, strict=True)
        messages = [_fuller(message, told.get(prefix)) for message, prefix in pairs]
        log.trajectories.append(trajectory(line, messages, how))
    return log


def chat_task(
    messages: Sequence[Mapping[str, Json]], env: str = CHAT, split: str = "train"
) -> Task:
    """The task of a conversation, by which its own recording is never a demonstration for it.

    It is what users said before the first answer: system messages may change from call to call.

    Raises:
        ValueError: a message that cannot be read; and why.
    """
    return opening_task([read_message(message) for message in messages], env, split)


def _lines(file: Path, env: TextEnv | None, log: Log) -> Iterator[Line]:
    """Those that can be read; counts the others."""
    with file.open("rb") as source:
        for number, raw in enumerate(source, 1):
            if not raw.strip():
                continue
            log.lines += 1
            try:
                line = read(number, raw)
                _check(line, env)
                yield line
            except (ValueError, RecursionError) as error:
                log.refused.append(Refusal(number, " ".join(str(error).split())))


def _check(line: Line, env: TextEnv | None) -> None:
    played = line.facts.get("env")
    if env is not None and played not in (None, env.card.id):
        raise ValueError(f"it is of environment {played}, not {env.card.id}")


def _fuller(message: Message, told: Message | None) -> Message:
    """``message``, or the answer itself where a client repeats only a part of it."""
    return told if told is not None and message.role == "assistant" else message
