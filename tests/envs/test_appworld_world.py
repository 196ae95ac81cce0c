"""AppWorld's real engine on small tasks of our own (tests/appworld_micro.py)."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs import footprint
from agentdistill.envs.appworld import data, env, setup
from agentdistill.envs.appworld.env import AppWorldEnv
from agentdistill.envs.check import check_env
from agentdistill.errors import EnvError
from agentdistill.records import StepResult, digest
from tests.appworld_micro import NOTES, PASSWORD, USER, build
from tests.cli_calls import ROOT

pytestmark = pytest.mark.appworld

LOGIN = (
    f"login = apis.simple_note.login(username='{USER['email']}', password='{PASSWORD}')\n"
    "token = login['access_token']\n"
)
COUNT = (
    "notes = apis.simple_note.search_notes(access_token=token, page_limit=20)\n"
    "print(len(notes), note, DateTime.now().year)"
)
SECRET = "sk-only-for-the-trainer"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The micro tasks, an API key among our variables, and another one in a .env file.

    AppWorld's environment is used through a link, so that the .env file is in a folder above it.
    """
    python = setup.python()
    assert python is not None
    place = tmp_path_factory.mktemp("appworld")
    build(python, place / "root")
    house = place / "house"
    house.mkdir()
    (house / "appworld").symlink_to(setup.home().absolute())
    (house / ".env").write_text(f"KEY_IN_A_FILE={SECRET}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTDISTILL_HOME", str(house))
        patch.setenv("APPWORLD_ROOT", str(place / "root"))
        patch.setenv("OPENAI_API_KEY", SECRET)
        yield place / "root"


@pytest.fixture(scope="module")
def shared(root: Path) -> Iterator[AppWorldEnv]:
    """Keeps the forking process alive between the tests."""
    made = AppWorldEnv()
    yield made
    made.close()


@pytest.fixture
def world(shared: AppWorldEnv) -> AppWorldEnv:
    """At the start of the first task: count the notes that mention tea (there are three)."""
    shared.reset(options={"task": _task(shared)})
    return shared


def _task(made: AppWorldEnv, split: str = "train") -> Any:
    return next(made.tasks(split))


# -- the task --------------------------------------------------------------------------------------


def test_the_first_observation_says_what_whose_and_where(world: AppWorldEnv) -> None:
    first, _ = world.reset(options={"task": _task(world)})
    assert first.startswith("How many of my notes mention the word tea?")
    assert all(USER[key] in first for key in USER)
    assert "2023-05-18 12:00:00" in first
    assert "apis.api_docs" in first
    assert world.goal in first


def test_the_recorded_solution_wins(world: AppWorldEnv) -> None:
    world.act("password = 5")
    code = world.expert_action()
    assert code is not None
    _, reward, terminated, truncated, info = world.step(code)
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["success"], info["score"], info["valid"], info["raised"]) == (True, 1, True, False)
    assert (info["passed"], info["tests"]) == (2, 2)
    assert world.expert_action() is None


def test_the_test_splits_have_no_solution(world: AppWorldEnv) -> None:
    world.reset(options={"task": _task(world, "test_normal")})
    assert world.expert_action() is None
    result = world.act("apis.supervisor.complete_task(answer=1)")
    assert (result.success, result.score) == (True, 1.0)


def test_code_of_one_s_own_wins(world: AppWorldEnv) -> None:
    result = world.act(LOGIN + "print(len(apis.simple_note.search_notes(access_token=token)))")
    assert (result.observation, result.terminated, result.score) == (f"{len(NOTES)}\n", False, 0.0)
    result = world.act("```python\napis.supervisor.complete_task(answer='3')\n```")
    assert (result.success, result.reward, result.terminated) == (True, 1.0, True)


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("apis.supervisor.complete_task(answer=4)", 0.5),
        ("apis.supervisor.complete_task()", 0.5),
        ("apis.supervisor.complete_task(status='fail')", 0.5),
        (
            LOGIN + "notes = apis.simple_note.search_notes(access_token=token)\n"
            "apis.simple_note.delete_note(note_id=notes[0]['note_id'], access_token=token)\n"
            "apis.supervisor.complete_task(answer=4)",
            0.0,
        ),
    ],
)
def test_wrong_code_fails(world: AppWorldEnv, code: str, score: float) -> None:
    result = world.act(code)
    assert (result.terminated, result.success, result.reward) == (True, False, 0.0)
    assert result.score == score


def test_the_step_limit_is_judged_too(shared: AppWorldEnv) -> None:
    made = AppWorldEnv(max_steps=2)
    made.reset(options={"task": _task(made)})
    assert made.act("print(1)").score == 0
    result = made.act("")
    assert (result.truncated, result.terminated, result.valid) == (True, False, False)
    assert (result.success, result.score, result.reward) == (False, 0.5, 0.0)
    made.close()


# -- observations ----------------------------------------------------------------------------------


