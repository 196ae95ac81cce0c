"""The curricula benchmark compares what it declares, and its statistics do not cry wolf."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from agentdistill.methods import get

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    pytest.importorskip("scipy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module


@pytest.fixture(scope="module")
def contrasts(load: Any) -> ModuleType:
    return load("contrasts")


@pytest.fixture(scope="module")
def curricula(load: Any) -> ModuleType:
    return load("curricula")


def rows(generator: np.random.Generator, n: int, effect: float, levels: int = 60) -> list[Any]:
    """Replicates with a rate of their own; the second method is better by ``effect``."""
    found = []
    for _ in range(n):
        rate = generator.uniform(0.3, 0.6)
        policies = {}
        for name, more in (("a", 0.0), ("b", effect)):
            won = generator.random(levels) < rate + more + generator.normal(0, 0.05)
            policies[name] = {"outcomes": "".join(map(str, won.astype(int)))}
        found.append({"policies": policies})
    return found


def test_two_equal_methods_alarm_in_one_of_twenty(contrasts: ModuleType) -> None:
    generator = np.random.default_rng(0)
    trials = 300
    alarms = sum(
        contrasts.contrast(rows(generator, 6, 0.0), "b", "a").p < 0.05 for _ in range(trials)
    )
    assert alarms <= trials * (0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5)


def test_a_real_difference_is_found(contrasts: ModuleType) -> None:
    found = contrasts.contrast(rows(np.random.default_rng(1), 10, 0.2), "b", "a")
    assert found.p < 0.01
    assert found.low > 0.05
    assert 0.05 < found.bootstrap[0] < found.mean < found.bootstrap[1] < 0.35


def test_the_bootstrap_knows_both_levels_of_chance(contrasts: ModuleType) -> None:
    same = [np.array([0.0, 1.0] * 50)] * 8
    narrow = contrasts.bootstrap(same)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.5 / 800**0.5, rel=0.1)
    apart = [np.full(100, value) for value in (0.0, 1.0) * 4]
    wide = contrasts.bootstrap(apart)
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * 0.5 / 8**0.5, rel=0.15)


def test_holm(contrasts: ModuleType) -> None:
    assert contrasts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_faults_are_left_out_and_two_replicates_claim_nothing(contrasts: ModuleType) -> None:
    one = {"policies": {"a": {"outcomes": "10-1"}, "b": {"outcomes": "1101"}}}
    found = contrasts.contrast([one] * 3, "b", "a")
    assert found.mean == pytest.approx(1 / 3)
    assert "needs three" in contrasts.compare([one] * 2, [("b", "a")])


@pytest.mark.parametrize("setting", ["long", "thoughts", "support"])
def test_every_method_is_declared_and_gets_the_same(
    curricula: ModuleType, tmp_path: Path, setting: str
) -> None:
    config = curricula.recipe(setting, 0, curricula.FULL, tmp_path)
    trained = [s for s in config.stages if s.do == "train" and s.init == "before"]
    assert len({(s.turns, s.iterations, s.updates) for s in trained}) == 1
    assert {s.name for s in trained} == {
        curricula.stage_name(name)
        for name in curricula.methods(curricula.SETTINGS[setting], curricula.FULL)
    }
    for stage in trained:
        get(stage.method).resolve(stage.axes)
    names = {name for pair in curricula.contrasts(setting) for name in pair}
    assert names <= set(curricula.methods(curricula.SETTINGS[setting], curricula.FULL))
    windows = [s for s in trained if s.axes.get("start", {}).get("kind") == "f2b"]
    for stage in windows:  # the window is whole at 60% of the run
        start = get(stage.method).resolve(stage.axes).start
        whole = (curricula.SETTINGS[setting].horizon - 2) * start.eta
        assert 0.4 * stage.iterations < whole <= 0.8 * stage.iterations


def test_replicates_differ_and_repeat(curricula: ModuleType, tmp_path: Path) -> None:
    def make(number: int) -> Any:
        return curricula.recipe("long", number, curricula.SMALL, tmp_path)

    assert make(0).fingerprint == make(0).fingerprint != make(1).fingerprint
    assert make(0).seed != make(1).seed
    assert make(0).evaluate.seed != make(1).evaluate.seed


def test_thinking_sokoban_reads_the_third_line(load: Any) -> None:
    env = load("thinking").ThinkingSokoban(height=7, width=7)
    task = next(env.tasks("train", seed=1))
    observation, _ = env.reset(options={"task": task})
    action = env.expert_action()
    assert action is not None
    box, target, move = action.split("\n")
    cells = {c: (y, x) for y, r in enumerate(observation.split("\n")) for x, c in enumerate(r)}
    down = cells["X"][0] - cells["P"][0]
    assert ("down" in box) == (down > 0)
    assert ("up" in box) == (down < 0)
    assert target.startswith("target ")
    saved = env.snapshot()
    assert env.act(action).optimal
    env.restore(saved)
    assert not env.act(move).valid, "a move without thoughts is no answer here"
    env.restore(saved)
    assert not env.act(f"{action}\nmore").valid
    env.restore(saved)
    while not (result := env.act(env.expert_action())).terminated:
        pass
    assert result.success
