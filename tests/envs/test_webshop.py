"""WebShop keeps the promises of every environment; its rules, buyer and options; what can break."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agentdistill.envs.check import check_env
from agentdistill.envs.webshop import env as module
from agentdistill.envs.webshop.env import ID, MAX_ACTION, WebShopEnv
from agentdistill.envs.webshop.formats import Product
from agentdistill.envs.webshop.goals import Goal
from agentdistill.envs.webshop.pages import State
from agentdistill.errors import ConfigError, MissingExtraError
from agentdistill.records import StepResult, Task

PRODUCTS = 100


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("webshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTDISTILL_HOME", str(folder / "cache"))
        patch.setenv("WEBSHOP_DATA", str(folder / "official"))
        yield


def made(**options: Any) -> WebShopEnv:
    return WebShopEnv(products=PRODUCTS, **options)


def played(env: WebShopEnv, task: Task) -> StepResult:
    """The last result of an episode of the buyer."""
    env.reset(options={"task": task})
    while True:
        action = env.expert_action()
        assert action is not None
        result = env.act(action)
        assert result.valid, action
        if result.terminated or result.truncated:
            return result


def to_item(env: WebShopEnv) -> Product:
    """Reset and go to the page of the product that was meant."""
    env.reset(options={"task": next(env.tasks("train"))})
    while env._state.page != "item":
        env.act(env.expert_action() or "")
    return env._shop.catalogue.product(env._state.row)


# -- the contract ----------------------------------------------------------------------------------


def test_check_env() -> None:
    report = check_env(ID, episodes=3, seconds=0.2, kwargs={"products": PRODUCTS})
    assert report.ok, str(report)


def test_tasks_are_distinct_and_complete() -> None:
    env = made()
    keys = [task.key for split in env.card.splits for task in env.tasks(split)]
    goals = env._shop.catalogue.goals["synthetic"]
    repeated = sum(goals.repeats(place) for place in range(len(goals)))
    assert len(set(keys)) == len(keys) == len(goals) - repeated
    orders = [[task.key for task in islice(env.tasks("train", seed), 5)] for seed in range(3)]
    assert len(set(map(tuple, orders))) == 3


def test_a_task_is_its_payload() -> None:
    env = made()
    task = next(env.tasks("train"))
    payload = json.loads(json.dumps(dict(task.payload)))
    copy = Task(ID, "elsewhere", payload, data=task.data)
    assert copy.key == task.key
    assert env.reset(options={"task": copy})[0] == env.reset(options={"task": task})[0]
    assert env.goal == payload["instruction"]


def test_construction_is_lazy(tmp_path: Path) -> None:
    env = WebShopEnv(catalogue=tmp_path / "nowhere")
    assert env.card.data == ""
    env.close()
    env.close()


# -- rules -----------------------------------------------------------------------------------------


def test_pages() -> None:
    env = made()
    product = to_item(env)
    found = env._state.query
    for name, shown in [("Description", product.description), ("Features", product.bullets[-1])]:
        assert shown.strip() in env.act(f"click[{name}]").observation
        assert env.admissible() == ["click[back to search]", "click[< prev]"]
        assert product.title in env.act("click[< prev]").observation
    results = env.act("click[< prev]").observation
    assert results == env.act(f"search[{found}]").observation
    second = env.act("click[Next >]").observation
    assert "Page 2 (" in second
    assert env.act("click[< Prev]").observation == results
    assert env.act("click[BACK TO SEARCH]").observation.endswith("[SEP] Search")


def test_attributes_are_shown_on_request() -> None:
    plain, env = made(), made(show_attributes=True)
    to_item(plain)
    assert "click[buy now]" in plain.admissible()
    assert "click[attributes]" not in plain.admissible()
    product = to_item(env)
    shown = env.act("click[attributes]").observation
    assert all(f"[SEP] {attribute} [SEP]" in shown for attribute in product.attributes)
    assert shown.endswith(product.product_category)


def test_options_are_kept_until_the_product_is_left() -> None:
    env = made()
    product = to_item(env)
    while not product.options:
        env.reset()
        product = to_item(env)
    name, values = next(iter(product.options.items()))
    for value in (values[0], values[-1]):
        env.act(f"click[{value.upper()}]")
        assert dict(env._state.options) == {name: value}
    env.act("click[features]")
    env.act("click[< prev]")
    assert dict(env._state.options) == {name: values[-1]}
    env.act("click[< prev]")
    assert env._state.options == ()


@pytest.mark.parametrize(
    "action",
    ["", "buy", "click[]", "click[no such thing]", "click[search]", "Click[back to search]",
     "search[]", "search", " click[< prev]", "search[a\nb]", "click[\ud800]", "x" * 2**20,
     f"search[{'a' * MAX_ACTION}]", "search[a][b]"],
)  # fmt: skip
def test_invalid_actions_show_the_page_again(action: str) -> None:
    env = made()
    to_item(env)
    before, page = env._state, env.act("").observation
    result = env.act(action)
    assert (result.observation, result.reward, result.valid) == (page, 0.0, False)
    assert not result.terminated
    assert env._state == before


def test_search_works_on_every_page() -> None:
    env = made()
    to_item(env)
    result = env.act("SEARCH[cup]")
    assert not result.valid
    assert env.act("search[CUP] please").observation == env.act("search[cup]").observation
    assert "Page 1 (Total results: 0)" in env.act("search[the]").observation


def test_purchase_ends() -> None:
    env = made()
    task = next(env.tasks("train"))
    result = played(env, task)
    assert result.terminated
    assert result.reward == result.score
    assert env.admissible() == []
    assert env.expert_action() is None
    after = env.act("search[cup]")
    assert (after.valid, after.reward, after.terminated) == (False, 0.0, True)
    assert after.observation == result.observation


def test_parts_of_the_reward() -> None:
    env = made()
    to_item(env)
    *_, info = env.step("click[buy now]")
    goal = env._goal
    whole = info["parts"]
    met = whole["attributes"] + whole["options"] + whole["price"]
    parts = len(goal.attributes) + len(goal.options) + 1
    assert whole["attributes"] == len(goal.attributes)
    assert whole["price"] is True
    assert info["score"] == whole["total"] == met / parts


def test_tools() -> None:
    env = made()
    assert env.tool_action("search", {"keywords": "red cup"}) == "search[red cup]"
    assert env.tool_action("click", {"element": "Buy Now"}) == "click[Buy Now]"
    to_item(env)
    for name, arguments in [
        ("click", {"keywords": "a"}),
        ("search", {}),
        ("click", {"element": 3}),
        ("buy", {"element": "a"}),
        ("click", {"element": "a", "more": "b"}),
    ]:
        assert not env.act(env.tool_action(name, arguments)).valid


# -- the buyer -------------------------------------------------------------------------------------


def test_buyer_earns_everything_that_can_be_earned() -> None:
    env = made()
    tasks = list(islice(env.tasks("train", seed=3), 150))
    won = {task.key: played(env, task).success for task in tasks}
    can = {task.key: env._can_be_met(Goal.from_json(task.payload)) for task in tasks}
    assert won == can
    assert sum(won.values()) > 0.8 * len(tasks)


def test_attainable_goals_are_all_won() -> None:
    env = made(attainable=True)
    assert env.card.expert_rate == 1.0
    assert all(played(env, task).success for task in islice(env.tasks("test"), 60))


def test_buyer_acts_from_any_state() -> None:
    env, rng = made(attainable=True, max_steps=60), Random(0)
    for task in islice(env.tasks("dev"), 20):
        env.reset(options={"task": task})
        for _ in range(rng.randrange(1, 12)):
            listed = [action for action in env.admissible() if action != "click[buy now]"]
            assert env.act(rng.choice(listed)).valid
        won = False
        for _ in range(20):
            result = env.act(env.expert_action() or "")
            won = won or result.success
            if result.terminated:
                break
        assert won


def test_buyer_pages_forth_and_back() -> None:
    env = made()
    env.reset(options={"task": next(env.tasks("train"))})
    row = env._shop.catalogue.row(env._goal.asin)
    query = next(
        words
        for words in (w for t in env.tasks("train") for w in t.payload["instruction"].split())
        if row in env._shop.catalogue.search(words.lower())[10:40]
    )
    place = env._shop.catalogue.search(query.lower()).index(row) // 10 + 1
    for number in (1, 5):
        env._state = State("results", query.lower(), number)
        for _ in range(abs(number - place)):
            env.act(env.expert_action() or "")
        assert env._state.number == place
        assert env.expert_action() == f"click[{env._goal.asin.lower()}]"


# -- options, and what is missing ------------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Official files with one request that somebody wrote."""
    from agentdistill.envs.webshop.generate import generate

    folder = tmp_path / "official"
    folder.mkdir()
    generate(folder, products=20, seed=1)
    asin = json.loads((folder / "items_shuffle.json").read_text())[3]["asin"]
    asked = {
        "instruction": "i want a nice one.",
        "instruction_attributes": ["nice"],
        "instruction_options": ["red"],
    }
    (folder / "items_human_ins.json").write_text(json.dumps({asin: [asked]}))
    return folder