def test_variables_live_on_within_an_episode_only(world: AppWorldEnv) -> None:
    assert world.act("x = 5").observation == "Execution successful."
    assert world.act("print(x + 1)").observation == "6\n"
    world.reset(options={"task": _task(world)})
    assert "NameError" in world.act("print(x)").observation


@pytest.mark.parametrize(
    ("code", "words", "valid"),
    [
        ("1 / 0", "ZeroDivisionError", True),
        ("raise SystemExit(3)", "3", True),
        ("apis.simple_note.show_note(note_id=1)", "401", True),
        ("apis.nothing.at_all()", "No app named 'nothing'", True),
        ("input('what?')", "input", True),
        ("x = 'a' * 10**11", "MemoryError", True),
        ("def f(:", "invalid syntax", False),
        ("import os\nos.system('ls')", "not allowed: os.system", False),
        ("import subprocess", "not allowed: subprocess", False),
        ("print('\x00')", "Not executed: the code has control", False),
    ],
)
def test_failures_are_observations(world: AppWorldEnv, code: str, words: str, valid: bool) -> None:
    result = world.act(code)
    assert words in result.observation
    assert (result.valid, result.terminated, result.reward) == (valid, False, 0.0)
    assert world.act("print(7)").observation == "7\n"


def test_what_an_exception_had_done_before_is_done(world: AppWorldEnv) -> None:
    _, _, terminated, _, info = world.step("apis.supervisor.complete_task(answer=3)\n1 / 0")
    assert (terminated, info["success"], info["raised"], info["valid"]) == (True, True, True, True)


def test_huge_output_is_cut_with_a_mark(world: AppWorldEnv) -> None:
    result = world.act("print('ab' * 10**7)")
    body, mark = result.observation.splitlines()
    assert body == "ab" * 5000
    assert mark == "[cut: 19,990,001 more characters]"
    assert world.act("print('\\ud800')").observation == "?\n"


def test_two_instances_do_not_meet(world: AppWorldEnv) -> None:
    others = [AppWorldEnv() for _ in range(2)]

    def play(made: AppWorldEnv) -> list[StepResult]:
        made.reset(options={"task": _task(made)})
        return [made.act("x = 1"), made.act("print(x)"), made.act(str(made.expert_action()))]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(play, others)
    assert first == second
    assert "NameError" in world.act("print(x)").observation
    for made in others:
        made.close()
        made.close()


# -- what executed code can reach ------------------------------------------------------------------


def test_no_key_of_ours_is_visible(world: AppWorldEnv) -> None:
    assert os.environ["OPENAI_API_KEY"] == SECRET
    seen = world.act("import os\nprint(dict(os.environ))").observation
    assert "APPWORLD_ROOT" in seen
    assert "KEY" not in seen
    assert SECRET not in seen


@pytest.mark.parametrize(
    "code",
    [
        "from pathlib import Path\nprint(Path('{task}/ground_truth/answer.json').read_text())",
        "from pathlib import Path\nprint(Path('{task}/specs.json').read_text())",
        "from pathlib import Path\nprint(Path('/etc/passwd').read_text())",
        "import os\nos.mkdir('{root}/made')",
        "import os\nos.link('{task}/specs.json', '{root}/made')",
        "getattr(__builtins__, 'op' + 'en')('{root}/made', 'w')",
    ],
)
def test_files_are_out_of_reach(world: AppWorldEnv, root: Path, code: str) -> None:
    result = world.act(code.format(task=data.folder(root, "aaaaaa1_1"), root=root))
    assert "PermissionError" in result.observation
    assert not (root / "made").exists()


def test_a_patched_module_ends_with_its_episode(world: AppWorldEnv) -> None:
    world.act("import calendar\ncalendar.isleap = None")
    assert "TypeError" in world.act("import calendar\ncalendar.isleap(1)").observation
    world.reset(options={"task": _task(world)})
    assert world.act("import calendar\nprint(calendar.isleap(1))").observation == "False\n"


def test_code_that_breaks_the_engine_is_a_fault(world: AppWorldEnv) -> None:
    with pytest.raises(EnvError, match="TypeError"):
        world.act("import json\njson.dumps = None")


# -- time and death --------------------------------------------------------------------------------


def test_an_infinite_loop_is_interrupted_and_goes_on(shared: AppWorldEnv) -> None:
    made = AppWorldEnv(seconds=1)
    made.reset(options={"task": _task(made)})
    result = made.act("x = 1\nwhile True:\n    x += 1")
    assert "timed out after 1 seconds" in result.observation
    assert (result.valid, result.terminated) == (True, False)
    assert made.act("print(x > 1)").observation == "True\n"
    made.close()


def test_code_that_cannot_be_interrupted_is_a_fault(
    shared: AppWorldEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "PATIENCE", 0.5)
    made = AppWorldEnv(seconds=1)
    made.reset(options={"task": _task(made)})
    process = _process(made)
    with pytest.raises(EnvError, match=r"no answer within 1\.5 s"):
        made.act("sum(range(10**12))")  # one call in C: no signal gets through
    _gone({process})
    with pytest.raises(EnvError):
        made.act("print(1)")
    monkeypatch.undo()
    made.reset(options={"task": _task(made)})
    assert made.act("print(1)").observation == "1\n"
    made.close()


