"""What may be compared, what is claimed of it, and whether a result comes out again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agentdistill import panel, reproduction
from agentdistill.comparison import compare
from agentdistill.config import load
from agentdistill.errors import ConfigError, MissingExtraError
from agentdistill.evaluation import Result
from agentdistill.metrics import Interval
from agentdistill.records import digest
from tests.cli_calls import ROOM, answer, call, refused
from tests.toy import micro

SETTING: dict[str, Any] = {
    "panel": {"name": "", "split": "report", "seed": 0},
    "env": {"id": "tests/Corridor-v0", "version": "1", "data": "d1"},
    "options": {"length": 6, "data": "/games"},
    "max_turns": None,
    "prompt": {"history": "full", "instruction": ""},
    "limits": {"tokens": None},
    "sampling": {"temperature": 1.0, "max_tokens": 2},
}


def changed(**sections: Any) -> dict[str, Any]:
    """The setting with some keys of its sections changed."""
    return {**SETTING, **{key: {**SETTING[key], **more} for key, more in sections.items()}}


def a_result(
    outcomes: Sequence[bool | None], keys: Sequence[str] | None = None, **more: Any
) -> Result:
    keys = tuple(keys or (f"k{number}" for number in range(len(outcomes))))
    sound = [won for won in outcomes if won is not None]
    rate = sum(sound) / max(1, len(sound))
    values: dict[str, Any] = {"policy": "student", "mode": "sampled", "setting": SETTING, **more}
    return Result(
        episodes=len(sound),
        success=rate,
        interval=Interval(0.0, 1.0),
        optimal=None,
        turns=3.0,
        invalid=0.0,
        score=rate,
        faults=len(outcomes) - len(sound),
        panel=digest(list(keys)),
        keys=keys,
        outcomes=tuple(outcomes),
        **values,
    )


def a_run(folder: Path, *results: Result, seed: int | None = 0) -> Path:
    """A run folder with evaluations; without a ``seed`` only the files."""
    (folder / "evaluation").mkdir(parents=True)
    for result in results:
        name = result.policy + ("" if result.mode == "-" else f"-{result.mode}")
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(result.to_json()))
    if seed is not None:
        (folder / "config.yaml").write_text(f"seed: {seed}\n")
    return folder


def runs(place: Path, rates: Sequence[float], seeds: Sequence[int | None], tasks: int = 50) -> Path:
    """A folder of run folders with the given success rates; each solves tasks of its own."""
    for number, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        order = np.random.default_rng([number, len(rates)]).permutation(tasks)
        a_run(place / f"r{number}", a_result([bool(n < rate * tasks) for n in order]), seed=seed)
    return place


# -- policies --------------------------------------------------------------------------------------


def test_one_run_each_is_a_claim_about_policies_and_no_other(tmp_path: Path) -> None:
    won, lost = [True] * 9 + [False] * 21, [False] * 9 + [True] * 1 + [False] * 20
    a, b = (a_run(tmp_path / n, a_result(o)) for n, o in (("a", won), ("b", lost)))
    found = compare(a, b)
    assert (found.about, found.tasks, found.paired) == ("policies", 30, False)
    assert found.difference == pytest.approx(8 / 30)
    assert found.p == pytest.approx(2 * 11 / 1024) and found.test == "signs by task"
    assert found.interval is not None and 0 < found.interval.low < 8 / 30 < found.interval.high
    assert found.bootstrap is None
    assert any("no p-value about the methods" in note for note in found.notes)
    again = compare(b, a)
    assert again.difference == -found.difference and again.p == found.p


def test_outcomes_are_paired_by_task_and_not_by_place(tmp_path: Path) -> None:
    outcomes = [True, True, False, False, True, False]
    keys = [f"k{n}" for n in range(6)]
    order = [3, 1, 5, 0, 2, 4]
    a = a_run(tmp_path / "a", a_result(outcomes, keys))
    b = a_run(tmp_path / "b", a_result([outcomes[n] for n in order], [keys[n] for n in order]))
    found = compare(a, b)
    assert (found.difference, found.p) == (0.0, 1.0)


def test_faults_are_in_no_rate_and_have_bounds(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a", a_result([True, True, None, False]))
    b = a_run(tmp_path / "b", a_result([True, False, True, None]))
    found = compare(a, b)
    assert found.tasks == 2 and found.difference == 0.5
    assert (found.first.episodes, found.first.faults) == (3, 1)
    assert found.first.bounds == (0.5, 0.75) and found.second.bounds == (0.5, 0.75)
    assert found.bounds == (-0.25, 0.25)
    assert "Whatever the episodes lost to faults had done: -25.0 to +25.0." in (
        call("compare", str(a), str(b)).stdout
    )
    c = a_run(tmp_path / "c", a_result([None, None, True, None]))
    with pytest.raises(ConfigError, match="no task of which both"):
        compare(a, c)
    d = a_run(tmp_path / "d", a_result([None] * 4))
    with pytest.raises(ConfigError, match="every episode was lost to faults"):
        compare(a, d)


def test_a_policy_and_a_mode_are_chosen_or_asked_for(tmp_path: Path) -> None:
    expert = a_result([True] * 8, policy="expert", mode="-", setting={**SETTING, "sampling": None})
    other = a_result([False] * 7 + [True], policy="other")
    greedy = a_result([True] + [False] * 7, mode="greedy")
    a = a_run(tmp_path / "a", expert, other, a_result([True] * 8), greedy)
    with pytest.raises(ConfigError, match="name one of other, student"):
        compare(a, a)
    found = compare(a, policy=("expert", "other"))
    assert (found.first.mode, found.second.mode, found.difference) == ("-", "sampled", 7 / 8)
    assert compare(a, policy=("student", "expert"), mode="greedy").difference == -7 / 8
    with pytest.raises(ConfigError, match="two policies"):
        compare(a, policy="student")
    with pytest.raises(ConfigError, match=r"policy='other greedy': .* has expert -, "):
        compare(a, policy=("student", "other"), mode="greedy")


# -- methods ---------------------------------------------------------------------------------------


def test_replicates_with_the_same_seeds_are_pairs(tmp_path: Path) -> None:
    a = runs(tmp_path / "a", (0.6, 0.5, 0.4, 0.7), (1, 2, 3, 4))
    b = runs(tmp_path / "b", (0.5, 0.6, 0.4, 0.26), (4, 1, 2, 3))
    found = compare(a, b)
    assert (found.about, found.paired, found.test) == ("methods", True, "paired t over replicates")
    assert found.difference == pytest.approx((0.0 + 0.1 + 0.14 + 0.2) / 4)
    assert found.p == pytest.approx(0.0793, abs=1e-3) and found.interval is not None
    assert found.bootstrap is not None and found.bootstrap.low < 0.11 < found.bootstrap.high
    assert found.second.success == (0.6, 0.4, 0.26, 0.5), "in the order of their pairs"
    assert [Path(run).name for run in found.second.runs] == ["r1", "r2", "r3", "r0"]
    unknown = runs(tmp_path / "c", (0.5, 0.6, 0.4, 0.2), (1, None, None, 2))
    assert not compare(a, unknown).paired, "a run whose seed nobody knows has no pair"


def test_other_replicates_are_two_groups(tmp_path: Path) -> None:
    a = runs(tmp_path / "a", (0.6, 0.5, 0.4), (1, 2, 3))
    b = runs(tmp_path / "b", (0.2, 0.3, 0.1, 0.2), (1, 2, 3, 4))
    found = compare([a / "r0", a / "r1", a / "r2"], b)
    assert (found.paired, found.test) == (False, "Welch's t over replicates")
    assert found.difference == pytest.approx(0.3) and found.p is not None and found.p < 0.05
    text = call("compare", ",".join(str(a / f"r{n}") for n in range(3)), str(b)).stdout
    assert "A - B: +30.0 points, 95% over replicates: " in text
    assert "| B: student (sampled) |    4 | 20.0% (10% to 30%) |" in text


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (3, 1), (2, 5)])
def test_too_few_replicates_give_no_p_value(tmp_path: Path, sizes: tuple[int, int]) -> None:
    sides = [
        runs(tmp_path / n, [0.5] * size, range(size)) for n, size in zip("ab", sizes, strict=True)
    ]
    found = compare(*sides)
    assert found.about == "methods" and found.test == ""
    assert (found.p, found.interval, found.bootstrap) == (None, None, None)
    assert "no p-value about the methods" in found.notes[0]


def test_pairs_may_have_tasks_of_their_own(tmp_path: Path) -> None:
    for side, rate in (("a", 0.7), ("b", 0.5)):
        for seed in range(4):
            keys = [f"s{seed}-{n}" for n in range(40)]
            setting = changed(panel={"seed": seed})
            outcomes = [n < rate * 40 + seed for n in range(40)]
            a_run(tmp_path / side / str(seed), a_result(outcomes, keys, setting=setting), seed=seed)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.paired and found.difference == pytest.approx(0.2)
    assert found.bootstrap is not None and 0.05 < found.bootstrap.low < found.bootstrap.high < 0.35
    shutil.rmtree(tmp_path / "b" / "3")
    with pytest.raises(ConfigError, match="tasks: 40 in A1, 40 in A2, 0 of them the same"):
        compare(tmp_path / "a", tmp_path / "b")


def test_one_run_twice_is_no_replicate(tmp_path: Path) -> None:
    a = runs(tmp_path / "a", (0.5, 0.5, 0.5), (1, 2, 1))
    with pytest.raises(ConfigError, match=r"r2.*is the run of .*r0 again"):
        compare(a, a)
    same = tmp_path / "a" / "r0"
    with pytest.raises(ConfigError, match="again"):
        compare([same, same], same)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (changed(prompt={"history": 2}), "prompt.history: 'full' in A, 2 in B"),
        (changed(sampling={"temperature": 0.5}), "sampling.temperature: 1.0 in A, 0.5 in B"),
        (changed(env={"version": "2"}), "environment.version: '1' in A, '2' in B"),
        (changed(env={"data": "d2"}), "environment.data: 'd1' in A, 'd2' in B"),
        (changed(options={"length": 7}), "options.length: 6 in A, 7 in B"),
        (changed(limits={"tokens": 9}), "limits.tokens: None in A, 9 in B"),
        (changed(panel={"seed": 4}), "seed: 0 in A, 4 in B"),
        ({**SETTING, "max_turns": 4}, "max_turns: None in A, 4 in B"),
    ],
)
def test_what_was_played_otherwise_is_named(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    a = a_run(tmp_path / "a", a_result([True, False]))
    b = a_run(tmp_path / "b", a_result([True, False], setting=setting))
    line = refused(2, "compare", str(a), str(b))
    assert line == f"error: A and B did not play the same: {message}"


def test_other_tasks_are_refused_and_other_places_are_not(tmp_path: Path) -> None:
    a = a_run(tmp_path / "a", a_result([True, False, True]))
    b = a_run(tmp_path / "b", a_result([True, False], ["k1", "x"]))
    assert "tasks: 3 in A, 2 in B, 1 of them the same" in refused(2, "compare", str(a), str(b))
    moved = changed(options={"data": "/elsewhere/games"}, panel={"name": "mine"})
    c = a_run(tmp_path / "c", a_result([True, True, True], setting=moved))
    assert compare(a, c).tasks == 3


def test_what_holds_no_results_is_refused(tmp_path: Path) -> None:
    a = str(a_run(tmp_path / "a", a_result([True])))
    (tmp_path / "x.json").write_text("[1]")
    (tmp_path / "y.json").write_text("{")
    for name, message in (
        ("x.json", "holds no results"),
        ("y.json", "not JSON"),
        ("z.json", "cannot be read"),
        ("", "this folder has no evaluation"),
    ):
        place = tmp_path / name if name else tmp_path / "empty"
        place.mkdir() if not name else None
        assert message in refused(2, "compare", str(place), a)


# -- a real run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the micro recipe, by the command."""
    place = tmp_path_factory.mktemp("trained")
    for seed in (1, 2):
        recipe = place / f"recipe{seed}.yaml"
        recipe.write_text(yaml.safe_dump(micro(place / "runs", name=f"seed{seed}", seed=seed)))
        assert call("train", str(recipe)).exit_code == 0
    return place / "runs"


