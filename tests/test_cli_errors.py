"""How the command line refuses: one line, the right exit code, no traceback, nothing half done."""

from __future__ import annotations

import importlib.util
import json
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentdistill import api
from agentdistill.callbacks import Callback
from agentdistill.errors import ConfigError, EnvError, MissingExtraError, StoreError
from tests.cli_calls import RECIPE, ROOM, ROOT, call, python, refused


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe that has not run."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output": str(tmp_path / "runs")}))
    return str(path)


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


def test_other_verbs_refuse_too(recipe: str) -> None:
    assert "no trained model yet" in refused(2, "eval", recipe, "--policy", "taught")
    assert "no trained model yet" in refused(2, "collect", recipe, "--policy", "taught")
    assert "names nothing before it" in refused(2, "eval", recipe, "--policy", "nope")
    assert "--policy" in refused(2, "eval", recipe, "evaluate.policies=[]")
    assert ".jsonl or .parquet" in refused(2, "collect", "--export", "x.csv")
    assert "height" in refused(2, "collect", "--option", "height=1")
    assert "Nope" in refused(2, "envs", "check", "agentdistill/Nope-v0")
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
    done = python("-m", "agentdistill.cli", *args, preexec_fn=limit)
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line and "ulimit" in line


def test_an_interrupt_and_the_same_command_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentdistill.cli", "collect", *ROOM, "--episodes", "400"]
    command += ["--output", str(tmp_path), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stderr.readline() == "episodes: start\n"
        while not (tmp_path / "collect/stages/episodes/metrics.jsonl").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("interrupted; the same command goes on where it stopped\n")
    assert json.loads(stdout)["error"]["exit_code"] == 130
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.stderr.startswith("episodes: goes on at iteration ")
    assert json.loads(again.stdout)["episodes"] == 400


def test_a_callback_that_fails_stops_a_run_of_several_processes(recipe: str) -> None:
    class Full(Callback):
        def on_iteration(self, *_: Any) -> None:
            raise StoreError("full")

    demos = {**RECIPE["stages"][0], "batch": 1}
    stages = f"stages={json.dumps([demos, {**demos, 'name': 'more'}])}"
    with pytest.raises(StoreError, match="full"):
        api.distill(recipe, [stages, "evaluate.policies=[]", "workers=2"], [Full()])
