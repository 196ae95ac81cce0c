"""Rollouts: gathered requests and kept keys and values, against two ways without.

The same episodes of the same model are played by

* ``ours``: the engine gathers requests into batches and keeps keys and values between turns;
* ``re-prefill``: the same engine, gathered, but every turn computes its whole prompt again;
* ``generate``: ``model.generate`` for one prompt at a time, one episode after the other (of which
  it plays the first few, as more would take no other time each).

Invariants
----------
* Each contender runs in fresh processes, one at a time, in turns (A B C A B C …), on one thread:
  the machine may be busy, and a slow minute then hits all of them. Ratios compare neighbours.
* All draw alike: one number per token from the seed of the response, through the inverse of the
  cumulative distribution (``generate`` does so in a logits processor). So all play the same
  episodes, which is checked on every sampled id, and once more with greedy choice.
* Prompts, parsing and records are those of :func:`agentdistill.rollout.rollout` for everybody.
* A slow environment sleeps in each step. What no schedule of the same work could beat is
  ``ideal = max(model, wait + alone)``: the seconds of the same episodes without any sleep, in
  batches as full as they get; and those of the longest chain, the sleeps of one episode plus the
  episode with most tokens played alone without sleep. ``overlap = ideal / actual``, each the best
  of a few rounds in turns, since a neighbour on the machine can only add to any of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import command, facts, finished, in_turns, peak_mib, results_file, save, show, spread
from torch import Tensor

from agentdistill.config import PromptConfig, TinyModel, TokenizerConfig
from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling
from agentdistill.engines.hf import HFEngine
from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.policy import ModelPolicy
from agentdistill.records import Task, Trajectory, Usage
from agentdistill.render import Renderer
from agentdistill.rollout import Request, rollout, run
from agentdistill.students import tiny

CONTENDERS = ("ours", "re-prefill", "generate")
THINGS = 200
"""Different lines of observations; each is one token."""
ROUNDS = 4
"""Of everything that goes into an overlap."""
STOP_EVERY = 16
"""Of so many ids one ends a response."""


@dataclass(frozen=True, slots=True)
class Size:
    """One comparison.

    Attributes:
        name: of the comparison.
        model: of the tiny Qwen3.
        episodes: at once.
        first: episodes that ``generate`` plays.
        turns: per episode.
        lines: of an observation, a token each.
        most: tokens of a response.
        sleep: seconds of a slow step.
        parts: what is measured (``fast``, ``slow``, ``greedy``), of whom, in how many processes.
        seed: of weights and episodes.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    episodes: int = 32
    first: int = 2
    turns: int = 20
    lines: int = 40
    most: int = 16
    sleep: float = 0.07
    parts: Sequence[tuple[Sequence[str], Sequence[str], int]] = ()
    seed: int = 0


TWO_MILLION = {"hidden": 192, "heads": 6, "layers": 4}
ALL_AT_ONCE = ((("fast", "slow", "greedy"), CONTENDERS, 1),)
FAST, GREEDY = (("fast",), CONTENDERS, 2), (("greedy",), CONTENDERS, 1)
SMALL = (Size("small", {}, 4, 1, 3, 10, 4, 0.02, ALL_AT_ONCE),)
FULL = (
    Size("0.14M", parts=(FAST, (("slow",), CONTENDERS, 1), GREEDY)),
    Size("0.14M, 128 at once", episodes=128, parts=((("slow",), ("ours",), 1),)),
    Size("2M", TWO_MILLION, parts=(FAST, (("slow",), ("ours", "generate"), 1), GREEDY)),
)


# -- the environment -------------------------------------------------------------------------------


