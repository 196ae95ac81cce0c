"""Everybody plays the same panel: fixed, distinct tasks; rates with intervals.

Invariants: the panel depends on the environment and the evaluation's own seed, not on the run;
sampled episodes have seeds of their own, so that an evaluation can be repeated exactly; faults are
counted apart; every result names panel, environment card, prompt and sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from agentdistill import costs
from agentdistill.callbacks import Callback, counting
from agentdistill.cascade import CascadePolicy
from agentdistill.config import EvaluateConfig, RunConfig, SamplingConfig
from agentdistill.metrics import Interval, of_trajectories, wilson
from agentdistill.panel import Panel, deviations, of_config
from agentdistill.policy import Policy
from agentdistill.records import Task, Trajectory, digest
from agentdistill.rollout import rollout, run
from agentdistill.run import Loaded, Run
from agentdistill.wording import Wording

SILENT = Callback()


@dataclass(frozen=True, slots=True)
class Result:
    """What one policy did on the panel in one mode.

    Attributes:
        policy: its name.
        mode: ``sampled``, ``greedy``, or ``-`` for policies that have no modes.
        episodes: episodes without faults.
        success: share of them that succeeded.
        interval: 95% Wilson interval of ``success``.
        optimal: share of optimal actions, None where the environment does not know.
        turns: mean turns.
        invalid: share of turns whose action could not be read or was not valid.
        score: mean score.
        faults: episodes lost to faults, in no rate.
        panel: hash of the task keys.
        keys: the task keys, in order.
        outcomes: success of each episode, in order (task by task, sample by sample); None where
            a fault lost it, so that two results over one panel can be compared pair by pair.
        setting: what else the numbers depend on: the panel (its name, "" for one that is drawn;
            its split, seed, and in what a model deviates from it), the environment (id, version,
            data) and its options, turns, prompt, limits, sampling (None for policies that have
            none), for a cascade what it is made of.
        asked: of a cascade, the share of the turns that its teacher answered.
        teacher_calls: of a cascade, how many turns that are.
        tokens: by who drew them: calls, and tokens in the four classes that providers price; faults
            included.
        cost: mean money per episode (faults included), as in :data:`agentdistill.costs.KINDS`;
            None where somebody has no price.
    """

    policy: str
    mode: str
    episodes: int
    success: float
    interval: Interval
    optimal: float | None
    turns: float
    invalid: float
    score: float
    faults: int
    panel: str
    keys: tuple[str, ...]
    outcomes: tuple[bool | None, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    asked: float | None = None
    teacher_calls: int | None = None
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    cost: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Result:
        """From plain JSON; the columns by task are empty where it lacks them (results.json)."""
        columns = {key: tuple(values.get(key, ())) for key in ("keys", "outcomes")}
        return cls(**{**values, **columns, "interval": Interval(*values["interval"])})


def modes(name: str, config: RunConfig) -> list[str]:
    """The modes in which policy ``name`` plays: a cascade samples, or its samples were all one."""
    if name in ("expert", "random"):
        return ["-"]
    return ["sampled"] if name in config.policies else list(dict.fromkeys(config.evaluate.modes))


def evaluate(
    the_run: Run,
    name: str,
    mode: str,
    config: EvaluateConfig | None = None,
    callback: Callback = SILENT,
) -> Result:
    """Let the policy called ``name`` play the panel in ``mode``."""
    config = config or the_run.config.evaluate
    policy = the_run.policy(name, _sampling(the_run, mode))
    return play(the_run, policy, mode, config, callback=callback)


def play(
    the_run: Run,
    player: Policy | Loaded,
    mode: str,
    config: EvaluateConfig,
    panel: Panel | None = None,
    callback: Callback = SILENT,
) -> Result:
    """Let a policy, or a model that is at hand, play ``panel``, or that of ``config``.

    ``callback`` is told of every episode that ends.
    """
    if panel is None:
        panel = of_config(the_run.config, config, the_run.env)
    if isinstance(player, Loaded):
        player = the_run.acting(player, _sampling(the_run, mode))
    requests = panel.requests(config.samples if mode == "sampled" else 1)
    title = player.name if mode == "-" else f"{player.name} ({mode})"
    trajectories = run(
        rollout(
            player,
            the_run.make_env,
            requests,
            concurrency=config.concurrency,
            max_turns=the_run.config.env.max_turns,
            limits=the_run.config.limits,
            on_end=counting(callback, title, len(requests), the_run.providers.spent),
            pool=the_run.pool,
        )
    )
    setting = _setting(the_run, player.name, mode, panel)
    found = summarise(player.name, mode, panel.listed(), trajectories, setting)
    return _spent(the_run, player, trajectories, found)


def _spent(the_run: Run, player: Policy, played: Sequence[Trajectory], found: Result) -> Result:
    """``found`` with what it took: tokens, money, and how often a teacher was asked."""
    tokens = costs.tokens(played)
    prices = {name: the_run.providers.price(name) for name in tokens}
    prompts = partial(prompt, Wording(the_run.config.prompt, the_run.env.instruction))
    cost = costs.per_episode(played, prices, prompts) if tokens else None
    found = replace(found, tokens=tokens, cost=cost)
    if not isinstance(player, CascadePolicy) or player.teacher is None:
        return found
    turns = [turn for t in played if not t.faults for turn in t.acted]
    asked = sum(turn.actor.name == player.teacher.name for turn in turns)
    share = asked / len(turns) if turns else None
    return replace(found, asked=share, teacher_calls=asked)


def prompt(wording: Wording, trajectory: Trajectory, number: int, informed: bool) -> costs.Prompt:
    """The texts of the messages with which turn ``number`` was asked for."""
    turn = trajectory.turns[number]
    note = str(trajectory.provenance.get("note", "")) if informed else ""
    told = wording.messages(
        trajectory.turns[:number],
        turn.observation,
        goal=trajectory.goal,
        admissible=turn.admissible,
        hint=turn.hint if informed else "",
    )
    texts = [message["content"] for message in told]
    return tuple([note, *texts] if note else texts)


def _sampling(the_run: Run, mode: str) -> SamplingConfig:
    base = the_run.config.sampling
    return base.model_copy(update={"temperature": 0.0}) if mode == "greedy" else base


def _setting(the_run: Run, name: str, mode: str, panel: Panel) -> dict[str, Any]:
    config, card = the_run.config, the_run.env.card
    named: dict[str, Any] = {"name": panel.name, "split": panel.split, "seed": panel.seed}
    if panel.name and mode != "-":
        named["deviations"] = deviations(panel, config, mode)
    made = config.policies.get(name)
    return {
        **({"made of": made.model_dump(mode="json")} if made else {}),
        "panel": named,
        "env": {"id": card.id, "version": card.version, "data": card.data},
        **config.model_dump(mode="json", include={"prompt", "limits"}),
        **config.env.model_dump(mode="json", include={"options", "max_turns"}),
        "sampling": None if mode == "-" else _sampling(the_run, mode).model_dump(mode="json"),
    }


def summarise(
    name: str,
    mode: str,
    tasks: Sequence[Task],
    trajectories: Sequence[Trajectory],
    setting: Mapping[str, Any] | None = None,
) -> Result:
    """The result of ``trajectories`` over the panel ``tasks``."""
    sound = [t for t in trajectories if not t.faults]
    wins = sum(t.success for t in sound)
    means = of_trajectories(trajectories)
    keys = tuple(task.key for task in tasks)
    return Result(
        name,
        mode,
        len(sound),
        wins / len(sound) if sound else 0.0,
        wilson(wins, len(sound)),
        means["optimal"],
        means["turns"] or 0.0,
        means["invalid"] or 0.0,
        means["score"] or 0.0,
        means["faults"],
        digest(list(keys)),
        keys,
        tuple(None if t.faults else t.success for t in trajectories),
        dict(setting or {}),
    )