def test_the_command_compares_runs_and_results(trained: Path) -> None:
    a, b = (str(trained / name) for name in ("seed1", "seed2"))
    found = answer("compare", a, f"{b}/results.json", "--policy", "distilled")
    assert found["about"] == "policies" and found["tasks"] == 5
    text = call("compare", a, b, "--policy", "distilled", "--mode", "greedy").stdout
    assert "| A: distilled (greedy) |    1 |" in text
    assert "No p-value about the methods: with one run each" in text
    both = answer("compare", str(trained), "--policy", "taught", "--policy", "distilled")
    assert both["about"] == "methods" and both["paired"] and both["p"] is None
    rates = [sum(both[side]["success"]) / 2 for side in ("first", "second")]
    assert both["difference"] == pytest.approx(rates[0] - rates[1])


def test_a_result_comes_out_again(trained: Path, tmp_path: Path) -> None:
    found = answer("reproduce", str(trained / "seed1" / "results.json"))
    assert found["ok"] and {each["status"] for each in found["results"]} == {"identical"}
    assert [each["policy"] for each in found["results"]].count("distilled") == 2
    moved = shutil.copytree(trained / "seed1", tmp_path / "elsewhere" / "copied")
    text = call("reproduce", str(moved), "--policy", "taught", "--mode", "greedy").stdout
    assert "| taught | greedy | identical |" in text
    file = str(tmp_path / "eval.json")
    words = ("--policy", "distilled", "--mode", "sampled", "--split", "tune", "--tasks", "4")
    settings = ("evaluate.samples=2", "evaluate.seed=3", "sampling.max_tokens=1")
    answer("eval", str(moved / "config.yaml"), *settings, *words, "--output", file)
    (again,) = answer("reproduce", file)["results"]
    assert again["status"] == "identical" and len(again["result"]["outcomes"]) == 8


