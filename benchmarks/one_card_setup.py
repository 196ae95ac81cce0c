"""What one_card.py needs: sizes, an environment that only has lengths, models, and the device.

Invariants: nothing is downloaded and no weight is written; the same seed gives the same weights,
texts and tasks in every process; without a GPU all of it works on the CPU, in float32.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import peak_mib

from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.records import Task

CARD = "benchmarks/Replay-v0"
ITERATIONS = 2
SETTINGS: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.98), "clip_norm": 1.0}
"""Of the optimiser, in the words of a train stage."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 architecture."""

    hidden: int
    layers: int
    heads: int
    groups: int
    feed_forward: int
    tied: bool
    dim: int = 128


@dataclass(frozen=True, slots=True)
class Size:
    """One comparison.

    Attributes:
        name: of the comparison.
        student: what is trained.
        teacher: what scores.
        vocabulary: of both.
        turns: of an episode.
        observation: tokens of one.
        response: tokens of one, at most.
        episodes: per iteration.
        slots: episodes played at once.
        micro_tokens: ids per forward pass.
        seed: of weights, texts and sampling.
    """

    name: str
    student: Shape
    teacher: Shape
    vocabulary: int
    turns: int
    observation: int
    response: int
    episodes: int
    slots: int
    micro_tokens: int
    seed: int = 0


def sized(values: Mapping[str, Any]) -> Size:
    """A size from JSON."""
    shapes = {role: Shape(**values[role]) for role in ("student", "teacher")}
    return Size(**{**values, **shapes})


# -- what plays, and on what -----------------------------------------------------------------------


class Replay(TextEnv):
    """Random words in place of observations; takes every action, ends at the last turn."""

    def __init__(self, turns: int, observation: int, vocabulary: int) -> None:
        """``observation`` words of ``vocabulary`` at each of ``turns``."""
        super().__init__(max_steps=turns)
        self._words, self._known = observation, vocabulary
        self._seed = self._step = 0

    @property
    def card(self) -> Card:
        """The facts."""
        return Card(CARD, "1", "", "Apache-2.0", ("train",), 1000)

    @property
    def instruction(self) -> str:
        """None: the lengths are all that counts."""
        return ""

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """Numbers, for ever."""
        source = random.Random(seed)
        while True:
            yield Task(CARD, split, {"number": source.randrange(1 << 30)})

    def _begin(self, task: Task) -> str:
        self._seed, self._step = task.payload["number"], 0
        return self._text()

    def _text(self) -> str:
        source = random.Random(f"{self._seed}/{self._step}")
        first = len(SPECIAL)
        return " ".join(f"w{source.randrange(first, self._known)}" for _ in range(self._words))

    def _advance(self, action: str) -> Moved:
        self._step += 1
        return Moved(self._text(), 0.0)

    def _save(self) -> Any:
        return self._seed, self._step

    def _load(self, state: Any) -> None:
        self._seed, self._step = state


SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "?")


def tokenizer(vocabulary: int) -> Any:
    """A word is a token: as many words as the models know ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from agentdistill.students.tiny import CHAT_TEMPLATE

    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), vocabulary))]
    table = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(table, unk_token=SPECIAL[5]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        unk_token=SPECIAL[5],
        additional_special_tokens=list(SPECIAL[2:5]),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def device() -> str:
    """The first GPU, else the CPU."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def model(size: Size, role: str) -> Any:
    """Random weights on the device, in bfloat16 on a GPU; the same for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape: Shape = getattr(size, role)
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    place = device()
    torch.manual_seed(size.seed + len(role))
    with torch.device(place):
        dtype = torch.float32 if place == "cpu" else torch.bfloat16
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def recipe(size: Size, folder: Path) -> Any:
    """The configuration; its models are only names here, see one_card_runs.py."""
    from agentdistill.config import load

    options = {name: getattr(size, name) for name in ("turns", "observation", "vocabulary")}
    stage = {
        "name": "distilled",
        "method": "opd-exact",
        "teacher": "teacher",
        "iterations": ITERATIONS,
        "tasks": size.episodes,
        "micro_tokens": size.micro_tokens,
        **SETTINGS,
    }
    return load(
        {
            "name": "one_card",
            "output": str(folder),
            "seed": size.seed,
            "env": {"id": "one_card_setup:Replay", "options": options},
            "prompt": "bare",
            "sampling": {"max_tokens": size.response},
            "models": {"student": {}, "teacher": {}},
            "stages": [stage],
            "concurrency": size.slots,
        }
    )


# -- the device ------------------------------------------------------------------------------------


def wait() -> None:
    """Until the device has done everything."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Forget the highest memory so far; the CPU's cannot be forgotten."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """Highest memory of tensors on the GPU, or of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_mib() * (1 << 20) / 1e9


class Busy:
    """Notes for how many seconds the GPU ran kernels inside the block; nothing on a CPU."""

    def __init__(self, notes: dict[str, Any]) -> None:
        """``notes`` get the key ``busy``."""
        self._notes, self._profile = notes, None

    def __enter__(self) -> None:
        """Start the profiler, of the device alone."""
        from torch.profiler import ProfilerActivity, profile

        if device() != "cpu":
            self._profile = profile(activities=[ProfilerActivity.CUDA]).__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Add up what it saw."""
        self._notes["busy"] = None
        if self._profile is not None:
            self._profile.__exit__(*exception)
            self._notes["busy"] = covered(kernels(self._profile, "CUDA"))


def kernels(profile: Any, kind: str) -> list[tuple[int, int]]:
    """Begin and end, in nanoseconds, of everything that ran on devices of that kind."""
    events = profile.profiler.kineto_results.events()
    mine = (e for e in events if e.device_type().name == kind and not e.is_user_annotation())
    return [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in mine]


def covered(spans: Iterable[tuple[int, int]]) -> float:
    """Seconds that ``spans`` (nanoseconds) cover, where they overlap only once."""
    total = reached = 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e9
