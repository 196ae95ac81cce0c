"""Rates, intervals and panels: what is counted, what is not, and that it can be repeated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from agentdistill.config import EvaluateConfig, RunConfig, load
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result, evaluate, modes, summarise
from agentdistill.methods.index import get
from agentdistill.metrics import of_table, of_trajectories, wilson
from agentdistill.panel import requests
from agentdistill.policy import ExpertPolicy, RandomPolicy, derive_seed
from agentdistill.recipe import execute
from agentdistill.records import (
    Actor,
    Author,
    Fault,
    Kind,
    Span,
    StepResult,
    Stream,
    Task,
    Trajectory,
    Turn,
    Verdict,
    digest,
)
from agentdistill.run import Run
from agentdistill.table import build
from agentdistill.tasks import TaskStream, draw
from tests.toy import Corridor, micro


# -- intervals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 200])
def test_wilson_solves_its_equation(trials: int) -> None:
    """The bounds are where the observed rate is z standard errors *of the bound* away."""
    z = 1.959964
    for successes in range(trials + 1):
        low, high = wilson(successes, trials)
        rate = successes / trials
        assert 0 <= low <= rate <= high <= 1
        for bound, open_ in ((low, successes > 0), (high, successes < trials)):
            if open_:
                error = math.sqrt(bound * (1 - bound) / trials)
                assert abs(rate - bound) == pytest.approx(z * error, rel=1e-6)
        mirrored = wilson(trials - successes, trials)
        assert (low, high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))


def test_nothing_known_without_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


# -- episodes --------------------------------------------------------------------------------------
def turn(index: int, *results: StepResult, author: Author = Author.ACTOR, **more: Any) -> Turn:
    actions = ("go",) * len(results)
    return Turn(index, "o", Actor("a"), author, actions=actions, results=results, **more)


def step(optimal: bool | None, valid: bool = True) -> StepResult:
    return StepResult("o", 0.0, valid=valid, optimal=optimal)


def episode(end: str, *turns: Turn, score: float = 0.0, number: int = 0) -> Trajectory:
    success = end == "success"
    faults = (Fault(end[6:], "x", 0),) if end.startswith("fault:") else ()
    score = 1.0 if success else score
    task = Task("e", "report", {"n": number})
    return Trajectory(task, "g", 0, turns, (), end, success, score, faults=faults)


EPISODES = [
    episode("success", turn(0, step(True)), turn(1, step(True), step(False))),
    episode("failure", turn(0, step(None)), score=0.5),
    episode("step_limit", turn(0, step(False, False), verdict=Verdict.INADMISSIBLE)),
    episode("horizon", turn(0, step(True)), turn(1, step(None))),
    episode("budget", turn(0, step(None), verdict=Verdict.MISSING)),
    episode("fault:engine", turn(0, step(True)), turn(1, step(True))),
    episode("fault:environment"),
]


def test_what_is_in_which_rate() -> None:
    found = of_trajectories(EPISODES)
    assert found == {
        "episodes": 5,
        "faults": 2,
        "censored": 2,
        "success": pytest.approx(1 / 3),
        "score": pytest.approx(0.5),
        "optimal": pytest.approx(3 / 5),
        "turns": pytest.approx(7 / 5),
        "invalid": pytest.approx(2 / 7),
    }


def test_faults_change_no_rate_but_their_own() -> None:
    sound = [t for t in EPISODES if not t.faults]
    with_, without = of_trajectories(EPISODES), of_trajectories(sound)
    assert {**with_, "faults": 0} == without


def test_replayed_turns_are_nobodys_doing() -> None:
    replayed = turn(0, step(True), author=Author.REPLAY)
    found = of_trajectories([episode("success", replayed, turn(1, step(False)))])
    assert (found["turns"], found["optimal"]) == (1.0, 0.0)


def test_nothing_measured_is_none_and_not_zero() -> None:
    for found in (of_trajectories([]), of_trajectories(EPISODES[-2:])):
        rates = ("success", "score", "optimal", "turns", "invalid")
        assert [found[name] for name in rates] == [None] * 5
        assert found["episodes"] == 0
    assert of_trajectories(EPISODES[3:4])["success"] is None, "a window says nothing"


# -- tables ----------------------------------------------------------------------------------------
def streamed(lengths: Sequence[int]) -> Trajectory:
    """One stream; turn t has ``lengths[t]`` tokens after one of context."""
    author: list[int] = []
    turns = []
    for index, length in enumerate(lengths):
        author.append(Author.CONTEXT)
        start = len(author)
        author += [Author.ACTOR] * length
        turns.append(turn(index, step(None), span=Span(0, start, len(author))))
    size = len(author)
    columns = (
        torch.arange(size, dtype=torch.int32).numpy(),
        torch.tensor(author, dtype=torch.uint8).numpy(),
        torch.full((size,), Kind.ACT, dtype=torch.uint8).numpy(),
        torch.full((size,), -1.0).numpy(),
    )
    return replace(episode("success", *turns), streams=(Stream(*columns),))


def test_divergence_by_turn_is_exact_where_distributions_are_compared() -> None:
    table = build([streamed([1, 2]), streamed([3])])
    table["rows/kd"] = torch.tensor([True, True, True, True, True, False])
    table["loss/reverse_kl"] = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 100.0])
    found = of_table(table, get("opd-exact").axes)
    assert found == {"divergence": 3.0, "divergence_by_turn": [3.0, 3.0]}
    table["loss/reverse_kl"] = torch.tensor([1.0, math.nan, math.nan, 3.0, 5.0, 100.0])
    found = of_table(table, get("opd-exact").axes)
    assert found == {"divergence": 3.0, "divergence_by_turn": [3.0, None]}


def test_divergence_of_sampled_tokens_is_own_minus_teacher() -> None:
    table = build([streamed([2])])
    table["rows/kd"] = torch.tensor([True, True])
    table["logp/teacher"] = torch.tensor([-3.0, -1.5])
    assert of_table(table, get("opd").axes)["divergence"] == pytest.approx(1.25)
    table["logp/old"] = torch.tensor([-2.0, -0.5])
    assert of_table(table, get("opd").axes)["divergence"] == pytest.approx(1.0)


def test_no_divergence_without_teacher_or_rows() -> None:
    table = build([streamed([2])])
    assert of_table(table, get("grpo").axes) == {}
    table["rows/kd"] = torch.tensor([False, False])
    table["logp/teacher"] = torch.tensor([-3.0, -1.5])
    assert of_table(table, get("opd").axes) == {}
    assert of_table(build([]), get("opd").axes) == {}


# -- panels and task streams -----------------------------------------------------------------------
class Repeating(Corridor):
    """Lists every task twice."""

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        for task in super().tasks(split, seed):
            yield from (task, task)


def test_a_panel_has_distinct_tasks_of_its_split() -> None:
    for env in (Corridor(), Repeating()):
        chosen = draw(env, "report", 6, 0)
        assert len({task.key for task in chosen}) == 6
        assert {task.split for task in chosen} == {"report"}
    assert [t.key for t in draw(Repeating(), "report", 6, 0)] == [
        t.key for t in draw(Corridor(), "report", 6, 0)
    ]
    assert draw(Corridor(), "report", 6, 0) == draw(Corridor(), "report", 7, 0)[:6]
    assert draw(Corridor(), "report", 6, 1) != draw(Corridor(), "report", 6, 0)


@pytest.mark.parametrize("env", [Corridor(), Repeating()])
def test_a_panel_never_repeats_a_task_to_be_large_enough(env: Corridor) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.tasks=8: split report .* only 7 distinct"):
        draw(env, "report", 8, 0)


def test_a_task_stream_goes_on_where_it_was() -> None:
    whole = TaskStream.of_split(Corridor(), "train", 5).take(100)
    for taken in (0, 1, 14, 15, 16, 77):
        stream = TaskStream.of_split(Corridor(), "train", 5)
        stream.take(3)
        stream.load_state_dict({"taken": taken})
        assert stream.take(100 - taken) == whole[taken:]
        assert stream.state_dict() == {"taken": 100}
    passes = [{task.key for task in whole[i : i + 16]} for i in range(0, 96, 16)]
    assert all(len(keys) == 16 for keys in passes), "within a pass tasks are distinct"
    assert whole[:16] != whole[16:32], "each pass has an order of its own"
    assert TaskStream.of_split(Corridor(), "train", 6).take(16) != whole[:16]


def test_a_stream_of_given_tasks() -> None:
    tasks = list(islice(Corridor().tasks("train"), 5))
    taken = TaskStream.of_list(tasks, 1).take(15)
    for start in (0, 5, 10):
        assert {t.key for t in taken[start : start + 5]} == {t.key for t in tasks}
    with pytest.raises(ConfigError, match="no tasks"):
        TaskStream.of_list([], 1).take(1)


# -- evaluation ------------------------------------------------------------------------------------
def a_run(output: Path, **changes: Any) -> Run:
    model = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 8}}
    values = {"models": {"student": model}, "stages": [], "sampling": {"max_tokens": 2}}
    section = {"tasks": 5, "samples": 3, "policies": ["expert", "random", "student"]}
    return Run(load(micro(output, **{**values, "evaluate": section, **changes})))


def test_the_expert_and_chance(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    expert = evaluate(run, "expert", "-")
    assert (expert.success, expert.optimal, expert.invalid, expert.faults) == (1.0, 1.0, 0.0, 0)
    assert expert.outcomes == (True,) * 5 and expert.episodes == 5
    assert expert.keys == tuple(t.key for t in draw(run.env, "report", 5, 0))
    assert expert.panel == digest(list(expert.keys))
    config = run.config.evaluate.model_copy(update={"tasks": 7, "seed": 3})
    chance = evaluate(run, "random", "-", config)
    assert 0 < chance.optimal < 1 and chance.turns > expert.turns
    assert chance.panel != expert.panel


def test_an_evaluation_repeats_exactly(tmp_path: Path) -> None:
    run, again = a_run(tmp_path / "a"), a_run(tmp_path / "a")
    for policy, mode in (("random", "-"), ("student", "sampled"), ("student", "greedy")):
        first = evaluate(run, policy, mode)
        assert evaluate(run, policy, mode) == first == evaluate(again, policy, mode)
        one = run.config.evaluate.model_copy(update={"concurrency": 1})
        assert evaluate(run, policy, mode, one) == first


def test_the_panel_does_not_depend_on_the_run(tmp_path: Path) -> None:
    mine = evaluate(a_run(tmp_path, seed=1), "expert", "-")
    other = evaluate(a_run(tmp_path, seed=2, name="other"), "expert", "-")
    assert mine == other
    mine, other = (evaluate(a_run(tmp_path, seed=s), "random", "-") for s in (1, 2))
    assert mine == other, "neither do the episodes of a policy without weights"


def test_modes(tmp_path: Path) -> None:
    assert modes("expert", RunConfig()) == modes("random", RunConfig()) == ["-"]
    assert modes("student", RunConfig()) == ["sampled", "greedy"]
    only = RunConfig(evaluate=EvaluateConfig(modes=["greedy", "greedy"]))
    assert modes("student", only) == ["greedy"]
    run = a_run(tmp_path)
    sampled, greedy = (evaluate(run, "student", mode) for mode in ("sampled", "greedy"))
    assert (sampled.episodes, greedy.episodes) == (15, 5)
    assert sampled.setting["sampling"]["temperature"] == 1.0
    assert greedy.setting["sampling"] == {**sampled.setting["sampling"], "temperature": 0.0}
    assert evaluate(run, "expert", "-").setting["sampling"] is None


def test_a_result_says_what_it_depends_on(tmp_path: Path) -> None:
    env = {"id": "tests.toy:Corridor", "options": {"length": 7}, "max_turns": 4}
    found = evaluate(a_run(tmp_path, env=env, limits={"tokens": 99}), "expert", "-").setting
    assert found["env"] == {"id": "tests/Corridor-v0", "version": "1", "data": ""}
    assert found["options"] == {"length": 7} and found["max_turns"] == 4
    assert found["prompt"]["instruction"] == "" and found["limits"]["tokens"] == 99


def test_samples_of_one_task_differ_and_are_in_order(tmp_path: Path) -> None:
    wanted = requests(draw(Corridor(), "report", 4, 0), 3, 9)
    assert len({request.seed for request in wanted}) == 12
    assert [request.sample for request in wanted] == [0, 1, 2] * 4
    assert [r.group for r in wanted] == [r.task.key for r in wanted]
    assert wanted[5].seed == derive_seed(9, "evaluate", wanted[5].task.key, 2)


def test_faults_keep_their_place_and_enter_no_rate(tmp_path: Path) -> None:
    tasks = [Task("e", "report", {"n": n}) for n in range(4)]
    played = [
        episode("success", turn(0, step(True)), number=0),
        episode("fault:timeout", number=1),
        episode("failure", turn(0, step(False)), number=2),
        episode("budget", turn(0, step(None)), number=3),
    ]
    result = summarise("p", "sampled", tasks, played)
    assert result.outcomes == (True, None, False, False)
    assert (result.episodes, result.faults) == (3, 1)
    assert result.success == pytest.approx(1 / 3)
    assert result.interval == wilson(1, 3)
    assert result.optimal == pytest.approx(1 / 2)
    lost = summarise("p", "sampled", tasks, [episode("fault:engine", number=n) for n in range(4)])
    assert (lost.episodes, lost.faults, lost.interval) == (0, 4, (0.0, 1.0))
    assert lost.outcomes == (None,) * 4


def test_results_of_a_recipe_read_back(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    outcome = execute(run.config)
    names = [(result.policy, result.mode) for result in outcome.results]
    assert names == [
        ("expert", "-"),
        ("random", "-"),
        ("student", "sampled"),
        ("student", "greedy"),
    ]
    assert all(isinstance(result, Result) for result in outcome.results)
    assert outcome.results[2] == evaluate(run, "student", "sampled")
    (row, *_) = outcome.to_json()["results"]
    assert "keys" not in row and row["panel"] == outcome.results[0].panel
    assert json.loads(json.dumps(outcome.to_json())) is not None


def test_policies_by_name(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert isinstance(run.policy("expert"), ExpertPolicy)
    assert isinstance(run.policy("random"), RandomPolicy)
    with pytest.raises(ConfigError, match="models='nobody': no such model; known: student"):
        run.policy("nobody")