def test_a_result_that_was_changed_is_outside(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained / "seed1", tmp_path / "copied")
    file = folder / "results.json"
    values = json.loads(file.read_text())
    (row,) = (row for row in values["results"] if row["policy"] == "random")
    truth = row["success"]

    def status(change: float) -> str:
        row["success"] = truth + change
        file.write_text(json.dumps(values))
        (found,) = reproduction.reproduce(file, "random")
        assert found.found == truth
        return found.status

    assert status(0.0) == "identical"
    assert status(0.01) == "within"
    assert status(0.9 if truth < 0.5 else -0.9) == "outside"
    result = call("reproduce", str(file), "--policy", "random")
    assert result.exit_code == 1 and "| random | -    | outside |" in result.stdout
    assert not json.loads(call("reproduce", str(file), "--json").stdout)["ok"]
    words = (str(folder), str(trained / "seed2"), "--policy", "random")
    assert "random.json says otherwise" in refused(2, "compare", *words)


def test_other_weights_are_another_result(trained: Path, tmp_path: Path) -> None:
    """Same numbers by chance, other episodes: that is not identical."""
    folder = shutil.copytree(trained / "seed1", tmp_path / "copied")
    file = folder / "evaluation" / "taught-sampled.json"
    values = json.loads(file.read_text())
    assert reproduction.reproduce(file)[0].status == "identical"
    values["outcomes"] = values["outcomes"][1:] + values["outcomes"][:1]
    file.write_text(json.dumps(values))
    expected = "identical" if len(set(values["outcomes"])) == 1 else "within"
    assert reproduction.reproduce(file)[0].status == expected
    values["setting"]["env"]["version"] = "0"
    file.write_text(json.dumps(values))
    assert "environment.version: '0' in the result, '1' in what is played here" in (
        refused(2, "reproduce", str(file))
    )


