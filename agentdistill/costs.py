"""What a policy costs per episode: from recorded usages and prices, and with other caching.

Invariants
----------
* Every token that somebody drew counts: the answer of a turn and what was drawn beside it, each
  under the name of who drew it; episodes lost to faults cost what they cost.
* ``paid`` is what the recorded usages cost. ``uncached`` is what the same calls would cost if no
  prompt token came from a cache or went into one. ``cached`` is an ideal prefix cache: of each
  prompt all is read that stood at the beginning of the same actor's last prompt in the episode, and
  what the next one reads is written.
* How much two prompts share is counted in characters of their messages and applied to their tokens:
  an estimate; only ``paid`` is exact.
* A sum in which one price is unknown is None, never a part of it.

Source: the break-even of in-context distillation, arXiv 2512.02543 (without caching there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise

from agentdistill.prices import Price, prompt_of
from agentdistill.records import Author, Trajectory, Turn, Usage

Prompt = tuple[str, ...]
"""The texts of a prompt's messages, in order."""

Prompts = Callable[[Trajectory, int, bool], Prompt]
"""(trajectory, number of the turn, whether its hint and note are shown) → that prompt."""

KINDS = ("paid", "uncached", "cached")


@dataclass(frozen=True, slots=True)
class Call:
    """One answer that was drawn.

    Attributes:
        actor: who drew it.
        usage: its tokens.
        turn: number of its turn.
        informed: whether its prompt had the turn's hint and the note.
        again: whether the same prompt was asked before in the same turn.
    """

    actor: str
    usage: Usage
    turn: int
    informed: bool = True
    again: bool = False


def calls(trajectory: Trajectory) -> list[Call]:
    """All that was drawn in an episode, in order; nothing of scripted actors and replayed turns."""
    found = []
    for number, turn in enumerate(trajectory.turns):
        if turn.author is Author.REPLAY or turn.usage == Usage():
            continue
        drawn = [Call(one.actor or turn.actor.name, one.usage, number) for one in turn.alternatives]
        own = Call(turn.actor.name, _own(turn), number, turn.informed)
        asked = {call.actor for call in drawn}
        if own.usage != Usage():
            drawn = [*drawn, own] if own.actor not in asked else [own, *drawn]
        seen: set[str] = set()
        for call in drawn:
            found.append(replace(call, again=call.actor in seen))
            seen.add(call.actor)
    return found


def _own(turn: Turn) -> Usage:
    """Of the answer itself: what the alternatives did not take."""
    names = ("input", "cache_read", "cache_write", "output")
    taken = {n: sum(getattr(one.usage, n) for one in turn.alternatives) for n in names}
    return Usage(**{n: max(0, getattr(turn.usage, n) - taken[n]) for n in names})


def tokens(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, int]]:
    """By actor: its calls, and its tokens in the four classes."""
    found: dict[str, dict[str, int]] = {}
    for call in (call for t in trajectories for call in calls(t)):
        mine = found.setdefault(call.actor, dict.fromkeys(_COUNTED, 0))
        mine["calls"] += 1
        for name in _COUNTED[1:]:
            mine[name] += getattr(call.usage, name)
    return found


_COUNTED = ("calls", "input", "cache_read", "cache_write", "output")


def per_episode(
    trajectories: Sequence[Trajectory], prices: Mapping[str, Price | None], prompts: Prompts
) -> dict[str, float] | None:
    """Mean money per episode, for each of :data:`KINDS`; None where a price is not known.

    Args:
        trajectories: all episodes, those with faults included.
        prices: by actor.
        prompts: makes the prompts again, see :data:`Prompts`.
    """
    found = [calls(trajectory) for trajectory in trajectories]
    actors = {call.actor for some in found for call in some}
    if not trajectories or any(prices.get(actor) is None for actor in actors):
        return None
    sums = dict.fromkeys(KINDS, Decimal(0))
    for trajectory, some in zip(trajectories, found, strict=True):
        for actor in sorted({call.actor for call in some}):
            price = prices[actor]
            assert price is not None
            mine = [call for call in some if call.actor == actor]
            ideal = [usage for usage in _ideal(trajectory, mine, prompts)]
            sums["paid"] += sum(price.cost(call.usage) for call in mine)
            sums["uncached"] += sum(price.cost(_uncached(call.usage)) for call in mine)
            sums["cached"] += sum(price.cost(usage) for usage in ideal)
    return {kind: float(money / len(trajectories)) for kind, money in sums.items()}


def _uncached(usage: Usage) -> Usage:
    return Usage(input=prompt_of(usage), output=usage.output)


def _ideal(trajectory: Trajectory, mine: Sequence[Call], prompts: Prompts) -> Iterator[Usage]:
    """The calls of one actor in one episode, through an ideal cache."""
    asked = [call for call in mine if not call.again]
    texts = [prompts(trajectory, call.turn, call.informed) for call in asked]
    shared = [0.0, *(_shared(one, other) for one, other in pairwise(texts))]
    sizes = [prompt_of(call.usage) for call in asked]
    read = [round(share * size) for share, size in zip(shared, sizes, strict=True)]
    kept = [*read[1:], 0]
    at = -1
    for call in mine:
        if call.again:  # the whole prompt was there a moment ago
            yield Usage(cache_read=prompt_of(call.usage), output=call.usage.output)
            continue
        at += 1
        write = min(max(0, kept[at] - read[at]), sizes[at] - read[at])
        rest = sizes[at] - read[at] - write
        yield Usage(rest, read[at], write, call.usage.output)


def _shared(before: Prompt, now: Prompt) -> float:
    """The share of ``now``, in characters, that ``before`` begins with as well."""
    same = 0
    for one, other in zip(before, now, strict=False):
        if one == other:
            same += len(other)
            continue
        same += _common(one, other)
        break
    return same / max(1, sum(map(len, now)))


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def break_even(demonstrations: float, teacher: float, cascade: float) -> float:
    """Episodes after which the demonstrations have paid for themselves; inf for never.

    ``N* = C_demo / (c_teacher - c_cascade)``: before rounding up. Give the teacher's cost *with*
    its prompt cache where it has one: that is what a cascade has to be cheaper than.

    Args:
        demonstrations: what they cost, all together.
        teacher: cost of an episode by the teacher alone.
        cascade: cost of an episode by the cascade.
    """
    saved = teacher - cascade
    return demonstrations / saved if saved > 0 else math.inf


def episodes(number: float) -> str:
    """A number of episodes to break even, for people."""
    return "never" if math.isinf(number) else f"{math.ceil(number):,}"