class Lines(TextEnv):
    """Shows random lines, whatever is said, until the step limit; may sleep in each step."""

    def __init__(self, lines: int, turns: int, sleep: float = 0.0) -> None:
        """``lines`` per observation, ``turns`` per episode, ``sleep`` seconds per step."""
        super().__init__(max_steps=turns)
        self._lines, self._sleep = lines, sleep

    @property
    def card(self) -> Card:
        """It blocks where it sleeps."""
        isolation = "thread" if self._sleep else "inline"
        return Card("benchmark/Lines-v0", "1", "", "Apache-2.0", ("train",), 1, isolation)

    @property
    def instruction(self) -> str:
        """The system message."""
        return "Say something."

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """As many as are wanted."""
        return (Task(self.card.id, split, {"seed": seed, "n": n}) for n in itertools.count())

    def _begin(self, task: Task) -> str:
        return self._show(0)

    def _advance(self, action: str) -> Moved:
        if self._sleep:  # sleep(0) would give the core away
            time.sleep(self._sleep)
        return Moved(self._show(len(self._actions) + 1), 0.0)

    def _show(self, step: int) -> str:
        generator = random.Random(f"{self.task.key}/{step}")
        return "".join(f"thing {generator.randrange(THINGS)}\n" for _ in range(self._lines))


# -- contenders: run in processes of their own -----------------------------------------------------


