"""The benchmark of one update: all contenders train the same, and a stream is read once."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def trainer() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("trainer")


@pytest.fixture(scope="module")
def data(trainer: ModuleType) -> ModuleType:
    return importlib.import_module("trainer_data")


def tiny(data: ModuleType, **changes: Any) -> Any:
    shape = {"vocabulary": 40, "student": (16, 2, 1, 24), "teacher": (32, 2, 1, 24)}
    given = {"batch": 3, "turns": (1, 5), "observation": 3, "response": 2, "steps": 2, **shape}
    return data.Size("tiny", **{**given, **changes})


def test_the_two_forms_train_the_same_tokens_after_the_same_prefixes(data: ModuleType) -> None:
    size = tiny(data)
    merged, single = (
        [data.samples(batch) for batch in data.batches(size, form)] for form in (False, True)
    )
    assert [len(update) for update in merged] == [3, 3]
    assert [len(update) for update in single] == [1 + 3 + 5] * 2
    assert data.fingerprint(merged) == data.fingerprint(single)
    assert data.fingerprint(merged) == data.fingerprint([update[::-1] for update in merged])
    assert data.fingerprint(merged) != data.fingerprint(merged[::-1]), "updates have an order"
    ids, trained = merged[0][0]
    for changed in (
        ([*ids[:-1], 1], trained),
        ([1, *ids[1:]], trained),
        (ids, [True, *trained[1:]]),
    ):
        assert data.fingerprint([[changed, *merged[0][1:]], merged[1]]) != data.fingerprint(merged)


def test_padding_and_its_removal_are_inverse(data: ModuleType) -> None:
    rows = data.samples(next(data.batches(tiny(data))))
    ids, mask, labels = data.padded(rows)
    assert ids.shape == (3, max(len(row) for row, _ in rows))
    assert data.unpadded(ids, mask, labels) == rows


def job_done(data: ModuleType, folder: Path, name: str, size: Any) -> Any:
    common, runs = importlib.import_module("common"), importlib.import_module("trainer_runs")
    job = data.Job(size, folder, common.Log())
    runs.CONTENDERS[name](job)
    return job


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_ours_equals_the_dense_form(data: ModuleType, tmp_path: Path, beta: float) -> None:
    import torch

    size = tiny(data, beta=beta, steps=4)
    names = ("ours", "ours, per turn", "dense")
    first, *others = (job_done(data, tmp_path, name, size) for name in names)
    assert first.losses[0] > 0.01, "equal models would agree whatever they compute"
    for other in others:
        assert data.fingerprint(other.used) == data.fingerprint(first.used)
        assert other.losses == pytest.approx(first.losses, abs=1e-5)
        pairs = zip(other.student.parameters(), first.student.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_full_history_is_read_once(data: ModuleType, tmp_path: Path) -> None:
    """Tokens through the student over new tokens: the goal is at most 1.1, padding included."""
    size = tiny(data, batch=16, turns=(3, 20), observation=4, response=1, steps=1)
    job = job_done(data, tmp_path, "ours", size)
    new = sum(len(ids) for ids, _ in job.used[0])
    assert 0.9 < job.processed / new <= 1.1
    job = job_done(data, tmp_path, "ours, per turn", size)
    assert job.processed / new > 5


def test_the_floor_counts_products(trainer: ModuleType, data: ModuleType, tmp_path: Path) -> None:
    size = tiny(data, steps=1)
    job = job_done(data, tmp_path, "dense", size)
    found = trainer.floor(job)
    lengths = [10 + 5 * turns for turns in (1, 3, 5)]
    assert found["student_head"] == 6 * 16 * 40 * 2 * 9
    assert found["teacher_head"] == 2 * 32 * 40 * 2 * 9
    assert found["student_body"] == 6 * (4 * 16 * 16 + 3 * 16 * 24) * sum(lengths)
    assert found["teacher_attention"] == 4 * 32 * sum(n * n for n in lengths) / 2


def test_refuses_contenders_that_differ(trainer: ModuleType) -> None:
    same = {"start": "s", "trained": "t", "losses": [2.0, 1.0]}
    trainer.check("x", {"ours": [same], "trl": [{**same, "losses": [2.0, 1.00005]}]})
    for other in ({"start": "z"}, {"trained": "z"}, {"losses": [2.0, 1.001]}):
        with pytest.raises(RuntimeError, match=f"x: contenders differ in {next(iter(other))}"):
            trainer.check("x", {"ours": [same], "trl": [{**same, **other}]})


def test_the_exponent_is_the_slope(trainer: ModuleType) -> None:
    turns = trainer.SWEEP
    assert trainer.exponent(turns, [3.0 * t for t in turns]) == pytest.approx(1)
    assert trainer.exponent(turns, [0.1 * t**2 for t in turns]) == pytest.approx(2)
    sizes = trainer.sweep(turns)
    assert [size.turns for size in sizes] == [(t, t) for t in turns]
    assert len({dataclasses.replace(size, name="", turns=(1, 1)) for size in sizes}) == 1


@pytest.mark.slow
def test_the_smallest_size_runs_and_all_train_the_same(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "trainer.json"
    command = [sys.executable, str(FOLDER / "trainer.py"), "--small", "--output", str(output)]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (found,) = results["comparisons"]
    assert "of floor" in done.stdout and "fitted: ours T^" in done.stdout
    assert found["agreement"]["trl"]["loss"] < 1e-5 and found["agreement"]["trl"]["update"] < 1e-2
    for cost in found["cost"].values():
        assert 0 < cost["share_of_floor"] < 1 and cost["memory_mib"]["median"] > 0
    assert set(found["profile"]["operations"]) >= {"aten::mm"}
    assert results["turns"]["ours, per turn"]["processed_per_new"][1] > 2
