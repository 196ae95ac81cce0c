"""What `trainer.py` lets its contenders train: sizes, ids, models, and how to tell them apart.

Invariant: everything follows from a :class:`Size`, so that each process makes the same for itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Log, digest

PAD = 0
"""The id that fills short rows."""

Sample = tuple[list[int], list[bool]]
"""Ids of one sequence, and which of them are trained."""


@dataclass(frozen=True, slots=True)
class Size:
    """One comparison.

    Attributes:
        name: of the comparison.
        vocabulary: number of ids of both models.
        student: its hidden size, heads, layers and feed-forward size.
        teacher: the same of the teacher.
        batch: episodes per update.
        turns: of the shortest and of the longest episode of a batch; the others lie between.
        prompt: tokens before the first observation.
        observation: tokens per turn that the environment wrote.
        response: tokens per turn that the student wrote; these are trained.
        beta: of the generalised Jensen-Shannon divergence; 1 is the reverse KL.
        steps: updates per process.
        repeats: processes per contender.
        contenders: who takes part; ratios are to the first.
        seed: of ids and weights.
    """

    name: str
    vocabulary: int = 530
    student: Sequence[int] = (64, 2, 2, 192)
    teacher: Sequence[int] = (96, 3, 2, 256)
    batch: int = 16
    turns: Sequence[int] = (3, 20)
    prompt: int = 10
    observation: int = 4
    response: int = 1
    beta: float = 1.0
    steps: int = 12
    repeats: int = 3
    contenders: Sequence[str] = ("ours", "trl", "trl, checkpointing", "trl, GKD", "dense")
    seed: int = 0


# -- what is trained ------------------------------------------------------------------------------


def batches(size: Size, per_turn: bool = False) -> Iterator[list[Any]]:
    """The trajectories of each update: equal lengths in all of them, other ids.

    With ``per_turn`` every turn is a stream of its own, the whole history before it.
    """
    source = random.Random(size.seed)
    low, high = size.turns
    rest = max(1, size.batch - 1)
    turns = [low + (high - low) * n // rest for n in range(size.batch)]
    for step in range(size.steps):
        yield [_episode(size, source, (step, n), turns[n], per_turn) for n in range(size.batch)]


def _episode(
    size: Size, source: random.Random, key: tuple[int, int], turns: int, per_turn: bool
) -> Any:
    """An episode of random ids, as one stream or as one per turn."""
    from agentdistill.records import Actor, Kind, StreamBuilder, Task, Trajectory, Turn

    def draw(count: int) -> list[int]:
        return [source.randrange(2, size.vocabulary) for _ in range(count)]

    whole, alone, found = StreamBuilder(), [], []
    history = draw(size.prompt)
    said: dict[str, Any] = {
        "logp": [math.nan] * size.response,
        "kind": [Kind.ACT] * size.response,
    }
    for index in range(turns):
        history += draw(size.observation)
        response = draw(size.response)
        builder = StreamBuilder() if per_turn else whole
        span = builder.extend(history, response, **said)
        if per_turn:
            alone += builder.finish()
            span = dataclasses.replace(span, stream=index)
        found.append(Turn(index, "", Actor("student"), span=span))
        history += response
    task = Task("benchmarks/updates", "train", {"step": key[0], "number": key[1]})
    streams = tuple(alone) or whole.finish()
    return Trajectory(task, str(key), 0, tuple(found), streams, "failure", False, 0.0)


def samples(trajectories: Sequence[Any]) -> list[Sample]:
    """The streams of ``trajectories``; what the actor wrote is trained."""
    from agentdistill.records import Author

    streams = [stream for trajectory in trajectories for stream in trajectory.streams]
    return [(s.ids.tolist(), (s.author == Author.ACTOR).tolist()) for s in streams]


def fingerprint(updates: Sequence[Sequence[Sample]]) -> str:
    """What was trained: every token with all that stood before it, update by update.

    Neither the order within an update nor padding counts, nor how often a prefix was repeated.
    """
    whole = hashlib.sha256()
    for update in updates:
        tokens = []
        for ids, trained in update:
            prefix = hashlib.sha256()
            for token, is_trained in zip(ids, trained, strict=True):
                prefix.update(token.to_bytes(4, "little"))
                if is_trained:
                    tokens.append(prefix.digest())
        whole.update(b"".join(sorted(tokens)) + b"update")
    return whole.hexdigest()[:32]


def model(vocabulary: int, shape: Sequence[int], seed: int) -> Any:
    """A Qwen3 with random weights, large enough that distributions are far from uniform."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, heads, layers, feed_forward = shape
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        initializer_range=1.5 / math.sqrt(hidden),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def padded(rows: Sequence[Sample]) -> tuple[Any, Any, Any]:
    """Ids, attention mask and labels (-100 where nothing is trained), padded on the right."""
    import torch

    shape = len(rows), max(len(ids) for ids, _ in rows)
    grid, mask, labels = torch.full(shape, PAD), torch.zeros(shape).long(), torch.full(shape, -100)
    for n, (ids, trained) in enumerate(rows):
        grid[n, : len(ids)] = torch.tensor(ids)
        mask[n, : len(ids)] = 1
        labels[n, : len(ids)] = torch.where(torch.tensor(trained), torch.tensor(ids), -100)
    return grid, mask, labels


def unpadded(ids: Any, mask: Any, labels: Any) -> list[Sample]:
    """The sequences of a padded batch."""
    rows = zip(ids, mask.bool(), labels != -100, strict=True)
    return [(row[real].tolist(), trained[real].tolist()) for row, real, trained in rows]


@dataclass(slots=True)
class Job:
    """What a contender gets, and what it leaves besides the trained student.

    Attributes:
        size: what to do.
        folder: for the first weights.
        log: its clock.
        student: to be trained; made by :meth:`begin`.
        teacher: fixed; made by :meth:`begin`.
        processed: ids that went through the student's body, padding included.
        losses: of each update.
        used: of each update, every sequence.
    """

    size: Size
    folder: Path
    log: Log
    student: Any = None
    teacher: Any = None
    processed: int = 0
    losses: list[float] = field(default_factory=list)
    used: list[list[Sample]] = field(default_factory=list)

    def begin(self) -> None:
        """Everything is imported; make the models."""
        import torch
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401  (loaded late otherwise)
        from safetensors.torch import save_file

        one = torch.ones(1, requires_grad=True)
        one.sum().backward()  # type: ignore[no-untyped-call]
        torch.optim.AdamW([one]).step()  # loads half of torch the first time, whoever calls it
        self.log.lap("import")
        self.student = model(self.size.vocabulary, self.size.student, self.size.seed)
        self.teacher = model(self.size.vocabulary, self.size.teacher, self.size.seed + 1)
        self.student.model.register_forward_pre_hook(self._count, with_kwargs=True)
        start = self.folder / "start.safetensors"
        save_file(dict(self.student.named_parameters()), start)
        self.log.notes["start"] = digest(start)

    def _count(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.processed += (args[0] if args else kwargs["input_ids"]).numel()
