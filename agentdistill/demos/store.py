"""The collection: built once from successful episodes, searched by many at each step.

Invariants
----------
* Only successful episodes without faults are kept, and of them the steps that the environment
  accepted. The same episodes give the same file, in whatever order they come. Of those that say
  the same word for word one is kept, for all of their tasks.
* A step's score is the weighted mean of its similarities by key. Equal scores: the shorter episode
  first, then by its id, then the earlier step.
* Nothing of the task that is being worked on is ever found for it (``task``), whoever asked: that
  would be its solution. Excluded tasks are never found at all.
* No two windows of one result say the same or share a step.
* An empty collection finds nothing; so does a query that shares nothing with it.

The file ``demos.bin`` in the folder is replaced as a whole and mapped by those who search.
Source: in-context distillation, arXiv 2512.02543; how it combines the keys is not published, the
mean is ours.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentdistill.demos import files
from agentdistill.demos.build import KEYS, TABLES, Skipped, entries, pack, planned
from agentdistill.demos.index import (
    Arrays,
    Dense,
    Embedder,
    Index,
    Lexical,
    SentenceEmbedder,
    Texts,
    code,
)
from agentdistill.demos.window import Match, Step
from agentdistill.errors import ConfigError, StoreError
from agentdistill.files import locked, refusing
from agentdistill.records import FloatArray, Task, Trajectory

FORMAT = 1
FILE = "demos.bin"

EVENLY: Mapping[str, float] = {key: 1.0 for key in KEYS}

Ints = npt.NDArray[np.int32]


class Demos:
    """Demonstrations on the disk; see the module docstring for what holds.

    Attributes:
        folder: where they lie.
        version: hash of everything in them; results name it.
        skipped: what :meth:`build` left out (zeros after :meth:`open`).
    """

    def __init__(
        self,
        folder: Path,
        arrays: Arrays,
        facts: Mapping[str, Any],
        embedder: Embedder | None,
        exclude: Iterable[str],
    ) -> None:
        """Use :meth:`open` or :meth:`build`."""
        self.folder, self.version, self.skipped = folder, str(facts["sha256"])[:16], Skipped()
        self._embedder, self._exclude = embedder, tuple(sorted(set(exclude)))
        self._starts: npt.NDArray[np.int64] = arrays["starts"]
        self._episode: Ints = arrays["episode"]
        self._turn: Ints = arrays["turn"]
        self._columns: dict[str, Ints] = {name: arrays[f"{name}/of"] for name in (*KEYS, *TABLES)}
        self._texts = {name: Texts(_part(arrays, name)) for name in (*KEYS, *TABLES)}
        self._index: dict[str, Index] = {}
        for key in facts["keys"]:
            part = _part(arrays, key)
            self._index[key] = Dense(part, embedder) if embedder else Lexical(part)
        self._guards: npt.NDArray[np.uint64] = arrays["guards"]
        self._guarded: Ints = arrays["guarded"]
        self._hidden = [self._of(key) for key in self._exclude]

    def _of(self, task: str) -> Ints:
        """The episodes of a task."""
        wanted = code(task)
        begin = np.searchsorted(self._guards, wanted)
        return self._guarded[begin : np.searchsorted(self._guards, wanted, "right")]

    @classmethod
    def build(
        cls,
        trajectories: Iterable[Trajectory],
        folder: str | Path,
        *,
        exclude: Container[str] = (),
        plan: Callable[[Trajectory], str] = planned,
        embedder: Embedder | None = None,
    ) -> Demos:
        """Keep what is successful of ``trajectories`` in ``folder``, in place of what is there.

        Args:
            trajectories: of any policy; each is read once.
            folder: made if need be.
            exclude: keys of tasks to leave out (held-out ones).
            plan: the plan of an episode, "" for none.
            embedder: compare by embeddings; None compares by words.

        Raises:
            StoreError: the disk refuses, or somebody else builds there.
        """
        folder, skipped = Path(folder), Skipped()
        arrays, keys = pack(entries(trajectories, exclude, plan, skipped), embedder)
        facts = {"format": FORMAT, "keys": keys, "embedder": embedder.name if embedder else ""}
        with refusing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock"):
                for torn in folder.glob(f".{FILE}.*.tmp"):
                    torn.unlink()
                files.save(folder / FILE, arrays, facts)
        found = cls.open(folder, embedder=embedder)
        found.skipped = skipped
        return found

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        exclude: Iterable[str] = (),
        embedder: Embedder | None = None,
        verify: bool = False,
    ) -> Demos:
        """Map the demonstrations in ``folder``, to search them.

        Args:
            folder: of :meth:`build`; a later build there changes nothing for who has opened it.
            exclude: keys of tasks whose demonstrations are never found.
            embedder: the one they were built with, where it is one of your own.
            verify: read everything and compare it with its hash.

        Raises:
            StoreError: there are none, or they are damaged or of another version.
            ConfigError: they were built with another embedder.
        """
        path = Path(folder) / FILE
        arrays, facts = files.load(path, verify=verify)
        if facts["format"] != FORMAT:
            raise StoreError(f"{path} has layout {facts['format']}, not {FORMAT}: build it again")
        return cls(Path(folder), arrays, facts, _embedder(facts["embedder"], embedder), exclude)

    def __reduce__(self) -> tuple[Callable[..., Demos], tuple[Any, ...]]:
        """Another process maps the file itself."""
        return _reopened, (self.folder, self._exclude, self._embedder)

    def __len__(self) -> int:
        """Steps of all episodes."""
        return len(self._episode)

    @property
    def episodes(self) -> int:
        """Episodes."""
        return len(self._starts) - 1

    def openings(self) -> Iterator[tuple[str, str, str]]:
        """Of each episode its trajectory's id, its goal, and what was seen first."""
        for episode in range(self.episodes):
            first = int(self._starts[episode])
            seen = self._text("observation", first)
            yield self._text("id", episode), self._text("goal", episode), seen

    def search(
        self,
        *,
        goal: str = "",
        observation: str = "",
        plan: str = "",
        task: Task | str | None,
        k: int = 6,
        window: int = 2,
        per_trajectory: int = 1,
        weights: Mapping[str, float] = EVENLY,
    ) -> list[Match]:
        """The ``k`` best windows of ``window`` steps to each side of a matching step.

        Args:
            goal: the task in words.
            observation: what is seen now.
            plan: what is intended.
            task: what is being worked on, or its key: nothing of it is found. None says that it is
                nobody's task, such as a question from outside.
            k: at most so many.
            window: steps before and after the one that matched, fewer at the ends.
            per_trajectory: windows of one episode at most.
            weights: of the keys; one that is missing, or "" in the query, counts nothing.

        Raises:
            ConfigError: a number or weight below its least value, an unknown key.
        """
        _check(k, window, per_trajectory, weights)
        parts = self._similarities(
            {"goal": goal, "plan": plan, "observation": observation}, weights
        )
        if not parts or not k:
            return []
        own = task.key if isinstance(task, Task) else task
        scores = self._scores(parts, weights, own)
        chosen = self._chosen(scores, k, window, per_trajectory)
        return [self._match(step, window, score, parts) for step, score in chosen]

    def _similarities(
        self, query: Mapping[str, str], weights: Mapping[str, float]
    ) -> dict[str, FloatArray]:
        """By key, for each distinct text of it."""
        asked = {key: text for key, text in query.items() if text and weights.get(key, 0) > 0}
        found = {
            key: self._index[key].similarity(text)
            for key, text in asked.items()
            if key in self._index
        }
        return {key: values for key, values in found.items() if values is not None}

    def _scores(
        self, parts: Mapping[str, FloatArray], weights: Mapping[str, float], task: str | None
    ) -> FloatArray:
        """Score of each step; 0 for one that must not be found."""
        total = sum(weights[key] for key in parts)
        episodes = np.zeros(self.episodes, np.float32)
        steps = np.zeros(len(self), np.float32)
        for key, values in parts.items():
            to = steps if key == "observation" else episodes
            to += (values * np.float32(weights[key] / total))[self._columns[key]]
        steps += episodes[self._episode]
        own = [] if task is None else [self._of(task)]
        for episode in np.concatenate([*self._hidden, *own, np.zeros(0, np.int32)]):
            steps[self._starts[episode] : self._starts[episode + 1]] = 0
        return steps

    def _chosen(
        self, scores: FloatArray, k: int, window: int, most: int
    ) -> list[tuple[int, float]]:
        """Matching steps with their scores, best first: no window twice, ``most`` of an episode.

        Uses ``scores`` up. Each round takes the best that is left and then everything away that
        must not follow it, for all steps at once: there may be thousands that look alike.
        """
        found: list[tuple[int, float]] = []
        taken: Counter[int] = Counter()
        while len(found) < k and scores[step := int(scores.argmax())] > 0:
            found.append((step, float(scores[step])))
            episode = int(self._episode[step])
            taken[episode] += 1
            for alike in self._alike(step, window):
                scores[alike] = 0
            begin, end = self._bounds(step, 2 * window)
            if taken[episode] == most:
                begin, end = int(self._starts[episode]), int(self._starts[episode + 1])
            scores[begin:end] = 0
        return found

    def _alike(self, step: int, window: int) -> Iterator[npt.NDArray[np.int64]]:
        """The steps whose windows show what that of ``step`` shows: same goal, seen and done."""
        begin, end = self._bounds(step, window)
        size, goals = end - begin, self._columns["goal"]
        seen, done = self._columns["observation"], self._columns["actions"]
        at = np.flatnonzero((seen == seen[begin]) & (done == done[begin]))
        at = at[at + size <= self._starts[self._episode[at] + 1]]
        at = at[goals[self._episode[at]] == goals[self._episode[step]]]
        for place in range(1, size):
            same = (seen[at + place], done[at + place])
            at = at[(same[0] == seen[begin + place]) & (same[1] == done[begin + place])]
        first, last = self._starts[self._episode[at]], self._starts[self._episode[at] + 1]
        for place in range(size):
            other = at + place
            whole = np.minimum(last, other + window + 1) == at + size
            yield other[whole & (np.maximum(first, other - window) == at)]

    def _bounds(self, step: int, window: int) -> tuple[int, int]:
        """The window around ``step``, clipped at the ends of its episode."""
        episode = self._episode[step]
        first, last = int(self._starts[episode]), int(self._starts[episode + 1])
        return max(first, step - window), min(last, step + window + 1)

    def _text(self, name: str, number: int) -> str:
        return self._texts[name][int(self._columns[name][number])]

    def _match(
        self, step: int, window: int, score: float, parts: Mapping[str, FloatArray]
    ) -> Match:
        episode, (begin, end) = int(self._episode[step]), self._bounds(step, window)
        place = {"goal": episode, "plan": episode, "observation": step}
        return Match(
            trajectory=self._text("id", episode),
            task=self._text("task", episode),
            step=int(self._turn[step]),
            score=score,
            scores={k: float(v[self._columns[k][place[k]]]) for k, v in parts.items()},
            goal=self._text("goal", episode),
            plan=self._text("plan", episode),
            steps=tuple(map(self._step, range(begin, end))),
            at=step - begin,
            before=begin - int(self._starts[episode]),
            after=int(self._starts[episode + 1]) - end,
        )

    def _step(self, step: int) -> Step:
        done = tuple(json.loads(self._text("actions", step)))
        seen, thought = self._text("observation", step), self._text("reasoning", step)
        return Step(int(self._turn[step]), seen, done, thought)


