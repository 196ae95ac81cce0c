"""Supervised fine-tuning: this library's loop against trl's SFTTrainer, in one run.

Both train the same model from the same weights on the same token ids, the same trained positions,
the same batches and the same optimiser settings (AdamW, constant rate, clip 1, fp32, one thread).

Invariants
----------
* Each contender runs in fresh processes, one at a time, in turns (A B C A B C …): the machine may
  be busy, and a slow minute then hits all of them. Ratios compare neighbours.
* A step lasts from the end of one optimiser step to the end of the next, so that everything in
  between counts: putting the batch together, metrics, callbacks.
* That all contenders started from the same weights and trained the same positions is checked in
  every run, on what each of them really used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    Log,
    agreement,
    command,
    cost,
    digest,
    facts,
    finished,
    in_turns,
    results_file,
    save,
    tables,
    trl_arguments,
)

STAGE = "demos"
WARM = 2
"""First steps of each process that do not count in times."""
CURVE = 20
"""Steps whose losses are compared."""
DECAY = 0.1
"""Weight decay of the controls that have any."""
DECAYED = ("ours, decay", "trl, decay", "trl, decay on all")
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "clip_norm": 1.0}
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
        everything: train every token and not only the actor's.
        contenders: who takes part.
        controls: who runs once more, for agreement only.
        seed: of episodes, weights and spreading.
    """

    name: str
    batch: int = 16
    steps: int = 20
    repeats: int = 3
    model: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None
    everything: bool = False
    contenders: Sequence[str] = ("ours", "trl", "trl, padding-free")
    controls: Sequence[str] = ()
    seed: int = 0


BOTH = ("ours", "trl")
WIDE = {"hidden": 256, "heads": 8, "layers": 4, "feed_forward": None}
SMALL = (Size("small", batch=4, steps=5, repeats=1, contenders=BOTH),)
FULL = (
    Size("quickstart", steps=60, repeats=5, controls=("ours, cut finer", *DECAYED)),
    Size("quickstart, all tokens", steps=40, everything=True, contenders=BOTH),
    Size("large head", model=WIDE, vocabulary=32_000),
    Size("large head, all tokens", 16, 8, 3, WIDE, 32_000, everything=True, contenders=BOTH),
)


# -- data: made once per size, read by all workers ------------------------------------------------


def prepare(size: Size, folder: Path) -> dict[str, Any]:
    """Leave episodes, the same as rows for trl, and a tokenizer in ``folder``; return the counts.

    The episodes are the quickstart's demonstrations, as its teacher reads them.
    """
    from agentdistill.export import export
    from agentdistill.quickstart import configure
    from agentdistill.recipe import execute
    from agentdistill.records import Author
    from agentdistill.render import Renderer, materialise
    from agentdistill.run import Run
    from agentdistill.store import Store

    number = size.batch * size.steps
    overrides = (f"stages.{STAGE}.episodes={number}", "evaluate.policies=[]")
    config = configure(seed=size.seed, output=str(folder), overrides=overrides)
    execute(config, only=[STAGE])
    the_run = Run(config)
    tokenizer = the_run.tokenizer(_model(size))
    renderer = Renderer(tokenizer, config.prompt, the_run.env.instruction)
    episodes = [materialise(episode, renderer) for episode in the_run.episodes(STAGE)]
    episodes = _change(episodes, size, len(tokenizer))
    if size.vocabulary:
        tokenizer.add_tokens([f"<{n}>" for n in range(len(tokenizer), size.vocabulary)])
    tokenizer.save_pretrained(folder / "tokenizer")
    with Store(folder / "episodes") as store:
        store.commit(STAGE, 0, [store.write(STAGE, 0, episodes)], {})
        export(store, folder / "rows.jsonl")
    authors = [stream.author for episode in episodes for stream in episode.streams]
    batches = [authors[first : first + size.batch] for first in range(0, number, size.batch)]
    return {
        "episodes": len(episodes),
        "vocabulary": len(tokenizer),
        "tokens": sum(map(len, authors)),
        "trained_tokens": sum(int((author == Author.ACTOR).sum()) for author in authors),
        "padded_tokens": sum(len(batch) * max(map(len, batch)) for batch in batches),
    }


