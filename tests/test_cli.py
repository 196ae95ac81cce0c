"""The command line: what it prints, what it returns, and how it refuses.

One micro run (tiny models, small rooms) is trained once per session and shared.
"""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner, Result

from agentdistill import api, display
from agentdistill import quickstart as quickstart_recipe
from agentdistill.cli import app
from agentdistill.config import RunConfig, TrainStage, load
from agentdistill.errors import ConfigError, EnvError, MissingExtraError, StoreError
from agentdistill.evaluate import Result as Evaluation
from agentdistill.metrics import Interval

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    "id": "agentdistill/Sokoban-v0",
    "options": {"height": 6, "width": 6, "max_moves": 5, "max_steps": 6},
}
ROOM = [f"--option={key}={value}" for key, value in ENV["options"].items()]
TINY = {"hidden": 16, "heads": 2, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 20}}
RECIPE: dict[str, Any] = {
    "name": "micro",
    "env": ENV,
    "prompt": "bare",
    "sampling": {"max_tokens": 2},
    "models": {"teacher": TINY, "student": TINY},
    "stages": [
        {"name": "demos", "do": "collect", "policy": "expert", "episodes": 24, "batch": 16},
        {"name": "taught", "model": "teacher", "method": "sft", "data": "demos", "iterations": 6},
        {"name": "distilled", "teacher": "taught", "method": "opd", "iterations": 3, "tasks": 4},
        {"name": "later", "teacher": "taught", "method": "opd-exact", "iterations": 1, "tasks": 2},
    ],
    "evaluate": {"policies": ["expert", "taught", "distilled"], "tasks": 6},
}


def call(*args: str) -> Result:
    """The command in this process; a bug raises here."""
    result = CliRunner().invoke(app, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*args: str) -> Any:
    """The JSON document of a command that must succeed."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(code: int, *args: str) -> str:
    """The one line that a command prints which must fail with ``code``."""
    result = call(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe that has not run."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(tmp_path / "runs")}))
    return str(path)


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
    assert _python("-c", code).stdout == "[]\n"
    assert _seconds("-m", "agentdistill.cli", "--help") - _seconds("-c", "pass") < 0.6


def _python(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, **more
    )


def _seconds(*args: str) -> float:
    """Least CPU time of three runs."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert _python(*args).returncode == 0
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


# -- refusals --------------------------------------------------------------------------------------

DISTILLED = "stages.distilled"
REFUSALS = {
    "unknown key": (["stages.taught.lrr=1"], "did you mean lr?"),
    "unknown key in a section": (["evaluate.task=1"], "did you mean tasks?"),
    "wrong type": (["seed=abc"], "seed='abc'"),
    "no override": (["seed"], "key.path=value"),
    "unknown method": (["stages.taught.method=sftt"], "did you mean sft?"),
    "unknown axis": ([f"{DISTILLED}.axes.signal.coeff=2"], "did you mean coef?"),
    "unknown stage in an override": (["stages.nope.lr=1"], "distilled"),
    "unknown stage": (["--stage", "nope"], "known: demos, taught, distilled"),
    "unknown model": ([f"{DISTILLED}.teacher=nope"], "taught"),
    "unknown environment": (["env.id=agentdistill/Nope-v0"], "Nope"),
    "unknown module": (["env.id=no_such_module:Env"], "no_such_module"),
    "not an environment": (["env.id=pathlib:Path", "env.options={}"], "TextEnv"),
    "unknown option": (["env.options.colour=red"], "colour"),
    "wrong option": (["env.options.height=1"], "height"),
    "unknown split": (["stages.demos.split=nope"], "train, tune, report"),
    "unknown panel": (["evaluate.split=nope"], "train, tune, report"),
    "a combination that cannot work": (
        [f"{DISTILLED}.axes.signal.divergence=reverse_kl"],
        "use coupling loss",
    ),
    "sampling that cannot be scored": (["sampling.temperature=0.5"], "K11"),
    "too few held-out tasks": (["evaluate.tasks=5000"], "distinct tasks"),
}


