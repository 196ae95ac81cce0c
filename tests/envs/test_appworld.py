"""AppWorld without its engine: actions, task files, what is said where something is missing."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.envs.appworld import data, setup
from agentdistill.envs.appworld.data import scenario_goal_completion
from agentdistill.envs.appworld.env import LONGEST, AppWorldEnv, opening, read, slots
from agentdistill.envs.appworld.worlds import nursery
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError, EnvError
from agentdistill.records import Task
from tests.cli_calls import python

SPECS = {
    "instruction": "Count the spoons.",
    "supervisor": {
        "first_name": "Ada",
        "last_name": "Byron",
        "email": "ada@example.com",
        "phone_number": "5550100",
    },
    "datetime": "2023-05-18T12:00:00",
    "db_version": "0.1.0",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with the lists and the words of some tasks, and no AppWorld installed."""
    monkeypatch.setenv("AGENTDISTILL_HOME", str(tmp_path / "house"))
    monkeypatch.setenv("APPWORLD_ROOT", str(tmp_path))
    for split, names in {
        "train": ["a_1", "a_2", "a_3:easy", "b_1", "b_2"],
        "dev": ["c_1"],
        "test_normal": ["d_1"],
        "test_challenge": ["e_1"],
    }.items():
        path = tmp_path / "data" / "datasets" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n\n")
        for name in names:
            folder = data.folder(tmp_path, name.partition(":")[0])
            folder.mkdir(parents=True)
            text = {**SPECS, "instruction": f"Count the spoons of {folder.name}."}
            (folder / "specs.json").write_text(json.dumps(text))
    return tmp_path


# -- actions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        "print(1)\n",
        "```python\nprint(1)\n```",
        "Let me see.\n```py\nprint(1)\n```\nAnd then:\n```\nprint(2)\n```",
        "<code>print(1)\n</code>",
        " <code>\n```\nprint(1)\n```\n</code>\n",
        "```python\r\nprint(1)\r\n```\r\n",
    ],
)
def test_code_is_taken_out_of_fences_and_tags(action: str) -> None:
    code, refusal = read(action)
    assert (code.strip(), refusal) == ("print(1)", "")


def test_bare_code_is_taken_as_it_is() -> None:
    code = 'if True:\n    text = "```"\n\tother = "<code>x</code>"\n'
    assert read(code) == (code, "")


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("", "no code"),
        (" \n\t", "no code"),
        ("```python\n```", "no code"),
        ("<code> </code>", "no code"),
        ("print('\x00')", "control"),
        ("print('\x1b[0m')", "control"),
        ("print('\ud800')", "Unicode"),
        ("A" * 2**20, "characters"),
    ],
)
def test_what_cannot_be_code_is_refused(action: str, reason: str) -> None:
    code, refusal = read(action)
    assert code == ""
    assert reason in refusal


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_is_code_or_refused(action: str) -> None:
    code, refusal = read(action)
    assert bool(code.strip()) != bool(refusal)
    assert len(code) <= LONGEST
    code.encode()


def test_the_tool_carries_code() -> None:
    env = AppWorldEnv()
    assert env.tool_action("execute", {"code": "print(1)"}) == "print(1)"
    assert [tool["function"]["name"] for tool in env.tools] == ["execute"]


# -- scenarios -------------------------------------------------------------------------------------


def test_a_scenario_counts_when_every_variant_is_solved() -> None:
    results = {"a_1": True, "a_2": True, "a_3": True, "b_1": True, "b_2": False, "c_1": True}
    assert scenario_goal_completion(results) == pytest.approx(2 / 3)
    assert scenario_goal_completion({"a_1": False}) == 0
    assert scenario_goal_completion({"x_y_1": True, "x_y_2": True}) == 1


@pytest.mark.parametrize("results", [{}, {"a": True}, {"_1": True}, {"a_b": True}])
def test_what_is_no_scenario_is_refused(results: dict[str, bool]) -> None:
    with pytest.raises(ConfigError):
        scenario_goal_completion(results)


@given(st.dictionaries(st.from_regex(r"[ab]_[1-3]", fullmatch=True), st.booleans(), min_size=1))
def test_scenarios_are_never_easier_than_tasks(results: dict[str, bool]) -> None:
    completion = scenario_goal_completion(results)
    assert 0 <= completion <= 1
    assert (completion == 1) == all(results.values())
    if not any(results.values()):
        assert completion == 0


# -- task files ------------------------------------------------------------------------------------


def test_tasks_are_listed_in_the_official_order_or_shuffled(root: Path) -> None:
    env = AppWorldEnv()
    names = [task.payload["task"] for task in env.tasks("train")]
    assert names == ["a_1", "a_2", "a_3", "b_1", "b_2"]
    shuffled = [task.payload["task"] for task in env.tasks("train", seed=3)]
    assert shuffled == [task.payload["task"] for task in env.tasks("train", seed=3)]
    assert (shuffled != names, sorted(shuffled) == names) == (True, True)


