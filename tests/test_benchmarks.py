"""The benchmarks compare what they say they compare, and their smallest size runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def common() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("common")


@pytest.fixture(scope="module")
def sft(common: ModuleType) -> ModuleType:
    return importlib.import_module("sft")


def notes(*seconds: float) -> dict[str, Any]:
    """What a worker notes whose steps took so long; its CPU time is half of that."""
    part = {"wall": 4.0, "cpu": 2.0}
    steps = [{"wall": s, "cpu": s / 2} for s in seconds]
    return {"import": part, "set_up": part, "import_mib": 5.0, "end_mib": 9.0, "steps": steps}


def test_cost_takes_medians_after_the_warm_steps(common: ModuleType) -> None:
    mine = [notes(99, 2, 4, 3), notes(99, 8, 8, 8)]
    base = [notes(99, 1, 1, 1), notes(99, 4, 2, 2)]
    found = common.cost(mine, base, tokens=24.0, warm=1)
    assert found["step_wall_s"] == {"median": 5.5, "low": 3, "high": 8, "n": 2}
    assert found["step_cpu_s"]["low"] == 1.5
    assert found["tokens_per_wall_s"] == {"median": 5.5, "low": 3, "high": 8, "n": 2}
    # Neighbour by neighbour: 3/1 and 8/2, not 5.5/1.5.
    assert found["ratio_wall"] == {"median": 3.5, "low": 3, "high": 4, "n": 2}
    assert found["import_cpu_s"]["median"] == 2
    assert found["peak_mib"]["median"] == 9


def test_agreement_is_relative_to_weights_and_to_the_update(
    common: ModuleType, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    weights = {"start": [3.0, 0.0, 0.0], "theirs": [3.0, 4.0, 0.0], "mine": [3.0, 4.0, 1.0]}
    for name, (a, *b) in weights.items():
        save_file({"a": np.array([a]), "b": np.array([b])}, tmp_path / f"{name}.safetensors")

    def run(name: str, digest: str, losses: list[float]) -> dict[str, Any]:
        path = str(tmp_path / f"{name}.safetensors")
        return {"weights": path, "digest": digest, "losses": losses}

    mine = [run("start", "x", []), run("mine", "x", [2.0, 1.0, 9.0])]
    theirs = [run("theirs", "y", [2.0, 1.5, 0.0])]
    found = common.agreement(mine, theirs, tmp_path / "start.safetensors", 2)
    assert found == {"steps": 2, "loss": 0.5, "weights": 0.2, "update": 0.25, "repeats": True}
    mine[0]["digest"] = "z"
    assert not common.agreement(mine, theirs, tmp_path / "start.safetensors", 2)["repeats"]


WORKER = """
import json, os, pathlib, sys
job = json.loads(sys.argv[2])
if job["contender"] == "broken":
    sys.exit("out of ideas")
