"""Supervised fine-tuning: this library's loop against trl's SFTTrainer, in one run.

Both train the same model from the same weights on the same token ids, the same trained positions,
the same batches and the same optimiser settings (AdamW, constant rate, clip 1, fp32, one thread).

Invariants
----------
* Each contender runs in fresh processes, one at a time, in turns (A B C A B C …): the machine may
  be busy, and a slow minute then hits all of them. Ratios compare neighbours.
* A step lasts from the end of one optimiser step to the end of the next, so that everything in
  between counts: drawing up the batch, logging, callbacks.
* That all contenders trained on the same positions and started from the same weights is checked in
  every run, on what each of them really used.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, Stopwatch, facts, finished, peak_mib, save, show, spread, work

STAGE = "demos"
WARM = 2
"""First steps of each process that do not count in times."""
CURVE = 20
"""Steps whose losses are compared."""
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.98), "clip_norm": 1.0, "weight_decay": 0.0}
"""Of the optimiser, in the words of a train stage."""


@dataclass(frozen=True, slots=True)
class Size:
    """One comparison.

    Attributes:
        name: of the comparison.
        batch: episodes per optimiser step.
        steps: optimiser steps per process.
        repeats: processes per contender.
        model: changes to the quickstart's teacher.
        vocabulary: the ids of the episodes are spread at random over so many, or None.
        seed: of episodes, weights and spreading.
    """

    name: str
    batch: int = 16
    steps: int = 60
    repeats: int = 5
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vocabulary: int | None = None
    seed: int = 0


SMALL = [Size("small", steps=6, repeats=1)]
FULL = [
    Size("quickstart"),
    Size(
        "large vocabulary",
        steps=22,
        repeats=3,
        model={"hidden": 256, "heads": 8, "layers": 4, "feed_forward": None},
        vocabulary=32_000,
    ),
]


# -- data: made once per size, read by all workers ------------------------------------------------


def prepare(size: Size, folder: Path) -> dict[str, Any]:
    """Leave episodes, the same as rows for trl, and a tokenizer in ``folder``; return the counts.

    The episodes are the quickstart's demonstrations, as its teacher reads them.
    """
    from agentdistill.export import export
    from agentdistill.quickstart import configure
    from agentdistill.recipe import execute
    from agentdistill.render import Renderer, materialise
    from agentdistill.run import Run
    from agentdistill.store import Store

    count = size.batch * size.steps
    overrides = (f"stages.{STAGE}.episodes={count}", f"stages.{STAGE}.batch={min(count, 256)}")
    config = configure(seed=size.seed, output=str(folder), overrides=overrides)
    execute(config, only=[STAGE])
    the_run = Run(config)
    tokenizer = the_run.tokenizer(_model(size))
    renderer = Renderer(tokenizer, config.prompt, the_run.env.instruction)
    episodes = [materialise(episode, renderer) for episode in the_run.episodes(STAGE)]
    if size.vocabulary:
        episodes = _spread(episodes, len(tokenizer), size.vocabulary, size.seed)
        tokenizer.add_tokens([f"<{n}>" for n in range(len(tokenizer), size.vocabulary)])
    tokenizer.save_pretrained(folder / "tokenizer")
    with Store(folder / "episodes") as store:
        store.commit(STAGE, 0, [store.write(STAGE, 0, episodes)], {})
        export(store, folder / "rows.jsonl")
    streams = [stream for episode in episodes for stream in episode.streams]
    return {
        "episodes": len(episodes),
        "vocabulary": len(tokenizer),
        "tokens": sum(map(len, streams)),
        "trained_tokens": sum(int((stream.author == 1).sum()) for stream in streams),
    }


def _spread(episodes: list[Any], known: int, vocabulary: int, seed: int) -> list[Any]:
    """The same episodes with every id replaced by its own random one of ``vocabulary``."""
    import numpy as np

    new = np.random.default_rng(seed).permutation(vocabulary)[:known].astype(np.int32)

    def swap(stream: Any) -> Any:
        return dataclasses.replace(stream, ids=new[stream.ids])

    return [dataclasses.replace(e, streams=tuple(map(swap, e.streams))) for e in episodes]


def _model(size: Size) -> Any:
    """The configuration of the model: the quickstart's teacher with the changes of ``size``."""
    from agentdistill.quickstart import configure

    return configure().models["teacher"].model_copy(update=dict(size.model))


