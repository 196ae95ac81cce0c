"""Privileged text: what a scorer, or an informed actor, reads besides the student's prompt.

Invariants
----------
* A note is built per trajectory or not at all: None says that there was nothing to build it from,
  and the caller masks and counts it (K2 of the methods' constraints). Nothing is shortened.
* A note depends on the trajectory, its group, the guide, the skills and the seed; not on the order
  in which they come, and there is no global generator.
* A note never holds what the trajectory's own actor said or did: shown its own failed attempt a
  scorer repeats it (SDPO). Thoughts are in no note.
* In tokens a note is spliced in after the opening, so both sides read identical responses, and a
  stream without its note is, id by id, what an actor without one would have read.
* Where the actor read hints (demonstrations, for a turn each), no view shows them: a stream without
  note and hints is what an actor without either would have read.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from agentdistill.methods.space import ContextAxis
from agentdistill.policy import derive_seed
from agentdistill.records import Author, Stream, Trajectory, Turn, Verdict
from agentdistill.render import Conversation, Renderer, Reply, materialise
from agentdistill.views import Splice, View, ViewBuilder, splice

Guide = Mapping[str, Sequence[Trajectory]]
"""Key of a task → its demonstrations."""

# -- texts ----------------------------------------------------------------------------------------

_PRIVATE = (
    "\n(These lines are for your eyes only. Let them guide you, do not mention them, and answer in "
    "the usual way.)"
)

TEXTS: dict[str, str] = {
    "gold": "This task was solved once. What was seen and done:\n{note}" + _PRIVATE,
    "actions": "These actions, in this order, solved this task:\n{note}" + _PRIVATE,
    "sibling": "Another attempt at this task succeeded. What it saw and did:\n{note}" + _PRIVATE,
    "feedback": "How the attempt that follows will end:\n{note}" + _PRIVATE,
    "skill": "What is known from earlier attempts at this task:\n{note}" + _PRIVATE,
    "demonstrations": "Tasks like this one were solved so:\n{note}" + _PRIVATE,
}
"""The words around a note, by kind; our own. ``ContextAxis.text`` replaces them."""

_OWN_END = "How the attempt that follows will end:"

_ENDS = {
    "success": "The task is solved",
    "failure": "The task is failed",
    "step_limit": "The steps run out before the task is solved",
}


def notes(
    axis: ContextAxis,
    trajectories: Sequence[Trajectory],
    *,
    guide: Guide,
    skills: Mapping[str, str],
    seed: int,
) -> list[str | None]:
    """The privileged text of each trajectory, None where it cannot be built.

    * ``gold``: the shortest successful demonstration of the task, observations and actions (OPSD);
      ``actions``: its actions alone (pi-Distill).
    * ``sibling``: a successful other sample of the group, drawn by the seed (SDPO); ``feedback``
      on the axis adds how the episode itself ended, or says it where no sibling succeeded.
    * ``feedback``: how the episode itself ended; None where that says nothing about the agent
      (``reward_valid``).
    * ``skill``: the trajectory's skill. ``demonstrations``: of ``k`` other tasks, or of as many as
      the guide has.

    Args:
        axis: which kind, and its settings.
        trajectories: complete groups where siblings are asked for (K5).
        guide: demonstrations by the key of their task.
        skills: id of a trajectory → text of its skill.
        seed: of the draws.

    Raises:
        ValueError: kind ``same``, which has no notes.
    """
    if axis.kind == "same":
        raise ValueError("context 'same' reads what the student read: it has no notes")
    sources = _Sources(trajectories, guide, skills, seed)
    return [_note(axis, trajectory, sources) for trajectory in trajectories]


@dataclass(eq=False)
class _Sources:
    """What notes are made from."""

    trajectories: Sequence[Trajectory]
    guide: Guide
    skills: Mapping[str, str]
    seed: int

    def shortest(self, key: str) -> Trajectory | None:
        """The shortest successful demonstration of a task."""
        found = filter(_succeeded, self.guide.get(key, ()))
        return min(found, key=lambda t: (_length(t), _path(t)), default=None)

    @cached_property
    def solved(self) -> list[str]:
        """Keys of the tasks that have a successful demonstration."""
        return sorted(key for key, many in self.guide.items() if any(map(_succeeded, many)))

    @cached_property
    def successes(self) -> dict[tuple[str, str], list[Trajectory]]:
        """The successful trajectories of each group and task, by their ids."""
        found: dict[tuple[str, str], list[Trajectory]] = {}
        for trajectory in sorted(filter(_succeeded, self.trajectories), key=lambda t: t.id):
            found.setdefault((trajectory.group, trajectory.task.key), []).append(trajectory)
        return found

    def generator(self, *parts: object) -> random.Random:
        """A generator for one draw."""
        return random.Random(derive_seed(self.seed, *parts))


def _note(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    kind: str = axis.kind
    body = _BODIES[kind](axis, trajectory, sources)
    if kind == "sibling" and (axis.feedback == "always" or (axis.feedback != "never" and not body)):
        end = _ending(axis, trajectory, sources)
        if not body:
            kind, body = "feedback", end
        elif end:
            body = f"{body}\n{_OWN_END}\n{end}"
    return (axis.text or TEXTS[kind]).replace("{note}", body) if body else None


def _succeeded(trajectory: Trajectory) -> bool:
    return trajectory.success and not trajectory.faults


def _did(turn: Turn) -> tuple[str, ...]:
    """The actions that were executed; all of them where no results are on record."""
    done = turn.actions[: len(turn.results)] if turn.results else turn.actions
    return tuple(action for action in done if action)


def _length(trajectory: Trajectory) -> int:
    return sum(len(_did(turn)) for turn in trajectory.turns)


def _path(trajectory: Trajectory) -> str:
    """Observations and actions, without a thought, from the reset on."""
    lines = [
        f"Seen:\n{turn.observation}\nDone: {' || '.join(done)}"
        for turn in trajectory.turns
        if (done := _did(turn))
    ]
    return "\n".join(lines)


def _gold(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    best = sources.shortest(trajectory.task.key)
    return None if best is None else _path(best)


def _actions(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    best = sources.shortest(trajectory.task.key)
    if best is None:
        return None
    done = [action for turn in best.turns for action in _did(turn)]
    return "\n".join(f"{number}. {action}" for number, action in enumerate(done, 1))


def _sibling(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    mine = trajectory.id
    group = sources.successes.get((trajectory.group, trajectory.task.key), [])
    others = [t for t in group if t.id != mine and mine != t.derived_from]
    others = [t for t in others if t.id != trajectory.derived_from]
    return _path(sources.generator("sibling", mine).choice(others)) if others else None


def _ending(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    results = [result for turn in trajectory.turns for result in turn.results]
    if not results or not trajectory.reward_valid:
        return None
    asked = trajectory.acted
    bad = sum(turn.verdict is not Verdict.OK for turn in asked)
    return (
        f"{_ENDS[trajectory.end]}; the score is {trajectory.score:g}. Of {len(asked)} responses "
        f"{bad} hold an action that is not possible or none at all. The last that is seen:\n"
        f"{results[-1].observation}"
    )


def _skill(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    text = sources.skills.get(trajectory.id, "")
    return text if text.strip() else None


def _demonstrations(axis: ContextAxis, trajectory: Trajectory, sources: _Sources) -> str | None:
    own = trajectory.task.key
    keys = [key for key in sources.solved if key != own]
    chosen = sources.generator("demonstrations", own).sample(keys, min(axis.k, len(keys)))
    shown = [t for key in chosen if (t := sources.shortest(key))]
    parts = [
        f"Task {number}{': ' if t.goal else ''}{t.goal}\n{_path(t)}"
        for number, t in enumerate(shown, 1)
    ]
    return "\n\n".join(parts) or None


_BODIES: dict[str, Callable[[ContextAxis, Trajectory, _Sources], str | None]] = {
    "gold": _gold,
    "actions": _actions,
    "sibling": _sibling,
    "feedback": _ending,
    "skill": _skill,
    "demonstrations": _demonstrations,
}

# -- tokens ---------------------------------------------------------------------------------------


def with_notes(renderer: Renderer, notes: Mapping[str, str]) -> ViewBuilder:
    """The view ``context``: each stream with its trajectory's note.

    A trajectory without one (by its id; "" is none) has no such view. Where the actor itself read
    a note, this one stands in its place. Trajectories without streams have no views at all.

    Raises:
        ValueError: (the view, when it is built) the streams are not this renderer's.
    """

    def build(trajectory: Trajectory, stream: int) -> View | None:
        note = notes.get(trajectory.id, "")
        return _exchanged(trajectory, stream, renderer, note) if note else None

    return build


def without_note(renderer: Renderer) -> ViewBuilder:
    """The view ``student``: each stream without the note and the hints that its actor read.

    The stream itself where the actor read none: then its prompt was the student's.

    Raises:
        ValueError: (the view, when it is built) the streams are not this renderer's.
    """
    return lambda trajectory, stream: _exchanged(trajectory, stream, renderer, "")


def lent(trajectory: Trajectory, renderer: Renderer) -> Trajectory:
    """An episode of somebody else as the student's own, by its text alone (AMPO, LUFFY).

    Nobody sampled these tokens as the student, so no row has a log-probability (K15).
    """
    told = materialise(trajectory, renderer)
    return dataclasses.replace(
        told, provenance={**told.provenance, "edit": "teacher"}, derived_from=trajectory.id
    )


def forget_note(trajectory: Trajectory, renderer: Renderer) -> Trajectory:
    """``trajectory`` as if its actor had read no note (KEPO's edit of a group).

    Its tokens were sampled under another prompt than the one they now stand in, so no row has a
    log-probability (K15). The note stays on record as ``provenance["hint"]``. A trajectory without
    streams has none afterwards; :func:`~agentdistill.render.materialise` makes them.

    Raises:
        ValueError: no note is on record, or the streams are not this renderer's.
    """
    text = _noted(trajectory)
    if not text:
        raise ValueError(
            f"trajectory {trajectory.id}: its actor read no note that could be dropped"
        )
    numbers = range(len(trajectory.streams))
    sizes = [len(renderer.note(_noted(trajectory, number))) for number in numbers]
    streams = tuple(
        _cut(stream, _place(trajectory, number, renderer), sizes[number])
        for number, stream in enumerate(trajectory.streams)
    )
    provenance = {key: v for key, v in trajectory.provenance.items() if key != "note"}
    return dataclasses.replace(
        trajectory,
        turns=tuple(_moved(turn, sizes) for turn in trajectory.turns),
        streams=streams,
        provenance={**provenance, "edit": "hint", "hint": text},
        derived_from=trajectory.id,
    )


def forget_hints(trajectory: Trajectory) -> Trajectory:
    """``trajectory`` as if its actors had read neither note nor hints; the streams go, too.

    :func:`~agentdistill.render.materialise` makes others, as a student without them reads it.
    """
    if not _noted(trajectory) and not any(turn.hint for turn in trajectory.turns):
        return trajectory
    turns = (dataclasses.replace(turn, hint="", span=None) for turn in trajectory.turns)
    provenance = {k: v for k, v in trajectory.provenance.items() if k not in ("note", "renderer")}
    return dataclasses.replace(trajectory, turns=tuple(turns), streams=(), provenance=provenance)


def _noted(trajectory: Trajectory, stream: int | None = None) -> str:
    """The note that the actor of ``trajectory`` read in a stream, "" for none."""
    spans = ((turn, turn.span) for turn in trajectory.turns if stream is not None)
    first = next((turn for turn, span in spans if span and span.stream == stream), None)
    informed = first is None or first.informed
    return str(trajectory.provenance.get("note", "")) if informed else ""


def _exchanged(trajectory: Trajectory, stream: int, renderer: Renderer, text: str) -> View:
    """A stream with the note ``text`` in place of its own (either may be ""), without hints."""
    at = _place(trajectory, stream, renderer)
    note = renderer.note(_noted(trajectory, stream))
    parts = list(_hints(trajectory, stream, renderer, note, renderer.note(text)))
    if not any(part.at <= at for part in parts):
        parts.append(Splice(at, len(note), renderer.note(text)))
    return splice(trajectory.streams[stream], parts)


def _hints(
    trajectory: Trajectory,
    stream: int,
    renderer: Renderer,
    note: tuple[int, ...],
    text: tuple[int, ...],
) -> Iterator[Splice]:
    """What takes the hints out of a stream, message by message.

    Where a message with a hint is the whole prompt, its note is exchanged for ``text`` as well: it
    stands where the hint does.
    """
    if not any(turn.shown for turn in trajectory.turns):
        return
    ids: list[int] = trajectory.streams[stream].ids.tolist()
    conversation = Conversation(renderer, trajectory.goal)
    for turn in trajectory.turns:
        seen = (turn.observation, turn.admissible)
        if turn.shown and turn.span is not None and turn.span.stream == stream:
            shown = conversation.last(*seen, hint=turn.shown)
            plain, end = conversation.last(*seen), turn.span.start
            if end == len(shown) + len(note):
                shown, plain = _with(shown, note, renderer), _with(plain, text, renderer)
            if tuple(ids[end - len(shown) : end]) != shown:
                raise _foreign(trajectory, stream)
            yield Splice(end - len(shown), len(shown), plain)
        nobody = Reply((), (), Author.CONTEXT)
        conversation.add(turn.observation, nobody, chosen=turn.actions, admissible=turn.admissible)


def _with(ids: tuple[int, ...], note: tuple[int, ...], renderer: Renderer) -> tuple[int, ...]:
    at = renderer.note_at(ids)
    return (*ids[:at], *note, *ids[at:])


def _foreign(trajectory: Trajectory, stream: int) -> ValueError:
    return ValueError(
        f"trajectory {trajectory.id}: stream {stream} was made with another tokenizer or "
        "prompt; make the streams again (agentdistill.render.materialise)"
    )


def _place(trajectory: Trajectory, stream: int, renderer: Renderer) -> int:
    """Where the note of a stream stands, or would stand."""
    made = trajectory.provenance.get("renderer", renderer.fingerprint)
    ids: list[int] = trajectory.streams[stream].ids.tolist()
    at = renderer.noted_at(ids, renderer.note(_noted(trajectory, stream)))
    if made != renderer.fingerprint or at is None:
        raise _foreign(trajectory, stream)
    return at


def _cut(stream: Stream, at: int, size: int) -> Stream:
    """``stream`` without ``size`` tokens, and without log-probabilities."""

    def kept(column: Any) -> Any:
        return np.concatenate([column[:at], column[at + size :]])

    logp = np.full(len(stream) - size, np.nan, np.float32)
    return Stream(kept(stream.ids), kept(stream.author), kept(stream.kind), logp)


def _moved(turn: Turn, sizes: Sequence[int]) -> Turn:
    if turn.span is None or not sizes:
        return turn
    size = sizes[turn.span.stream]
    start, end = turn.span.start - size, turn.span.end - size
    return dataclasses.replace(turn, span=dataclasses.replace(turn.span, start=start, end=end))
