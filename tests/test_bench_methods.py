"""The benchmark of methods declares what it compares, and compares like with like."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from agentdistill.methods import METHODS, get
from agentdistill.methods.constraints import check

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    pytest.importorskip("scipy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("methods")


@pytest.mark.parametrize("setting", ["all", "steps", "skills"])
@pytest.mark.parametrize("scale", ["FULL", "SMALL"])
def test_every_stage_is_allowed_and_gets_the_same(
    bench: ModuleType, tmp_path: Path, setting: str, scale: str
) -> None:
    config = bench.recipe(setting, 0, getattr(bench, scale), tmp_path)
    compared = [bench.stage_name(name) for name in bench.methods(setting)]
    stages = [stage for stage in config.stages if stage.name in compared]
    assert [stage.name for stage in stages] == compared
    for stage in stages:
        assert stage.do == "train"
        assert stage.init == "before"
        check(config, stage, get(stage.method).resolve(stage.axes))
    assert len({(stage.iterations, stage.updates) for stage in stages}) == 1
    assert len({stage.turns for stage in stages if stage.turns}) == 1
    assert set(compared) <= set(config.evaluate.policies)


def test_every_method_and_every_contrast_is_there(bench: ModuleType) -> None:
    assert bench.methods("all") == list(METHODS)
    for setting in bench.SETTINGS:
        names = set(bench.methods(setting))
        assert {name for pair in bench.contrasts(setting) for name in pair} <= names
    assert {("skill-sd", "shuffled skills"), ("skill-sd", "empty skills")} <= set(
        bench.contrasts("skills")
    )


def test_replicates_differ_and_repeat(bench: ModuleType, tmp_path: Path) -> None:
    def fingerprint(number: int) -> str:
        return bench.recipe("steps", number, bench.SMALL, tmp_path).fingerprint

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)
