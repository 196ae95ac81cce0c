"""120 sessions recorded from the original engine, with its own search index, come out the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.webshop.env import ID, WebShopEnv
from agentdistill.records import Task

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "webshop"

pytestmark = pytest.mark.skipif(
    not (SHARED / "traces.jsonl").is_file(),
    reason="needs ../shared/data/webshop: the small catalogue and traces.jsonl",
)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebShopEnv]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTDISTILL_HOME", str(tmp_path_factory.mktemp("cache")))
        yield WebShopEnv(catalogue=SHARED, goals="synthetic")


@pytest.fixture(scope="module")
def sessions() -> list[dict[str, Any]]:
    with (SHARED / "traces.jsonl").open() as file:
        return [json.loads(line) for line in file]


def _task(goal: dict[str, Any]) -> Task:
    payload = {
        "asin": goal["asin"],
        "instruction": goal["instruction_text"],
        "attributes": goal["attributes"],
        "options": goal["goal_options"],
        "price_upper": goal["price_upper"],
    }
    return Task(ID, "train", payload)


def test_every_step_of_every_session(env: WebShopEnv, sessions: list[dict[str, Any]]) -> None:
    steps = 0
    for session in sessions:
        first, *others = session["steps"]
        observation, _ = env.reset(options={"task": _task(session["goal"])})
        assert observation == first["observation"]
        for step in others:
            result = env.act(step["action"])
            place = f"session {session['session']}, {step['action']}"
            assert result.observation == step["observation"], place
            assert result.reward == step["reward"], place
            assert result.terminated == step["done"], place
            labels = [a.removeprefix("click[")[:-1] for a in env.admissible()]
            known = [label for label in step["available"]["clickables"] if label != "search"]
            assert step["available"]["has_search_bar"] or labels == known, place
            steps += 1
    assert (len(sessions), steps) == (120, 769)


def test_goals_are_the_sessions(env: WebShopEnv, sessions: list[dict[str, Any]]) -> None:
    """Products, options and attributes all; the caps as far as one seed explains them."""
    goals = env._shop.catalogue.goals["synthetic"]
    assert len(goals) == 6910
    caps = 0
    for session in sessions:
        ours, theirs = goals[session["session"]], session["goal"]
        assert ours.asin == theirs["asin"]
        assert dict(ours.options) == theirs["goal_options"]
        assert list(ours.attributes) == theirs["attributes"]
        caps += ours.price_upper == theirs["price_upper"]
    assert caps == 110


def test_splits_are_those_of_the_paper(env: WebShopEnv) -> None:
    bounds = {split: sorted(t.index for t in env.tasks(split)) for split in env.card.splits}
    assert (bounds["test"][0], bounds["test"][-1]) == (0, 499)
    assert (bounds["dev"][0], bounds["dev"][-1]) == (500, 1499)
    assert (bounds["train"][0], bounds["train"][-1]) == (1500, 6909)