class PerEpisode(Engine):
    """transformers' own generation, one prompt at a time."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        """``stop_ids`` end a response."""
        self.name, self._model, self._tokenizer = "generate", model.eval(), tokenizer
        self._stop_ids = list(stop_ids)

    @property
    def capabilities(self) -> Capabilities:
        """What a rollout needs."""
        return Capabilities(ids=True)

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """One response."""
        draw, prompt = Draw(sampling.temperature, seed), torch.tensor([list(ids)])
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # the processor has drawn already
            eos_token_id=self._stop_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            logits_processor=[draw],
        )
        new = tuple(output[0, len(ids) :].tolist())
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        stop = "stop" if new[-1] in self._stop_ids else "length"
        return Sample(new, tuple(draw.logp), text, stop, usage=Usage(len(ids), 0, 0, len(new)))


class Draw:
    """A logits processor that draws a token as our engine does and leaves only that one."""

    def __init__(self, temperature: float, seed: int) -> None:
        """Temperature 0 is greedy."""
        self._temperature, self._random = temperature, random.Random(seed)
        self.logp: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] that are 0 at the drawn id and -inf elsewhere."""
        logp = torch.log_softmax(scores.float() / (self._temperature or 1.0), -1)
        if self._temperature:
            sums = logp.exp().cumsum(-1, dtype=torch.float64)
            level = self._random.random() * sums[:, -1:]
            token = torch.searchsorted(sums, level, right=True).clamp_(max=scores.shape[-1] - 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.logp.append(float(logp.gather(-1, token)))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class Rollouts:
    """Plays episodes with one contender's engine."""

    def __init__(self, contender: str, size: Size) -> None:
        """Build tokenizer, model and engine; the same seed gives the same ones."""
        self.size = size
        self._alone, self._measures_overlap = contender == "generate", contender == "ours"
        texts = [Lines(1, 1).instruction, *[f"thing {n}\n" for n in range(THINGS)] * 4]
        tokenizer: Any = tiny.train_tokenizer(texts, TokenizerConfig())
        model = tiny.build(TinyModel(**size.model), tokenizer, size.seed)
        self.parameters = sum(p.numel() for p in model.parameters())
        count = len(tokenizer)
        stop = random.Random(size.seed).sample(range(count), count // STOP_EVERY)
        self._engine: Engine
        if self._alone:
            self._engine = PerEpisode(model, tokenizer, stop)
        else:
            kept = contender == "ours"
            self._engine = HFEngine(model, tokenizer, stop_ids=stop, reuse_kv=kept)
        self._renderer = Renderer(tokenizer, PromptConfig(), Lines(1, 1).instruction)
        self.numbers = range(size.first if self._alone else size.episodes)

    def play(
        self, numbers: Sequence[int], *, sleep: float = 0.0, greedy: bool = False, turns: int = 0
    ) -> dict[str, Any]:
        """Play the episodes ``numbers``; what they took and the ids that were sampled."""
        size = self.size
        env = partial(Lines, size.lines, turns or size.turns, sleep)
        tasks = list(itertools.islice(env().tasks("train", size.seed), max(numbers) + 1))
        requests = [Request(tasks[n], seed=n, sample=n) for n in numbers]
        sampling = Sampling(temperature=1 - greedy, max_tokens=size.most)
        policy = ModelPolicy("student", self._engine, self._renderer, sampling)
        at_once = 1 if self._alone else len(requests)
        began = time.perf_counter(), time.process_time()
        found = run(rollout(policy, env, requests, concurrency=at_once))
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        return {"wall": wall, "cpu": cpu, **_counts(found), "ids": [_ids(t) for t in found]}

    def fast(self) -> dict[str, Any]:
        """An environment that takes no time."""
        return self.play(self.numbers)

    def slow(self) -> dict[str, Any]:
        """An environment that sleeps; where requests are gathered and kept, also the overlap."""
        found = self.play(self.numbers, sleep=self.size.sleep)
        if not self._measures_overlap:
            return found
        longest = max(self.numbers, key=lambda n: sum(map(len, found["ids"][n])))
        walls: dict[str, list[float]] = {"actual": [], "model": [], "alone": []}
        for _ in range(ROUNDS):
            walls["model"].append(self.play(self.numbers)["wall"])
            walls["alone"].append(self.play([longest])["wall"])
            walls["actual"].append(self.play(self.numbers, sleep=self.size.sleep)["wall"])
        return {**found, **overlap(walls, self.size.turns * self.size.sleep)}

    def greedy(self) -> dict[str, Any]:
        """The likeliest tokens of a few turns, for agreement only."""
        return self.play(self.numbers[:8], greedy=True, turns=min(6, self.size.turns))


def overlap(walls: Mapping[str, Sequence[float]], wait: float) -> dict[str, float]:
    """The overlap, and the seconds that go into it; see the module docstring."""
    best = {name: min(values) for name, values in walls.items()}
    ideal = max(best["model"], wait + best["alone"])
    return {**best, "wait": wait, "ideal": ideal, "overlap": ideal / best["actual"]}


def _ids(episode: Trajectory) -> list[list[int]]:
    """The sampled ids of each turn."""
    if episode.end != "step_limit":
        raise RuntimeError(f"an episode ended by {episode.end}: {episode.faults}")
    (stream,) = episode.streams  # the whole history: each prompt extends the one before
    return [stream.ids[t.span.start : t.span.end].tolist() for t in episode.turns if t.span]


def _counts(found: Sequence[Trajectory]) -> dict[str, int]:
    """Steps, generated tokens, prompt tokens that were computed and that were kept."""
    turns = [turn for episode in found for turn in episode.turns]
    return {
        "steps": len(turns),
        "tokens": sum(turn.usage.output for turn in turns),
        "prefilled": sum(turn.usage.input for turn in turns),
        "kept": sum(turn.usage.cache_read for turn in turns),
    }


def worker(job: Mapping[str, Any]) -> None:
    """Run the parts of one contender; leave what they took."""
    torch.set_num_threads(1)
    rollouts = Rollouts(job["contender"], Size(**job["size"]))
    rollouts.play(rollouts.numbers[:8], turns=2)  # warm
    notes: dict[str, Any] = {part: getattr(rollouts, part)() for part in job["parts"]}
    notes.update(parameters=rollouts.parameters, peak_mib=peak_mib())
    Path(job["result"]).write_text(json.dumps(notes))


# -- the comparison --------------------------------------------------------------------------------


def compare(size: Size, folder: Path) -> dict[str, Any]:
    """Everything about one size."""
    found: dict[str, Any] = {}
    for modes, contenders, repeats in size.parts:
        job = {"size": dataclasses.asdict(size), "parts": list(modes)}
        title = f"{size.name}, {' and '.join(modes)}"
        runs = in_turns(__file__, job, [*contenders] * repeats, folder, title)
        for mode in modes:
            notes = {name: [run[mode] for run in mine] for name, mine in runs.items()}
            found[mode] = {
                name: {
                    **cost(notes[name], notes["ours"]),
                    "same": same([run["ids"] for run in notes[name]], notes["ours"][0]["ids"]),
                    "peak_mib": spread([run["peak_mib"] for run in runs[name]]),
                }
                for name in contenders
            }
        found["parameters"] = runs["ours"][0]["parameters"]
    return {"size": dataclasses.asdict(size), **found}


def cost(runs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates of one contender, and how many times as fast ours is, process by process."""
    found: dict[str, Any] = {key: runs[0][key] for key in ("steps", "tokens", "prefilled", "kept")}
    for kind in ("wall", "cpu"):
        for unit in ("steps", "tokens"):
            found[f"{unit}_per_{kind}_s"] = spread([run[unit] / run[kind] for run in runs])
        # Tokens, as some play fewer episodes; the episodes are the same, and so are the steps.
        pairs = zip(ours, runs, strict=True)
        ratios = [a["tokens"] / a[kind] / (b["tokens"] / b[kind]) for a, b in pairs]
        found[f"ours_{kind}"] = spread(ratios)
    for key in ("overlap", "ideal", "actual", "model", "alone", "wait"):
        if key in runs[0]:
            found[key] = spread([run[key] for run in runs])
    return found


def same(runs: Sequence[Sequence[Any]], ours: Sequence[Any]) -> float:
    """Share of responses whose ids are all those of ours, over the episodes that both played."""
    episodes = [pair for run in runs for pair in zip(run, ours, strict=False)]
    equal = [a == b for mine, other in episodes for a, b in zip(mine, other, strict=True)]
    return float(sum(equal) / len(equal))


# -- output ----------------------------------------------------------------------------------------


def report(found: Mapping[str, Any]) -> str:
    """The table of one size, and the overlap."""
    size = found["size"]
    header = ("", "ours: x CPU s", "x s", "steps/s", "tokens/s", "per CPU s", "same ids", "MiB")
    columns = ("ours_cpu", "ours_wall", "steps_per_wall_s", "tokens_per_wall_s", "tokens_per_cpu_s")
    rows = [
        [
            f"{mode}, {name}",
            *(f"{spent[key]['median']:.3g}" for key in columns),
            f"{spent['same']:.1%}",
            f"{spent['peak_mib']['median']:.0f}",
        ]
        for mode in ("fast", "slow", "greedy")
        for name, spent in found.get(mode, {}).items()
    ]
    episodes = f"{size['episodes']} episodes of {size['turns']} turns"
    lines = [f"{size['name']}: {found['parameters']:,} parameters, {episodes}", show(header, rows)]
    slow = found.get("slow", {}).get("ours")
    if slow:
        seconds = {
            key: slow[key]["median"] for key in ("model", "wait", "alone", "ideal", "actual")
        }
        words = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        lines.append(f"overlap {slow['overlap']['median']:.0%}: {words}")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run, print, write."""
    parser = command("rollout", __doc__)
    given = parser.parse_args()
    if given.job:
        worker(json.loads(given.job))
        return
    known, comparisons = facts("transformers"), []
    settings = {"things": THINGS, "stop_every": STOP_EVERY, "rounds": ROUNDS}
    file = results_file(given)
    for size in SMALL if given.small else FULL:
        with tempfile.TemporaryDirectory() as folder:
            comparisons.append(compare(size, Path(folder)))
        print(f"\n{report(comparisons[-1])}\n", flush=True)
        if file is not None:
            results = {"machine": finished(known), "settings": settings, "comparisons": comparisons}
            save(file, results)


if __name__ == "__main__":
    main()
