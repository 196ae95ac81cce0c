"""Plays episodes and keeps them: demonstrations for training, guides for curricula.

Invariants: batches are committed one by one, and a repeated command goes on after the last one;
with ``avoid_held_out`` no kept episode passes through the start of a held-out task, so that what is
evaluated was not demonstrated.
"""

from __future__ import annotations

import json
import time
from typing import Any

from agentdistill.callbacks import Callback, counting
from agentdistill.config import ApiModel, CollectStage
from agentdistill.errors import ConfigError
from agentdistill.files import write_text
from agentdistill.metrics import of_trajectories
from agentdistill.policy import FirstThought, ModelPolicy, Policy, derive_seed
from agentdistill.records import Trajectory
from agentdistill.rollout import Request, rollout, run, sound
from agentdistill.run import Run
from agentdistill.store import Store
from agentdistill.tasks import TaskStream


def collect(the_run: Run, stage: CollectStage, callback: Callback) -> dict[str, Any]:
    """Run a collect stage to its end; return its summary."""
    began = time.monotonic()
    folder = the_run.folder(stage.name)
    seed = derive_seed(the_run.config.seed, "stage", stage.name)
    policy = _policy(the_run, stage)
    tasks = TaskStream.of_split(the_run.env, stage.split, seed)
    with Store(folder) as store:
        done = store.commits(stage.name)
        kept = sum(commit.info["kept"] for commit in done)
        played = sum(commit.info["played"] for commit in done)
        tasks.load_state_dict({"taken": played})
        callback.on_stage_start(stage, folder, len(done))
        n = len(done)
        while kept < stage.episodes:
            requests = [
                Request(
                    task,
                    derive_seed(seed, n, task.key, number),
                    f"{stage.name}/{n}/{number}",
                    provenance=_provenance(the_run, stage, policy, n),
                )
                for number, task in enumerate(tasks.take(_size(the_run, stage, kept)))
            ]
            config = the_run.config
            trajectories = run(
                rollout(
                    policy,
                    the_run.make_env,
                    requests,
                    concurrency=config.concurrency,
                    max_turns=config.env.max_turns,
                    limits=config.limits,
                    admissible=config.prompt.lists_admissible,
                    on_end=counting(callback, stage.name, len(requests), the_run.providers.spent),
                    pool=the_run.pool,
                )
            )
            sound(trajectories, stage.max_fault_rate)
            chosen = [t for t in trajectories if keep(the_run, stage, t)]
            chosen = chosen[: stage.episodes - kept]
            kept, played = kept + len(chosen), played + len(trajectories)
            shard = store.write(stage.name, n, chosen)
            metrics = {**of_trajectories(trajectories), "kept": kept, "played": played}
            metrics.update(the_run.providers.spent())
            callback.on_iteration(stage, n, metrics, min(1.0, kept / stage.episodes))
            info = {"kept": len(chosen), "played": len(trajectories)}
            store.commit(stage.name, n, [shard], info)
            n += 1
            if played > 1000 and kept < played / 1000:
                raise ConfigError(
                    f"{played} episodes played and {kept} kept; check only_success, "
                    "avoid_held_out and the policy",
                    key=f"stages.{stage.name}.episodes",
                    value=stage.episodes,
                )
    summary = {
        "stage": stage.name,
        "policy": stage.policy,
        "episodes": kept,
        "played": played,
        "seconds": round(time.monotonic() - began, 3),
    }
    write_text(folder / "done.json", json.dumps(summary))
    callback.on_stage_end(stage, summary)
    return summary


def _size(the_run: Run, stage: CollectStage, kept: int) -> int:
    """Episodes of the next batch: nobody is paid for more than are still wanted."""
    parts, models = the_run.config.parts(stage.policy), the_run.config.models
    paid = any(isinstance(models.get(part), ApiModel) for part in parts)
    return min(stage.batch, stage.episodes - kept) if paid else stage.batch


def _policy(the_run: Run, stage: CollectStage) -> Policy:
    """Who plays; with ``first_thought`` it thinks before it acts."""
    policy = the_run.policy(stage.policy, stage.sampling, "teacher")
    if not stage.first_thought:
        return policy
    if not isinstance(policy, ModelPolicy):
        raise ConfigError(
            f"{stage.policy} is no model and has no thoughts; name a model or a train stage as "
            f"stages.{stage.name}.policy",
            key=f"stages.{stage.name}.first_thought",
            value=True,
        )
    return FirstThought(policy.name, policy.engine, policy.renderer, policy.sampling)


def keep(the_run: Run, stage: CollectStage, trajectory: Trajectory) -> bool:
    """Whether an episode is kept: no fault, successful if asked for, clear of held-out tasks."""
    if trajectory.faults or (stage.only_success and not trajectory.success):
        return False
    if not stage.avoid_held_out:
        return True
    seen = (turn.observation for turn in trajectory.turns)
    return not any(the_run.env.held_out(observation) for observation in seen)


def _provenance(the_run: Run, stage: CollectStage, policy: Policy, n: int) -> dict[str, Any]:
    facts = {
        "run": the_run.config.name,
        "stage": stage.name,
        "iteration": n,
        "policy": stage.policy,
        "seed": the_run.config.seed,
        "env": the_run.env.card.to_json(),
        "instruction": the_run.env.instruction,
    }
    if policy.fingerprint is not None:
        facts["renderer"] = policy.fingerprint
    if stage.first_thought:
        facts["first_thought"] = True
    return facts