def test_a_task_is_its_content(root: Path) -> None:
    before, other = list(AppWorldEnv().tasks("train"))[:2]
    assert before.data == "0.1.0"
    assert before.key != other.key
    path = data.folder(root, "a_1") / "specs.json"
    path.write_text(path.read_text().replace("spoons", "forks"))
    assert next(AppWorldEnv().tasks("train")).key != before.key
    with pytest.raises(ConfigError, match="made with other data"):
        AppWorldEnv().reset(options={"task": before})


def test_the_card_names_the_data(root: Path) -> None:
    card = AppWorldEnv().card
    assert card.data.startswith("0.1.0-")
    assert (card.split("report"), card.split("tune")) == ("test_normal", "dev")
    (root / "data" / "datasets" / "dev.txt").write_text("d_9\n")
    assert AppWorldEnv().card.data != card.data


def test_first_observations_tell_held_out_tasks(root: Path) -> None:
    env = AppWorldEnv()
    assert env.held_out("anything") is False
    for name, held in (("a_1", False), ("c_1", True), ("e_1", True)):
        found = data.specs(root, name)
        assert env.held_out(opening(found)) is held


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"instruction": 1, "supervisor": 2}'])
def test_a_damaged_task_is_named_with_the_remedy(root: Path, text: str) -> None:
    path = data.folder(root, "b_1") / "specs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"b_1.specs\.json is missing or damaged: run `agent"):
        list(AppWorldEnv().tasks("train"))


def test_missing_data_is_named_with_the_remedy(root: Path) -> None:
    (root / "data" / "datasets" / "train.txt").unlink()
    with pytest.raises(ConfigError, match="agentdistill data appworld"):
        list(AppWorldEnv().tasks("train"))
    with pytest.raises(ConfigError, match="splits are train, dev"):
        list(AppWorldEnv().tasks("valid"))


def test_nothing_installed_is_named_with_the_remedy(root: Path) -> None:
    env = AppWorldEnv()
    with pytest.raises(EnvError, match="agentdistill setup appworld"):
        env.reset(options={"task": next(env.tasks("train"))})
    with pytest.raises(EnvError):
        env.step("print(1)")
    env.close()
    env.close()


def test_availability_says_what_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = AppWorldEnv.availability()
    assert (found.package, found.missing) == ("", ("AppWorld: run `agentdistill setup appworld`",))
    assert found.data.startswith("0.1.0-")
    monkeypatch.setenv("APPWORLD_ROOT", str(root / "empty"))
    found = AppWorldEnv.availability()
    assert (found.data, len(found.needs)) == ("", 2)
    assert AppWorldEnv().card.data == ""


@pytest.mark.parametrize("payload", [{}, {"task": "../a_1"}, {"task": "a_1/.."}, {"task": "no_1"}])
def test_a_task_that_is_none_is_refused(root: Path, payload: dict[str, str]) -> None:
    env = AppWorldEnv()
    with pytest.raises(ConfigError):
        env.reset(options={"task": Task(env.card.id, "train", payload, data="0.1.0")})


def test_a_root_that_the_engine_takes_for_a_database_is_refused(root: Path) -> None:
    house = root / "in-memory"
    house.mkdir()
    (house / "data").symlink_to(root / "data")
    fake = root / "house" / "appworld" / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.touch()
    (root / "house" / "appworld" / "ready.json").write_text(f'{{"appworld": "{setup.VERSION}"}}')
    env = AppWorldEnv(root=house)
    with pytest.raises(ConfigError, match="choose another folder"):
        env.reset(options={"task": next(env.tasks("train"))})


@pytest.mark.parametrize(
    "options",
    [{"seconds": 0}, {"max_output": 5}, {"memory": 0.5}, {"memory": -1}, {"max_steps": 0}],
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        make("agentdistill/AppWorld-v0", options)


def test_slots_follow_from_cores_and_memory() -> None:
    assert slots(2, 64) == 8
    assert slots(32, 16) == 20
    assert slots(1, 0.1) == 1
    assert slots() >= 1


# -- light, and what a broken interpreter looks like -----------------------------------------------


def test_construction_and_card_start_and_import_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from agentdistill.envs.make import make\n"
        "begun = time.process_time(); env = make('agentdistill/AppWorld-v0'); env.card\n"
        "env.availability(); print(time.process_time() - begun)\n"
        "print([m for m in ('appworld', 'torch', 'httpx', 'pandas') if m in sys.modules])"
    )
    seconds, heavy = python("-c", code).stdout.splitlines()
    assert float(seconds) < 0.3
    assert heavy == "[]"


def test_a_broken_interpreter_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho the venv is broken >&2\nexit 3\n")
    program.chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(EnvError, match="the venv is broken"):
        nursery(program, tmp_path, 0).world()
    with pytest.raises(EnvError, match="cannot start"):
        nursery(tmp_path / "venv" / "bin" / "none", tmp_path, 0)
    assert time.monotonic() - begun < 20


def test_a_process_that_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentdistill.envs.appworld.worlds.START", 0.5)
    program = tmp_path / "venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import time; time.sleep(60)'\n")
    program.chmod(0o755)
    held = nursery(program, tmp_path, 0)
    with pytest.raises(EnvError, match=r"no answer within 0\.5 s"):
        held.world()
    process = held.child.process.pid
    held.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
