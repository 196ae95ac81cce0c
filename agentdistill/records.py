"""What happened, as plain frozen records: tasks, turns, token streams, trajectories.

Invariants
----------
* No torch here; numpy arrays are never written to after construction.
* ``Task.key`` is identity (environment id, data version, canonical payload); indices are
  presentation.
* A :class:`Stream` is one token sequence that a model really saw. Its columns have equal length.
  Sampled ids are never decoded and encoded again.
* A turn extends the last stream if and only if that stream is an exact prefix of the turn's prompt
  ids; otherwise it opens a new one (:class:`StreamBuilder`). How many streams an episode has is an
  outcome of the prompt preset, never a setting.
* A trajectory is a fact: edits make a new trajectory that names its parent (``derived_from``).
* ``reward_valid`` is false when a curriculum's window or a fault ended the episode: that is not a
  failure of the agent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from agentdistill.columns import Columns

Json = Any
IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


def digest(value: Json, length: int = 16) -> str:
    """Hexadecimal SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:length]


class Author(IntEnum):
    """Who put a token there (a column of every stream)."""

    CONTEXT = 0
    """Prompt, observation, template."""
    ACTOR = 1
    """The policy that acted in this trajectory, whoever that was (see ``Turn.actor``)."""
    TEACHER = 2
    """A teacher's edit inside somebody else's trajectory."""
    FORCED = 3
    """Text put into the actor's mouth, such as a forced opening."""
    REPLAY = 4
    """A replayed action before the hand-over; context, never trained on."""


class Kind(IntEnum):
    """What a token is for (a column of every stream)."""

    CONTEXT = 0
    REASON = 1
    ACT = 2
    FORMAT = 3


class Verdict(StrEnum):
    """What became of a response's action."""

    OK = "ok"
    MISSING = "missing"
    MALFORMED = "malformed"
    INADMISSIBLE = "not_admissible"


@dataclass(frozen=True, slots=True)
class Task:
    """One problem of one environment.

    Attributes:
        env: versioned environment id, such as ``agentdistill/Sokoban-v0``.
        split: the part it belongs to (train, tune, report, …).
        payload: JSON that the environment rebuilds the problem from (level, seed, game hash, …).
        data: version or hash of the environment's data, "" when it needs none.
        index: place in a listing; presentation only.
        key: 16 hex digits of identity; derived, not given.
    """

    env: str
    split: str
    payload: Mapping[str, Json]
    data: str = ""
    index: int | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Derive the key."""
        identity = [self.env, self.data, dict(self.payload)]
        object.__setattr__(self, "key", digest(identity))

    def __hash__(self) -> int:
        """Tasks with the same key are the same task."""
        return hash(self.key)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, in the four classes that providers price."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acted: policy name, version of its weights, and how it sampled."""

    name: str
    version: int = 0
    sampling: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``[start, end)`` of stream number ``stream`` of the same trajectory."""

    stream: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one environment step returned.

    ``optimal`` is True or False where the environment knows the best actions, None where it does
    not (or where the state cannot be solved any more).
    """

    observation: str
    reward: float
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    score: float = 0.0
    valid: bool = True
    optimal: bool | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A sample that was drawn and not executed, with what it cost.

    ``actor`` is the name of who drew it, "" for whoever answered the turn.
    """

    text: str
    actions: tuple[str, ...] = ()
    usage: Usage = Usage()
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One observation and the response to it.

    Attributes:
        index: turns since the environment's reset; replayed turns count.
        observation: what the actor was shown.
        actor: who responded.
        author: ``ACTOR``, or ``REPLAY`` for a turn executed before the hand-over.
        text: the response as text, reasoning included.
        reasoning: the thought inside ``text``, "" when there is none.
        tool_calls: native tool calls, as the provider returned them.
        actions: environment steps asked for; one response may cause several.
        results: what each executed step returned; at most as many as ``actions``.
        verdict: what became of the action.
        stop: why the response ended: ``stop``, ``length``, or ``none`` where nobody sampled.
        reward: sum over ``results``.
        span: the response's tokens, or None for text-only turns.
        alternatives: samples drawn and not executed.
        admissible: actions that the environment listed; empty where the prompt shows no list.
        cut: actions beyond the prompt's limit, asked for and not executed.
        hint: what this turn's prompt said besides, right before the observation (demonstrations);
            no later prompt says it again.
        informed: whether who responded read the hint, and the trajectory's note; a teacher may
            answer without either. Whose samples are in ``alternatives`` did read them.
    """

    index: int
    observation: str
    actor: Actor
    author: Author = Author.ACTOR
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Json], ...] = ()
    actions: tuple[str, ...] = ()
    results: tuple[StepResult, ...] = ()
    verdict: Verdict = Verdict.OK
    stop: str = "none"
    reward: float = 0.0
    usage: Usage = Usage()
    span: Span | None = None
    alternatives: tuple[Alternative, ...] = ()
    admissible: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    hint: str = ""
    informed: bool = True

    @property
    def shown(self) -> str:
        """The hint, where who responded read it."""
        return self.hint if self.informed else ""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One token sequence that a model really saw.

    Attributes:
        ids: token ids [L], int32.
        author: :class:`Author` of each token [L], uint8.
        kind: :class:`Kind` of each token [L], uint8.
        logp: natural log-probability under the distribution that the sampler drew from [L],
            float32; NaN where nobody sampled.
    """

    ids: IntArray
    author: ByteArray
    kind: ByteArray
    logp: FloatArray

    def __post_init__(self) -> None:
        """Refuse columns of different length."""
        lengths = {len(self.ids), len(self.author), len(self.kind), len(self.logp)}
        if len(lengths) != 1:
            raise ValueError(f"stream columns have different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong outside the agent (environment, engine, timeout, replay), in which turn."""

    kind: str
    message: str
    turn: int


