"""The command line: what it runs, prints and writes.

One micro run (tiny models, small rooms) is trained once and shared.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from typer.testing import Result

from agentdistill import display
from agentdistill import quickstart as quickstart_recipe
from agentdistill.config import load
from tests.cli_calls import ENV, RECIPE, ROOM, ROOT, TINY, answer, call, python, refused


class Micro(NamedTuple):
    """A run: first up to one stage, then all of it."""

    recipe: str
    folder: Path
    staged: Result
    after_staged: list[str]
    whole: Result


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    """The run that tests share; they may repeat its commands and add episodes to it."""
    output = tmp_path_factory.mktemp("micro")
    recipe, folder = str(output / "recipe.yaml"), output / "micro"
    Path(recipe).write_text(yaml.safe_dump({**RECIPE, "output": str(output)}))
    staged = call("train", recipe, "--stage", "distilled")
    files = [path.name for path in [*folder.iterdir(), *(folder / "stages").iterdir()]]
    return Micro(recipe, folder, staged, files, call("train", recipe))


# -- the application -------------------------------------------------------------------------------


def test_help_names_the_verbs_and_the_exit_codes() -> None:
    text = call("--help").stdout
    for verb in ("quickstart", "train", "collect", "eval", "export", "envs", "methods", "config"):
        assert f"\n  {verb} " in text
    for line in ("2  bad configuration or usage", "3  a package is missing", "130  interrupted"):
        assert line in text


def test_version_is_the_package_s() -> None:
    from agentdistill import __version__

    assert call("--version").stdout == f"agentdistill {__version__}\n"


def test_importing_the_application_imports_nothing_heavy_and_is_quick() -> None:
    heavy = ["torch", "transformers", "gymnasium", "rich", "pydantic", "numpy"]
    code = f"import sys, agentdistill.cli; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout == "[]\n"
    assert _seconds("-m", "agentdistill.cli", "--help") - _seconds("-c", "pass") < 0.6


def _seconds(*args: str) -> float:
    """Least CPU time of three runs."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*args).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


