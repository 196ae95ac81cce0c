"""The sections of a configuration, and what must hold between them.

Invariant: combinations that cannot work are refused here, by name, before any work
(:func:`agentdistill.methods.check` adds what the methods know). No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from agentdistill.config.api import ApiModel, BudgetConfig
from agentdistill.config.models import ModelConfig, TinyModel, tag
from agentdistill.config.policies import CascadeConfig
from agentdistill.config.prompts import PROMPTS, PromptConfig, Section, prompt
from agentdistill.config.servers import VllmModel
from agentdistill.errors import ConfigError
from agentdistill.records import digest

Over = Literal["token", "turn", "step", "stream", "trajectory", "group"]
"""The index set of a mean; here, so that a method can be read without torch."""


class EnvConfig(Section):
    """Which environment."""

    id: str = "agentdistill/Sokoban-v0"
    """Versioned id, or ``module:Class`` of any TextEnv."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""
    max_turns: int | None = Field(None, ge=1)
    """Responses per episode; None leaves it to the environment's step limit."""


class SamplingConfig(Section):
    """How a model draws its responses."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(64, ge=1)


StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Beta = Annotated[float, Field(ge=0, lt=1)]


class CollectStage(Section):
    """Play episodes and keep them."""

    do: Literal["collect"] = "collect"
    name: StageName
    policy: str = "expert"
    """``expert``, ``random``, a model, an earlier train stage, or a key of ``policies``."""
    episodes: int = Field(100, ge=1)
    """Episodes kept."""
    split: str = "train"
    only_success: bool = True
    avoid_held_out: bool = True
    """Drop episodes that pass through a start state of a held-out task."""
    batch: int = Field(64, ge=1)
    """Episodes played at once; also one commit. Of a model behind an API never more than are still
    wanted."""
    max_fault_rate: float = Field(0.2, ge=0, le=1)
    """Stop when more episodes than this share of a batch ended in a fault."""
    first_thought: bool = False
    """Ask the model for a step-by-step answer first, and put its beginning into its mouth as the
    opening of the first response (agent-distillation, arXiv 2505.17612)."""
    sampling: SamplingConfig | None = None


class TrainStage(Section):
    """Train one model by one method."""

    do: Literal["train"] = "train"
    name: StageName
    model: str = "student"
    """Key of ``models``."""
    init: str | None = None
    """Earlier train stage whose weights it starts from; None starts from the model itself."""
    method: str = "opd"
    """Name of a method (``agentdistill methods``)."""
    axes: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the method's axes."""
    teacher: str | None = None
    """Train stage or model that teaches; None where the method needs none."""
    data: str | None = None
    """Collect stage to learn from, for methods whose actor is ``data``, ``cached`` or ``mixed``."""
    guide: str | None = None
    """Collect stage with the demonstrations that a backward curriculum replays, or that only the
    scorer reads (contexts gold, actions, demonstrations)."""
    base: str | None = None
    """Train stage or model whose logits have the rest of an extrapolated target; None takes the
    student's start."""
    analyser: str | None = None
    """Who writes skills (context skill): ``grounded`` (from what the environment did, no model), or
    a train stage or model."""
    hints: Literal["keep", "drop"] = "keep"
    """Whether the prompts of ``data`` keep the demonstrations that its actors were shown."""
    limit: int | None = Field(None, ge=1)
    """Use only so many episodes of ``data``."""
    iterations: int | None = Field(None, ge=1)
    env_steps: int | None = Field(None, ge=1)
    """Stop after so many environment steps; with ``iterations``, whichever comes first."""
    tasks: int = Field(16, ge=1)
    """Tasks per iteration."""
    turns: int | None = Field(None, ge=1)
    """Acted turns per iteration in place of ``tasks``: episodes are begun until there are so many,
    the last ones one by one (less than one task more); equal updates are then equal steps."""
    samples: int = Field(1, ge=1)
    """Episodes per task (the group of GRPO)."""
    split: str = "train"
    updates: int = Field(1, ge=1)
    """Optimiser steps per iteration."""
    lr: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the run over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    clip_norm: float = Field(1.0, gt=0)
    micro_tokens: int = Field(16384, ge=64)
    """Tokens per forward pass; changes memory, not results."""
    max_length: int | None = Field(None, ge=8)
    """Views longer than this are dropped and counted; None takes the model's context."""
    checkpoint_every: int = Field(25, ge=1)
    """Iterations between checkpoints."""
    evaluate_every: int | None = Field(None, ge=1)
    """Iterations between evaluations on the tune split; None never."""
    sampling: SamplingConfig | None = None
    """None takes the run's."""
    max_fault_rate: float = Field(0.2, ge=0, le=1)
    """Stop when more episodes than this share of an iteration ended in a fault."""

    @model_validator(mode="after")
    def _bounded(self) -> TrainStage:
        if self.iterations is None and self.env_steps is None:
            raise ValueError("give iterations, env_steps, or both")
        return self


