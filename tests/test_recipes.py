"""The recipes of the papers: read, checked, and rehearsed to the end with random models.

``recipes/models.yaml`` is the one place for hub ids and licences. Nothing here reaches a hub.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentdistill.config import CollectStage, LocalModel, RunConfig, TinyModel, load
from agentdistill.errors import ConfigError
from agentdistill.quickstart import recipe as quickstart
from agentdistill.recipe import Outcome, execute, validate
from agentdistill.rehearsal import WORLDS, changes, rehearse
from tests.cli_calls import answer, call
from tests.toy import micro

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
MODELS: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "models.yaml").read_text())
PACKAGES = {"alfworld": "alfworld", "webshop": "rapidfuzz"}


def _needs(name: str) -> Any:
    """The recipe ``name``, marked with what its environment needs."""
    env = name.rpartition("-")[2]
    if env == "alfworld":
        return pytest.param(name, marks=pytest.mark.alfworld)
    missing = find_spec(PACKAGES[env]) is None
    reason = f"needs the package {PACKAGES[env]}: pip install 'agentdistill[{env}]'"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


METHODS = ("opd", "skill-sd", "sod", "tcod")
NAMES = [f"{method}-{env}" for method in METHODS for env in PACKAGES]
RECIPES = [_needs(name) for name in NAMES]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is generated, for all recipes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _no_official_data(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing was fetched."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTDISTILL_HOME", str(cache))
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA"):
        monkeypatch.delenv(name, raising=False)


def read(name: str, *overrides: str) -> RunConfig:
    return load(FOLDER / f"{name}.yaml", overrides)


def test_every_method_has_a_recipe_for_every_environment() -> None:
    found = {path.stem for path in FOLDER.glob("*.yaml")} - {"models"}
    assert found == set(NAMES)
    assert all(read(name).name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_hub_ids_are_named_in_one_place_with_a_licence(name: str) -> None:
    for model in read(name).models.values():
        assert isinstance(model, LocalModel)
        assert MODELS[model.path]["licence"] == "Apache-2.0"


def test_the_list_of_models_is_complete() -> None:
    for facts in MODELS.values():
        assert list(facts) == ["licence", "verified", "made_by", "parameters", "revision", "role"]
        assert all(facts[key] for key in ("verified", "made_by", "parameters", "role"))
    used = {model.path for name in NAMES for model in read(name).models.values()}
    for path, facts in MODELS.items():
        assert (path in used) != ("not used" in facts["role"]), path


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_once_there_is_data(name: str) -> None:
    data = dict(WORLDS[read(name).env.id].options) | {"types": None, "products": 300}
    known = {"alfworld": ("games", "types"), "webshop": ("catalogue", "goals", "products")}
    mine = known[name.rpartition("-")[2]]
    overrides = [f"env.options.{key}={json.dumps(data[key])}" for key in mine]
    with validate(read(name, *overrides)) as the_run:
        assert the_run.env.step_limit == the_run.config.env.options["max_steps"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_never_fall_back_to_generated_data(name: str) -> None:
    with pytest.raises(ConfigError, match=f"agentdistill data {name.rpartition('-')[2]}"):
        validate(read(name))


# -- what a rehearsal keeps and what it replaces ---------------------------------------------------

REPLACED = {
    *("name", "concurrency", "env.max_turns", "sampling.max_tokens"),
    *("evaluate.tasks", "evaluate.samples", "evaluate.concurrency"),
    *(f"env.options.{key}" for key in ("games", "types", "catalogue", "goals", "products")),
}
PER_STAGE = {"policy", "episodes", "batch", "iterations", "tasks", "samples", "updates"}
PER_STAGE |= {"evaluate_every", "sampling.max_tokens"}


def _keys(lines: list[str]) -> set[str]:
    """Keys of :func:`changes`, without models and without the names of stages."""
    keys = {line.partition(":")[0] for line in lines}
    keys = {key for key in keys if not key.startswith("models.")}
    return {key.split(".", 2)[2] if key.startswith("stages.") else key for key in keys}


@pytest.mark.parametrize("name", NAMES)
def test_methods_prompts_and_stages_stay(name: str) -> None:
    config = read(name)
    small = rehearse(config)
    assert _keys(changes(config, small)) <= REPLACED | PER_STAGE
    assert all(isinstance(model, TinyModel) for model in small.models.values())
    assert [stage.name for stage in small.stages] == [stage.name for stage in config.stages]
    again = rehearse(small)
    assert _keys(changes(small, again)) == {"name"}
    for stage in small.stages:
        if isinstance(stage, CollectStage):
            assert (stage.policy, stage.episodes) == ("expert", 4)
        else:
            assert stage.iterations == 2 and stage.tasks * stage.samples <= 4
            assert stage.axes == config.stage(stage.name).model_dump()["axes"]


def test_changes_name_key_old_and_new() -> None:
    config = read("opd-webshop")
    lines = changes(config, rehearse(config))
    assert "models.teacher: Qwen/Qwen3-30B-A3B → a random model" in lines
    assert "env.options.catalogue: ~/.cache/agentdistill/webshop → generated" in lines
    assert "env.options.products: unset → 40" in lines
    assert "stages.distilled.iterations: 150 → 2" in lines
    assert changes(config, config) == []


def test_other_environments_and_tiny_models_are_left_alone(tmp_path: Path) -> None:
    for values in (quickstart(), micro(tmp_path)):
        config = load(values)
        small = rehearse(config)
        assert small.env == config.env and small.models == config.models
    named = load({**quickstart(), "evaluate": {"policies": ["taught"], "panel": "sokoban"}})
    assert rehearse(named).evaluate.panel is None


# -- the rehearsals --------------------------------------------------------------------------------


def perform(config: RunConfig, folder: Path) -> Outcome:
    return execute(config.model_copy(update={"output": str(folder)}))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_to_its_end(name: str, tmp_path: Path) -> None:
    config = rehearse(read(name))
    outcome = perform(config, tmp_path)
    assert list(outcome.stages) == [stage.name for stage in config.stages]
    assert [result.policy for result in outcome.results] == config.evaluate.policies
    assert all((result.episodes, result.faults) == (2, 0) for result in outcome.results)
    for stage in config.stages:
        summary = outcome.stages[stage.name]
        if isinstance(stage, CollectStage):
            assert summary["episodes"] == 4
            continue
        assert summary["iterations"] == 2
        assert (summary["scored_tokens"] > 0) == (stage.teacher is not None)


@pytest.mark.skipif(find_spec("rapidfuzz") is None, reason="needs the package rapidfuzz")
def test_a_task_that_comes_back_brings_its_skill(tmp_path: Path) -> None:
    """Two iterations of a recipe rarely meet a task twice, so its skills are written, not read."""
    overrides = ["env.options.products=3", "stages.distilled.split=test", "evaluate.policies=[]"]
    config = load(rehearse(read("skill-sd-webshop")), overrides)
    assert perform(config, tmp_path).stages["distilled"]["scored_tokens"] > 0


@pytest.mark.skipif(find_spec("rapidfuzz") is None, reason="needs the package rapidfuzz")
def test_the_command_says_what_it_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["train", str(FOLDER / "sod-webshop.yaml"), "--rehearse", "--stage", "cold"]
    document = answer(*args)
    assert "models.student: Qwen/Qwen3-1.7B → a random model" in document["replaced"]
    assert document["stages"].keys() == {"demos", "cold"}
    assert not Path(document["path"]).exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    shown = call(*args, f"output={tmp_path / 'kept'}")
    assert shown.exit_code == 0, shown.stderr
    assert "stages.demos.policy: teacher → expert" in shown.stdout.splitlines()
    assert os.listdir(tmp_path / "kept") == ["sod-webshop-rehearsal"]