seen = {"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid(), "told": job["size"]}
pathlib.Path(job["result"]).write_text(json.dumps(seen))
"""


def test_contenders_run_in_turns_in_fresh_processes(
    common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    order = ["a", "b", "a", "b"]
    runs = common.in_turns(str(script), {"size": 7}, order, tmp_path, "toy")
    assert capsys.readouterr().out == "toy: 1/4 a\ntoy: 2/4 b\ntoy: 3/4 a\ntoy: 4/4 b\n"
    assert list(runs) == ["a", "b"]
    every = [run for found in runs.values() for run in found]
    assert [(run["threads"], run["told"]) for run in every] == [("1", 7)] * 4
    assert len({run["pid"] for run in every}) == len({run["result"] for run in every}) == 4
    with pytest.raises(RuntimeError, match=r"toy, broken: ended with 1\nout of ideas"):
        common.in_turns(str(script), {}, ["broken"], tmp_path, "toy")


def test_results_say_where_they_come_from(common: ModuleType, tmp_path: Path) -> None:
    known = common.finished(common.facts("numpy", "no-such-package"))
    common.save(tmp_path / "new" / "x.json", {"machine": known, "curve": [1 / 3, 2.0]})
    text = (tmp_path / "new" / "x.json").read_text()
    read = json.loads(text)
    assert read["curve"] == [0.3333333, 2.0]
    assert ' "curve": [ 0.3333333, 2.0 ]\n' in text
    assert read["machine"]["versions"]["numpy"] == np.__version__
    assert read["machine"]["versions"]["no-such-package"] == "absent"
    assert read["machine"]["began"] <= read["machine"]["ended"]
    assert len(read["machine"]["load_began"]) == len(read["machine"]["load_ended"]) == 3
    assert {"commit", "python", "cores", "cpu_model"} <= read["machine"].keys()


@pytest.mark.parametrize("fact", ["start", "trained"])
def test_refuses_contenders_that_differ(
    sft: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str
) -> None:
    same = {"start": "s", "trained": "t"}
    runs = {"ours": [same], "trl": [{**same, fact: "other"}]}
    monkeypatch.setattr(sft, "prepare", lambda *_: {"tokens": 1})
    monkeypatch.setattr(sft, "in_turns", lambda *_: runs)
    with pytest.raises(RuntimeError, match=f"differ in {fact}"):
        sft.compare(sft.SMALL[0], tmp_path)


@pytest.mark.slow
def test_the_smallest_size_runs_and_both_train_the_same(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "sft.json"
    command = [sys.executable, str(FOLDER / "sft.py"), "--small", "--output", str(output)]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["comparisons"]
    assert "CPU s/step" in done.stdout and "trl / ours" in done.stdout
    assert found["data"]["episodes"] == 20
    assert 0 < found["data"]["trained_tokens"] < found["data"]["tokens"] / 3
    (apart,) = found["agreement"].values()
    assert apart["loss"] < 1e-5 and apart["update"] < 1e-3
    losses = found["losses"]["ours"]
    assert losses[-1] < losses[0] - 1, "nothing was learnt, so equal weights would prove nothing"
    for cost in found["cost"].values():
        assert cost["step_cpu_s"]["median"] > 0 and cost["peak_mib"]["median"] > 100


# -- environments ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environments(common: ModuleType) -> ModuleType:
    return importlib.import_module("environments")


def spent(start: float, reset: float, step: float, listing: float | None) -> dict[str, Any]:
    """What a worker notes about an environment; memory is ten times the start."""
    memory = {"rss": 10 * start, "uss": 5 * start}
    return {
        "start": start,
        "resets": [reset] * 3,
        "steps": [step, step, 99.0],
        "listings": [] if listing is None else [listing],
        "first": memory,
        "played": memory,
        "another": memory,
        "in_step": listing is None,
    }


def test_quantiles_are_of_the_values_that_were_seen(environments: ModuleType) -> None:
    values = [float(n) for n in range(1, 21)]
    assert environments.quantiles(values) == {"median": 10.5, "p90": 18.0, "n": 20}
    assert environments.quantiles([7.0]) == {"median": 7.0, "p90": 7.0, "n": 1}


def test_ratios_are_upstream_over_ours_process_by_process(environments: ModuleType) -> None:
    ours = [spent(1.0, 2.0, 1.0, 3.0), spent(1.0, 2.0, 2.0, 2.0)]
    theirs = [spent(3.0, 4.0, 8.0, None), spent(2.0, 8.0, 4.0, None)]
    found = environments.ratio(ours, theirs)
    assert (found["start"]["low"], found["start"]["high"]) == (2.0, 3.0)
    assert found["resets"] == {"median": 3.0, "low": 2.0, "high": 4.0, "n": 2}
    assert found["steps"] == {"median": 5.0, "low": 2.0, "high": 8.0, "n": 2}
    assert found["turn"]["median"] == 1.5, "their step lists, so it is compared with both of ours"
    assert found["another_rss"]["median"] == 2.5
    cost = environments.cost(theirs)
    assert cost["listings"] is None and cost["listing_in_step"]
    assert environments.cost(ours)["listings"]["median"] == 2.5


def test_what_cannot_run_is_named_and_no_error(environments: ModuleType, tmp_path: Path) -> None:
    found = environments.compare("nowhere:Env", environments.SMALL, tmp_path)
    assert found["env"] == "nowhere:Env" and "is no environment" in found["unavailable"]
    assert "is no environment" in environments.report([found])


def test_the_smallest_comparison_of_an_environment_runs(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    output = tmp_path / "environments.json"
    words = ["--small", "--env", "agentdistill/Sokoban-v0", "--output", str(output)]
    command = [sys.executable, str(FOLDER / "environments.py"), *words]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compared with nothing: gym-sokoban needs gym" in done.stdout
    results = json.loads(output.read_text())
    assert results["settings"]["tasks"] == 2 and "psutil" in results["machine"]["versions"]
    (found,) = results["environments"]
    assert set(found["cost"]) == {"ours", "ours, again"}
    cost = found["cost"]["ours"]
    assert 0 < cost["steps"]["median"] <= cost["steps"]["p90"] < cost["start"]["median"]
    assert cost["listings"]["n"] >= 3 and cost["played"]["rss"] > 0
    assert found["success"]["panel"] == "sokoban"
    assert found["success"]["expert"]["success"] == 1.0