def _change(episodes: list[Any], size: Size, known: int) -> list[Any]:
    """The episodes with ids spread over the vocabulary and other authors, as ``size`` wants."""
    import numpy as np

    from agentdistill.records import Author

    new = np.arange(known, dtype=np.int32)
    if size.vocabulary:
        new = np.random.default_rng(size.seed).permutation(size.vocabulary).astype(np.int32)

    def changed(stream: Any) -> Any:
        author = stream.author
        if size.everything:  # but the first: nothing predicts it
            author = np.full_like(author, Author.ACTOR)
            author[0] = Author.CONTEXT
        return dataclasses.replace(stream, ids=new[stream.ids], author=author)

    return [dataclasses.replace(e, streams=tuple(map(changed, e.streams))) for e in episodes]


def _model(size: Size) -> Any:
    """The configuration of the model: the quickstart's teacher with the changes of ``size``."""
    from agentdistill.quickstart import configure

    return configure().models["teacher"].model_copy(update=dict(size.model))


# -- contenders: run in processes of their own ----------------------------------------------------


@dataclass(slots=True)
class Done:
    """What a contender leaves: the trained model, its losses, (stream, position, token) trained."""

    model: Any
    losses: list[float]
    trained: Iterable[tuple[int, int, int]]


def ours(size: Size, folder: Path, log: Log, **changes: Any) -> Done:
    """What an iteration on recorded episodes does: table, method's columns, backward, step.

    ``changes`` are keys of the train stage.
    """
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  (loaded late otherwise)

    from agentdistill.config import TrainStage
    from agentdistill.methods import compile as plan
    from agentdistill.methods.index import get
    from agentdistill.optimise import Optimiser, backward
    from agentdistill.store import Store
    from agentdistill.table import build

    log.lap("import")
    model, _ = _fresh(size, folder, log)
    settings = {"name": "taught", "method": "sft", "iterations": size.steps, **SETTINGS}
    stage = TrainStage(**{**settings, **changes})
    axes = get("sft").axes
    terms, optimiser = plan.terms(axes), Optimiser(model, stage)
    with Store(folder / "episodes", readonly=True) as store:
        episodes = list(store.trajectories(STAGE))
    losses = []
    model.train()
    log.lap("set_up")
    for first in range(0, len(episodes), size.batch):
        table = build(episodes[first : first + size.batch])
        plan.fill(table, axes)
        batch = backward(model, table, terms, {}, micro_tokens=stage.micro_tokens)
        optimiser.step(first / len(episodes))
        losses.append(batch.losses["nll"])
        log.step()
    log.lap("end")
    table = build(episodes)
    plan.fill(table, axes)
    rows = table["rows/kd"]
    columns = (table[name][rows].tolist() for name in ("stream", "position", "token"))
    return Done(model, losses, zip(*columns, strict=True))


def trl(size: Size, folder: Path, log: Log, *, on_all: bool = False, **changes: Any) -> Done:
    """SFTTrainer on rows of ``input_ids`` and ``labels``, which it takes as they are.

    ``changes`` are arguments of SFTConfig. With ``on_all`` the trainer gets an optimiser that
    decays the norms too, which its own does not.
    """
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  (loaded late otherwise)
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Steps(TrainerCallback):
        """Notes the time."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.lap("set_up")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log.step()

    log.lap("import")
    model, tokenizer = _fresh(size, folder, log)
    optimiser = None
    if on_all:
        plain = {"lr": SETTINGS["lr"], "betas": SETTINGS["betas"], "weight_decay": DECAY}
        optimiser = torch.optim.AdamW(model.parameters(), **plain)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**{**_trl_settings(size, output), **changes}),
            train_dataset=Dataset.from_list(_rows(folder / "rows.jsonl")),
            processing_class=tokenizer,
            callbacks=[Steps()],
            optimizers=(optimiser, None),
        )
        trainer.remove_callback(PrinterCallback)
        trained_on: Any = trainer.train_dataset
        trainer.train()
    log.lap("end")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    labels = enumerate(trained_on["labels"])
    trained = ((n, at, i) for n, row in labels for at, i in enumerate(row) if at and i != -100)
    return Done(model, losses, trained)


def _trl_settings(size: Size, output: str) -> dict[str, Any]:
    """Arguments of SFTConfig: the same algorithm, and nothing switched on that only costs time."""
    return {
        **trl_arguments(SETTINGS, output),
        "per_device_train_batch_size": size.batch,
        "max_steps": size.steps,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "gradient_checkpointing": False,
    }


def _rows(path: Path) -> list[dict[str, list[int]]]:
    """One row per stream of the exported episodes; only what the actor wrote has labels."""
    from agentdistill.records import Author

    rows = []
    for line in path.read_text().splitlines():
        episode = json.loads(line)
        for ids, authors in zip(episode["ids"], episode["authors"], strict=True):
            pairs = zip(ids, authors, strict=True)
            labels = [i if author == Author.ACTOR else -100 for i, author in pairs]
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def _fresh(size: Size, folder: Path, log: Log) -> tuple[Any, Any]:
    """The model at its first weights, and the tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from agentdistill.students import tiny

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = tiny.build(_model(size), tokenizer, size.seed)
    save_file(_weights(model), folder / "start.safetensors")
    log.notes["start"] = digest(folder / "start.safetensors")
    return model, tokenizer


