"""One update of distillation by several hands, on the same ids: what `trainer.py` compares.

Every contender takes a :class:`Job`, calls its ``begin`` after its imports, laps ``set_up`` before
the first update, ends each with ``log.step``, laps ``end``, and leaves losses and what it used.
Invariant: ``Job.used`` is read from what went into a loss, not from what was handed over.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from common import Log, trl_arguments
from trainer_data import PAD, Job, Size, batches, padded, samples, unpadded

WARM = 2
"""First steps of each process that do not count in times."""
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "clip_norm": 1.0}
"""Of the optimiser, in the words of a train stage."""


def ours(job: Job, per_turn: bool = False, profiler: Any = None) -> None:
    """What an iteration does with the episodes that it has played.

    Args:
        job: what to do.
        per_turn: a stream for each turn in place of one for each episode.
        profiler: started after the warm updates, stopped after the last.
    """
    from agentdistill.config import TrainStage
    from agentdistill.methods import compile as plan
    from agentdistill.methods.space import Axes, SignalAxis
    from agentdistill.optimise import Optimiser, backward
    from agentdistill.table import build
    from agentdistill.teachers.scorer import LocalScorer

    job.begin()
    kind = "reverse_kl" if job.size.beta == 1 else "jsd"
    axes = Axes(signal=SignalAxis(divergence=kind, coupling="loss", beta=job.size.beta))
    stage = TrainStage(name="x", method="opd-exact", teacher="t", iterations=1, **SETTINGS)
    terms, optimiser = plan.terms(axes), Optimiser(job.student, stage)
    scorer = LocalScorer(plan.TEACHER, job.teacher)
    everything, kept = list(batches(job.size, per_turn)), []
    job.student.train()
    job.log.lap("set_up")
    for n, episodes in enumerate(everything):
        if profiler and n == WARM:
            profiler.start()
        table = build(episodes)
        scorer.score(table, plan.wanted(axes), rows=table.acted, micro_tokens=stage.micro_tokens)
        plan.fill(table, axes)
        heads = {plan.TEACHER: scorer.head}
        done = backward(job.student, table, terms, heads, micro_tokens=stage.micro_tokens)
        optimiser.step(0.5)
        job.losses.append(done.losses[kind])
        kept.append((table.views["plain"], table.offsets, ~table[f"loss/{kind}"].isnan()))
        job.log.step()
    if profiler:
        profiler.stop()
    job.log.lap("end")
    for views, offsets, trained in kept:
        job.used.append([])
        for view, first, last in zip(views, offsets, offsets[1:], strict=False):
            marks = [False] * len(view.ids)
            for position in view.positions[trained[first:last].numpy()].tolist():
                marks[position] = True
            job.used[-1].append((view.ids.tolist(), marks))


def trl(job: Job, per_turn: bool = False, **changes: Any) -> None:
    """DistillationTrainer. ``changes`` are arguments of its configuration.

    It always samples its completions itself; ``_generate``, which is private, is replaced by one
    that hands out the given ids. What the environment said is masked as the answer of a tool.
    """
    import torch  # noqa: F401
    import trl.trainer.distillation_trainer  # noqa: F401  (loaded late otherwise)
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    job.begin()
    rows = [row for batch in batches(job.size, per_turn) for row in samples(batch)]
    count = len(rows) // job.size.steps
    kept: list[Mapping[str, Any]] = []

    class Given(DistillationTrainer):  # type: ignore[misc]
        """Takes its completions from ``rows``."""

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            chosen = [(*rows[int(n)], rows[int(n)][1].index(True)) for n in prompts]
            return (
                [ids[:cut] for ids, _, cut in chosen],
                [ids[cut:] for ids, _, cut in chosen],
                [list(map(int, trained[cut:])) for _, trained, cut in chosen],
                None,
                None,
            )

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kept.append(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    given = {"beta": job.size.beta, "shuffle_dataset": False, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as output:
        trainer = Given(
            model=job.student,
            teacher_model=job.teacher,
            args=DistillationConfig(**_arguments(job.size, count, output), **{**given, **changes}),
            train_dataset=Dataset.from_list([{"prompt": str(n)} for n in range(len(rows))]),
            processing_class=_tokenizer(),
            callbacks=[_clock(job.log)],
        )
        _train(trainer, job)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    for inputs in kept:
        job.used.append([])
        for before, shown, after, real, on in zip(*(inputs[n] for n in names), strict=True):
            ids = before[shown.bool()].tolist() + after[real.bool()].tolist()
            marks = [False] * int(shown.sum()) + on[real.bool()].bool().tolist()
            job.used[-1].append((ids, marks))


def gkd(job: Job) -> None:
    """The experimental GKDTrainer with lmbda = 0: trains on the batches it gets; all public."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    job.begin()
    rows = [row for batch in batches(job.size) for row in samples(batch)]
    kept: list[dict[str, Any]] = []

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        found = padded([rows[row["number"]] for row in chosen])
        kept.append(dict(zip(("input_ids", "attention_mask", "labels"), found, strict=True)))
        return dict(kept[-1])

    given: dict[str, Any] = {
        "beta": job.size.beta,
        "lmbda": 0.0,
        "train_sampling_strategy": "sequential",
    }
    count = len(rows) // job.size.steps
    with tempfile.TemporaryDirectory() as output:
        trainer = GKDTrainer(
            model=job.student,
            teacher_model=job.teacher,
            args=GKDConfig(
                **_arguments(job.size, count, output), **given, gradient_checkpointing=False
            ),
            data_collator=collate,
            train_dataset=Dataset.from_list([{"number": n} for n in range(len(rows))]),
            processing_class=_tokenizer(),
            callbacks=[_clock(job.log)],
        )
        _train(trainer, job)
    job.used = [unpadded(*batch.values()) for batch in kept]


