"""The rollout benchmark counts what it says, and its contenders play the same episodes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("rollout")


def test_all_contenders_sample_the_same_ids(bench: ModuleType) -> None:
    """Otherwise they would be compared at different work."""
    torch.set_num_threads(1)
    (size,) = bench.SMALL
    every = {name: bench.Rollouts(name, size) for name in bench.CONTENDERS}
    for part in ("fast", "greedy"):
        found = {name: getattr(rollouts, part)() for name, rollouts in every.items()}
        ours = found["ours"]["ids"]
        lengths = {len(ids) for episode in ours for ids in episode}
        assert len(ours) == 4 and (part == "greedy" or len(lengths) > 1)
        assert found["re-prefill"]["ids"] == ours
        assert found["generate"]["ids"] == ours[:1]
        assert found["ours"]["kept"] > 0 == found["re-prefill"]["kept"] == found["generate"]["kept"]
        computed = [run["prefilled"] + run["kept"] for run in found.values()]
        assert computed[0] == computed[1] > computed[2] > 0


def test_a_slow_environment_is_slow_and_runs_in_a_thread(bench: ModuleType) -> None:
    env = bench.Lines(5, 2, 0.05)
    assert (env.card.isolation, bench.Lines(5, 2).card.isolation) == ("thread", "inline")
    first, _ = env.reset(options={"task": next(env.tasks("train"))})
    began = time.monotonic()
    result = env.act("anything")
    assert time.monotonic() - began >= 0.05
    assert len(first.splitlines()) == len(result.observation.splitlines()) == 5
    assert first != result.observation and env.act("x").truncated and not result.truncated


def test_the_ideal_is_the_longer_of_model_and_chain(bench: ModuleType) -> None:
    walls = {"actual": [9.0, 5.0], "model": [4.0, 8.0], "alone": [2.0, 1.0]}
    found = bench.overlap(walls, 1.0)
    assert found == pytest.approx(
        {"actual": 5, "model": 4, "alone": 1, "wait": 1, "ideal": 4, "overlap": 0.8}
    )
    assert bench.overlap(walls, 3.5)["overlap"] == pytest.approx(4.5 / 5)


def test_ratios_are_of_rates_process_by_process(bench: ModuleType) -> None:
    def run(tokens: int, wall: float) -> dict[str, Any]:
        counts = {"steps": tokens // 10, "prefilled": 1, "kept": 0}
        return {**counts, "tokens": tokens, "wall": wall, "cpu": wall / 2}

    found = bench.cost([run(10, 1.0), run(10, 4.0)], [run(100, 2.0), run(100, 1.0)])
    assert found["ours_wall"] == {"median": 22.5, "low": 5, "high": 40, "n": 2}
    assert found["ours_cpu"] == found["ours_wall"]
    assert found["steps_per_cpu_s"]["high"] == 2 and found["tokens_per_wall_s"]["low"] == 2.5


def test_the_share_of_equal_responses(bench: ModuleType) -> None:
    ours = [[[1], [2, 3]], [[4], [5]]]
    assert bench.same([ours, [[[1], [2, 3]]]], ours) == 1
    assert bench.same([[[[1], [2, 9]]]], ours) == 0.5


@pytest.mark.slow
def test_the_smallest_size_runs(tmp_path: Path) -> None:
    output = tmp_path / "rollout.json"
    command = [sys.executable, str(FOLDER / "rollout.py"), "--small", "--output", str(output)]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fast, re-prefill" in done.stdout and "overlap" in done.stdout
    results = json.loads(output.read_text())
    assert "transformers" in results["machine"]["versions"]
    (found,) = results["comparisons"]
    for part in ("fast", "slow", "greedy"):
        for name in bench_names(found[part]):
            assert found[part][name]["same"] == 1, (part, name)
    assert 0 < found["slow"]["ours"]["overlap"]["median"] < 1.5


def bench_names(part: dict[str, Any]) -> list[str]:
    """The contenders of one part; all of them took part."""
    assert set(part) == {"ours", "re-prefill", "generate"}
    return list(part)