StageConfig = Annotated[
    Annotated[CollectStage, Tag("collect")] | Annotated[TrainStage, Tag("train")],
    tag("do", "train"),
]


class EvaluateConfig(Section):
    """The panel that everybody plays."""

    policies: list[str] = Field(default_factory=list)
    """``expert``, ``random``, models, train stages and keys of ``policies``, in the order of the
    table."""
    split: str = "report"
    tasks: int = Field(200, ge=1)
    """Distinct tasks; fewer in the split is an error."""
    samples: int = Field(1, ge=1)
    """Sampled episodes per task (greedy plays once)."""
    modes: list[Literal["sampled", "greedy"]] = Field(default=["sampled", "greedy"])
    seed: int = Field(0, ge=0)
    """Of the panel; not the run's seed, so that runs share a panel."""
    panel: str | None = None
    """A built-in panel (``agentdistill panels``) or a panel's file; ``split``, ``tasks`` and
    ``seed`` are then its, and stay at their defaults here."""
    concurrency: int = Field(256, ge=1)


class LimitsConfig(Section):
    """Hard limits of one episode; reaching one ends it with ``budget``."""

    env_steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)


def _one_tiny_model() -> dict[str, ModelConfig]:
    return {"student": TinyModel()}


class RunConfig(Section):
    """A whole run: environment, models, stages, evaluation."""

    name: str = Field("run", pattern=r"^[^/\\.][^/\\]*$")
    """Its folder in ``output``."""
    seed: int = Field(0, ge=0)
    output: str = "runs"
    """Folder of all runs; this one goes to ``output/name``."""
    env: EnvConfig = EnvConfig()
    prompt: PromptConfig = PROMPTS["chat"]
    """A preset by name, or its fields; ``preset`` plus fields overrides single ones."""
    sampling: SamplingConfig = SamplingConfig()
    models: dict[ModelName, ModelConfig] = Field(default_factory=_one_tiny_model)
    policies: dict[ModelName, CascadeConfig] = Field(default_factory=dict)
    """Policies made of others."""
    stages: list[StageConfig] = Field(default_factory=list)
    evaluate: EvaluateConfig = EvaluateConfig()
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    """Of the whole run, for models behind an API; ``limits`` are those of one episode."""
    concurrency: int = Field(256, ge=1)
    """Episodes played at once while training."""
    threads: int = Field(1, ge=1)
    """CPU threads of torch; more than one rarely helps small models."""
    workers: int = Field(1, ge=1)
    """Processes for stages that do not depend on each other."""

    @model_validator(mode="before")
    @classmethod
    def _named_prompt(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "prompt" in values:
            values = {**values, "prompt": prompt(values["prompt"])}
        return values

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        seen: dict[str, str] = {name: "model" for name in self.models}
        for name in _BUILT_IN:
            if name in seen:
                raise ValueError(f"models.{name}: this name is taken; choose another one")
        for name in self.policies:
            if name in seen or name in _BUILT_IN or any(s.name == name for s in self.stages):
                raise ValueError(f"policies.{name}: this name is taken; choose another one")
        for stage in self.stages:
            if stage.name in seen or stage.name in _BUILT_IN:
                raise ValueError(f"stages.{stage.name}: this name is taken; choose another one")
            for key, kinds in _REFERENCES.items():
                value = getattr(stage, key, None)
                if key == "policy" and value in self.policies:
                    self._made_of(value, seen)
                elif value is not None:
                    _known(f"stages.{stage.name}.{key}", value, seen, kinds)
            if isinstance(stage, TrainStage):
                self._has_weights(stage)
                if stage.init is not None:
                    self._same_model(stage, self.stage(stage.init))
            seen[stage.name] = stage.do
        self._one_at_a_time()
        for policy in self.policies:
            self._made_of(policy, seen)
        seen.update(dict.fromkeys(self.policies, "policy"))
        for policy in self.evaluate.policies:
            _known("evaluate.policies", policy, seen, ("model", "train", "policy", "built-in"))
        return self

    def _made_of(self, policy: str, seen: Mapping[str, str]) -> None:
        """Refuse a cascade of what is not there (yet)."""
        made, key = self.policies[policy], f"policies.{policy}"
        _known(f"{key}.student", made.student, seen, ("model", "train"))
        if made.teacher not in (None, "expert"):
            _known(f"{key}.teacher", str(made.teacher), seen, ("model", "train"))
        if any(stage.name == made.demos for stage in self.stages):
            _known(f"{key}.demos", str(made.demos), seen, ("collect",))

    def _has_weights(self, stage: TrainStage) -> None:
        for key in ("model", "base"):
            name = getattr(stage, key)
            if isinstance(self.models.get(name), ApiModel | VllmModel):
                raise ValueError(
                    f"stages.{stage.name}.{key}={name!r}: a model behind an API or on a server has "
                    "no weights here; name a tiny or local one"
                )

    def _one_at_a_time(self) -> None:
        """A server that takes whole weights has one set of them: one process uses it."""
        for name, model in self.models.items():
            server = getattr(model, "server", None)
            whole = server is not None and server.weights != "lora"
            if whole and getattr(model, "lora", None) is None and self.workers > 1:
                raise ValueError(
                    f"workers={self.workers}: the server of models.{name} has one set of weights, "
                    "which two processes would take from each other; set workers: 1"
                )

    def _same_model(self, stage: TrainStage, init: StageConfig) -> None:
        model = getattr(init, "model", None)
        if stage.model != model:
            raise ValueError(
                f"stages.{stage.name}.model={stage.model!r}: {init.name} trains {model!r}, and a "
                f"stage goes on with the model of its init; write model: {model}"
            )

    @property
    def path(self) -> Path:
        """Folder of this run."""
        return Path(self.output) / self.name

    @property
    def fingerprint(self) -> str:
        """Identity of what the run computes (not of where it is written).

        Defaults are left out, so that a key that is new in a later version changes no run; so is
        what a provider is paid and how it is reached, so that a run can go on with more.
        """
        exclude = {"output", "name", "workers", "budget"}
        found = self.model_dump(mode="json", exclude=exclude, exclude_defaults=True)
        for model in found.get("models", {}).values():
            for key in _REACHED:
                model.pop(key, None)
            if "server" in model:  # the weights are ours, wherever the server is
                model["server"] = True
        return digest(found)

    def parts(self, policy: str) -> frozenset[str]:
        """Names of what the policy called ``policy`` is made of; itself, where that is all."""
        made = self.policies.get(policy)
        return frozenset({policy} if made is None else made.needs)

    def stage(self, name: str) -> StageConfig:
        """The stage called ``name``."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages) or "none"
        raise ConfigError(f"no such stage; known: {known}", key="stage", value=name)


_REACHED = ("key_env", "concurrency", "timeout", "retries", "retry_budget", "ready", "price")
"""Keys of a model that say how it is reached and paid, not what it is."""

_BUILT_IN = ("expert", "random", "grounded")

_REFERENCES: dict[str, tuple[str, ...]] = {
    "policy": ("model", "train", "built-in"),
    "model": ("model",),
    "init": ("train",),
    "teacher": ("model", "train"),
    "data": ("collect",),
    "guide": ("collect",),
    "base": ("model", "train"),
    "analyser": ("model", "train", "grounded"),
}


def _known(key: str, value: str, seen: Mapping[str, str], kinds: tuple[str, ...]) -> None:
    if "built-in" in kinds and value in ("expert", "random"):
        return
    if value == "grounded" and value in kinds:
        return
    if seen.get(value) in kinds:
        return
    known = [name for name, kind in seen.items() if kind in kinds]
    known += ["expert", "random"] if "built-in" in kinds else []
    known += ["grounded"] if "grounded" in kinds else []
    raise ValueError(
        f"{key}={value!r} names nothing before it; known: {', '.join(known) or 'none'}"
    )
