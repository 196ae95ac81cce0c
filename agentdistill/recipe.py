"""Runs a recipe: its stages in the order of their dependencies, then the evaluation.

Invariants: everything that can be refused is refused before the first stage; a finished stage is
never run again; stages and evaluations that do not depend on each other may run in ``workers``
processes, and give the same numbers as one after the other.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agentdistill.callbacks import Callback, Callbacks, JsonLines
from agentdistill.cascade import possible
from agentdistill.config import (
    ApiModel,
    CollectStage,
    RunConfig,
    StageConfig,
    TinyModel,
    TrainStage,
)
from agentdistill.errors import ConfigError, EngineError
from agentdistill.evaluation import Result, evaluate, modes
from agentdistill.files import write_text
from agentdistill.methods.constraints import check, remarks
from agentdistill.methods.index import get
from agentdistill.panel import for_tuning, of_config, tuning_part
from agentdistill.run import Run, need_torch

LOG = logging.getLogger("agentdistill")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe produced.

    Attributes:
        path: the run's folder.
        stages: summary of each stage.
        results: the evaluation, in the order of the configuration.
    """

    path: Path
    stages: dict[str, dict[str, Any]]
    results: tuple[Result, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON (without the per-task columns)."""
        rows = [
            {k: v for k, v in result.to_json().items() if k not in ("keys", "outcomes")}
            for result in self.results
        ]
        return {"path": str(self.path), "stages": self.stages, "results": rows}


def validate(config: RunConfig) -> Run:
    """Check everything that can be checked without playing or training.

    Raises:
        ConfigError, MissingExtraError: with the key, the value and the remedy.
    """
    the_run = Run(config)
    card, known = the_run.env.card, the_run.env.card.splits
    for stage in config.stages:
        if card.split(stage.split) not in known:
            _unknown_split(f"stages.{stage.name}.split", stage.split, known)
        if isinstance(stage, TrainStage):
            axes = get(stage.method).resolve(stage.axes)
            check(config, stage, axes)
            for remark in remarks(config, stage, axes):
                LOG.warning(remark)
            need_torch("training")
            if stage.evaluate_every:
                if card.split(part := tuning_part(config)) not in known:
                    remedy = f"needs a split {part}; this environment has {', '.join(known)}"
                    key = f"stages.{stage.name}.evaluate_every"
                    raise ConfigError(remedy, key=key, value=stage.evaluate_every)
                for_tuning(config, the_run.env)
    for name, said in config.policies.items():
        possible(name, said, card)
    if config.evaluate.policies:
        if config.evaluate.panel is None and card.split(config.evaluate.split) not in known:
            _unknown_split("evaluate.split", config.evaluate.split, known)
        of_config(config, config.evaluate, the_run.env)
        if any(map(partial(_has_tokens, config), config.evaluate.policies)):
            need_torch("evaluating a model")
    _check_providers(the_run)
    return the_run


def _has_tokens(config: RunConfig, policy: str) -> bool:
    """Whether somebody in ``policy`` acts by token ids."""
    stages = {stage.name for stage in config.stages if isinstance(stage, TrainStage)}
    texts = {name for name, model in config.models.items() if isinstance(model, ApiModel)}
    return bool(config.parts(policy) & ((stages | config.models.keys()) - texts))


def _check_providers(the_run: Run) -> None:
    """Keys, providers and prices of the models behind an API that somebody names."""
    config = the_run.config
    named = {name for stage in config.stages for name in _needs(config, stage)}
    named = named.union(*map(config.parts, config.evaluate.policies))
    for name, model in config.models.items():
        if isinstance(model, ApiModel) and name in named:
            the_run.providers.check(name)


def _unknown_split(key: str, value: str, known: Sequence[str]) -> None:
    raise ConfigError(f"this environment has the splits {', '.join(known)}", key=key, value=value)


def execute(
    config: RunConfig,
    callbacks: Sequence[Callback] = (),
    only: Sequence[str] | None = None,
) -> Outcome:
    """Run the stages of ``config`` (all, or ``only`` those and what they need), then evaluate.

    Repeating the call after a crash or an interrupt goes on where it stopped.
    """
    with validate(config) as the_run:
        the_run.prepare()
        jobs = _jobs(the_run, only)
        if jobs and any(isinstance(stage, TrainStage) for stage in config.stages):
            _prepare_torch(the_run)
        _probe(the_run, jobs, Callbacks(callbacks))
        runner = _in_processes if config.workers > 1 and len(jobs) > 1 else _one_by_one
        runner(the_run, jobs, Callbacks(callbacks))
        stages = {s.name: summary for s in config.stages if (summary := the_run.done(s.name))}
        results = () if only else _results(the_run)
    return Outcome(the_run.path, stages, results)


def _probe(the_run: Run, jobs: Sequence[Job], callback: Callback) -> None:
    """Find out what models elsewhere can do, before anything is spent."""
    from agentdistill import probing

    if jobs and probing.elsewhere(the_run.config):
        stages = [job.name for job in jobs if job.stage is not None]
        reports = probing.at_start(the_run, stages)
        found = json.dumps([report.to_json() for report in reports], indent=1)
        write_text(the_run.path / "probe.json", found)
        callback.on_probe([probing.line(report) for report in reports])


def _prepare_torch(the_run: Run) -> None:
    """Threads and tokenizers, once, before any process is forked."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(the_run.config.threads)
    for model in the_run.config.models.values():
        if isinstance(model, TinyModel):
            the_run.tokenizer(model)


@dataclass(frozen=True, slots=True)
class Job:
    """A stage, or one evaluation: ``stage`` is None for the latter."""

    name: str
    needs: frozenset[str]
    stage: StageConfig | None = None
    mode: str = ""


def _jobs(the_run: Run, only: Sequence[str] | None) -> list[Job]:
    """What has to be done, in an order that respects the needs."""
    config = the_run.config
    names = {stage.name for stage in config.stages}
    wanted = names if only is None else _closure(config, only)
    jobs = [
        Job(stage.name, _needs(config, stage) & names, stage)
        for stage in config.stages
        if stage.name in wanted and the_run.done(stage.name) is None
    ]
    if only is None:
        for policy in dict.fromkeys(config.evaluate.policies):
            jobs += [
                Job(policy, config.parts(policy) & names, None, mode)
                for mode in modes(policy, config)
                if not _evaluation(the_run, policy, mode).exists()
            ]
    return jobs


def _needs(config: RunConfig, stage: StageConfig) -> frozenset[str]:
    keys = ("policy", "init", "teacher", "data", "guide", "base", "analyser")
    named = filter(None, (getattr(stage, key, None) for key in keys))
    return frozenset().union(*(config.parts(name) for name in named))


def _closure(config: RunConfig, only: Sequence[str]) -> set[str]:
    """The stages named in ``only`` and all that they need."""
    wanted: set[str] = set()
    open_ = [config.stage(name) for name in only]
    while open_:
        stage = open_.pop()
        wanted.add(stage.name)
        names = {s.name: s for s in config.stages}
        open_ += [names[n] for n in _needs(config, stage) if n in names and n not in wanted]
    return wanted


def _perform(the_run: Run, job: Job, callback: Callback) -> None:
    """Do one job in this process."""
    callback = Callbacks([JsonLines(), callback])
    if isinstance(job.stage, CollectStage):
        from agentdistill.collection import collect

        collect(the_run, job.stage, callback)
    elif isinstance(job.stage, TrainStage):
        from agentdistill.iteration import Training

        Training(the_run, job.stage, callback).run()
    else:
        result = evaluate(the_run, job.name, job.mode, callback=callback)
        file = _evaluation(the_run, job.name, job.mode)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result.to_json()))