@dataclass(frozen=True, slots=True)
class Start:
    """Where the actor began: ``actions`` were replayed first and came from ``source``."""

    actions: tuple[str, ...] = ()
    source: str = "reset"


ENDS = ("success", "failure", "step_limit", "horizon", "budget")
"""How an episode can end; besides these, ``fault:<kind>``."""

REWARD_VALID_ENDS = frozenset({"success", "failure", "step_limit"})


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode, complete.

    Attributes:
        task: what was to be done.
        group: id shared by the samples that are compared with each other (GRPO and others).
        sample: number of this sample within its group.
        turns: in order; replayed turns first.
        streams: the token sequences; empty for text-only trajectories.
        end: one of :data:`ENDS`, or ``fault:<kind>``.
        success: the environment's own verdict.
        score: in [0, 1].
        start: replayed actions and their source.
        horizon: turns the actor was allowed after the hand-over; None means the step limit.
        counter: the curriculum's n when it was sampled.
        faults: what went wrong outside the agent.
        provenance: run, iteration, policy, environment card, prompt, tokenizer, seed.
        derived_from: id of the trajectory this one is an edit of.
        goal: the task in words, as the environment said it after the reset.
    """

    task: Task
    group: str
    sample: int
    turns: tuple[Turn, ...]
    streams: tuple[Stream, ...]
    end: str
    success: bool
    score: float
    start: Start = Start()
    horizon: int | None = None
    counter: int = 0
    faults: tuple[Fault, ...] = ()
    provenance: Mapping[str, Json] = field(default_factory=dict)
    derived_from: str | None = None
    goal: str = ""

    @property
    def id(self) -> str:
        """Identity of this episode: task, group, sample, counter, parent and run."""
        run = self.provenance.get("run", "")
        return digest(
            [self.task.key, self.group, self.sample, self.counter, self.derived_from, run]
        )

    @property
    def reward(self) -> float:
        """Sum of the rewards of the actor's own turns (replayed ones do not count)."""
        return sum(turn.reward for turn in self.acted)

    @property
    def reward_valid(self) -> bool:
        """Whether the outcome says something about the agent."""
        return self.end in REWARD_VALID_ENDS

    @property
    def acted(self) -> tuple[Turn, ...]:
        """The turns after the hand-over."""
        return tuple(turn for turn in self.turns if turn.author is not Author.REPLAY)

    @property
    def env_steps(self) -> int:
        """Environment steps that the actor caused (not the replayed ones)."""
        return sum(len(turn.results) for turn in self.acted)


class StreamBuilder:
    """Grows the streams of one episode, turn by turn, by the exact-prefix rule."""

    def __init__(self) -> None:
        """Start without any stream."""
        self._streams: list[Columns] = []

    @property
    def tail(self) -> list[int]:
        """Ids of the last stream, empty at the start; do not modify."""
        return self._streams[-1].ids if self._streams else []

    def extend(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        *,
        logp: Sequence[float],
        kind: Sequence[int],
        author: Author = Author.ACTOR,
        prompt_author: Sequence[int] | None = None,
        forced: int = 0,
    ) -> Span:
        """Add one turn; return where its response lies.

        Args:
            prompt: the whole prompt of this turn, as token ids.
            response: the response's ids.
            logp: the sampler's log-probability per response token (NaN where nobody sampled).
            kind: :class:`Kind` per response token.
            author: who wrote the response.
            prompt_author: author per prompt token, used only for tokens that are new to the
                stream (``CONTEXT`` by default; replayed turns re-rendered into a new stream).
            forced: how many tokens at the beginning of the response were put into its mouth.
        """
        prompt, tail = list(prompt), self.tail
        known = len(tail)
        if not self._streams or tail != prompt[:known]:
            self._streams.append(Columns())
            known = 0
        columns = self._streams[-1]
        authors = prompt_author[known:] if prompt_author is not None else None
        columns.add(prompt[known:], authors or [Author.CONTEXT] * (len(prompt) - known))
        start = len(columns.ids)
        said = [Author.FORCED] * forced + [author] * (len(response) - forced)
        columns.add(list(response), said, kind, logp)
        return Span(len(self._streams) - 1, start, len(columns.ids))

    def finish(self) -> tuple[Stream, ...]:
        """The streams, frozen."""
        return tuple(Stream(*columns.freeze()) for columns in self._streams)
