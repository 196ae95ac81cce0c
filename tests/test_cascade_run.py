"""Cascades by name: configuration, evaluation, collection, and what their results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentdistill import api
from agentdistill.config import RunConfig, load
from agentdistill.display import columns, rows
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result, modes
from agentdistill.recipe import execute, validate
from agentdistill.records import Usage
from agentdistill.report.read import read_runs
from agentdistill.run import Run
from tests.toy import micro

PRICES = {"teacher": {"input": 10, "output": 30}, "student": {"input": 1, "output": 3}}
MIX = {"student": "student", "teacher": "taught", "demos": "demos", "k": 2, "window": 1}
"""The cascade of these tests."""


def config(output: Path, **changes: Any) -> dict[str, Any]:
    """The micro run without its second training, its models with prices, and two cascades."""
    base = micro(output)
    models = {name: {**model, "price": PRICES[name]} for name, model in base["models"].items()}
    chance = {**MIX, "rule": "random", "threshold": 0.5, "demos": None, "plan": True}
    policies = {"mix": MIX, "chance": chance}
    return {
        **base,
        "models": models,
        "stages": base["stages"][:2],
        "policies": policies,
        "evaluate": {"policies": ["expert", "student", "taught", "mix", "chance"], "tasks": 4},
        **changes,
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Result]]:
    loaded = load(config(tmp_path_factory.mktemp("runs")))
    outcome = execute(loaded)
    return loaded, {f"{r.policy} {r.mode}": r for r in outcome.results}


def test_results_say_who_answered_and_what_it_cost(played: Any) -> None:
    _, results = played
    assert set(results) == {
        "expert -", "student sampled", "student greedy", "taught sampled", "taught greedy",
        "mix sampled", "chance sampled",
    }  # fmt: skip
    mix, student, taught = (results[f"{n} sampled"] for n in ("mix", "student", "taught"))
    assert student.asked is None and student.teacher_calls is None
    assert mix.asked is not None and 0 < mix.asked <= 1
    turns = mix.turns * mix.episodes
    assert mix.teacher_calls == round(mix.asked * turns)
    assert set(mix.tokens) == {"student", "taught"}
    assert mix.tokens["student"]["calls"] == 3 * round(turns)
    assert mix.tokens["taught"]["calls"] == mix.teacher_calls
    assert mix.setting["made of"]["samples"] == 3 and "made of" not in student.setting
    for result in (mix, student, taught):
        assert result.cost is not None
        assert (
            0
            < result.cost["cached"]
            <= result.cost["uncached"]
            == pytest.approx(
                sum(
                    (value["input"] + value["cache_read"]) * PRICES[model]["input"]
                    + value["output"] * PRICES[model]["output"]
                    for model, value in (
                        ("student" if name == "student" else "teacher", value)
                        for name, value in result.tokens.items()
                    )
                )
                / (result.episodes + result.faults)
                / 1e6
            )
        )
    assert results["expert -"].cost is None and not results["expert -"].tokens


def test_tables_and_files_have_it(played: Any) -> None:
    loaded, results = played
    table = rows(list(results.values()))
    head = columns(table)
    assert head[-4:] == ("teacher", "cost", "uncached", "cached")
    lines = {row.policy: dict(zip(head, row.cells(head), strict=True)) for row in table}
    assert lines["mix"]["teacher"].endswith("%") and lines["student"]["teacher"] == "–"  # noqa: RUF001
    assert float(lines["mix"]["cost"]) > 0 and lines["expert"]["cost"] == "–"  # noqa: RUF001
    plain = [result for result in results.values() if result.policy == "expert"]
    assert "teacher" not in columns(rows(plain))
    again = {f"{r.policy} {r.mode}": r for r in read_runs([loaded.path])[0].results}
    assert again["mix sampled"].cost == results["mix sampled"].cost
    old = results["mix sampled"].to_json()
    for name in ("asked", "teacher_calls", "tokens", "cost"):
        del old[name]
    assert Result.of_json(json.loads(json.dumps(old))).asked is None


def test_demonstrations_are_those_of_the_stage(played: Any) -> None:
    loaded, _ = played
    with Run(loaded) as the_run:
        policy: Any = the_run.policy("mix")
        demos = policy.shown.demos
        shown = {t.id for t in the_run.episodes("demos") if t.success}
        assert 0 < demos.episodes <= len(shown)
        before = (the_run.folder("demos") / "demos" / "demos.bin").stat().st_mtime_ns
        assert the_run.policy("mix").shown.demos.version == demos.version  # type: ignore
        assert (the_run.folder("demos") / "demos" / "demos.bin").stat().st_mtime_ns == before
        folder = str(the_run.folder("demos") / "demos")
        again: Any = the_run.cascade(
            "mix", said=loaded.policies["mix"].model_copy(update={"demos": folder})
        )
        assert again.shown.demos.version == demos.version
        with pytest.raises(ConfigError, match="neither"):
            the_run.cascade("mix", said=loaded.policies["mix"].model_copy(update={"demos": "gone"}))


@pytest.mark.parametrize("hints", ["keep", "drop"])
@pytest.mark.parametrize("place", ["after", "before"])
def test_its_episodes_are_data(played: Any, hints: str, place: str, tmp_path: Path) -> None:
    loaded, _ = played
    stages = [
        *loaded.model_dump()["stages"],
        {"name": "mixed", "do": "collect", "policy": "mix", "episodes": 4, "batch": 4,
         "only_success": False, "avoid_held_out": False},
        {"name": "tuned", "model": "student", "method": "sft", "data": "mixed", "iterations": 2,
         "tasks": 4, "hints": hints},
    ]  # fmt: skip
    values = {**loaded.model_dump(), "stages": stages, "output": str(tmp_path)}
    values["policies"]["mix"]["place"] = place
    values["stages"][1]["iterations"] = 1
    outcome = api.train(values, "tuned")
    with Run(load(values)) as the_run:
        found = the_run.episodes("mixed")
        assert {turn.actor.name for t in found for turn in t.acted} == {"student", "taught"}
        told = [t for t in found if "note" in t.provenance or any(u.hint for u in t.turns)]
        assert told and outcome.stages["tuned"]["iterations"] == 2
        from agentdistill.experience import Experience
        from agentdistill.methods.index import get

        stage = the_run.config.stage("tuned")
        loaded_model = the_run.model("student")
        experience = Experience(
            the_run,
            stage,
            get("sft").resolve({}),
            loaded_model,
            None,
            None,
            lambda t, n: [],  # type: ignore
        )
        texts = [
            loaded_model.renderer.text(stream.ids.tolist())
            for t in experience.data
            for stream in t.streams
        ]
        assert any("Steps from tasks" in text for text in texts) is (hints == "keep")


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"student": "nobody"}, "policies.mix.student"),
        ({"student": "demos"}, "policies.mix.student"),
        ({"teacher": "nobody"}, "policies.mix.teacher"),
        ({"teacher": "student"}, "itself"),
        ({"demos": "taught"}, "policies.mix.demos"),
        ({"rule": "most"}, "rule"),
        ({"rule": "threshold"}, "threshold"),
        ({"threshold": 0.5}, "threshold"),
        ({"samples": 0}, "samples"),
        ({"teacher": None, "rule": "always"}, "rule"),
        ({"equivalence": "judge"}, "equivalence"),
        ({"place": "inside"}, "place"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        load(config(tmp_path, policies={"mix": {**MIX, **change}}, evaluate={}))


@pytest.mark.parametrize("name", ["expert", "student", "taught", "demos"])
def test_names_are_taken_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="taken"):
        load(config(tmp_path, policies={name: MIX}, evaluate={}))


def test_a_stage_may_only_use_what_comes_before(tmp_path: Path) -> None:
    base = config(tmp_path)
    early = {"name": "early", "do": "collect", "policy": "mix", "episodes": 1}
    with pytest.raises(ConfigError, match="names nothing before it"):
        load({**base, "stages": [base["stages"][0], early, base["stages"][1]]})
    load({**base, "stages": [*base["stages"], early]})


def test_what_a_cascade_needs_is_done_first(tmp_path: Path) -> None:
    from agentdistill.recipe import _jobs

    base = config(tmp_path)
    late = {"name": "late", "do": "collect", "policy": "mix", "episodes": 1}
    the_run = validate(load({**base, "stages": [*base["stages"], late]}))
    jobs = {(job.name, job.mode): job.needs for job in _jobs(the_run, None)}
    assert jobs["late", ""] == jobs["mix", "sampled"] == {"demos", "taught"}
    assert jobs["chance", "sampled"] == {"taught"}
    assert [job.name for job in _jobs(the_run, ["late"])] == ["demos", "taught", "late"]


def test_cascades_always_sample(tmp_path: Path) -> None:
    loaded = load(config(tmp_path))
    assert modes("mix", loaded) == ["sampled"] and len(modes("student", loaded)) == 2


def test_a_price_is_a_models(tmp_path: Path) -> None:
    with Run(load(config(tmp_path))) as the_run:
        price = the_run.providers.price("taught")
        assert price is not None and price.cost(Usage(input=100, output=1)) * 10**6 == 1030
        assert (
            the_run.providers.price("taught")
            == the_run.providers.price("teacher")
            != the_run.providers.price("student")
        )
        assert the_run.providers.price("expert") is None and the_run.providers.prices() == {}


def test_old_configurations_keep_their_identity(tmp_path: Path) -> None:
    assert (
        load(micro(tmp_path)).fingerprint == load({**micro(tmp_path), "policies": {}}).fingerprint
    )


@pytest.mark.filterwarnings("ignore")
def test_one_policy_can_be_asked_for(played: Any) -> None:
    loaded, results = played
    again = api.evaluate(loaded, "mix", "greedy")
    assert again.mode == "sampled" and again.outcomes == tuple(
        results["mix sampled"].outcomes or again.outcomes
    )


def test_a_report_shows_them(played: Any, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    from agentdistill.report import report
    from agentdistill.report.results import columns as heads
    from agentdistill.report.results import result_rows

    loaded, results = played
    runs = read_runs([loaded.path])
    assert heads(runs)[-2:] == ("teacher", "cost")
    cells = {row.policy: [cell.text for cell in row.cells[-2:]] for row in result_rows(runs)}
    assert cells["expert"] == ["–", "–"] and cells["student"][0] == "–"  # noqa: RUF001
    assert cells["mix"][0] == f"{results['mix sampled'].asked:.1%}"
    page = Path(report([loaded.path], tmp_path / "r.html", score=False).file).read_text()
    assert cells["mix"][1] in page
