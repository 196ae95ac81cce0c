"""Methods as points of one space: each trains, any two compose or say why not, and all survive.

Everything happens on corridors. What all stages start from (demonstrations, a teacher, a student
that has begun to imitate random play, its recorded episodes) is trained once and copied.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill import crash
from agentdistill.callbacks import Callback
from agentdistill.config import Section, TrainStage, load
from agentdistill.engines.hf import HFEngine
from agentdistill.errors import ConfigError
from agentdistill.iteration import Training
from agentdistill.methods.constraints import CONSTRAINTS, check
from agentdistill.methods.index import METHODS, get
from agentdistill.methods.schedule import Controller
from agentdistill.methods.space import Axes, Method
from agentdistill.recipe import execute
from agentdistill.run import Run
from agentdistill.table import Table
from agentdistill.weights import sod, step_divergence
from tests.cli_calls import answer, call
from tests.test_training import fork, timeless, traces, wait
from tests.toy import micro

TINY = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 20}}
STAGES = [
    {"name": "demos", "do": "collect", "episodes": 16, "batch": 16},
    {"name": "noise", "do": "collect", "policy": "random", "episodes": 40, "batch": 40,
     "only_success": False},
    {"name": "taught", "model": "teacher", "method": "sft", "data": "demos", "iterations": 25,
     "tasks": 8, "lr": 2e-2},
    {"name": "before", "method": "sft", "data": "noise", "axes": {"only_success": False},
     "iterations": 12, "tasks": 16, "lr": 2e-2},
    {"name": "cache", "do": "collect", "policy": "before", "episodes": 12, "batch": 12,
     "only_success": False, "avoid_held_out": False},
]  # fmt: skip


def recipe(output: Path, *stages: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What every stage here starts from, and ``stages``."""
    values = {
        "env": {"id": "tests.toy:Corridor", "options": {"length": 5}, "max_turns": 5},
        "prompt": {"preset": "bare", "window": 0},
        "models": {"teacher": TINY, "student": TINY},
        "stages": [*STAGES, *stages],
        "evaluate": {"policies": []},
    }
    return micro(output, **{**values, **changes})


def stage_of(axes: Axes, /, **fields: Any) -> dict[str, Any]:
    """A stage that has everything that ``axes`` ask for."""
    chosen: dict[str, Any] = {"name": "one", "init": "before", "iterations": 2, "tasks": 4}
    chosen |= {"samples": 4, "lr": 1e-2, "checkpoint_every": 1}
    if axes.needs_teacher:
        chosen["teacher"] = "taught"
    if axes.actor in ("data", "mixed", "cached"):
        chosen["data"] = "cache" if axes.actor == "cached" else "demos"
    if axes.start.kind == "b2f" or axes.context.kind in ("gold", "actions", "demonstrations"):
        chosen["guide"] = "demos"
    return chosen | fields


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished stages that the others need."""
    output = tmp_path_factory.mktemp("ground")
    execute(load(recipe(output)))
    return output / "micro"


def grown(ground: Path, output: Path, stage: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe in ``output`` whose common stages are done already."""
    for part in ("stages", "tokenizers"):
        shutil.copytree(ground / part, output / "micro" / part)
    return recipe(output, stage, **changes)


def lines(output: Path, name: str = "one") -> list[dict[str, Any]]:
    text = (output / "micro" / "stages" / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def weights(output: Path, name: str = "one") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output / "micro" / "stages" / name / "model" / "model.safetensors")


def moved(output: Path) -> float:
    """Largest change of a weight since the start; NaN where one is not finite."""
    start, end = weights(output, "before"), weights(output)
    return max(float((end[name] - start[name]).abs().max()) for name in start)


