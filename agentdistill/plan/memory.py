"""Memory of one train stage by part, and what is held at once in each phase of an iteration.

Invariants: parts add up; a phase's peak is the sum of the parts that it holds, per device; a part
is called exact only if a test finds the same number of bytes in tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentdistill.config import TrainStage
from agentdistill.engines.kv import FIRST_CAPACITY, FIRST_SLOTS
from agentdistill.methods.space import Axes
from agentdistill.optimise import CHUNK_BYTES
from agentdistill.plan.sizes import Size

PHASES = ("generate", "score", "update", "step")
"""``step`` is the optimiser's, after the last backward pass of an update."""

TOKEN_COPIES, FULL_COPIES = 5, 9
"""float32 matrices of chunk rows times vocabulary that the loss holds at once: logits, their log
probabilities and gradients; a divergence has the teacher's and the products too."""
DRAW_BYTES = 36
"""Bytes per logit of drawing tokens: raw, float32, log-probability, weight, float64 sum."""
PREFILL = 1 << 16
"""Padded tokens of one prefill (the engine's budget)."""
SCORE_LOGITS = 5 * 4 << 24
"""Chunk of logits when tokens are scored: 2**24 numbers, float32, five matrices."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How much one iteration plays and trains.

    Attributes:
        episodes: per iteration.
        context: longest sequence, tokens.
        tokens: that go through the body in an update.
        rows: tokens that are trained.
        turns: acted in an iteration.
        env_steps: taken in an iteration.
        source: where the numbers come from.
    """

    episodes: int
    context: int
    tokens: int
    rows: int
    turns: int
    env_steps: int
    source: str


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory: on which device, in which phases."""

    name: str
    bytes: int
    device: str
    phases: tuple[str, ...]
    exact: bool = False


def parts(
    stage: TrainStage,
    axes: Axes,
    student: Size,
    teacher: Size | None,
    lengths: Lengths,
    slots: int,
) -> list[Part]:
    """Everything that ``stage`` holds, after its first optimiser step.

    Args:
        stage: what is planned.
        axes: of its method.
        student: the model that is trained.
        teacher: the model that acts or scores, if any.
        lengths: of one iteration.
        slots: episodes that are played at once.
    """
    here, always = student.device, PHASES
    found = [
        Part("weights", student.weights, here, always, True),
        Part("float32 masters", student.masters, here, always, True),
        Part("optimiser state", student.state, here, always, True),
        Part("gradients", student.gradients, here, ("update", "step"), True),
        Part("copies of the step", _step(student), here, ("step",)),
    ]
    if teacher is not None:
        found.append(Part("teacher weights", teacher.weights, teacher.device, always, True))
    actor = teacher if axes.actor == "teacher" else student
    if axes.actor != "data" and actor is not None:
        found += _playing(actor, lengths, slots)
    found += _scoring(stage, axes, student, teacher, lengths)
    longest = min(lengths.tokens, max(stage.micro_tokens, lengths.context))
    found.append(Part("activations", _activations(student, longest, lengths), here, ("update",)))
    found.append(Part("loss chunks", _chunks(axes, student, teacher, lengths), here, ("update",)))
    return [part for part in found if part.bytes]


def _step(student: Size) -> int:
    """float32 copies of half-precision gradients, and AdamW's own workspace.

    On a GPU it works on all tensors at once (a copy of everything), elsewhere one by one.
    """
    workspace = 2 * student.largest if student.device == "cpu" else 4 * student.trained
    return student.masters + workspace


def _playing(actor: Size, lengths: Lengths, slots: int) -> list[Part]:
    """Keys and values (held until the weights change), and the forward passes of generation."""
    rows = _power(max(FIRST_SLOTS, slots))
    capacity = _power(max(FIRST_CAPACITY, lengths.context))
    new = min(PREFILL, slots * lengths.context)
    passes = new * actor.work + slots * actor.vocabulary * DRAW_BYTES
    return [
        Part("KV cache", rows * capacity * actor.kv, actor.device, PHASES),
        Part("generation", passes, actor.device, ("generate",)),
    ]


def _power(number: int) -> int:
    """The next power of two: buffers grow by doubling."""
    return 1 << (number - 1).bit_length()


def _scoring(
    stage: TrainStage, axes: Axes, student: Size, teacher: Size | None, lengths: Lengths
) -> list[Part]:
    """One micro-batch without gradients, and the teacher's hidden states of every row."""
    found = []
    tokens = min(lengths.tokens, max(stage.micro_tokens, lengths.context))
    if axes.scores and teacher is not None:
        place, width = teacher.device, teacher.hidden * teacher.each
        chunk = 2 * min(tokens, lengths.rows) * width if axes.full else _logits(teacher, lengths)
        found.append(Part("scoring", tokens * teacher.work + chunk, place, ("score",)))
        if axes.full:
            kept = lengths.rows * width
            found.append(Part("teacher's hidden states", kept, place, ("score", "update", "step")))
    if axes.advantages:
        chunk = tokens * student.work + _logits(student, lengths)
        found.append(Part("scoring by the student", chunk, student.device, ("score",)))
    return found


def _logits(scorer: Size, lengths: Lengths) -> int:
    return min(SCORE_LOGITS, 20 * lengths.rows * scorer.vocabulary)


def _activations(student: Size, tokens: int, lengths: Lengths) -> int:
    """What autograd keeps of a micro-batch, and the hidden states, leaves and gradients of rows."""
    rows = min(tokens, lengths.rows)
    square = student.kept_square * tokens * min(tokens, lengths.context)
    return int(student.kept * tokens + square) + 3 * rows * student.hidden * student.each


def _chunks(axes: Axes, student: Size, teacher: Size | None, lengths: Lengths) -> int:
    """Chunk rows times vocabulary in float32, so many times, and one gradient of the head."""
    rows = min(lengths.rows, max(16, CHUNK_BYTES // (4 * student.vocabulary)))
    copies = FULL_COPIES if axes.full and teacher is not None else TOKEN_COPIES
    head = student.vocabulary * student.hidden * student.each if student.head_trained else 0
    return copies * 4 * rows * student.vocabulary + head


def peaks(found: list[Part]) -> dict[str, dict[str, int]]:
    """Bytes held at once: device → phase → sum of its parts."""
    devices = dict.fromkeys(part.device for part in found)
    return {
        device: {
            phase: sum(p.bytes for p in found if p.device == device and phase in p.phases)
            for phase in PHASES
        }
        for device in devices
    }


def capacity(device: str) -> tuple[str, int | None]:
    """Name and memory of ``device`` in bytes; None where this machine has no such device."""
    import torch

    if device == "cpu":
        return "memory of this machine", _physical()
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        number = torch.device(device).index or 0
        if number < torch.cuda.device_count():
            facts = torch.cuda.get_device_properties(number)
            return facts.name, int(facts.total_memory)
    return "not on this machine", None


def _physical() -> int | None:
    """Memory of the machine, or less where a control group allows less."""
    import os
    from pathlib import Path

    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return min(whole, int(allowed)) if allowed.isdigit() else whole
