"""What the benchmarks of cascades and of quickstart's default compare, and what they keep."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentdistill import quickstart
from agentdistill.config import load
from agentdistill.envs.make import make

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    pytest.importorskip("scipy")
    names = ("cascade", "cascade_worlds", "quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def worlds(benchmarks: SimpleNamespace) -> list[tuple[str, Any]]:
    known = benchmarks.cascade_worlds.WORLDS.items()
    return [(name, part) for name, w in known for part in (w, benchmarks.cascade_worlds.small(w))]


def test_every_world_is_a_run(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    for name, world in worlds(benchmarks):
        config = load(benchmarks.cascade.recipe(world, name, str(tmp_path)))
        base = config.policies["cascade"].model_dump()
        for change in benchmarks.cascade.players(world.k, 0.3, -0.1).values():
            type(config.policies["cascade"]).model_validate({**base, **change})
        taught, shown = (config.stage(name) for name in ("taught", "shown"))
        assert taught.iterations == world.steps[0]
        assert shown.batch <= shown.episodes


def test_results_of_other_worlds_are_kept(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "cascade.json"
    for name, number in (("one", 1), ("two", 2), ("one", 3)):
        benchmarks.cascade.keep(file, name, {"number": number})
    assert json.loads(file.read_text()) == {"worlds": {"one": {"number": 3}, "two": {"number": 2}}}


@pytest.mark.alfworld
def test_household_games_are_of_one_kind_and_can_be_won(
    benchmarks: SimpleNamespace, tmp_path: Path
) -> None:
    module = benchmarks.cascade_worlds
    world = module.furnished(module.small(module.WORLDS["household"]), tmp_path / "games")
    files = (tmp_path / "games" / "train").iterdir()
    games = [json.loads(file.read_text()) for file in files]
    assert {game["task_type"] for game in games} == {module.KIND}
    assert all(f"(problem {module.ROOM}_" in game["pddl_problem"] for game in games)
    assert len({game["pddl_problem"] for game in games}) == len(games) == 600
    env = make(world.env["id"], dict(world.env["options"]))
    try:
        env.reset(options={"task": next(env.tasks("valid_unseen"))})
        while not (result := env.act(env.expert_action() or "look")).terminated:
            assert not result.truncated
        assert result.success
    finally:
        env.close()


def test_the_default_is_chosen_on_other_seeds_and_levels(
    benchmarks: SimpleNamespace, tmp_path: Path
) -> None:
    module = benchmarks.quickstart
    runs = {
        split: [module.recipe(split, n, module.FULL, tmp_path) for n in range(5)]
        for split in ("tune", "report")
    }
    assert not {run.seed for run in runs["tune"]} & {run.seed for run in runs["report"]}
    for split, some in runs.items():
        for run in some:
            assert run.evaluate.split == split
            compared = [stage for stage in run.stages if getattr(stage, "init", None)]
            assert {stage.init for stage in compared} == {"before"}
            assert len({(stage.env_steps, stage.tasks, stage.updates) for stage in compared}) == 1


def test_quickstart_does_what_was_chosen(benchmarks: SimpleNamespace) -> None:
    results = json.loads(benchmarks.quickstart.FILE.read_text())
    (stage,) = (s for s in quickstart.recipe()["stages"] if s["name"] == quickstart.STUDENT)
    rows = [row for row in results["rows"] if row["setting"] == "tune"]
    assert benchmarks.quickstart.choice(rows) == results["chosen"] == stage["method"]


def test_the_default_is_on_policy_and_the_best_on_average(benchmarks: SimpleNamespace) -> None:
    def row(**success: float) -> dict[str, Any]:
        return {"policies": {name.replace("_", "-"): {"success": s} for name, s in success.items()}}

    rows = [row(opd=0.9, opd_exact=0.2, tcod_f2b_exact=0.5, kd=1.0),
            row(opd=0.1, opd_exact=0.5, tcod_f2b_exact=0.6, kd=1.0)]  # fmt: skip
    assert benchmarks.quickstart.choice(rows) == "tcod-f2b-exact"
    assert benchmarks.quickstart.choice(rows[:1]) == "opd"
