"""Panels: what a file fixes, what is refused, what a reference says, and how it is played again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentdistill import panel
from agentdistill.config import EvaluateConfig, load
from agentdistill.envs.base import Availability, Card, Moved
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError, EnvError
from agentdistill.evaluation import evaluate
from agentdistill.metrics import wilson
from agentdistill.panel import Panel
from agentdistill.recipe import execute, validate
from agentdistill.records import Task
from agentdistill.run import Run
from agentdistill.tasks import TaskStream, draw
from tests.cli_calls import answer, call, python, refused
from tests.toy import Corridor, micro

HERE = "tests.test_panels"
NAMES = {"train": "train", "valid_seen": "tune", "valid_unseen": "report"}


class Official(Corridor):
    """A corridor whose parts have names of their own; tasks may name a trap."""

    engine, version_of_data = "1", "d1"
    closed = made = 0

    def __init__(self, data: str | None = None, **options: Any) -> None:
        self.where = data
        super().__init__(**options)
        Official.made += 1

    @property
    def card(self) -> Card:
        return dataclasses.replace(
            super().card,
            id="tests/Official-v0",
            version=self.engine,
            data=self.version_of_data,
            splits=tuple(NAMES),
            roles={"tune": "valid_seen", "report": "valid_unseen"},
            notes=("a note of the card",),
        )

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        for task in super().tasks(NAMES[split], seed):
            yield Task(self.card.id, split, task.payload, self.card.data, task.index)

    def close(self) -> None:
        Official.closed += 1


class Fragile(Official):
    """Fails in every second task."""

    def _begin(self, task: Task) -> str:
        if task.payload["at"] % 2:
            raise OSError("no corridor today")
        return super()._begin(task)


class Moody(Official):
    """Its episodes are never the same, its success rate is."""

    count = itertools.count()

    def _advance(self, action: str) -> Moved:
        moved = super()._advance(action)
        return dataclasses.replace(moved, observation=f"{moved.observation} {next(self.count)}")


class Grim(Moody):
    """Nobody gets anywhere."""

    def _advance(self, action: str) -> Moved:
        moved = super()._advance(action)
        return dataclasses.replace(moved, success=False, score=0.0)


class Contents(Official):
    """The payload of its tasks is all that they are; ``length`` says how many there are."""

    @property
    def card(self) -> Card:
        return dataclasses.replace(super().card, data=f"corridors up to {self.length}")

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        for task in super().tasks(split, seed):
            yield Task(task.env, split, task.payload)


class Absent(Official):
    @classmethod
    def availability(cls) -> Availability:
        return Availability("", "none", ("the games",), ("needs the games: get them",))


class Few(Official):
    """Counts the episodes that run at once."""

    lock = threading.Lock()
    inside = most = 0

    @property
    def card(self) -> Card:
        return dataclasses.replace(super().card, isolation="thread", slots=2)

    def _begin(self, task: Task) -> str:
        with self.lock:
            Few.inside += 1
            Few.most = max(Few.most, Few.inside)
        return super()._begin(task)

    def _advance(self, action: str) -> Moved:
        moved = super()._advance(action)
        if moved.terminated:
            with self.lock:
                Few.inside -= 1
        return moved


def a_panel(env: Corridor | None = None, number: int = 6, **options: Any) -> Panel:
    env = env or Official()
    target = f"{HERE}:{type(env).__name__}"
    return panel.make(env, "report", number, 3, name="toy", target=target, **options)


def with_references(found: Panel, **options: Any) -> Panel:
    scores = {name: panel.score(found, name, **options) for name in panel.POLICIES}
    return found.model_copy(update={"references": scores})


# -- the file --------------------------------------------------------------------------------------


def test_a_file_reads_back_as_it_was(tmp_path: Path) -> None:
    found = with_references(a_panel(max_turns=9, notes=["mine"]))
    panel.save(found, tmp_path / "new" / "toy.json")
    again = panel.load(tmp_path / "new" / "toy.json")
    assert again == found
    wanted = [task.key for task in draw(Official(), "valid_unseen", 6, 3)]
    assert [task.key for task in again.listed()] == wanted
    assert (again.split, again.version, again.data) == ("valid_unseen", "1", "d1")
    assert (again.max_steps, again.max_turns) == (12, 9)
    assert again.notes == ["a note of the card", "mine"]
    lines = (tmp_path / "new" / "toy.json").read_text().splitlines()
    assert sum('"payload"' in line for line in lines) == 6, "a task per line"
    assert again.facts()["tasks"] == 6 and "digests" not in again.facts()["references"]["random"]


def test_every_episode_has_a_seed_of_its_own() -> None:
    wanted = a_panel().requests(3)
    assert len({request.seed for request in wanted}) == 18
    assert [request.sample for request in wanted] == [0, 1, 2] * 6
    assert wanted == a_panel().requests(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["tasks"][2]["payload"].update(at=9), r"task 2 has the key \w+ and a content"),
        (lambda v: v["tasks"][1].update(key="0" * 16), "task 1 has the key 0000000000000000"),
        (lambda v: v["tasks"][0].update(data="d2"), "task 0 has the key"),
        (lambda v: v.update(env="tests/Other-v0"), "task 0 has the key"),
        (lambda v: v["tasks"].append(v["tasks"][0]), "a task is there twice"),
        (lambda v: v.update(prompt="shout"), "prompt 'shout' is no preset"),
        (lambda v: v.update(colour="red"), "colour: Extra inputs"),
        (lambda v: v.pop("version"), "version: Field required"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    values = a_panel().model_dump(mode="json")
    change(values)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as error:
        panel.load(path)
    assert "\n" not in str(error.value)


def test_what_is_no_panel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="is no sound panel"):
        panel.load(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"built-in panels: .*sokoban"):
        panel.load("nowhere")


def test_every_built_in_panel_is_sound_and_has_references() -> None:
    assert "sokoban" in panel.names()
    for name in panel.names():
        found = panel.load(name)
        assert found.name == name and found.licence and found.references.keys() >= {"random"}
        for reference in found.references.values():
            assert reference.episodes + reference.faults == len(found.tasks)
            assert len(reference.digests.split()) == len(found.tasks)
            low, high = wilson(round(reference.success * reference.episodes), reference.episodes)
            assert reference.interval == pytest.approx((low, high), abs=1e-5)


def test_the_panel_of_sokoban_is_reproduced() -> None:
    found = panel.load("sokoban")
    with_env = make(found.env, found.options)
    assert panel.check(found, with_env, found.options) == []
    assert found.listed() == draw(with_env, found.split, len(found.tasks), found.seed)
    assert [r.status for r in panel.reproduces(found, tasks=40)] == ["identical", "identical"]
    assert found.references["expert"].success == 1.0
    assert found.references["random"].success < 0.1


def test_no_torch() -> None:
    code = "import sys, agentdistill.panel as p; p.reproduces(p.load('sokoban'), tasks=2);"
    assert python("-c", f"{code} print('torch' in sys.modules)").stdout == "False\n"


# -- what must agree -------------------------------------------------------------------------------


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = a_panel()
    assert panel.check(found, Official()) == []
    assert panel.check(found, make("agentdistill/Sokoban-v0"))[0] == (
        "environment: tests/Official-v0 in the panel, agentdistill/Sokoban-v0 here"
    )
    assert panel.check(found, Corridor())[1:] == [
        "split valid_unseen is not among train, tune, report",
    ]
    monkeypatch.setattr(Official, "version_of_data", "d2")
    assert panel.check(found, Official()) == ["data: d1 in the panel, d2 here"]
    monkeypatch.undo()
    monkeypatch.setattr(Official, "engine", "2")
    assert panel.check(found, Official()) == ["engine: 1 in the panel, 2 here"]
    with pytest.raises(ConfigError, match="panel='toy': engine: 1 in the panel, 2 here"):
        panel.score(found, "expert")


def test_more_data_than_the_panel_s_is_no_problem() -> None:
    found = a_panel(Contents())
    assert found.data == "corridors up to 6" and not any(task.data for task in found.tasks)
    keys = {task.key for task in found.tasks}
    bigger, smaller = Contents(length=12), Contents(length=5)
    assert bigger.card.data != found.data
    there = {task.key for task in bigger.tasks("valid_unseen")}
    lost = len(keys - there)
    assert panel.check(found, bigger) == [
        f"data: {lost} of the panel's 6 tasks are not in the data here"
    ] * bool(lost)
    kept = [task for task in found.tasks if task.key in there]
    assert kept and panel.check(found.model_copy(update={"tasks": kept}), bigger) == []
    (problem,) = panel.check(found, smaller)
    assert problem.endswith("of the panel's 6 tasks are not in the data here")


def test_options_are_compared_with_their_defaults_and_places_are_not(tmp_path: Path) -> None:
    given = {"length": 6, "data": str(tmp_path), "isolation": "thread"}
    found = a_panel(Official(**given), options=given, free=["isolation"])
    assert found.options == {"length": 6, "isolation": "thread"}, "no place on this machine"
    for same in ({}, {"data": "/elsewhere"}, {"length": 6, "isolation": "inline"}):
        assert panel.check(found, Official(), same) == []
    wrong = {"length": 7, "break_at": 3}
    assert panel.check(found, Official(), wrong) == [
        "option break_at: None in the panel, 3 here",
        "option length: 6 in the panel, 7 here",
    ]


# -- names of parts --------------------------------------------------------------------------------


def test_roles_work_wherever_a_split_is_named(tmp_path: Path) -> None:
    env = Official()
    assert draw(env, "report", 5, 0) == draw(env, "valid_unseen", 5, 0)
    streams = (TaskStream.of_split(env, name, 7).take(20) for name in ("tune", "valid_seen"))
    assert next(streams) == next(streams)
    stages = [
        {"name": "demos", "do": "collect", "episodes": 3, "split": "tune"},
        {"name": "s", "method": "sft", "data": "demos", "iterations": 1, "evaluate_every": 1},
    ]
    options = {"env": {"id": f"{HERE}:Official"}, "stages": stages}
    section = {"policies": ["expert"], "tasks": 5}
    config = load(micro(tmp_path, **options, evaluate=section))
    outcome = execute(config, only=["demos"])
    with Run(config) as run:
        assert {t.task.split for t in run.episodes("demos")} == {"valid_seen"}
        assert evaluate(run, "expert", "-").setting["panel"]["split"] == "valid_unseen"
    assert outcome.stages["demos"]["episodes"] == 3
    with pytest.raises(ConfigError, match="splits train, valid_seen, valid_unseen"):
        validate(load(micro(tmp_path, **options, evaluate={**section, "split": "test"})))


# -- references ------------------------------------------------------------------------------------


def test_a_reference_says_what_was_done() -> None:
    found = with_references(a_panel())
    expert, chance = found.references["expert"], found.references["random"]
    assert (expert.success, expert.episodes, expert.faults) == (1.0, 6, 0)
    assert expert.interval == pytest.approx(wilson(6, 6), abs=1e-6)
    assert expert.exact and chance.exact and expert.score == 1.0
    assert chance.turns > expert.turns and len(set(chance.digests.split())) == 6
    assert expert.commit is not None and "cores" in expert.machine and expert.date > "2020"
    with pytest.raises(ConfigError, match="policy='nobody': one of expert, random"):
        panel.score(found, "nobody")


def test_faults_are_counted_apart_and_nothing_stays_open() -> None:
    Official.made = Official.closed = 0
    found = a_panel(Fragile())
    odd = sum(task.payload["at"] % 2 for task in found.tasks)
    assert 0 < odd < 6
    seen: list[str] = []
    reference = panel.score(found, "expert", on_end=lambda t: seen.append(t.end))
    assert (reference.episodes, reference.faults, reference.success) == (6 - odd, odd, 1.0)
    assert reference.digests.split().count("fault") == odd
    assert len(seen) == 6
    assert Official.made - 1 == Official.closed, "the one that a_panel was given is the test's"


def test_slots_hold_while_a_panel_is_played() -> None:
    Few.inside = Few.most = 0
    assert panel.score(a_panel(Few()), "expert").episodes == 6
    assert Few.most == 2


def test_what_cannot_run_says_so_at_once() -> None:
    with pytest.raises(EnvError, match="needs the games: get them"):
        panel.score(a_panel(Absent()), "expert")


def test_playing_again_gives_the_same_or_names_what_is_not() -> None:
    found = with_references(a_panel())
    assert [r.status for r in panel.reproduces(found)] == ["identical", "identical"]
    assert panel.reproduces(found, ["expert"], tasks=2)[0].found.episodes == 2
    known = found.references["expert"]
    words = known.digests.split()
    words[3] = "00000000"
    other = known.model_copy(update={"digests": " ".join(words)})
    changed = found.model_copy(update={"references": {"expert": other}})
    (replay,) = panel.reproduces(changed)
    assert replay.status == "differs"
    assert f"1 of 6 episodes differ, first that of task {found.tasks[3].key}" in replay.message
    assert panel.reproduces(changed, tasks=3)[0].status == "identical"
    with pytest.raises(ConfigError, match="no such reference; known: expert"):
        panel.reproduces(changed, ["random"])


def test_what_is_not_exact_is_judged_by_its_interval() -> None:
    found = with_references(a_panel(Moody()))
    assert not any(reference.exact for reference in found.references.values())
    (replay,) = panel.reproduces(found, ["expert"])
    assert replay.status == "within" and "6 of 6 episodes differ" in replay.message
    assert panel.reproduces(found, ["expert"], tasks=2)[0].status == "within"
    grim = found.model_copy(update={"target": f"{HERE}:Grim"})
    (replay,) = panel.reproduces(grim, ["expert"])
    assert replay.status == "differs"
    assert "success 0.0%, in the panel 100.0%" in replay.message


# -- in a run --------------------------------------------------------------------------------------


def a_run(tmp_path: Path, found: Panel, **changes: Any) -> Run:
    panel.save(found, tmp_path / "toy.json")
    model = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 8}}
    section = {"panel": str(tmp_path / "toy.json"), "policies": ["expert", "random"]}
    values: dict[str, Any] = {
        "env": {"id": f"{HERE}:Official"},
        "models": {"student": model},
        "stages": [],
        "evaluate": {**section, **changes.pop("evaluate", {})},
    }
    return validate(load(micro(tmp_path, **{**values, **changes})))


def test_an_evaluation_plays_the_panel_and_names_it(tmp_path: Path) -> None:
    found = with_references(a_panel())
    run = a_run(tmp_path, found)
    for policy, known in found.references.items():
        result = evaluate(run, policy, "-")
        assert result.keys == tuple(task.key for task in found.tasks)
        assert result.panel == found.hash
        assert result.setting["panel"] == {"name": "toy", "split": "valid_unseen", "seed": 3}
        assert (result.success, result.turns) == pytest.approx(
            (known.success, known.turns), abs=1e-3
        )
    model = evaluate(run, "student", "sampled")
    assert model.setting["panel"]["deviations"] == [
        "the prompt is not the preset chat",
        "max_tokens is 2, not 64",
    ]
    again = load(tmp_path / "micro" / "config.yaml") if execute(run.config) else None
    assert again is not None and again.fingerprint == run.config.fingerprint
    assert execute(again).results[0].keys == result.keys, "a written configuration reads back"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"tasks": 5}}, r"evaluate\.tasks=5: the panel toy says 6; leave this out"),
        ({"evaluate": {"seed": 4}}, r"evaluate\.seed=4: the panel toy says 3"),
        ({"evaluate": {"split": "tune"}}, r"evaluate\.split='tune': the panel toy says 'valid_uns"),
        ({"env": {"id": "tests.toy:Corridor"}}, r"evaluate\.panel=.*environment: tests/Official"),
        (
            {"env": {"id": f"{HERE}:Official", "options": {"length": 7}}},
            "option length: 6 in the panel, 7 here",
        ),
        (
            {"env": {"id": f"{HERE}:Official", "max_turns": 4}},
            r"env\.max_turns: None in the panel, 4 here",
        ),
        ({"evaluate": {"panel": "nowhere"}}, "panel='nowhere': is neither a file"),
    ],
)
def test_what_contradicts_the_panel_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        a_run(tmp_path, a_panel(), **changes)
    assert "\n" not in str(error.value)


def test_what_agrees_with_the_panel_may_be_said(tmp_path: Path) -> None:
    said = {"tasks": 6, "seed": 3, "split": "report"}
    assert evaluate(a_run(tmp_path, a_panel(), evaluate=said), "expert", "-").episodes == 6
    said["split"] = "valid_unseen"
    assert evaluate(a_run(tmp_path, a_panel(), evaluate=said), "expert", "-").episodes == 6


def test_tuning_beside_a_panel_takes_what_the_tune_split_has(tmp_path: Path) -> None:
    config = a_run(tmp_path, a_panel(number=7)).config
    tuning = panel.for_tuning(config, Official())
    assert {task.split for task in tuning.tasks} == {"valid_seen"} and len(tuning.tasks) == 7
    alone = config.model_copy(update={"evaluate": EvaluateConfig(tasks=8)})
    with pytest.raises(ConfigError, match=r"evaluate\.tasks=8: split tune .* only 7"):
        panel.for_tuning(alone, Official())


def test_a_panel_says_where_tuning_tasks_come_from_and_keeps_its_own(tmp_path: Path) -> None:
    found = a_panel()
    config = a_run(tmp_path, found.model_copy(update={"tune": "train"})).config
    assert {task.split for task in panel.for_tuning(config, Official()).tasks} == {"train"}
    panel.save(found.model_copy(update={"tune": "report"}), tmp_path / "toy.json")
    with pytest.raises(ConfigError, match="6 of the tasks for tuning are the panel's own"):
        panel.for_tuning(config, Official())


# -- the command -----------------------------------------------------------------------------------


def test_panels_are_listed_and_shown() -> None:
    (found,) = [each for each in answer("panels") if each["name"] == "sokoban"]
    assert found["tasks"] == 200 and found["references"]["expert"]["success"] == 1.0
    row = next(line for line in call("panels").stdout.splitlines() if "sokoban" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:6] == ["report", "200", "100.0% (98 to 100)"]
    text = call("panels", "show", "sokoban").stdout
    assert "hash: " in text and "payload" not in text
    assert len(answer("panels", "show", "sokoban")["tasks"]) == 200
    assert "is neither a file" in refused(2, "panels", "show", "nowhere")


def test_a_panel_is_made_and_checked_by_the_command(tmp_path: Path) -> None:
    file = str(tmp_path / "mine.json")
    where = f"--option=data={tmp_path}"
    words = ["--env", f"{HERE}:Official", "--tasks", "5", "--seed", "2", "--note", "by hand"]
    made = answer("panels", "make", *words, "-o", file, where, "--option=length=6")
    assert (made["name"], made["tasks"], made["split"]) == ("mine", 5, "valid_unseen")
    assert made["options"] == {"length": 6} and made["notes"][-1] == "by hand"
    assert set(made["references"]) == {"expert", "random"}
    result = call("panels", "check", file, where)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "mine: ok")
    found = answer("panels", "check", file, "--tasks", "2", "--policy", "expert")
    assert found["ok"] and [each["status"] for each in found["references"]] == ["identical"]
    wrong = call("panels", "check", file, "--option", "length=7")
    assert wrong.exit_code == 1
    assert wrong.stdout.splitlines() == [
        "failed    option length: 6 in the panel, 7 here",
        "mine: FAILED",
    ]


def test_a_reference_that_is_not_reproduced_exits_with_1(tmp_path: Path) -> None:
    found = with_references(a_panel())
    expert = found.references["expert"]
    other = expert.model_copy(update={"digests": " ".join(reversed(expert.digests.split()))})
    changed = found.model_copy(update={"references": {**found.references, "expert": other}})
    panel.save(changed, tmp_path / "toy.json")
    result = call("panels", "check", str(tmp_path / "toy.json"), "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert not document["ok"]
    assert [each["status"] for each in document["references"]] == ["differs", "identical"]


def test_the_command_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    words = ["panels", "make", "--env", f"{HERE}:Official", "-o", str(tmp_path / "x.json")]
    assert "only 7 distinct tasks" in refused(2, *words, "--tasks", "8")
    assert "one of expert, random" in refused(2, *words, "--tasks", "5", "--policy", "nobody")
    other = [*words[:-1], str(tmp_path / "x.yaml")]
    assert "name the file NAME.json" in refused(2, *other, "--tasks", "5")
    assert not list(tmp_path.iterdir())
    panel.save(a_panel(Absent()), tmp_path / "absent.json")
    result = call("panels", "check", str(tmp_path / "absent.json"))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "failed    needs the games: get them"


def test_progress_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentdistill.cli import panels

    monkeypatch.setattr(panels, "EVERY", 0.0)
    result = call("panels", "check", "sokoban", "--tasks", "3", "--policy", "random")
    assert "random: 3/3, " in result.stderr and result.exit_code == 0


def test_a_panel_of_keys_finds_its_tasks_in_the_data(tmp_path: Path) -> None:
    """Where the content of a task may not be passed on."""
    whole = panel.make(Corridor(), "report", 4, seed=2, name="whole", target="tests.toy:Corridor")
    file = tmp_path / "bare.json"
    panel.save(panel.bare(whole), file)
    assert "goal" not in file.read_text().partition('"tasks"')[2]
    found = panel.load(file)
    assert found.hash == whole.hash
    assert panel.filled(found, Corridor()).tasks == whole.tasks
    assert panel.score(found, "expert").digests == panel.score(whole, "expert").digests
    with pytest.raises(ConfigError, match="of its 4 tasks are not in the data here"):
        panel.filled(found, Corridor(length=4))