def _evaluation(the_run: Run, policy: str, mode: str) -> Path:
    suffix = "" if mode == "-" else f"-{mode}"
    return the_run.path / "evaluation" / f"{policy}{suffix}.json"


def _results(the_run: Run) -> tuple[Result, ...]:
    config = the_run.config
    found = []
    for policy in dict.fromkeys(config.evaluate.policies):
        for mode in modes(policy, config):
            text = _evaluation(the_run, policy, mode).read_text()
            found.append(Result.of_json(json.loads(text)))
    return tuple(found)


def _one_by_one(the_run: Run, jobs: Sequence[Job], callback: Callback) -> None:
    for job in jobs:
        _perform(the_run, job, callback)


# -- several processes ---------------------------------------------------------------------------


class _Forward(Callback):
    """Sends every event to the parent."""

    def __init__(self, send: Callable[[tuple[str, tuple[Any, ...]]], None]) -> None:
        self._send = send

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        self._send(("on_stage_start", (stage, folder, iteration)))

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        self._send(("on_iteration", (stage, iteration, dict(metrics), progress)))

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        self._send(("on_stage_end", (stage, dict(summary))))

    def on_episode(self, name: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
        self._send(("on_episode", (name, done, total, dict(metrics))))


def _child(config: RunConfig, job: Job) -> None:
    with Run(config) as the_run:
        _perform(the_run, job, _Forward(_EVENTS.put))


_EVENTS: Any = None
"""The queue to the parent; inherited by forked workers, since queues cannot be pickled as tasks."""


def _in_processes(the_run: Run, jobs: Sequence[Job], callback: Callback) -> None:
    """Run ``jobs`` in forked processes as soon as their needs are met.

    Forked, so that torch is imported once; nothing has started threads or a GPU context by then.
    """
    global _EVENTS
    if any(isinstance(job.stage, TrainStage) for job in jobs):
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401  (once, not per process)

    context = multiprocessing.get_context("fork")
    _EVENTS = context.SimpleQueue()
    failures: list[BaseException] = []
    listener = threading.Thread(target=_listen, args=(_EVENTS, callback, failures), daemon=True)
    with ProcessPoolExecutor(
        the_run.config.workers, mp_context=context, initializer=_belong_to_the_parent
    ) as pool:
        try:
            _schedule(the_run, jobs, pool, listener, failures)
        except BrokenProcessPool as error:
            remedy = "repeat the command to go on, with fewer workers if memory is short"
            raise EngineError(f"a worker process was killed; {remedy}") from error
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise  # without the listener: what was killed may have held the queue's lock
        _EVENTS.put(None)
        listener.join()
    if failures:
        raise failures[0]


def _belong_to_the_parent() -> None:
    """Leave interrupts to the parent, and end when it does: a killed one cannot stop its workers.

    They would hold the run's locks, or wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _schedule(
    the_run: Run,
    jobs: Sequence[Job],
    pool: ProcessPoolExecutor,
    listener: threading.Thread,
    failures: Sequence[BaseException],
) -> None:
    waiting = list(jobs)
    running: dict[Future[None], Job] = {}
    unfinished = {job.name for job in jobs if job.stage is not None}
    while waiting or running:
        ready = [job for job in waiting if not job.needs & unfinished]
        for job in ready:
            waiting.remove(job)
            running[pool.submit(_child, the_run.config, job)] = job
        if not listener.ident:  # started after the fork: a thread does not survive one
            listener.start()
        done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        if failures:
            raise failures[0]
        for future in done:
            job = running.pop(future)
            future.result()
            if job.stage is not None:
                unfinished.discard(job.name)


def _listen(events: Any, callback: Callback, failures: list[BaseException]) -> None:
    """Hand events to ``callback``; after it failed, still read, or the senders would block."""
    while (event := events.get()) is not None:
        name, arguments = event
        try:
            if not failures:
                getattr(callback, name)(*arguments)
        except BaseException as error:  # raised again by the thread that runs the recipe
            failures.append(error)