def _fresh(size: Size, folder: Path) -> tuple[Any, Any]:
    """The model at its first weights, and the tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from agentdistill.students import tiny

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return tiny.build(_model(size), tokenizer, size.seed), tokenizer


# -- contenders: run in processes of their own ----------------------------------------------------


class Log:
    """What a worker notes about itself."""

    def __init__(self) -> None:
        """Start the clock."""
        self.notes: dict[str, Any] = {}
        self.losses: list[float] = []
        self._steps: list[dict[str, float]] = []
        self._clock = Stopwatch()

    def imported(self) -> None:
        """All imports are done."""
        self.notes["import"] = self._clock.lap()

    def ready(self) -> None:
        """Model and data are loaded; the first step begins."""
        self.notes["set_up"] = self._clock.lap()
        self.notes["mib_before"] = peak_mib()

    def step(self) -> None:
        """An optimiser step is done."""
        self._steps.append(self._clock.lap())

    def to_json(self, model: Any, start: str, trained: str, mib: float) -> dict[str, Any]:
        """Everything, with the digests of what was used."""
        steps = {kind: [step[kind] for step in self._steps] for kind in ("wall", "cpu")}
        digests = {"start": start, "trained": trained, "end": _weights(model)}
        return {**self.notes, **digests, "mib": mib, "steps": steps, "losses": self.losses}


def ours(
    size: Size, folder: Path, log: Log, *, micro_tokens: int = 16384, decay: float = 0.0
) -> dict[str, Any]:
    """What an iteration on recorded episodes does: table, method's columns, backward, step."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  (loaded lazily otherwise)

    from agentdistill.config import TrainStage
    from agentdistill.methods import compile as plan
    from agentdistill.methods.index import get
    from agentdistill.optimise import Optimiser, backward
    from agentdistill.store import Store
    from agentdistill.table import build

    log.imported()
    model, _ = _fresh(size, folder)
    start = _weights(model)
    settings = {**SETTINGS, "weight_decay": decay, "micro_tokens": micro_tokens}
    stage = TrainStage(name="taught", method="sft", iterations=size.steps, **settings)
    axes = get("sft").axes
    terms, optimiser = plan.terms(axes), Optimiser(model, stage)
    with Store(folder / "episodes", readonly=True) as store:
        episodes = list(store.trajectories(STAGE))
    model.train()
    log.ready()
    for first in range(0, len(episodes), size.batch):
        table = build(episodes[first : first + size.batch])
        plan.fill(table, axes)
        batch = backward(model, table, terms, {}, micro_tokens=stage.micro_tokens)
        optimiser.step(first / len(episodes))
        log.losses.append(batch.losses["nll"])
        log.step()
    mib = peak_mib()
    table = build(episodes)
    plan.fill(table, axes)
    rows = table["rows/kd"]
    places = zip(
        *(table[name][rows].tolist() for name in ("stream", "position", "token")), strict=True
    )
    _keep(model, folder, log)
    return log.to_json(model, start, _digest(places), mib)


def trl(
    size: Size, folder: Path, log: Log, *, padding_free: bool = False, decay: float = 0.0
) -> dict[str, Any]:
    """SFTTrainer on rows of ``input_ids`` and ``labels``, which it takes as they are."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        """Notes the time."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.ready()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log.step()

    log.imported()
    model, tokenizer = _fresh(size, folder)
    start = _weights(model)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**_trl_settings(size, output, padding_free, decay)),
            train_dataset=Dataset.from_list(_rows(folder / "rows.jsonl")),
            processing_class=tokenizer,
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        mib = peak_mib()
    log.losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    labels = enumerate(trainer.train_dataset["labels"])
    trained = ((n, at, i) for n, row in labels for at, i in enumerate(row) if at and i != -100)
    _keep(model, folder, log)
    return log.to_json(model, start, _digest(trained), mib)


def _trl_settings(size: Size, output: str, padding_free: bool, decay: float) -> dict[str, Any]:
    """Arguments of SFTConfig: the same algorithm, and nothing on that would only cost time."""
    beta1, beta2 = SETTINGS["betas"]
    same = {
        "per_device_train_batch_size": size.batch,
        "max_steps": size.steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": SETTINGS["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "weight_decay": decay,
        "max_grad_norm": SETTINGS["clip_norm"],
        "max_length": None,
        "bf16": False,
    }
    return {
        **same,
        "output_dir": output,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "padding_free": padding_free,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _rows(path: Path) -> list[dict[str, list[int]]]:
    """One row per stream of the exported episodes; only what the actor wrote has labels."""
    rows = []
    for line in path.read_text().splitlines():
        episode = json.loads(line)
        for ids, authors in zip(episode["ids"], episode["authors"], strict=True):
            pairs = zip(ids, authors, strict=True)
            rows.append({"input_ids": ids, "labels": [i if a == 1 else -100 for i, a in pairs]})
    return rows


def _digest(parts: Iterable[Any]) -> str:
    content = hashlib.sha256()
    for part in parts:
        content.update(repr(part).encode())
    return content.hexdigest()[:16]


def _weights(model: Any) -> str:
    """Digest of all parameters."""
    content = hashlib.sha256()
    for name, value in model.named_parameters():
        content.update(name.encode() + value.detach().numpy().tobytes())
    return content.hexdigest()[:16]


def _keep(model: Any, folder: Path, log: Log) -> None:
    """Save the final weights for the comparison."""
    from safetensors.torch import save_file

    path = folder / f"weights-{len(list(folder.glob('weights-*')))}.safetensors"
    save_file({name: value.detach() for name, value in model.named_parameters()}, path)
    log.notes["weights"] = path.name


TIMED: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours,
    "trl": trl,
    "trl, padding-free": partial(trl, padding_free=True),
}
CONTROLS: dict[str, Callable[..., dict[str, Any]]] = {
    "ours, 4 micro-batches or more": partial(ours, micro_tokens=512),
    "ours, decay 0.1": partial(ours, decay=0.1),
    "trl, decay 0.1": partial(trl, decay=0.1),
}
"""Run once, for agreement only: rounding alone, and what weight decay means."""


def worker(job: Mapping[str, Any]) -> None:
    """Run one contender and write what it noted to the job's ``result``."""
    contender = {**TIMED, **CONTROLS}[job["contender"]]
    found = contender(Size(**job["size"]), Path(job["folder"]), Log())
    Path(job["result"]).write_text(json.dumps(found))