def test_a_scripted_policy_needs_only_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    options = dict(text.removeprefix("--option=").split("=") for text in ROOM)
    env = {"id": "agentdistill/Sokoban-v0", "options": {k: int(v) for k, v in options.items()}}
    section = {"policies": ["expert", "random"], "tasks": 4, "seed": 5}
    recipe.write_text(yaml.safe_dump({"env": env, "prompt": "bare", "evaluate": section}))
    file = tmp_path / "alone" / "eval.json"
    answer("eval", str(recipe), "--output", str(file))
    assert [each.status for each in reproduction.reproduce(file)] == ["identical"] * 2
    values = json.loads(file.read_text())
    values["results"][0]["policy"] = "student"
    file.write_text(json.dumps(values))
    assert "its checkpoint is not here" in refused(2, "reproduce", str(file))
    assert "there are student -, random -" in refused(2, "reproduce", str(file), "--policy", "x")


# -- reference checkpoints -------------------------------------------------------------------------


def test_a_checkpoint_is_rebuilt_from_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = micro(tmp_path, prompt="bare", evaluate={})
    recipe["stages"] = [recipe["stages"][0], {**recipe["stages"][1], "name": "student"}]
    recipe["models"] = {"teacher": recipe["models"]["teacher"]}
    file, made = tmp_path / "recipe.yaml", tmp_path / "toy.json"
    file.write_text(yaml.safe_dump(recipe))
    words = ["--env", "tests.toy:Corridor", "--tasks", "5", "--prompt", "bare", "-o", str(made)]
    answer(
        "panels", "make", *words, "--max-tokens", "2", "--checkpoint", str(file), "--rebuilds", "1"
    )
    known = panel.load(made).references["student"]
    assert known.recipe == str(file) and known.episodes == 5 and known.exact
    found = answer("panels", "check", str(made), "--checkpoint")
    assert [each["policy"] for each in found["references"]] == ["expert", "random", "student"]
    assert {each["status"] for each in found["references"]} == {"identical"}
    assert len(answer("panels", "check", str(made))["references"]) == 2, "not trained unasked"
    whole = panel.load(made)
    for success, status in ((known.success, "within"), (1 - round(known.success), "differs")):
        other = known.model_copy(update={"digests": "x x x x x", "success": float(success)})
        changed = whole.model_copy(update={"references": {"student": other}})
        assert panel.judge(changed, "student", known).status == status
    wide = other.model_copy(update={"spread": 0.5})
    changed = whole.model_copy(update={"references": {"student": wide}})
    assert panel.judge(changed, "student", known).status == "within"
    with pytest.raises(ConfigError, match="max_tokens is 2, not 64"):
        reproduction.checkpoint(whole.model_copy(update={"sampling": load({}).sampling}), str(file))
    monkeypatch.setattr(reproduction, "need_torch", _lacking)
    with pytest.raises(MissingExtraError, match=r"pip install 'agentdistill\[train\]'"):
        reproduction.checkpoint(whole, str(file))
    panel.save(whole.model_copy(update={"references": {}}), made)
    assert "has no reference checkpoint" in refused(2, "panels", "check", str(made), "--checkpoint")


def _lacking(feature: str) -> None:
    raise MissingExtraError(feature, "train")


def test_the_panel_of_sokoban_names_a_checkpoint() -> None:
    found = panel.load("sokoban").references["student"]
    assert found.recipe == "reference-sokoban"
    assert 0.2 < found.success < 0.8 and 0 < found.spread < 0.1 and found.faults == 0, (
        "neither chance nor the solver"
    )


@pytest.mark.slow
def test_the_checkpoint_of_sokoban_is_reproduced() -> None:
    found = answer("panels", "check", "sokoban", "--checkpoint", "--policy", "expert")
    assert found["references"][-1]["status"] in ("identical", "within")
