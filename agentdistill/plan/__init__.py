"""What a run will need before it starts: memory by part, seconds by phase, hours.

Memory of a train stage, per device; T trained numbers of b bytes, V vocabulary, H hidden size:

    weights             all parameters and buffers, tied ones once, adapters in float32     exact
    float32 masters     4 T where the weights are in half precision, else 0                 exact
    optimiser state     8 T and 4 bytes per tensor (AdamW's two moments and step counts)    exact
    gradients           b T, during an update                                               exact
    copies of the step  4 T float32 gradients (half precision only) and AdamW's workspace: 4 T on a
                        GPU, two of the largest tensor elsewhere
    teacher weights     as above, without gradients                                         exact
    KV cache            2 · layers · kv_heads · head_dim · b · slots · capacity; slots (episodes at
                        once) and capacity (the longest sequence) rounded up to powers of two; held
                        until the new weights are published, so also while scoring and updating
    generation          one prefill without gradients, and the logits of the drawn tokens
    scoring             one micro-batch without gradients, and a chunk of logits
    hidden states       H_teacher · b · rows, for divergences over the whole vocabulary
    activations         what autograd keeps per token (counted on the architecture with fake
                        tensors; no gradient checkpointing) times the tokens of a micro-batch
    loss chunks         chunk rows · V · 4, five of them (nine with a divergence), and
                        V · H · b for one gradient of the head

Exact parts are equal to the bytes of the tensors that a stage allocates; a test compares them, and
finds the KV cache equal for given lengths, activations within a tenth, an update (gradients,
activations and chunks together) and scoring within a factor of two. Copies of the step and
generation are compared with nothing. A micro-batch counts as full, though it holds whole streams.
Not counted: the allocator's rounding and fragmentation, CUDA's context (about half a gigabyte), the
program itself, several ranks.

Seconds come from a real iteration on this machine (:mod:`agentdistill.plan.step`), times tokens of
the iteration over tokens of the measured one. A larger batch generates more per second than a small
one, so ``generate`` is too high rather than too low. GB are 10**9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agentdistill.config import ApiModel, CollectStage, RunConfig, TrainStage, VllmModel
from agentdistill.errors import AgentDistillError
from agentdistill.recipe import validate
from agentdistill.run import Run, need_torch

if TYPE_CHECKING:
    from agentdistill.plan.memory import Lengths
    from agentdistill.plan.step import Step

NO_STEP = "not measured (--no-step)"


def plan(config: RunConfig, *, step: bool = True) -> dict[str, Any]:
    """Memory, seconds and hours of ``config`` as plain JSON.

    Args:
        config: of the run.
        step: measure a small iteration of every stage; without it, and where it does not fit into
            memory or cannot run, there are no seconds, and lengths are guessed.

    Raises:
        ConfigError, MissingExtraError: as :func:`agentdistill.recipe.validate` and
            :func:`agentdistill.plan.sizes.size` say.
    """
    need_torch("a plan")
    from agentdistill.plan.step import guess

    with validate(config) as the_run:
        trained = [stage for stage in config.stages if isinstance(stage, TrainStage)]
        memory = {s.name: _memory(config, s, guess(the_run, s)) for s in trained}
        measured, why = _measure(config, memory, step)
        for stage in trained if measured else ():
            memory[stage.name] = _memory(config, stage, measured[stage.name].lengths)
        found = [
            _train(stage, memory[stage.name], measured.get(stage.name))
            if isinstance(stage, TrainStage)
            else _collect(stage, measured.get(stage.name))
            for stage in config.stages
        ]
        panel = _panel(config, the_run, measured)
    hours = [entry["hours"] for entry in (*found, panel) if entry is not None]
    return {
        "name": config.name,
        "step": why or "measured",
        "stages": found,
        "evaluation": panel,
        "hours": None if not measured or None in hours else sum(hours),
    }


def _memory(config: RunConfig, stage: TrainStage, one: Lengths) -> dict[str, Any]:
    """Parts, peaks and devices of one stage."""
    from agentdistill.methods.index import get
    from agentdistill.plan import memory, sizes, step

    def sized(name: str) -> sizes.Size:
        known = {s.name: s.model for s in config.stages if isinstance(s, TrainStage)}
        key = known.get(name, name)
        return sizes.size(config.models[key], key)

    student = sized(stage.model)
    elsewhere = isinstance(config.models.get(str(stage.teacher)), ApiModel | VllmModel)
    here = stage.teacher is not None and not elsewhere
    teacher = sized(str(stage.teacher)) if here else None
    lengths = step.scaled(one, stage, student.context)
    slots = min(config.concurrency, lengths.episodes)
    axes = get(stage.method).resolve(stage.axes)
    parts = memory.parts(stage, axes, student, teacher, lengths, slots)
    devices = {}
    for device, phases in memory.peaks(parts).items():
        name, there = memory.capacity(device)
        peak = max(phases.values())
        fits = None if there is None else peak <= there
        devices[device] = {"name": name, "bytes": there, "peak": peak, "fits": fits, **phases}
    return {
        "student": asdict(student),
        "teacher": teacher and asdict(teacher),
        "lengths": asdict(lengths),
        "parts": [asdict(part) for part in parts],
        "devices": devices,
    }


def _measure(
    config: RunConfig, memory: Mapping[str, Any], wanted: bool
) -> tuple[dict[str, Step], str]:
    """What every stage takes in small, or nothing and why."""
    from agentdistill.plan import step

    if not wanted:
        return {}, NO_STEP
    for name, found in memory.items():
        for device, facts in found["devices"].items():
            if facts["fits"] is False:
                return {}, f"not measured: stage {name} does not fit on {device} ({facts['name']})"
    try:
        return step.measure(config), ""
    except AgentDistillError as error:
        return {}, f"not measured: {' '.join(str(error).split())}"


def _collect(stage: CollectStage, step: Step | None) -> dict[str, Any]:
    """A collect stage: its episodes, and its hours at the measured rate of kept ones."""
    hours = None
    if step is not None:
        few = step.lengths.episodes
        kept = max(step.kept, 1 / few) if stage.only_success else 1.0
        hours = stage.episodes / kept * step.seconds["generate"] / few / 3600
    return {"stage": stage.name, "do": "collect", "episodes": stage.episodes, "hours": hours}


def _train(stage: TrainStage, memory: dict[str, Any], step: Step | None) -> dict[str, Any]:
    """A train stage: its memory, its seconds per iteration and its hours."""
    lengths = memory["lengths"]
    number = iterations(stage, lengths["env_steps"])
    seconds = None
    if step is not None:
        share = lengths["tokens"] / max(1, step.lengths.tokens)
        seconds = {phase: value * share for phase, value in step.seconds.items()}
    return {
        "stage": stage.name,
        "do": "train",
        "method": stage.method,
        "iterations": number,
        "env_steps": number * lengths["env_steps"] if stage.data is None else 0,
        "seconds": seconds,
        "hours": None if seconds is None else number * sum(seconds.values()) / 3600,
        **memory,
    }


def iterations(stage: TrainStage, env_steps: int) -> int:
    """How many iterations ``stage`` takes when each has so many environment steps."""
    bounds = [stage.iterations] if stage.iterations else []
    if stage.env_steps and stage.data is None:
        bounds.append(math.ceil(stage.env_steps / max(1, env_steps)))
    return min(bounds)


def _panel(config: RunConfig, the_run: Run, measured: Mapping[str, Step]) -> dict[str, Any] | None:
    """Episodes of the evaluation, and their hours where a stage measured the model that plays."""
    from agentdistill.evaluation import modes

    section = config.evaluate
    if not section.policies:
        return None
    models = {s.name: s.model for s in config.stages if isinstance(s, TrainStage)}
    pace: dict[str, float] = {}
    for stage in config.stages:
        if isinstance(stage, TrainStage) and stage.data is None and stage.name in measured:
            found = measured[stage.name]
            pace[stage.model] = found.seconds["generate"] / found.lengths.episodes
    episodes, seconds, unknown = 0, 0.0, []
    for policy in dict.fromkeys(section.policies):
        ways = modes(policy, config)
        mine = sum(section.tasks * (section.samples if way == "sampled" else 1) for way in ways)
        episodes += mine
        model = models.get(policy, policy)
        if model in pace:
            seconds += mine * pace[model]
        elif policy not in ("expert", "random"):
            unknown.append(policy)
    hours = seconds / 3600 if measured else None
    return {"episodes": episodes, "hours": hours, "unknown": unknown}