# -- each alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(ground: Path, tmp_path: Path, name: str) -> None:
    method = get(name)
    fields = {"data": "cache"} if name == "redi" else {}  # successes and failures
    stage = stage_of(method.axes, method=name, iterations=3, tasks=6, **fields)
    execute(load(grown(ground, tmp_path, stage)))
    found = lines(tmp_path)
    assert [line["rows"] > 0 for line in found] == [True] * 3
    numbers = [v for line in found for k, v in line.items() if k.startswith(("loss/", "grad_norm"))]
    assert numbers and all(map(math.isfinite, numbers))
    assert math.isfinite(moved(tmp_path)) and moved(tmp_path) > 1e-5
    if method.axes.reward.kind == "grpo":
        assert min(line["zero_advantage_groups"] for line in found) < 1, "no reward taught anything"


def test_skills_train_in_locked_rooms(tmp_path: Path) -> None:
    """Where what is worth knowing belongs to the room, and only past episodes reveal it."""
    noise, before = STAGES[1], STAGES[3]
    stage = stage_of(get("skill-sd").axes, method="skill-sd", iterations=3, tasks=4)
    env = {"id": "agentdistill/Lockroom-v0", "options": {"containers": 2, "levers": 1, "rooms": 4}}
    values = recipe(tmp_path, env=env, sampling={"max_tokens": 4})
    execute(load({**values, "stages": [noise, before, stage]}))
    found = lines(tmp_path)
    assert [line["used_skills"] > 0 for line in found] == [False, True, True]
    assert all(line["without_note"] < line["episodes"] for line in found[1:])
    assert 1e-5 < moved(tmp_path) < 1


# -- any two ---------------------------------------------------------------------------------------


