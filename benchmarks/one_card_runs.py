"""The contenders of one_card.py, each run in a process of its own.

Invariants
----------
* trl trains on the ids that ours left, from the same weights, by the same objective (reverse KL
  over the vocabulary) and the same AdamW.
* Whatever is timed ends with waiting for the device.
* Only the models are not the library's: :func:`ours` builds them in memory where a run would load a
  folder; all else is its own run and training.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from common import Log, trl_arguments
from one_card_setup import (
    ITERATIONS,
    SETTINGS,
    Busy,
    Size,
    device,
    model,
    peak_gb,
    recipe,
    reset_peak,
    sized,
    tokenizer,
    wait,
)


def ours(size: Size, folder: Path, log: Log) -> None:
    """Two iterations of the library's own training; leaves the ids that it trained on."""
    import agentdistill.iteration as iteration
    from agentdistill.callbacks import Callback
    from agentdistill.records import Author
    from agentdistill.run import Run

    class Here(Run):
        """A run whose models are built in memory."""

        def _fresh(self, key: str) -> tuple[Any, Any]:
            return model(size, key), tokenizer(size.vocabulary)

    class Clock(iteration._Clock):
        """Waits for the device at the end of every phase."""

        def lap(self, phase: str) -> None:
            wait()
            super().lap(phase)

    iteration._Clock = Clock
    log.lap("import")
    config = recipe(size, folder)
    rows: list[list[dict[str, Any]]] = []
    with Here(config) as the_run:
        training = iteration.Training(the_run, config.stage("distilled"), Callback())
        published = _timed(training.student.engine, "publish")
        log.lap("set_up")
        with training.store:
            for n in range(ITERATIONS):
                reset_peak()
                began = time.perf_counter()
                with Busy(log.notes) if n == 0 else nullcontext():
                    metrics = training._iterate(n)
                    wait()
                seconds = {k: v for k, v in metrics.items() if k.startswith("seconds/")}
                step = {"wall": time.perf_counter() - began, "sync": published[-1], **seconds}
                log.notes["steps"].append({**step, "loss": metrics["loss/reverse_kl"]})
                streams = [stream for t in training.experience.last for stream in t.streams]
                rows.append(
                    [
                        {"ids": s.ids.tolist(), "acted": (s.author == Author.ACTOR).tolist()}
                        for s in streams
                    ]
                )
    (folder / "rows.json").write_text(json.dumps(rows))


def _timed(engine: Any, name: str) -> list[float]:
    """Let ``engine`` note the seconds of each call of its method ``name``."""
    seconds: list[float] = []
    known = getattr(engine, name)

    def call(*arguments: Any) -> None:
        wait()
        began = time.perf_counter()
        known(*arguments)
        wait()
        seconds.append(time.perf_counter() - began)

    setattr(engine, name, call)
    return seconds


def trl(size: Size, folder: Path, log: Log, *, checkpointing: bool) -> None:
    """DistillationTrainer on the ids of ``ours``, an optimiser step per iteration."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    rows = [row for part in json.loads((folder / "rows.json").read_text()) for row in part]

    class Given(DistillationTrainer):
        """Takes completions from a list in place of generating them."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            chosen = [rows[int(row["prompt"])] for row in inputs]
            return _padded(chosen, self.accelerator.device, self._tokenizer.pad_token_id)

    class Steps(TrainerCallback):
        """Notes the time."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.lap("set_up")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            log.step()
            log.notes["peak_gb"] = peak_gb()
            reset_peak()

    log.lap("import")
    student = model(size, "student").float()  # as our masters are; bfloat16 by autocast
    with tempfile.TemporaryDirectory() as output:
        trainer = Given(
            model=student,
            teacher_model=model(size, "teacher"),
            args=DistillationConfig(**_settings(size, output, checkpointing)),
            train_dataset=Dataset.from_list([{"prompt": str(n)} for n in range(len(rows))]),
            processing_class=tokenizer(size.vocabulary),
        )
        trainer.add_callback(Steps())
        trainer.remove_callback(PrinterCallback)
        torch.manual_seed(size.seed)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, loss in zip(log.notes["steps"], losses, strict=True):
        step["loss"] = loss


def _settings(size: Size, output: str, checkpointing: bool) -> dict[str, Any]:
    """Arguments of DistillationConfig: the same algorithm, one episode per forward pass."""
    gpu = device() != "cpu"
    return {
        **trl_arguments(SETTINGS, output),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": size.episodes,
        "max_steps": ITERATIONS,
        "shuffle_dataset": False,
        "beta": 1.0,
        "bf16": gpu,
        "use_cpu": not gpu,
        "gradient_checkpointing": checkpointing,
    }


def _padded(rows: Sequence[Mapping[str, Any]], place: Any, pad: int) -> dict[str, Any]:
    """Prompts padded on the left, the rest on the right, and which tokens count."""
    import torch

    starts = [row["acted"].index(True) for row in rows]
    lengths = [len(row["ids"]) for row in rows]
    left, right = max(starts), max(n - s for n, s in zip(lengths, starts, strict=True))
    ids = torch.full((len(rows), left + right), pad)
    mask, acted = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (row, start, length) in enumerate(zip(rows, starts, lengths, strict=True)):
        span = slice(left - start, left - start + length)
        ids[number, span] = torch.tensor(row["ids"])
        mask[number, span] = 1
        acted[number, span] = torch.tensor(row["acted"], dtype=torch.long)
    parts = {
        "prompt_ids": ids[:, :left],
        "prompt_mask": mask[:, :left],
        "completion_ids": ids[:, left:],
        "completion_mask": mask[:, left:],
        "tool_mask": acted[:, left:],
        "num_items_in_batch": acted.sum(),
    }
    return {name: value.to(place) for name, value in parts.items()}


def worker(job: Mapping[str, Any]) -> None:
    """Run one contender; leave what it noted."""
    import torch

    torch.set_num_threads(1)
    log, size, folder = Log(), sized(job["size"]), Path(job["folder"])
    work = {
        "ours": ours,
        "trl": partial(trl, checkpointing=True),
        "trl, no checkpointing": partial(trl, checkpointing=False),
    }
    work[job["contender"]](size, folder, log)
    log.notes.setdefault("peak_gb", peak_gb())
    log.notes["device"] = torch.cuda.get_device_name() if device() != "cpu" else "cpu"
    Path(job["result"]).write_text(json.dumps(log.notes))