def _part(arrays: Arrays, name: str) -> Arrays:
    """The arrays called ``name/…``."""
    start = f"{name}/"
    return {
        key.removeprefix(start): values for key, values in arrays.items() if key.startswith(start)
    }


def _reopened(folder: Path, exclude: tuple[str, ...], embedder: Embedder | None) -> Demos:
    return Demos.open(folder, exclude=exclude, embedder=embedder)


def _embedder(name: str, given: Embedder | None) -> Embedder | None:
    """The embedder called ``name``, "" for none."""
    if given is not None and given.name != name:
        known = f"built with {name!r}" if name else "built without an embedder"
        raise ConfigError(f"these demonstrations were {known}", key="embedder", value=given.name)
    if given is None and name.startswith(SentenceEmbedder.PREFIX):
        return SentenceEmbedder(name.removeprefix(SentenceEmbedder.PREFIX))
    if given is None and name:
        raise ConfigError(
            f"give the one they were built with: {name!r}", key="embedder", value=None
        )
    return given


def _check(k: int, window: int, per: int, weights: Mapping[str, float]) -> None:
    for name, value, least in (("k", k, 0), ("window", window, 0), ("per_trajectory", per, 1)):
        if value < least:
            raise ConfigError(f"must be at least {least}", key=name, value=value)
    for key, weight in weights.items():
        if key not in KEYS or not 0 <= weight < math.inf:
            remedy = f"keys are {', '.join(KEYS)}, and weights finite and at least 0"
            raise ConfigError(remedy, key=f"weights.{key}", value=weight)