def _weights(model: Any) -> dict[str, Any]:
    return {name: value.detach() for name, value in model.named_parameters()}


CONTENDERS: dict[str, Callable[..., Done]] = {
    "ours": ours,
    "trl": trl,
    "trl, padding-free": partial(trl, padding_free=True),
    "ours, cut finer": partial(ours, micro_tokens=256),
    DECAYED[0]: partial(ours, weight_decay=DECAY),
    DECAYED[1]: partial(trl, weight_decay=DECAY),
    DECAYED[2]: partial(trl, on_all=True),
}
PAIRS = {
    "trl": "ours",
    "trl, padding-free": "ours",
    "ours, cut finer": "ours",
    "trl, decay": "ours, decay",
    "trl, decay on all": "ours, decay",
}
"""Who is compared with whom for agreement; cut finer shows what rounding alone does."""


def worker(job: Mapping[str, Any]) -> None:
    """Run one contender; leave what it noted and its weights."""
    from safetensors.torch import save_file

    log = Log()
    done = CONTENDERS[job["contender"]](Size(**job["size"]), Path(job["folder"]), log)
    save_file(_weights(done.model), job["weights"])
    trained = hashlib.sha256(repr(list(done.trained)).encode()).hexdigest()[:32]
    log.notes.update(losses=done.losses, trained=trained, digest=digest(Path(job["weights"])))
    Path(job["result"]).write_text(json.dumps(log.notes))


# -- the comparison -------------------------------------------------------------------------------


def compare(size: Size, folder: Path) -> dict[str, Any]:
    """Everything about one size."""
    data = prepare(size, folder)
    job = {"size": dataclasses.asdict(size), "folder": str(folder)}
    order = [*size.contenders] * size.repeats + [*size.controls]
    runs = in_turns(__file__, job, order, folder, size.name)
    for fact in ("start", "trained"):
        if len({run[fact] for found in runs.values() for run in found}) != 1:
            raise RuntimeError(f"{size.name}: contenders differ in {fact}; nothing to compare")
    tokens = data["tokens"] / size.steps
    start = folder / "start.safetensors"
    return {
        "size": job["size"],
        "data": data,
        "cost": {name: cost(runs[name], runs["ours"], tokens, WARM) for name in size.contenders},
        "agreement": {
            f"{one} / {other}": agreement(runs[one], runs[other], start, CURVE)
            for one, other in PAIRS.items()
            if one in runs and other in runs
        },
        "losses": {name: found[-1]["losses"] for name, found in runs.items()},
    }


def report(found: Mapping[str, Any]) -> str:
    """The tables of one size."""
    data = found["data"]
    share = data["trained_tokens"] / data["tokens"]
    title = f"{found['size']['name']}: {data['vocabulary']} ids, {share:.0%} of tokens trained"
    return f"{title}\n{tables(found['cost'], found['agreement'])}\n"


def main() -> None:
    """Read the command line, run, print, write."""
    parser = command("sft", __doc__)
    given = parser.parse_args()
    if given.job:
        worker(json.loads(given.job))
        return
    known = facts("trl", "accelerate", "datasets", "safetensors")
    comparisons = []
    for size in SMALL if given.small else FULL:
        with tempfile.TemporaryDirectory() as folder:
            comparisons.append(compare(size, Path(folder)))
        print(f"\n{report(comparisons[-1])}")
    settings = {**SETTINGS, "decay_of_controls": DECAY, "warm_steps": WARM, "curve_steps": CURVE}
    results = {"machine": finished(known), "settings": settings, "comparisons": comparisons}
    file = results_file(given)
    if file is not None:
        save(file, results)


if __name__ == "__main__":
    main()
