"""What the models of a run can do, found out before anything is spent, and what that refuses.

Invariants: only models that are not in this process are asked at the start of a run, and those
behind an API are asked nothing there that costs; a teacher that gives less than its method needs is
refused here, with the reason, as is one that speaks another language (K1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentdistill.config import ApiModel, LocalModel, RunConfig, TinyModel, TrainStage, VllmModel
from agentdistill.engines.base import Capabilities
from agentdistill.engines.probing import Report, by_ids, by_text
from agentdistill.engines.vllm import VLLMEngine
from agentdistill.errors import ConfigError
from agentdistill.methods import needs
from agentdistill.methods.index import get
from agentdistill.render import Renderer
from agentdistill.rollout import run as wait
from agentdistill.run import Run
from agentdistill.students.local import tokenizer_of

_ASKED = ("policy", "model", "teacher", "analyser")
"""Keys of a stage that name somebody who is asked."""

NO_VALUE = "\u2013"
COLUMNS = (
    *("model", "where", "text", "ids", "sampled", "top_k", "at ids", "full", "hidden"),
    "repeat",
)


def elsewhere(config: RunConfig) -> list[str]:
    """The models of a run that are not, or not only, in this process."""
    remote = (ApiModel, VllmModel)
    return [
        name
        for name, model in config.models.items()
        if isinstance(model, remote) or getattr(model, "server", None) is not None
    ]


def probe(the_run: Run, names: Sequence[str], *, ask: bool = False) -> list[Report]:
    """Probe models by name.

    Args:
        the_run: whose models they are.
        names: keys of ``models``, or train stages.
        ask: whether a model behind an API is asked one tiny thing, which costs.

    Raises:
        ConfigError, EngineError: one of them cannot be had.
    """
    return [_one(the_run, name, ask) for name in names]


def _one(the_run: Run, name: str, ask: bool) -> Report:
    config = the_run.config.models.get(name)
    if isinstance(config, ApiModel):
        provider = the_run.providers.engine(name).in_role("teacher")
        return wait(by_text(provider, name, f"api ({config.model})", ask=ask))
    voice = the_run.voice(name)
    engine = voice.engine
    report = wait(by_ids(engine, voice.renderer.alone("?"), name, _kind(engine)))
    return replace(report, language=voice.renderer.fingerprint)


def _kind(engine: Any) -> str:
    if not isinstance(engine, VLLMEngine):
        return "in process"
    trained = ", follows the weights here" if hasattr(engine, "journeys") else ""
    return f"vllm {engine.endpoint.url}{trained}"


def at_start(the_run: Run, names: Sequence[str]) -> list[Report]:
    """Probe what stages that are still to be run ask of others, and refuse what cannot work.

    Args:
        the_run: whose models they are.
        names: of the stages.

    Raises:
        ConfigError: a teacher lacks something, or speaks another language than its student.
        EngineError: a server is not there.
    """
    config = the_run.config
    stages = [config.stage(name) for name in names]
    used: set[str] = set(config.evaluate.policies)
    for stage in stages:
        used |= {str(getattr(stage, key, None)) for key in _ASKED}
    found = {r.name: r for r in probe(the_run, [n for n in elsewhere(config) if n in used])}
    for stage in stages:
        if isinstance(stage, TrainStage) and stage.teacher in found:
            report = found[stage.teacher]
            axes = get(stage.method).resolve(stage.axes)
            needs.refuse(stage.name, stage.teacher, axes, report.able)
            _same_language(the_run, stage, report)
    return list(found.values())


def _same_language(the_run: Run, stage: TrainStage, teacher: Report) -> None:
    """K1, before the stage that would find out."""
    config = the_run.config.models[stage.model]
    axes = get(stage.method).resolve(stage.axes)
    if not axes.scores or not teacher.language:
        return
    if isinstance(config, TinyModel):
        tokenizer = the_run.tokenizer(config)
    elif isinstance(config, LocalModel):
        tokenizer = tokenizer_of(config.path)
    else:
        return
    mine = Renderer(tokenizer, the_run.config.prompt, the_run.env.instruction)
    if mine.fingerprint != teacher.language:
        raise ConfigError(
            f"{teacher.name} and {stage.model} have different vocabularies or chat templates, so "
            "their token probabilities cannot be compared (K1); give models one tokenizer",
            key=f"stages.{stage.name}.teacher",
            value=stage.teacher,
        )


def cells(report: Report) -> list[str]:
    """One row of the table."""
    able: Capabilities = report.able

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    return [
        report.name,
        report.kind,
        yes(able.text),
        yes(able.ids),
        yes(able.sampled),
        str(able.top_k),
        yes(able.at_ids),
        yes(able.full),
        yes(able.hidden),
        NO_VALUE if report.repeat is None else f"{report.repeat:.1g}",
    ]


def remarks(report: Report) -> list[str]:
    """What the table has no column for."""
    lines = list(report.able.notes)
    if report.agree is not None:
        lines.append(f"samples and scores agree to {report.agree:.1g} nats")
    if report.language:
        lines.append(f"vocabulary and template {report.language}")
    if report.spent:
        lines.append(report.spent)
    return [f"{report.name}: {line}" for line in lines]


def line(report: Report) -> str:
    """A report in one line, for a log."""
    gives = [
        name
        for name in ("text", "ids", "sampled", "at_ids", "full", "hidden")
        if getattr(report.able, name)
    ]
    if report.able.top_k:
        gives.append(f"top_k {report.able.top_k}")
    repeat = "" if report.repeat is None else f"; repeats to {report.repeat:.1g} nats"
    return f"{report.name} ({report.kind}) gives {', '.join(gives) or 'nothing'}{repeat}"