def test_a_world_that_died_is_an_error_and_the_next_reset_works(world: AppWorldEnv) -> None:
    os.kill(_process(world), signal.SIGKILL)
    with pytest.raises(EnvError, match="has ended"):
        world.act("print(1)")
    world.reset(options={"task": _task(world)})
    assert world.act("print(1)").observation == "1\n"
    with pytest.raises(EnvError, match="has ended"):
        world.act("import os\nos.abort()")


def test_a_damaged_database_is_an_error_with_the_remedy(world: AppWorldEnv, root: Path) -> None:
    task = _task(world, "test_challenge")
    changes = data.folder(root, "dddddd4_1") / "dbs" / "supervisor.jsonl"
    whole = changes.read_text()
    changes.write_text("{ this is no JSON")
    with pytest.raises(EnvError, match=r"dddddd4_1: .*agentdistill data appworld"):
        world.reset(options={"task": task})
    changes.write_text(whole)
    world.reset(options={"task": task})
    assert world.act("apis.supervisor.complete_task(answer=1)").success


def _process(made: AppWorldEnv) -> int:
    assert made._world is not None
    assert made._world.process is not None
    return made._world.process


def _gone(processes: set[int]) -> None:
    until = time.monotonic() + 10
    while any(footprint.resident(process) for process in processes):
        assert time.monotonic() < until, processes
        time.sleep(0.02)


# -- saved states ----------------------------------------------------------------------------------


def test_the_engine_s_saved_states_are_not_exact(world: AppWorldEnv) -> None:
    world.act(f"note = 'before'\n{LOGIN}")
    add = "apis.simple_note.create_note(title='{}', content='', access_token=token)"
    world._call("save_state", name="here")
    world.act(f"note = 'after'\n{add.format('New')}")
    assert world.act(COUNT).observation == f"{len(NOTES) + 1} after 2023\n"
    world._call("load_state", name="here")
    # The databases went back, the variable did not: so snapshots replay.
    assert world.act(COUNT).observation == f"{len(NOTES)} after 2023\n"


def test_a_snapshot_restores_databases_and_variables(world: AppWorldEnv) -> None:
    world.act(f"note = 'before'\n{LOGIN}")
    saved = world.snapshot()
    add = "apis.simple_note.create_note(title='New', content='', access_token=token)"
    after = [world.act(f"note = 'after'\n{add}"), world.act(COUNT)]
    assert world.restore(saved) == "Execution successful."
    assert world.act(COUNT).observation == f"{len(NOTES)} before 2023\n"
    world.restore(saved)
    assert world.replay([f"note = 'after'\n{add}", COUNT]) == after


# -- processes -------------------------------------------------------------------------------------

CHILD = """
import sys, time
from agentdistill.envs.appworld.env import EXAMPLES, AppWorldEnv
from agentdistill.records import digest
env = AppWorldEnv()
first, _ = env.reset(options={"task": next(env.tasks("train"))})
seen = [first, *(result.observation for result in env.replay(EXAMPLES))]
print(digest(seen), env._world.process, env._nursery.child.process.pid, flush=True)
env.act("while True: pass")
"""


def test_another_process_sees_the_same_and_leaves_nothing_when_killed(
    world: AppWorldEnv, tmp_path: Path
) -> None:
    seen = [world.reset(options={"task": _task(world)})[0]]
    seen += [result.observation for result in world.replay(env.EXAMPLES)]
    variables = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], env=variables, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        same, process, parent = child.stdout.readline().split()
        assert footprint.resident(int(process)) > 0
        child.kill()
    assert same == digest(seen)
    _gone({int(process), int(parent)})


def test_closing_the_last_instance_ends_everything(root: Path) -> None:
    before = footprint.descendants()
    made = AppWorldEnv(memory=5)  # another limit: a forking process of its own
    made.reset(options={"task": _task(made)})
    born = {number for number, _ in footprint.descendants() - before}
    folder = Path(made._nursery.folder) if made._nursery else Path()
    assert len(born) == 2
    assert folder.is_dir()
    del made  # forgotten, not closed
    gc.collect()
    _gone(born)
    assert not folder.exists()


# -- the promises of every environment ---------------------------------------------------------


def test_the_checker_passes(shared: AppWorldEnv) -> None:
    report = check_env(shared, episodes=2, seconds=0.1, budget=1)
    assert report.ok, str(report)
    passed = {check.name for check in report.checks if check.status == "ok"}
    assert passed >= {"gymnasium", "replay", "snapshot", "hostile", "expert", "limit"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_checker_passes_by_name(root: Path) -> None:
    report = check_env("agentdistill/AppWorld-v0", episodes=3, budget=5, expert_rate=1.0)
    assert report.ok, str(report)
