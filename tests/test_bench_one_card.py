"""The one-card benchmark: its counts, its verdicts, and its tiny sizes through the real code."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
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
        yield importlib.import_module("one_card")


@pytest.fixture(scope="module")
def setup(bench: ModuleType) -> ModuleType:
    return importlib.import_module("one_card_setup")


def test_what_overlaps_is_busy_once(setup: ModuleType) -> None:
    second = 10**9
    spans = [(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]
    assert setup.covered((a * second, b * second) for a, b in spans) == 6.0
    assert setup.covered([]) == 0.0


def test_kernels_of_another_kind_of_device_do_not_count(setup: ModuleType) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(1000).sum()
    spans = setup.kernels(profile, "CPU")
    assert spans and all(begin <= end for begin, end in spans)
    assert setup.kernels(profile, "CUDA") == []


def test_flops_are_two_per_weight_and_token(bench: ModuleType) -> None:
    """Against the weights of the model itself; norms and the embedding multiply nothing."""
    size = bench.SMALL
    model = importlib.import_module("one_card_setup").model(size, "teacher")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    head = model.lm_head.weight.numel()
    inner = sum(p.numel() for p in matrices) - head
    linear = 2 * 7 * inner + 2 * 3 * head
    shape = size.teacher
    attention = shape.layers * 2 * shape.heads * shape.dim * (16 + 9)
    found = bench.forward_flops(shape, size.vocabulary, [4, 3], 3)
    assert found == linear + attention
    work = bench.flops(size, [4, 3], 3)
    student = bench.forward_flops(size.student, size.vocabulary, [4, 3], 3)
    assert work["generate"] == student
    assert work["score"] + 2 * shape.hidden * size.vocabulary * 3 == found
    assert work["update"] == 3 * student + 2 * shape.hidden * size.vocabulary * 3


def test_the_peak_is_the_named_card_s(bench: ModuleType) -> None:
    assert bench.peak_flops("NVIDIA H200") == 989e12
    assert bench.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert bench.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert bench.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert bench.peak_flops("Some other card") is None


def notes(**changes: Any) -> dict[str, Any]:
    """What ours could have noted on a card."""
    seconds = {"seconds/generate": 8.0, "seconds/score": 1.0, "seconds/update": 1.0}
    steps = [{"wall": 12.0, "sync": 0.0, "loss": 4.0, **seconds}]
    steps.append({"wall": 10.0, "sync": 0.01, "loss": 3.0, **seconds})
    return {
        "device": "NVIDIA H100 80GB HBM3",
        "busy": 9.5,
        "peak_gb": 70.0,
        "steps": steps,
    } | changes


def test_goals_are_judged_against_trl_s_fastest(bench: ModuleType) -> None:
    def other(wall: float) -> dict[str, Any]:
        steps = [{"wall": 99.0, "loss": 4.0}, {"wall": wall, "loss": 3.3}]
        return {"steps": steps, "peak_gb": 75.0}

    runs = {"ours": notes(), "trl": other(8.0), "trl, no checkpointing": other(5.0)}
    found = bench.results(bench.FULL, runs, [6000, 6000], 4800)
    assert found["ours"]["idle"] == pytest.approx(0.05)
    assert found["trl"]["ratio"] == 4.0 and found["trl, no checkpointing"]["ratio"] == 2.5
    assert found["trl"]["apart"] == pytest.approx(0.3 / 3.3)
    assert list(found["goals"].values()) == [True, True, False]
    share = found["ours"]["share_of_peak"]
    assert share["score"] == found["ours"]["flops"]["score"] / 989e12
    assert found["ours"]["tokens_per_s"] == {"generate": 600, "score": 12000, "update": 12000}
    text = bench.report(found)
    assert "goal: 3 times trl's fastest: no" in text and "idle 5.0%" in text
    runs = {"ours": notes(busy=5.0, peak_gb=81.0), "trl": {"failed": "Traceback\nout of memory"}}
    found = bench.results(bench.FULL, runs, [6000], 2400)
    assert list(found["goals"].values()) == [False, False, None]
    assert "trl: failed: out of memory" in bench.report(found)


def test_a_card_that_nobody_knows_has_no_share(bench: ModuleType) -> None:
    found = bench.results(bench.FULL, {"ours": notes(device="X1")}, [60], 24)
    assert found["ours"]["share_of_peak"] is None and "unknown" in bench.report(found)


def test_sizes_travel_as_json(bench: ModuleType, setup: ModuleType) -> None:
    for size in (bench.SMALL, bench.FULL):
        assert setup.sized(asdict(size)) == size


def test_episodes_have_the_lengths_they_should(bench: ModuleType, setup: ModuleType) -> None:
    size = replace(bench.SMALL, vocabulary=151_936)
    env = setup.Replay(size.turns, size.observation, size.vocabulary)
    words = setup.tokenizer(size.vocabulary)
    assert len(words) == size.vocabulary
    first, _ = env.reset(options={"task": next(env.tasks("train"))})
    for text in (first, env.act("anything").observation):
        ids = words.encode(text, add_special_tokens=False)
        assert len(ids) == size.observation and min(ids) >= len(setup.SPECIAL)
    assert env.replay(["x"] * 9)[-1].truncated


def test_a_worker_that_fails_is_an_error_of_ours(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "out of ideas")

    monkeypatch.setattr(bench.subprocess, "run", broken)
    with pytest.raises(RuntimeError, match="ours failed\nout of ideas"):
        bench.compare(bench.SMALL, tmp_path)


def test_the_tiny_size_runs_and_trl_computes_the_same(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    size = bench.SMALL
    found = bench.compare(size, tmp_path, ("ours", "trl"))
    assert (found["gpu"], found["goals"], found["device"]) == (False, None, "cpu")
    played = size.episodes * size.turns
    assert played < found["tokens"]["trained"] <= played * size.response
    assert found["tokens"]["all"] > found["tokens"]["trained"] + played * size.observation
    seconds = found["ours"]["seconds"]
    assert set(seconds) == {"generate", "score", "update", "sync", "iteration"}
    assert 0 < seconds["sync"] < seconds["update"] < seconds["iteration"]
    assert found["ours"]["losses"][0] > 0 and len(found["ours"]["losses"]) == 2
    assert found["trl"]["apart"] < 1e-3, "another objective, other ids or other weights"
    assert found["trl"]["ratio"] > 0 and found["ours"]["peak_gb"] > 0.05
    text = bench.report(found)
    assert bench.NO_GPU in text and "goal:" not in text