@pytest.mark.parametrize(
    "args",
    [("trian",), ("train",), ("collect", "--episodes", "0"), ("eval", "x", "--mode", "fast")],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(args: Sequence[str]) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr and "Traceback" not in result.stderr


# -- what there is ---------------------------------------------------------------------------------


def test_envs() -> None:
    (sokoban,) = [card for card in answer("envs") if card["id"] == ENV["id"]]
    assert (sokoban["splits"], sokoban["installed"]) == (["train", "tune", "report"], True)
    row = next(line for line in call("envs").stdout.splitlines() if ENV["id"] in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert "train, tune, report" in cells


def test_envs_check() -> None:
    report = answer("envs", "check", ENV["id"], *ROOM, "--episodes", "2")
    assert report["ok"] and report["card"]["id"] == ENV["id"]
    broken = call("envs", "check", "tests.toy:Corridor", "--option", "break_at=1", "--json")
    assert broken.exit_code == 1
    assert "failed" in {check["status"] for check in json.loads(broken.stdout)["checks"]}


def test_an_environment_of_the_current_folder(tmp_path: Path) -> None:
    source = "from tests.toy import Corridor\nclass Mine(Corridor): pass\n"
    (tmp_path / "my_corridor.py").write_text(source)
    args = ["collect", "--env", "my_corridor:Mine", "--episodes", "2", "--json"]
    code = "from agentdistill.cli import main; import sys; sys.path.remove(''); main()"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = python("-c", code, *args, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["episodes"] == 2


def test_methods() -> None:
    found = {method["name"]: method for method in answer("methods")}
    needs = {name: [need["key"] for need in method["needs"]] for name, method in found.items()}
    assert needs["opd"] == ["teacher"] and needs["sft"] == ["data"]
    assert needs["tcod-b2f"] == ["teacher", "guide"] and needs["grpo"] == ["samples"]
    assert answer("methods", "show", "opd") == found["opd"]
    assert answer("methods", "diff", "opd", "tcod-f2b") == {
        "start.kind": ["full", "f2b"],
        "over": ["token", "turn"],
    }
    assert answer("methods", "diff", "opd", "opd") == {}
    shown = yaml.safe_load(call("methods", "show", "tcod-b2f").stdout)
    assert shown["axes"] == found["tcod-b2f"]["axes"] and shown["paper"] == "arXiv:2604.24005"
    assert (
        '| over       | "token" | "turn"   |' in call("methods", "diff", "opd", "tcod-f2b").stdout
    )
    assert "| tcod-b2f " in call("methods").stdout


def test_config_prints_what_it_reads(tmp_path: Path) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    Path(recipe).write_text(yaml.safe_dump(RECIPE))
    printed = call("config", recipe, "seed=3").stdout
    assert load(yaml.safe_load(printed)) == load(recipe, ["seed=3"])
    assert answer("config", recipe) == load(recipe).model_dump(mode="json")
    preset = answer("config", "--preset", "quickstart", "seed=4")
    assert preset == load(quickstart_recipe.recipe(), ["seed=4"]).model_dump(mode="json")


# -- runs ------------------------------------------------------------------------------------------


def test_one_stage_runs_with_what_it_needs(micro: Micro) -> None:
    lines = micro.staged.stdout.splitlines()
    starts = [line.partition(":")[0] for line in lines if line.endswith(": start")]
    assert starts == ["demos", "taught", "distilled"]
    assert lines[-1].startswith(f"run: {micro.folder} (")
    assert {"results.json", "later"}.isdisjoint(micro.after_staged)


def test_what_a_run_refuses_afterwards(micro: Micro) -> None:
    assert "another name" in refused(2, "train", micro.recipe, "seed=9")
    assert "known: demos, distilled" in refused(2, "export", str(micro.folder), "x", "x.jsonl")
    assert ".jsonl or .parquet" in refused(2, "export", str(micro.folder), "demos", "x.csv")


def test_the_whole_recipe_then_again(micro: Micro) -> None:
    folder, first = micro.folder, micro.whole
    assert first.exit_code == 0, first.stderr
    assert "later: start" in first.stdout and "taught: start" not in first.stdout
    written = (folder / "results.json").read_bytes()
    values = json.loads(written)
    assert (
        values["machine"]["versions"]["torch"] and values["commit"] == values["machine"]["commit"]
    )
    rows = {row["policy"]: row for row in values["rows"]}
    assert list(rows) == ["expert", "taught", "distilled"]
    assert rows["expert"]["success"] == 1.0 and rows["expert"]["greedy"] is None
    assert rows["distilled"]["env_steps"] == values["stages"]["distilled"]["env_steps"] > 0
    table = [line for line in first.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 5 and table[2].startswith("| expert    | 100.0% (61 to 100) |      – |")  # noqa: RUF001
    report = (folder / "results.md").read_text()
    assert all(line in report for line in table) and values["commit"] in report
    document = answer("train", micro.recipe)
    assert document == {"path": str(folder), **values}
    assert (folder / "results.json").read_bytes() == written


def test_eval_repeats_the_recipe_s_numbers(micro: Micro, tmp_path: Path) -> None:
    known = json.loads((micro.folder / "results.json").read_text())["results"]
    file = tmp_path / "new" / "eval.json"
    both = ("--policy", "expert", "--policy", "distilled", "--mode", "both")
    found = answer("eval", micro.recipe, *both, "--output", str(file))
    assert json.loads(file.read_text()) == found
    compact = [
        {k: v for k, v in r.items() if k not in ("keys", "outcomes")} for r in found["results"]
    ]
    assert compact == [result for result in known if result["policy"] != "taught"]
    other = call(
        "eval",
        micro.recipe,
        "--policy",
        "distilled",
        "--mode",
        "greedy",
        "--tasks",
        "3",
        "--split",
        "tune",
    )
    row = other.stdout.splitlines()[2].split("|")
    assert row[1].strip() == "distilled" and row[2].strip() == display.NOTHING
    assert row[3].strip().endswith("%") and "3 tasks of split tune" in other.stdout
    assert other.stderr.startswith("distilled, greedy: ")


def test_a_trained_student_collects(micro: Micro, tmp_path: Path) -> None:
    file = tmp_path / "episodes.jsonl"
    args = ("collect", micro.recipe, "--policy", "distilled", "--episodes", "5", "--failures")
    found = answer(*args, "--export", str(file))
    assert (found["episodes"], found["rows"], found["policy"]) == (5, 5, "distilled")
    assert Path(found["path"]).parent == micro.folder / "stages"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["policy"] for row in rows} == {"distilled"} and rows[0]["ids"]
    again = call(*args)
    assert again.stdout == f"kept 5 of 5 episodes\nepisodes: {found['path']}\n"


def test_the_expert_collects_without_a_configuration(tmp_path: Path) -> None:
    args = ("collect", *ROOM, "--episodes", "3", "--seed", "7", "--name", "007")
    found = answer(*args, "--output", str(tmp_path))
    assert found["episodes"] == 3
    assert found["path"] == str(tmp_path / "007/stages/episodes")
    config = load(tmp_path / "007/config.yaml")
    assert (config.seed, config.env.options) == (7, ENV["options"])


def test_export(micro: Micro, tmp_path: Path) -> None:
    file = tmp_path / "new" / "demos.parquet"
    assert answer("export", str(micro.folder), "demos", str(file)) == {
        "file": str(file),
        "rows": 24,
    }
    parquet = pytest.importorskip("pyarrow.parquet")
    assert parquet.read_table(file).num_rows == 24


def test_quickstart_labels_its_rows(tmp_path: Path) -> None:
    small = {
        "workers": 1,
        "env.options": ENV["options"],
        "evaluate.tasks": 4,
        "models": {"teacher": TINY, "student": TINY},
        "stages.demos.episodes": 16,
        "stages.taught.iterations": 2,
        "stages.before.iterations": 2,
        "stages.distilled.env_steps": 20,
        "stages.distilled.tasks": 2,
        "stages.offpolicy.env_steps": 20,
        "stages.offpolicy.tasks": 2,
    }
    changes = [f"--set={key}={json.dumps(value)}" for key, value in small.items()]
    args = ("--method", "opd", "--seed", "5", "--name", "qs", "--output", str(tmp_path), *changes)
    found = answer("quickstart", *args)
    assert found["path"] == str(tmp_path / "qs")
    names = {row["policy"]: row["label"] for row in found["rows"]}
    assert names == {
        "expert": "solver",
        "taught": "teacher",
        "before": "student, before",
        "offpolicy": "student, off-policy",
        "distilled": "student, distilled (opd)",
    }
    assert "student, distilled (opd)" in (tmp_path / "qs/results.md").read_text()


def test_results_are_written_anew_when_they_differ(micro: Micro) -> None:
    file = micro.folder / "results.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "results": []}))
    assert answer("train", micro.recipe)["results"] == values["results"]
    assert json.loads(file.read_text())["results"] == values["results"]