@pytest.mark.parametrize(("change", "says"), REFUSALS.values(), ids=REFUSALS)
def test_train_refuses_before_it_works(
    change: list[str], says: str, recipe: str, tmp_path: Path
) -> None:
    assert says in refused(2, "train", recipe, *change)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), ("a: [1", "is not YAML"), ("- 1", "keys and values")],
)
def test_a_file_that_is_no_configuration(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_text(content)
    for verb in ("train", "eval", "config", "collect"):
        assert says in refused(2, verb, str(path))


def test_other_verbs_refuse_too(recipe: str, micro: Micro) -> None:
    assert "no trained model yet" in refused(2, "eval", recipe, "--policy", "taught")
    assert "no trained model yet" in refused(2, "collect", recipe, "--policy", "taught")
    assert "names nothing before it" in refused(2, "eval", recipe, "--policy", "nope")
    assert "--policy" in refused(2, "eval", recipe, "evaluate.policies=[]")
    assert "another name" in refused(2, "train", micro.recipe, "seed=9")
    assert "known: demos, distilled" in refused(2, "export", str(micro.folder), "x", "x.jsonl")
    assert ".jsonl or .parquet" in refused(2, "export", str(micro.folder), "demos", "x.csv")
    assert ".jsonl or .parquet" in refused(2, "collect", "--export", "x.csv")
    assert "height" in refused(2, "collect", "--option", "height=1")
    assert "did you mean opd?" in refused(2, "methods", "show", "opdd")
    assert "did you mean opd?" in refused(2, "methods", "diff", "opd", "opdd")
    assert "did you mean opd?" in refused(2, "quickstart", "--method", "opdd")
    assert "--preset" in refused(2, "config")


def test_an_output_that_cannot_be_written(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    assert str(below) in refused(5, "train", recipe, f"output={below}")
    assert str(below) in refused(5, "collect", *ROOM, "--output", str(below))


@pytest.mark.parametrize(
    ("package", "args"),
    [
        ("torch", ("train", "{recipe}")),
        ("transformers", ("eval", "{recipe}", "--policy", "student")),
        ("tensorboard", ("train", "{recipe}", "--tensorboard")),
        ("pyarrow", ("collect", "--export", "x.parquet")),
    ],
)
def test_a_missing_package(
    package: str, args: Sequence[str], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    without = {package: lambda *_: None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: without.get(name, find)(name, *more)
    )
    line = refused(3, *(arg.format(recipe=recipe) for arg in args))
    assert "pip install 'agentdistill[train]'" in line


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no", key="a", value={1}),
        MissingExtraError("this", "train"),
        EnvError("two\nlines"),
        StoreError("full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_as_lines_and_as_json(
    error: Any, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise pickle.loads(pickle.dumps(error))  # as it arrives from another process

    monkeypatch.setattr(api, "distill", fail)
    message = " ".join(str(error).split())
    result = call("train", recipe, "--json")
    assert (result.exit_code, result.stderr) == (error.exit_code, f"error: {message}\n")
    expected = {"type": type(error).__name__, "message": message, "exit_code": error.exit_code}
    assert json.loads(result.stdout) == {"error": expected}


def test_a_bug_is_not_hidden(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "distill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train", recipe)


def test_a_full_disk(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    args = ["collect", *ROOM, "--episodes", "50", "--output", str(tmp_path)]
    done = _python("-m", "agentdistill.cli", *args, preexec_fn=limit)
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line and "ulimit" in line


def test_an_interrupt_and_the_same_command_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentdistill.cli", "collect", *ROOM, "--episodes", "800"]
    command += ["--output", str(tmp_path), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stderr.readline() == "episodes: start\n"
        while not (tmp_path / "collect/stages/episodes/metrics.jsonl").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "interrupted; the same command goes on where it stopped\n"
    assert json.loads(stdout)["error"]["exit_code"] == 130
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.stderr.startswith("episodes: goes on at iteration ")
    assert json.loads(again.stdout)["episodes"] == 800


# -- what there is ---------------------------------------------------------------------------------


def test_envs() -> None:
    (sokoban,) = [card for card in answer("envs") if card["id"] == ENV["id"]]
    assert (sokoban["splits"], sokoban["installed"]) == ("train, tune, report", "yes")
    assert f"| {ENV['id']} | " in call("envs").stdout


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


def test_config_prints_what_it_reads(recipe: str) -> None:
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
        recipe,
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


def test_quickstart_labels_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    args = ("--method", "opd", "--seed", "5", "--output", str(tmp_path), *changes)
    found = answer("quickstart", *args)
    assert found["path"] == str(tmp_path / "quickstart-opd")
    names = {row["policy"]: row["label"] for row in found["rows"]}
    assert names == {
        "expert": "solver",
        "taught": "teacher",
        "before": "student, before",
        "offpolicy": "student, off-policy",
        "distilled": "student, distilled (opd)",
    }
    assert "student, distilled (opd)" in (tmp_path / "quickstart-opd/results.md").read_text()


# -- display ---------------------------------------------------------------------------------------

MEASURED = Evaluation(
    policy="p",
    mode="sampled",
    episodes=10,
    success=0.5,
    interval=Interval(0.237, 0.763),
    optimal=None,
    turns=3.25,
    invalid=0.125,
    score=0.5,
    faults=1,
    panel="0123456789abcdef",
    keys=(),
    outcomes=(),
)


def test_modes_share_a_row() -> None:
    greedy = replace(MEASURED, mode="greedy", success=0.75, turns=9.0, faults=2)
    (row,) = display.rows(
        [greedy, MEASURED], {"p": {"env_steps": 12345, "seconds": 6.25}}, {"p": "P"}
    )
    assert row.cells() == ["P", "50.0% (24 to 76)", "75.0%", "–", "3.2", "12.5%", "12,345", "6.2"]  # noqa: RUF001
    assert row.faults == 3
    (note, lost) = display.notes([row], [greedy, MEASURED], RunConfig())
    assert "panel 0123456789ab" in note and lost.startswith("3 episodes were lost")


def test_nothing_measured_is_no_zero() -> None:
    nothing = replace(MEASURED, episodes=0, success=0.0)
    (row,) = display.rows([nothing])
    assert set(row.cells()[1:]) == {display.NOTHING}


def test_markdown_is_aligned_and_keeps_its_columns() -> None:
    text = display.markdown(("name", "n"), [["a|b", "1"], ["longer", "100"]])
    assert text.splitlines() == [
        "| name   |   n |",
        "| ------ | --: |",
        r"| a\|b   |   1 |",
        "| longer | 100 |",
    ]


class Terminal(io.StringIO):
    """A terminal that remembers what it showed."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars_and_drawn_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(key, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    stage = TrainStage(name="distilled", iterations=4)
    metrics = {"success": 0.25, "optimal": None, "loss/k1": 0.5, "divergence": 0.125}
    with display.progress(["distilled"], evaluation=True) as progress:
        progress.on_stage_start(stage, Path(), 2)
        progress.on_iteration(stage, 2, metrics, 0.75)
        progress._bars.refresh()
        progress.on_stage_end(stage, {"iterations": 4, "env_steps": 1000, "seconds": 1.5})
    shown = screen.getvalue()
    assert "iteration 3, success 25%, loss 0.500, divergence 0.125" in shown
    assert "4 iterations, 1,000 environment steps, 1.5 s" in shown and "evaluation" in shown
    display.show(("name", "n"), [["[red]", "1"]])
    assert "[red]" in screen.getvalue() and "|" not in screen.getvalue()


def test_elsewhere_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    stage = TrainStage(name="distilled", iterations=4)
    with display.progress(["distilled"], evaluation=True, stderr=True) as progress:
        progress.on_stage_start(stage, Path(), 2)
        progress.on_iteration(stage, 2, {}, 0.75)
        progress.on_stage_end(stage, {"iterations": 4, "seconds": 1.5})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "distilled: goes on at iteration 2",
        "distilled: done, 4 iterations, 1.5 s",
        "evaluation: start",
    ]


def test_results_are_written_anew_when_they_differ(micro: Micro) -> None:
    file = micro.folder / "results.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "results": []}))
    assert answer("train", micro.recipe)["results"] == values["results"]
    assert json.loads(file.read_text())["results"] == values["results"]
