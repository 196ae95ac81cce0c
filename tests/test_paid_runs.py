"""Runs whose models are paid: through a misbehaving provider, within a budget, and on again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentdistill.callbacks import Callback
from agentdistill.config import RunConfig, load
from agentdistill.engines import patience
from agentdistill.errors import BudgetError, ConfigError, EngineError, StoreError
from agentdistill.evaluation import Result
from agentdistill.recipe import Outcome, execute, validate
from agentdistill.rehearsal import rehearse
from agentdistill.run import Run
from agentdistill.spending import Sum, read, sums
from agentdistill.store import Store
from tests.cli_calls import call
from tests.provider import Move, Provider

KEY = "sk-0123456789abcdef"
PRICE = {"input": "3", "cache_read": "0.3", "output": "15"}
COST = Decimal("0.000075")
"""Of an answer: 10 tokens in and 3 out at ``PRICE``."""

pytestmark = [
    pytest.mark.litellm,
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(patience, "Patience", partial(patience.Patience, base=0.01))


def knows_the_way(number: int, payload: Mapping[str, Any]) -> Move:
    """A provider whose model walks to the goal."""
    corridor = payload["messages"][-1]["content"]
    return Move("right" if corridor.index("P") < corridor.index("G") else "left")


def settings(provider: Provider | None, folder: Path, **changes: Any) -> dict[str, Any]:
    url = provider.url if provider else "http://127.0.0.1:9/v1"
    model = {"kind": "api", "model": "openai/small", "base_url": url, "key_env": "TEST_KEY"}
    stage = {"do": "collect", "name": "demos", "policy": "teacher", "episodes": 9, "batch": 6}
    return {
        "output": str(folder),
        "env": {"id": "tests.toy:Corridor"},
        "prompt": "bare",
        "models": {"teacher": {**model, "price": PRICE}},
        "stages": [stage],
        "evaluate": {"policies": ["teacher"], "tasks": 5, "modes": ["sampled"]},
        **changes,
    }


def spent(config: RunConfig) -> tuple[list[Sum], Sum]:
    return sums(read(config.path))


def asked_twice(provider: Provider) -> int:
    """Requests that were sent more than once."""
    return len(provider.asked) - len({json.dumps(one, sort_keys=True) for one in provider.asked})


def test_a_run_is_paid_and_every_call_is_on_the_bill(tmp_path: Path) -> None:
    told: list[tuple[str, int, int, Mapping[str, Any]]] = []

    class Watch(Callback):
        def on_episode(self, *event: Any) -> None:
            told.append(event)

    with Provider(knows_the_way) as provider:
        config = load(settings(provider, tmp_path))
        outcome = execute(config, [Watch()])
    assert outcome.results[0].success == 1
    demos = outcome.stages["demos"]
    assert demos["played"] == demos["episodes"] == 9, "more were paid than are wanted"
    by_role, whole = spent(config)
    assert [(each.role, each.model) for each in by_role] == [
        ("student", "openai/small"),
        ("teacher", "openai/small"),
    ]
    assert whole.calls == len(provider.asked) and whole.money == COST * len(provider.asked)
    assert told[-1][:3] == ("teacher (sampled)", 5, 5)
    assert told[-1][3]["spent/money"] == pytest.approx(float(whole.money))
    assert [event[:3] for event in told[:6]] == [("demos", n, 6) for n in range(1, 7)]
    assert [event[:3] for event in told[6:9]] == [("demos", n, 3) for n in range(1, 4)]
    shown = call("cost", str(config.path), "--json")
    assert Decimal(json.loads(shown.stdout)["all"]["money"]) == whole.money


def test_nothing_is_written_with_a_key_in_it(tmp_path: Path) -> None:
    refusal = Move(fault="refuse", status=401, message=f"the key {KEY} is wrong")
    with (
        Provider(lambda n, said: refusal if n > 5 else knows_the_way(n, said)) as provider,
        pytest.raises(EngineError, match=r"more than max_fault_rate=0\.2; first: engine"),
    ):
        execute(load(settings(provider, tmp_path)))
    assert len(provider.asked) < 60, "it goes on against a wall"
    assert provider.keys[0] == f"Bearer {KEY}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


FAULTS: dict[str, Move] = {
    "busy": Move(fault="refuse", status=429, headers={"Retry-After": "0.05"}),
    "broken": Move(fault="refuse", status=500),
    "drop": Move(fault="drop"),
    "tear": Move(fault="tear"),
    "cut": Move(fault="cut"),
    "garble": Move(fault="garble"),
    "alien": Move(fault="alien"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_episode_is_lost_to_a_provider_that_fails(fault: str, tmp_path: Path) -> None:
    def moves(number: int, payload: Mapping[str, Any]) -> Move:
        return FAULTS[fault] if number % 4 == 3 else knows_the_way(number, payload)

    with Provider(moves) as provider:
        config = load(settings(provider, tmp_path, seed=1))
        outcome = execute(config)
        free = Provider(knows_the_way)
        with free:
            same = execute(load(settings(free, tmp_path / "calm", seed=1)))
    assert (outcome.results[0].faults, outcome.results[0].outcomes) == (0, (True,) * 5)
    assert _episodes(outcome) == _episodes(same), "faults must not change what was played"
    _, whole = spent(config)
    answered = len(free.asked)
    assert whole.calls == len(provider.asked)
    assert whole.money - whole.failed_money == COST * answered
    assert (whole.failed_money > 0) == (fault not in ("busy", "broken"))


def _episodes(outcome: Outcome) -> list[Any]:
    found = Run(RunConfig(output=str(outcome.path.parent), name=outcome.path.name))
    return [
        (t.task.key, [turn.actions for turn in t.turns], t.success) for t in found.episodes("demos")
    ]


BUDGETS: list[tuple[str, Any, Callable[[Sum], Any]]] = [
    ("calls", 7, lambda total: total.calls),
    ("tokens", 1_300, lambda total: total.tokens),
    ("money", "0.0165", lambda total: total.money),
]


@pytest.mark.parametrize(("limit", "value", "used"), BUDGETS)
def test_a_budget_stops_the_run_which_goes_on_with_more(
    limit: str, value: Any, used: Callable[[Sum], Any], tmp_path: Path
) -> None:
    """A call must fit with its worst case, 1,000 answered tokens, though it takes 3."""
    with Provider(knows_the_way) as provider:
        values = settings(provider, tmp_path, sampling={"max_tokens": 1000})
        with pytest.raises(BudgetError, match=f"budget.{limit}="):
            execute(load({**values, "budget": {limit: value}, "name": "poor"}))
        _, whole = spent(load({**values, "name": "poor"}))
        assert used(whole) <= Decimal(value)
        paid = len(provider.asked)
        assert paid > 0
        outcome = execute(load({**values, "name": "poor"}))
        assert outcome.results[0].success == 1
        assert asked_twice(provider) == 0
        fresh = execute(load({**values, "name": "rich"}))
    assert outcome.results[0].outcomes == fresh.results[0].outcomes
    assert _episodes(outcome) == _episodes(fresh)


def test_a_batch_that_dies_before_its_commit_is_not_paid_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise StoreError("the disk is full")

    with Provider(knows_the_way) as provider:
        config = load(settings(provider, tmp_path, evaluate={}))
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="full"):
            patch.setattr(Store, "commit", dies)
            execute(config)
        paid = len(provider.asked)
        assert paid > 0
        execute(config)
        assert len(provider.asked) > paid and asked_twice(provider) == 0


def test_a_broken_budget_is_an_exit_code_and_one_line(tmp_path: Path) -> None:
    with Provider(knows_the_way) as provider:
        values = settings(provider, tmp_path, budget={"calls": 3})
        file = tmp_path / "c.yaml"
        file.write_text(json.dumps(values))
        ended = call("train", str(file), "--json")
    assert ended.exit_code == 6
    error = json.loads(ended.stdout)["error"]
    assert error["type"] == "BudgetError" and "budget.calls=3" in error["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_env": "NOT_SET"}, "NOT_SET"),
        ({"model": "nobody/small", "base_url": None}, "nobody/small"),
        ({"price": None}, "nobody knows its price"),
    ],
)
def test_what_cannot_be_paid_is_refused_before_anything_is_sent(
    change: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    values = settings(None, tmp_path, budget={"money": 1})
    values["models"]["teacher"] |= change
    with pytest.raises(ConfigError, match=words):
        validate(load(values))
    assert not list(tmp_path.iterdir())


def test_money_and_ways_to_a_provider_are_not_the_run(tmp_path: Path) -> None:
    config = load(settings(None, tmp_path))
    other = settings(None, tmp_path, budget={"money": 3})
    other["models"]["teacher"] |= {"price": None, "timeout": 9, "key_env": "ANOTHER"}
    assert load(other).fingerprint == config.fingerprint
    other["models"]["teacher"] |= {"model": "openai/large"}
    assert load(other).fingerprint != config.fingerprint


def test_a_rehearsal_pays_nobody(tmp_path: Path) -> None:
    small = rehearse(load(settings(None, tmp_path, budget={"money": 3})))
    assert small.models["teacher"].kind == "tiny" and small.budget.money is None


def test_results_know_nothing_of_a_cache(tmp_path: Path) -> None:
    """Answers from the cache count like paid ones where a policy is described, not on the bill."""
    with Provider(knows_the_way) as provider:
        values = settings(provider, tmp_path, stages=[])
        first: Result = execute(load(values)).results[0]
        paid = len(provider.asked)
        (tmp_path / "run" / "evaluation" / "teacher-sampled.json").unlink()
        again: Result = execute(load(values)).results[0]
        assert len(provider.asked) == paid
    assert again == first


def test_a_teacher_behind_an_api_helps_groups_that_fail(tmp_path: Path) -> None:
    tiny = {"hidden": 16, "heads": 1, "layers": 1,
            "tokenizer": {"vocabulary": 320, "episodes": 8}}  # fmt: skip
    stage = {"name": "rl", "model": "student", "teacher": "teacher", "method": "grpo", "tasks": 4,
             "samples": 2, "iterations": 2,
             "axes": {"group": {"edit": "teacher", "replace": 1}}}  # fmt: skip
    with Provider(knows_the_way) as provider:
        values = settings(provider, tmp_path, stages=[stage], evaluate={})
        values["models"]["student"] = tiny
        execute(config := load({**values, "sampling": {"max_tokens": 2}}))
    with Run(config) as the_run:
        given = [t for t in the_run.episodes("rl") if t.provenance.get("edit") == "teacher"]
    by_role, whole = spent(config)
    assert given and all(t.success for t in given)
    assert [each.role for each in by_role] == ["teacher"]
    assert whole.calls == sum(len(t.turns) for t in given) == len(provider.asked)
