"""Which trajectories are shown, and what all of them say.

Invariants: every committed trajectory is counted, shards are read one at a time, and what is kept
in memory is what may be shown. The choice is drawn by hash, so it depends on ``seed`` and on the
trajectories only, not on the order in which they are read.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from agentdistill.policy import derive_seed
from agentdistill.records import Author, Trajectory
from agentdistill.report.read import RunData, StageData
from agentdistill.report.tokens import Turns, mean_divergence
from agentdistill.store import Store

FIRST, LAST, FAILED, FAULT = "first iterations", "last iterations", "failed", "fault"
ANY = "drawn at random"
DIVERGENT = "highest divergence"
_END = 0.1
"""Share of a stage's iterations that counts as its beginning, and as its end."""


@dataclass(slots=True, eq=False)
class Shown:
    """A trajectory that may be shown, and why.

    Attributes:
        run: number of its run.
        stage: name of its stage.
        iteration: of that stage.
        trajectory: itself.
        reasons: what it was chosen for.
        tokens: of each turn, where they were scored.
    """

    run: int
    stage: str
    iteration: int
    trajectory: Trajectory
    reasons: list[str] = field(default_factory=list)
    tokens: Turns = field(default_factory=dict)

    @property
    def divergence(self) -> float | None:
        """Mean over its tokens, None where nobody knows."""
        return mean_divergence([token for tokens in self.tokens.values() for token in tokens])


@dataclass(frozen=True, slots=True)
class Depth:
    """Where the episodes of one iteration began, and how far they could go.

    Attributes:
        replayed: mean turns that were replayed.
        allowed: mean turns that the actor had then; up to the step limit where no window was set.
    """

    replayed: float
    allowed: float


@dataclass(slots=True)
class Facts:
    """About all trajectories of one stage of one run.

    Attributes:
        count: how many.
        ends: how they ended.
        faults: how many of each kind.
        messages: the first message of each kind of fault.
        depth: per iteration.
    """

    count: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    depth: dict[int, Depth] = field(default_factory=dict)

    def add(self, iteration: int, batch: Sequence[Trajectory]) -> None:
        """Count one iteration."""
        self.count += len(batch)
        self.ends.update(trajectory.end for trajectory in batch)
        for fault in (fault for trajectory in batch for fault in trajectory.faults):
            self.faults[fault.kind] += 1
            self.messages.setdefault(fault.kind, fault.message)
        if batch:
            self.depth[iteration] = _depth(batch)


def _depth(batch: Sequence[Trajectory]) -> Depth:
    replayed = [sum(turn.author is Author.REPLAY for turn in t.turns) for t in batch]
    limits = [int(t.provenance.get("env", {}).get("step_limit", 0)) for t in batch]
    allowed = [
        limit if t.horizon is None else t.horizon for t, limit in zip(batch, limits, strict=True)
    ]
    return Depth(sum(replayed) / len(batch), sum(allowed) / len(batch))


class _Draw:
    """The ``size`` trajectories with the smallest hash of all that were offered."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[int, int, Shown]] = []
        self._offered = 0

    def offer(self, rank: int, item: Shown) -> None:
        self._offered += 1
        entry = (-rank, self._offered, item)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        elif self.size:
            heapq.heappushpop(self._heap, entry)

    def __iter__(self) -> Iterator[Shown]:
        return (item for *_, item in sorted(self._heap, key=lambda entry: -entry[0]))


def choose(
    runs: Sequence[RunData], stage: str, size: int, pool: int, seed: int
) -> tuple[list[Shown], list[Facts]]:
    """Candidates of one stage, and the facts about it in each run.

    Args:
        runs: seeds of one recipe.
        stage: its name.
        size: how many shall be shown: a third from its beginning and its end, a third that failed
            or broke, the others from anywhere.
        pool: how many are drawn from anywhere (more than are shown, where they are scored first).
        seed: of the choice.
    """
    share = max(1, size // 6)
    draws = {
        FIRST: _Draw(share),
        LAST: _Draw(share),
        FAILED: _Draw(share),
        FAULT: _Draw(share),
        ANY: _Draw(pool),
    }
    facts = [_read(number, run, stage, draws, seed) for number, run in enumerate(runs)]
    return _gather(draws), facts


def _read(number: int, run: RunData, stage: str, draws: dict[str, _Draw], seed: int) -> Facts:
    """Offer every trajectory of a stage of one run."""
    facts = Facts()
    data = next(item for item in run.stages if item.name == stage)
    for iteration, place, batch in _iterations(data):
        facts.add(iteration, batch)
        for trajectory in batch:
            item = Shown(number, stage, iteration, trajectory)
            rank = derive_seed(seed, trajectory.id)
            for reason in _reasons(trajectory, place):
                draws[reason].offer(rank, item)
    return facts


def _iterations(data: StageData) -> Iterator[tuple[int, float, list[Trajectory]]]:
    """Number, place in [0, 1] and trajectories of each iteration."""
    if not data.started:
        return
    with Store(data.folder, readonly=True) as store:
        commits = store.commits(data.name)
        last = max((commit.iteration for commit in commits), default=0)
        for commit in commits:
            batch = [item for ref in commit.shards for item in store.read(ref)]
            yield commit.iteration, commit.iteration / max(last, 1), batch


def _reasons(trajectory: Trajectory, place: float) -> Iterator[str]:
    if place <= _END:
        yield FIRST
    if place >= 1 - _END:
        yield LAST
    if failed(trajectory):
        yield FAILED
    if trajectory.faults:
        yield FAULT
    yield ANY


def failed(trajectory: Trajectory) -> bool:
    """Whether the agent failed (a window or a fault that ended the episode says nothing)."""
    return trajectory.reward_valid and not trajectory.success and not trajectory.faults


def _gather(draws: dict[str, _Draw]) -> list[Shown]:
    """Everything that was drawn, each once with all its reasons, in the order of the stage."""
    found: dict[int, Shown] = {}
    for reason, draw in draws.items():
        for item in draw:
            found.setdefault(id(item), item).reasons.append(reason)
    return list(found.values())


def trim(items: Sequence[Shown], size: int) -> list[Shown]:
    """The ``size`` to show: those drawn for a reason, the most divergent ones, then any."""
    known = [(value, item) for item in items if (value := item.divergence) is not None]
    known.sort(key=lambda pair: -pair[0])
    for _, item in known[: max(1, size // 4)]:
        item.reasons.append(DIVERGENT)
    for item in items:
        if len(item.reasons) > 1 and ANY in item.reasons:
            item.reasons.remove(ANY)
    wanted = sorted(items, key=lambda item: item.reasons == [ANY])[:size]
    return sorted(wanted, key=lambda item: (item.run, item.iteration, item.trajectory.sample))