def test_human_goals(official: Path) -> None:
    env = WebShopEnv(catalogue=official)
    (task,) = (task for split in env.card.splits for task in env.tasks(split))
    assert task.payload["options"] == ["red"]
    assert env.reset(options={"task": task})[0].count("i want a nice one, and price lower") == 1
    result = played(env, task)
    assert 0 < result.score <= 1
    assert env.card.notes[-1] == "goals: human"
    both = WebShopEnv(catalogue=official, goals="synthetic")
    assert both.card.data == env.card.data
    assert any(isinstance(task.payload["options"], dict) for task in both.tasks("train"))
    for name in ("items_shuffle", "items_ins_v2"):
        (official / f"{name}.json").rename(official / f"{name}_1000.json")
    assert WebShopEnv(catalogue=official).card.notes[-1] == "goals: synthetic"


def test_auto_prefers_official_files(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WebShopEnv().card.data.startswith("generated")
    assert WebShopEnv.availability().missing
    monkeypatch.setenv("WEBSHOP_DATA", str(official))
    env = WebShopEnv()
    assert env.card.data == WebShopEnv(catalogue=official).card.data
    assert not WebShopEnv.availability().missing
    assert "items_human_ins.json" in WebShopEnv.availability().data
    assert WebShopEnv(catalogue="generated").card.data.startswith("generated")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"goals": "mixed"}, "goals"),
        ({"products": 0}, "products"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_options(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WebShopEnv(**options)
    assert caught.value.key == key


def test_missing_data(tmp_path: Path) -> None:
    env = WebShopEnv(catalogue=tmp_path)
    with pytest.raises(ConfigError, match="items_shuffle"):
        next(env.tasks("train"))
    with pytest.raises(ConfigError, match=r"'human' needs items_human_ins\.json"):
        next(made(goals="human").tasks("train"))
    with pytest.raises(ConfigError, match="train, dev, test"):
        env.tasks("validation")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    env = made()
    assert env.card.id == ID
    assert env.availability().needs
    with pytest.raises(MissingExtraError, match=r"agentdistill\[webshop\]"):
        env.reset()


def test_tasks_of_others() -> None:
    env = made()
    task = next(env.tasks("train"))
    foreign = Task(ID, "train", task.payload, data="another")
    with pytest.raises(ConfigError, match="another catalogue"):
        env.reset(options={"task": foreign})
    for payload in ({}, {**task.payload, "options": 3}, {**task.payload, "price_upper": "x"}):
        with pytest.raises(ConfigError, match="a goal has"):
            env.reset(options={"task": Task(ID, "train", payload)})
    with pytest.raises(ConfigError, match="no such product"):
        env.reset(options={"task": Task(ID, "train", {**task.payload, "asin": "B0"})})


def test_every_goal_of_a_generated_catalogue_can_be_met() -> None:
    """The reward's colour rule must not spoil what we invent, as it does official goals."""
    everything, reachable = (
        WebShopEnv(catalogue="generated", attainable=only) for only in (False, True)
    )
    for split in everything.card.splits:
        keys = [task.key for task in everything.tasks(split)]
        assert keys
        assert {task.key for task in reachable.tasks(split)} == set(keys)