def dense(job: Job) -> None:
    """Plain torch: the padded batch, all logits of both models, a divergence in three lines."""
    import torch
    from torch.nn.functional import kl_div

    job.begin()
    beta, betas = job.size.beta, SETTINGS["betas"]
    weights = list(job.student.parameters())
    adam = torch.optim.AdamW(weights, SETTINGS["lr"], betas, weight_decay=0.0)
    given = [samples(batch) for batch in batches(job.size)]
    job.student.train()
    job.teacher.eval()
    job.log.lap("set_up")
    for batch in given:
        ids, mask, labels = padded(batch)
        rows = labels[:, 1:] != -100
        live = job.student(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            target = job.teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
        log_s, log_t = live[:, :-1][rows].log_softmax(-1), target[:, :-1][rows].log_softmax(-1)
        if beta == 1:
            values = kl_div(log_t, log_s, reduction="none", log_target=True)
        else:
            log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
            from_t = kl_div(log_m, log_t, reduction="none", log_target=True)
            from_s = kl_div(log_m, log_s, reduction="none", log_target=True)
            values = beta * from_t + (1 - beta) * from_s
        loss = values.sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, SETTINGS["clip_norm"])
        adam.step()
        adam.zero_grad()
        job.losses.append(float(loss.detach()))
        job.used.append(unpadded(ids, mask, labels))
        job.log.step()
    job.log.lap("end")


def _arguments(size: Size, count: int, output: str) -> dict[str, Any]:
    """Of a trainer: the same algorithm, and nothing switched on that only costs time."""
    return {
        **trl_arguments(SETTINGS, output),
        "per_device_train_batch_size": count,
        "max_steps": size.steps,
    }


def _tokenizer() -> Any:
    """A tokenizer that only says which ids pad and end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def _clock(log: Log) -> Any:
    """A callback that notes the time."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.lap("set_up")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log.step()

    return Clock()


def _train(trainer: Any, job: Job) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    job.log.lap("end")
    job.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CONTENDERS: dict[str, Callable[..., None]] = {
    "ours": ours,
    "ours, per turn": partial(ours, per_turn=True),
    "trl": trl,
    "trl, per turn": partial(trl, per_turn=True),
    "trl, checkpointing": partial(trl, gradient_checkpointing=True),
    "trl, GKD": gkd,
    "dense": dense,
}