def leaves(values: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and "name" not in value and key != "schedules":
            yield from leaves(value, *path, key)
        else:
            yield (*path, key), value


NEUTRAL = dict(leaves(Axes().model_dump(by_alias=True)))


def choices(method: Method) -> dict[str, Any]:
    """What ``method`` chooses otherwise than the neutral point, as overrides."""
    found: dict[str, Any] = {}
    for path, value in leaves(method.axes.model_dump(by_alias=True)):
        if value != NEUTRAL[path] and ".".join(path) not in method.axes.schedules:
            place = found
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = value
    return found


def verdict(axes: Axes, stage: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
    """Name of the constraint that refuses the stage, None where nothing does."""
    config = load({**values, "stages": [*values["stages"], dict(stage)]})
    chosen = config.stage(stage["name"])
    assert isinstance(chosen, TrainStage)
    try:
        check(config, chosen, axes)
    except ConfigError as error:
        (name,) = [c.name for c in CONSTRAINTS if f" ({c.name}): {c.remedy}" in str(error)]
        return name
    return None


def test_choices_say_everything() -> None:
    for method in METHODS.values():
        assert get("opd").resolve(choices(method)) == method.resolve({})


CORE = (
    "tcod-f2b", "tcod-b2f", "grpo", "sod", "skill-sd", "gkd", "exopd", "opsd", "pi-distill", "sdpo",
    "rlsd", "kepo", "paced", "taid", "scope", "uni-opd",
)  # fmt: skip


@pytest.mark.parametrize(
    "run", [CORE, pytest.param(tuple(METHODS), marks=pytest.mark.slow)], ids=("core", "all")
)
def test_any_two_methods_compose_or_say_why_not(
    ground: Path, tmp_path: Path, run: tuple[str, ...]
) -> None:
    """The choices of one over those of the other; what is accepted runs an iteration."""
    values, points, refused = recipe(tmp_path), dict[str, dict[str, Any]](), set[str]()
    for one, two in itertools.combinations(METHODS, 2):
        overrides = choices(get(two))
        axes = get(one).resolve(overrides)
        if axes in (get(one).axes, get(two).axes):
            continue
        known = axes.model_dump_json()
        stage = stage_of(axes, name=f"point_{len(points)}", method=one, axes=overrides)
        stage |= {"tasks": 2, "samples": 2, "iterations": 1}
        broken = verdict(axes, stage, values)
        if broken is not None:
            refused.add(broken)
        elif {one, two} <= set(run):
            points.setdefault(known, stage)
    assert {"K3", "K8", "coupling", "weights", "shift", "edit", "episodes"} <= refused
    assert len(points) > 50
    for part in ("stages", "tokenizers"):
        shutil.copytree(ground / part, tmp_path / "micro" / part)
    values["stages"] += points.values()
    outcome = execute(load(values))
    assert len(outcome.stages) == len(STAGES) + len(points)
    for stage in points.values():
        (line,) = lines(tmp_path, stage["name"])
        told = (stage["method"], stage["axes"])
        axes = get(stage["method"]).resolve(stage["axes"])
        masked = bool(line.get("masked_contexts")) or axes.only_success
        masked = masked or any(signal.route for signal in axes.signals)
        masked = masked or axes.task.weight != "none"  # no task is between hopeless and solved
        assert line.get("rows", 0) > 0 or masked, told
        assert math.isfinite(line.get("grad_norm", 0.0)), told


GRPO = {"kind": "grpo", "source": "score"}
SOD = {"step": "sod"}
COMPOSED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "b2f and sod": ("sod", {"start": {"kind": "b2f", "eta": 1}}, {"policy_gradient"}),
    "f2b and sod": ("sod", {"start": {"kind": "f2b"}, "over": "turn"}, {"policy_gradient"}),
    "f2b and skill-sd": ("skill-sd", {"start": {"kind": "f2b"}}, {"policy_gradient", "rho_k3"}),
    "b2f and skill-sd": (
        "skill-sd",
        {"start": {"kind": "b2f", "eta": 1}},
        {"policy_gradient", "rho_k3"},
    ),
    "sod and skill-sd": ("skill-sd", {"weight": SOD}, {"policy_gradient", "rho_k3"}),
    "f2b and gkd": (
        "tcod-f2b",
        {"signal": {"divergence": "jsd", "coupling": "loss", "beta": 0.9}},
        {"jsd"},
    ),
    "b2f and gkd": (
        "tcod-b2f",
        {"signal": {"divergence": "jsd", "coupling": "loss", "beta": 0.1}},
        {"jsd"},
    ),
    "sod and exopd": ("exopd", {"weight": SOD, "reward": {"kind": "grpo"}}, {"policy_gradient"}),
    "sdpo and paced": ("sdpo", {"task": {"weight": "pass_rate"}}, {"jsd"}),
    "opsd and taid": (
        "opsd",
        {"signal": {"share": {"from": 0.4, "to": 1, "shape": "taid"}, "rest": "student"}},
        {"jsd"},
    ),
    "rlad and uni-opd": ("rlad", {"weight": {"shift": "margin"}}, {"policy_gradient"}),
    "pi-distill and a curriculum": (
        "pi-distill",
        {"start": {"kind": "b2f", "eta": 1}, "informed_share": 0.5, "signal": {"coef": 0.1}},
        {"policy_gradient", "policy_gradient/informed"},
    ),
    "skill-sd with hints": (
        "kepo",
        {"context": {"kind": "skill"}, "signal": {"route": "success"}},
        {"policy_gradient", "jsd"},
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_published_methods_compose(ground: Path, tmp_path: Path, name: str) -> None:
    method, overrides, terms = COMPOSED[name]
    axes = get(method).resolve(overrides)
    stage = stage_of(axes, method=method, axes=overrides, iterations=4, tasks=6)
    execute(load(grown(ground, tmp_path, stage)))
    found = lines(tmp_path)
    losses = {key.removeprefix("loss/") for key in found[-1] if key.startswith("loss/")}
    assert losses == terms
    assert all(math.isfinite(line["grad_norm"]) for line in found)
    assert math.isfinite(moved(tmp_path)) and moved(tmp_path) > 1e-5
    if axes.start.kind == "f2b":
        assert [line["turns"] <= 1 + n // 2 for n, line in enumerate(found)] == [True] * 4
    if axes.start.kind == "b2f":
        assert found[0]["total/replayed_steps"] > 0


def scored(
    ground: Path, output: Path, stage: Mapping[str, Any], iterations: int = 1
) -> tuple[Axes, Table]:
    """The point of a stage and its table in the iteration after so many others."""
    config = load(grown(ground, output, stage))
    chosen = config.stage("one")
    assert isinstance(chosen, TrainStage)
    with Run(config) as the_run:
        training = Training(the_run, chosen, Callback())
        with training.store:
            for n in range(iterations):
                training._iterate(n)
            training.judges.before(iterations)
            trajectories, _ = training.experience.of(iterations)
            return training.axes, training._scored(trajectories, training.axes, iterations, {})[0]


def test_sod_weighs_by_the_scorer_with_the_skill(ground: Path, tmp_path: Path) -> None:
    """Steps are compared with what the self said that had read the skill."""
    overrides = {"weight": SOD}
    axes = get("skill-sd").resolve(overrides)
    stage = stage_of(axes, method="skill-sd", axes=overrides, tasks=8)
    _, table = scored(ground, tmp_path, stage)
    told = table["rows/signals"]
    assert bool(told.any()) and "logp/teacher" not in table.columns
    old, teacher = table["logp/old"], table["logp/teacher@context"]
    assert bool((old - teacher)[told].abs().max() > 1e-4)
    place = table.index["trajectory"], table.units("step"), told
    expected = sod(step_divergence(old, teacher, *place[1:]), *place, delta=0.2, eps=1e-6)
    assert torch.equal(table["weight/step"][told], expected[told])
    assert not bool(table["weight/step"][~told].any())
    assert float(expected[told].std()) > 0


def test_sod_weighs_the_extrapolated_signal_beside_the_reward(ground: Path, tmp_path: Path) -> None:
    """A = A_grpo + w (1.25 log T - 0.25 log base - log old)."""
    name, overrides, _ = COMPOSED["sod and exopd"]
    stage = stage_of(get(name).resolve(overrides), method=name, axes=overrides, tasks=8)
    _, table = scored(ground, tmp_path, stage)
    target = 1.25 * table["logp/teacher"] - 0.25 * table["logp/base"]
    signal = table["weight/step"] * (target - table["logp/old"])
    rest = (table["advantage"] - signal)[table.acted]
    per_episode = [rest[table.index["trajectory"][table.acted] == b] for b in range(32)]
    assert all(float(part.max() - part.min()) < 1e-4 for part in per_episode), "not the reward's"
    assert float(rest.abs().max()) > 0.1, "no reward"
    assert float(signal[table.acted].abs().max()) > 0.01, "no signal"


def test_replayed_turns_teach_nothing_and_begin_no_step(ground: Path, tmp_path: Path) -> None:
    overrides = {"start": {"kind": "b2f", "eta": 3}}
    stage = stage_of(get("sod").resolve(overrides), method="sod", axes=overrides)
    _, table = scored(ground, tmp_path, stage, iterations=0)
    assert any(t.start.actions for t in table.trajectories)
    for number, trajectory in enumerate(table.trajectories):
        mine = table.index["trajectory"] == number
        replayed = len(trajectory.turns) - len(trajectory.acted)
        turns = table.index["turn"][mine & table["rows/signals"]]
        assert int(turns.min()) == replayed
        first = table["weight/step"][mine & (table.index["turn"] == replayed)]
        assert bool((first == 1).all())


# -- the student's prompt --------------------------------------------------------------------------


def prompts(
    ground: Path, output: Path, method: str, monkeypatch: pytest.MonkeyPatch, **context: str
) -> tuple[list[tuple[int, ...]], list[dict[str, Any]]]:
    """Every prompt in rollouts and evaluation of a stage that learns next to nothing, in order."""
    seen: list[tuple[int, ...]] = []
    generate = HFEngine.generate

    async def heard(self: HFEngine, ids: Any, *rest: Any, **named: Any) -> Any:
        seen.append(tuple(map(int, ids)))
        return await generate(self, ids, *rest, **named)

    axes = {"task": {"weight": "none"}, "group": {"edit": "none"}, "context": context}
    stage = stage_of(get(method).axes, method=method, axes=axes, lr=1e-12, iterations=3, tasks=6)
    values = grown(ground, output, stage, evaluate={"policies": ["one"], "tasks": 4})
    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "generate", heard)
        execute(load(values))
    return sorted(seen), lines(output)


@pytest.fixture(scope="module")
def uninformed(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, ...]]:
    """The prompts where nobody reads a context."""
    output = tmp_path_factory.mktemp("uninformed")
    return prompts(ground, output, "grpo", pytest.MonkeyPatch())[0]


@pytest.mark.parametrize("method", ["skill-sd", "sdpo"])
def test_a_context_of_the_scorer_never_reaches_the_student(
    ground: Path,
    tmp_path: Path,
    uninformed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    seen, found = prompts(ground, tmp_path, method, monkeypatch)
    assert seen == uninformed and len(seen) > 100
    assert found[-1]["without_note"] < found[-1]["episodes"], "nobody had a note"


@pytest.mark.parametrize("method", ["opsd", "pi-opsd", "rlsd"])
def test_a_demonstration_for_the_scorer_never_reaches_the_student(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Beside it, the same tasks and a note that says nothing; every task has a demonstration."""
    (tmp_path / "empty").mkdir()
    seen, found = prompts(ground, tmp_path, method, monkeypatch)
    silent, _ = prompts(ground, tmp_path / "empty", method, monkeypatch, control="empty")
    assert seen == silent and len(seen) > 100
    assert [line["without_note"] for line in found] == [0] * len(found)


def test_an_informed_actor_does_read_it(
    ground: Path,
    tmp_path: Path,
    uninformed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other side of the test above."""
    seen, _ = prompts(ground, tmp_path, "pi-distill", monkeypatch)
    assert max(map(len, seen)) > max(map(len, uninformed)) + 10


# -- deaths ----------------------------------------------------------------------------------------


STATEFUL: dict[str, tuple[dict[str, Any], str]] = {
    "skill-sd": ({}, "judges.skills.skills"),
    "sdpo": ({}, "judges.teacher.weights"),
    "taid": ({}, "schedules.signal.share.loss"),
    "paced": ({}, "pass_rates"),
    "gkd": ({"iterations": 6}, "totals.env_steps"),
    "lightning-opd": ({}, "judges.teacher.identity"),
    "kepo": ({"axes": {"group": {"replace": 1, "attempts": 2}}}, "totals.env_steps"),
    "pi-distill": ({}, "schedules.informed_share"),
    "informed by skills": (
        {"method": "pi-distill", "axes": {"context": {"kind": "skill"}}},
        "judges.skills.skills",
    ),
}
"""Methods that remember something between iterations: changes of the stage, and what it is."""

ORDER = (
    "shard:before-write",
    "shard:before-rename",
    "shard:after-rename",
    "iteration:after-generate",
    "iteration:after-update",
    "commit:before",
    "commit:torn",
    "commit:after",
    "checkpoint:before-write",
    "checkpoint:before-complete",
    "checkpoint:before-rename",
    "checkpoint:after-rename",
    "checkpoint:pruning",
    "file:before-write",
    "file:before-rename",
    "file:after-rename",
)
"""As a run that dies at one after the other still reaches the next one."""

SOME = (*(p for p in ORDER if p.startswith(("iteration", "commit"))), "checkpoint:after-rename")
"""Where what is remembered is ahead of the checkpoint, or just in it."""


def test_no_point_is_forgotten() -> None:
    """No step is saved twice, and nothing is exported here."""
    passed = {"checkpoint:replacing", *(p for p in crash.POINTS if p.startswith("export:"))}
    assert set(ORDER) == {*crash.POINTS, *crash.RUN_POINTS} - passed


def at(values: Any, path: str) -> Any:
    """The part of a state at a dotted path, of which names may have dots themselves."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if path == key:
            return value
        if path.startswith(f"{key}."):
            return at(value, path.removeprefix(f"{key}."))
    raise KeyError(path)


def unpaid(found: dict[str, Any]) -> dict[str, Any]:
    """``found`` without what scoring cost: scores on disk survive a death."""
    text = json.dumps(found["stages/one/metrics.jsonl"])
    state = found[next(name for name in found if "one/checkpoints" in name and "state.pt" in name)]
    cost = {state["state"]["totals"].pop("scored_tokens")}
    kept = {k: v for k, v in found.items() if k.startswith("stages/one") and "done.json" not in k}
    lines = [{k: v for k, v in line.items() if "scored" not in k} for line in json.loads(text)]
    assert cost
    return {**kept, "stages/one/metrics.jsonl": lines}


@pytest.mark.skipif(sys.platform != "linux", reason="forks with torch loaded")
@pytest.mark.parametrize("name", STATEFUL)
def test_killed_at_every_point(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever a method remembers is as if nothing had happened."""
    fields, state = STATEFUL[name]
    method = fields.get("method", name)
    axes = get(method).resolve(fields.get("axes", {}))
    stage = stage_of(
        axes, **{"method": method, "iterations": 4, "tasks": 3, "samples": 2, **fields}
    )
    calm, torn = tmp_path / "calm", tmp_path / "torn"
    with monkeypatch.context() as patch:
        patch.setenv(crash.VARIABLE, "export:before-write:1")  # points count, and none is deadly
        crash._reached.clear()
        execute(load(grown(ground, calm, stage)))
        reached = dict(crash._reached)
    wanted = traces(calm / "micro")
    (checkpoint,) = [k for k in wanted if "one/checkpoints" in k and k.endswith("state.pt")]
    assert at(wanted[checkpoint]["state"], state), "nothing is remembered"
    values = grown(ground, torn, stage)
    points = [p for p in (ORDER if name == "skill-sd" else SOME) if reached.get(p)]
    assert len(points) == (3 if axes.actor == "cached" else 16 if name == "skill-sd" else 6)
    for number, point in enumerate(points):
        count = 2 if number == 0 else 1  # at first after a checkpoint, later wherever it is then
        assert _killed_at(values, f"{point}:{count}") == -signal.SIGKILL, point
    assert _killed_at(values, "") == 0
    found = traces(torn / "micro")
    if axes.scorer.stored:
        found, wanted = unpaid(found), unpaid(wanted)
    found.pop("config.yaml", None), wanted.pop("config.yaml", None)
    different = [key for key in wanted if found.get(key) != wanted[key]]
    assert found.keys() == wanted.keys() and not different, different


def _killed_at(values: dict[str, Any], point: str) -> int:
    """Exit code of a child that runs the stage until it dies there."""

    def work() -> None:
        os.environ[crash.VARIABLE] = point
        execute(load(values))

    return wait(fork(work))


# -- the command line ------------------------------------------------------------------------------


def test_methods_are_listed_with_what_they_need() -> None:
    found = answer("methods")
    assert [method["name"] for method in found] == list(METHODS)
    printed = call("methods").stdout
    for method in found:
        assert f"| {method['name']} " in printed
        assert {need["key"] for need in method["needs"]} <= {"teacher", "data", "guide", "samples"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_shown_and_compared(name: str) -> None:
    shown = answer("methods", "show", name)
    assert Axes.model_validate(shown["axes"]) == METHODS[name].axes
    assert yaml.safe_load(call("methods", "show", name).stdout)["axes"] == shown["axes"]
    found = answer("methods", "diff", "opd", name)
    assert (found == {}) == (name == "opd")
    for key, (before, after) in found.items():
        assert before != after, key
        assert json.dumps(after) in call("methods", "diff", "opd", name).stdout, key


# -- any number may move ---------------------------------------------------------------------------


def numbers(section: type[Section] = Axes, path: str = "") -> Iterator[tuple[str, type, Any, Any]]:
    """(dotted key, int or float, least, most) of every number below ``section``."""
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            if kind.__name__ not in ("Choice", "Schedule"):
                yield from numbers(kind, f"{path}{key}.")
            continue
        options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        kinds = [one for one in options if one in (int, float)]
        limits = itertools.product(field.metadata, ("ge", "gt", "le"))
        bounds = {name: getattr(one, name) for one, name in limits if hasattr(one, name)}
        if get_origin(kind) is Literal and all(type(v) is int for v in get_args(kind)):
            yield f"{path}{key}", int, min(get_args(kind)), max(get_args(kind))
        elif kinds:
            least = bounds["gt"] + 1e-3 if "gt" in bounds else bounds.get("ge", -9.0)
            yield f"{path}{key}", kinds[0], least, bounds.get("le", max(least, 0) + 9)


NUMBERS = {key: (kind, least, most) for key, kind, least, most in numbers()}


def test_the_numbers_are_found() -> None:
    assert {"signal.coef", "signal.top_k", "start.eta", "reward.ddof", "informed_share"} <= set(
        NUMBERS
    )
    assert len(NUMBERS) > 25 and "shared" not in NUMBERS and "scorer.stored" not in NUMBERS


@settings(max_examples=15)
@given(st.data(), st.sampled_from(["linear", "cosine", "step", "taid"]), st.floats(0.1, 1))
@pytest.mark.parametrize("key", NUMBERS)
def test_any_number_can_be_a_schedule(key: str, data: Any, shape: str, over: float) -> None:
    kind, least, most = NUMBERS[key]
    one = st.integers(least, int(most)) if kind is int else st.floats(least, most)
    start, end = data.draw(one), data.draw(one)
    change: Any = {"from": start, "to": end, "over": over, "shape": shape}
    for part in reversed(key.split(".")):
        change = {part: change}
    axes = get("opd").resolve(change)
    control = Controller(axes.schedules[key])
    for progress in (0.0, over / 2, 1.0):
        now = axes.at({key: control.value(progress)})
        value = at(now.model_dump(), key)
        assert type(value) is kind and min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
        wanted = {0.0: start, 1.0: end}.get(progress, value)
        assert value == pytest.approx(wanted)
        before, after = (dict(leaves(a.model_dump())) for a in (get("opd").axes, now))
        assert {".".join(k) for k in after if after[k] != before[k]} <= {key, "schedules"}


SCHEDULED: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "signal.coef": ("opd-exact", {}, 1.0, 0.0),
    "weight.step.delta": ("sod", {}, 0.2, 5.0),
    "start.turns": ("opd", {"start": {"kind": "fixed"}}, 1, 5),
    "start.k_start": ("tcod-f2b", {}, 1, 4),
    "scorer.rate": ("sdpo", {"context": {"kind": "gold"}}, 0.001, 1.0),
    "scorer.every": ("skill-sd", {"context": {"kind": "gold"}, "signal": {"coef": 1}}, 9, 1),
    "context.k": ("opsd", {"context": {"kind": "demonstrations"}}, 1, 3),
    "student_share": ("gkd", {}, 1.0, 0.0),
    "signal.share": ("exopd", {}, 1.0, 1.5),
    "task.b": ("paced", {}, 0.0, 3.0),
}


@pytest.mark.parametrize("key", SCHEDULED)
def test_a_schedule_acts_from_the_iteration_on_in_which_it_moves(
    ground: Path, tmp_path: Path, key: str
) -> None:
    """Until then everything is as without it; afterwards it is not."""
    method, overrides, start, end = SCHEDULED[key]
    found = []
    moves = {"from": start, "to": end, "shape": "step", "over": 0.5}
    for number, value in enumerate((start, moves)):
        axes = json.loads(json.dumps(overrides))
        place = axes
        for part in key.split(".")[:-1]:
            place = place.setdefault(part, {})
        place[key.rpartition(".")[2]] = value
        stage = stage_of(get(method).resolve(axes), method=method, axes=axes, iterations=4, tasks=5)
        execute(load(grown(ground, tmp_path / str(number), stage)))
        kept = [timeless(line) for line in lines(tmp_path / str(number))]
        other = ("schedule", "total/scored")  # a base is scored as soon as it may be needed
        found.append([{k: v for k, v in line.items() if not k.startswith(other)} for line in kept])
    constant, moving = found
    for one, two in zip(moving[:2], constant[:2], strict=True):
        assert one == two, [k for k in one if one[k] != two.get(k)]
    assert moving[2:] != constant[2:]
