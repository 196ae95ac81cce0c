"""Training goes on after any death as if nothing had happened, and is not done twice.

A run that dies is a forked child of this process, in which torch is imported and warm already. What
two runs left behind is compared by :func:`traces`: weights, optimiser, task stream, commits,
metrics and evaluations, bit by bit; only clocks may differ.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentdistill import crash, iteration
from agentdistill.callbacks import Callback
from agentdistill.config import load
from agentdistill.errors import ConfigError, EngineError, EnvError, StoreError
from agentdistill.recipe import execute
from agentdistill.run import Run
from agentdistill.store import Store
from tests.test_config import COMBINATIONS, combination, verdict
from tests.toy import Corridor, micro

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks with torch loaded")

TINY = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 10}}


def recipe(output: Path, **changes: Any) -> dict[str, Any]:
    """Every kind of stage, as small as can be."""
    stages = [
        {"name": "demos", "do": "collect", "episodes": 6, "batch": 3},
        {"name": "noise", "do": "collect", "policy": "random", "episodes": 4, "batch": 2},
        {"name": "taught", "model": "teacher", "method": "sft", "data": "demos",
         "iterations": 12, "tasks": 4, "lr": 2e-2, "checkpoint_every": 5},
        {"name": "shown", "do": "collect", "policy": "taught", "episodes": 5, "batch": 3,
         "only_success": False},
        {"name": "back", "teacher": "taught", "guide": "shown", "method": "tcod-b2f-exact",
         "axes": {"start": {"eta": 1}}, "iterations": 4, "tasks": 2, "updates": 2,
         "checkpoint_every": 2, "schedule": "cosine", "warmup": 0.3},
        {"name": "rewarded", "model": "teacher", "init": "taught", "method": "grpo",
         "env_steps": 121, "tasks": 2, "samples": 4, "lr": 1e-2, "checkpoint_every": 1,
         "schedule": "cosine"},
    ]  # fmt: skip
    values = {
        "models": {"teacher": TINY, "student": TINY},
        "env": {"id": "tests.toy:Corridor", "max_turns": 5},
        "sampling": {"max_tokens": 2},
        "stages": stages,
        "evaluate": {"policies": ["expert", "taught", "rewarded"], "tasks": 3},
    }
    return micro(output, **{**values, **changes})


# -- runs in children ------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """Start ``work`` in a child; it exits with 0, 130 after an interrupt, or 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        crash._reached.clear()
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(values: dict[str, Any], crash_at: str = "", calls: Path | None = None) -> int:
    """Start a run; ``calls`` gets a byte for every request to an engine."""

    def work() -> None:
        os.environ[crash.VARIABLE] = crash_at
        if calls is not None:
            _count_calls(calls)
        execute(load(values))

    return fork(work)


def finish(values: dict[str, Any], crash_at: str = "", calls: Path | None = None) -> int:
    return wait(start(values, crash_at, calls))


def _count_calls(path: Path) -> None:
    """Note every request to an engine in a way that survives SIGKILL."""
    from agentdistill.engines.hf import HFEngine

    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    generate = HFEngine.generate

    async def counted(self: HFEngine, *args: Any, **named: Any) -> Any:
        os.write(file, b".")
        return await generate(self, *args, **named)

    HFEngine.generate = counted  # type: ignore[method-assign]  (in a child of its own)


# -- what a run leaves behind ----------------------------------------------------------------------


def traces(run: Path) -> dict[str, Any]:
    """Everything that must not depend on how often a run died."""
    found: dict[str, Any] = {}
    # A death before the last pruning leaves one checkpoint more than there would be.
    checkpoints = [sorted(path.iterdir()) for path in run.glob("stages/*/checkpoints")]
    skipped = {path for paths in checkpoints for path in paths[:-1]}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if skipped & {*path.parents} or "/." in f"/{name}":
            continue
        if path.suffix == ".safetensors" or name.startswith(("evaluation/", "tokenizers/")):
            found[name] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "done.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.name == "state.pt":
            found[name] = _plain(path)
        elif path.name in ("config.yaml", "machine.json", "complete.json"):
            found[name] = "there"
    for stage in sorted((run / "stages").iterdir()):
        with Store(stage, readonly=True) as store:
            found[f"commits of {stage.name}"] = store.commits()
            report = store.report()
            strays = ("uncommitted", "corrupt_shards", "missing_shards")
            found[f"strays of {stage.name}"] = [report[key] for key in strays]
    strays = [*run.glob("stages/*/*/.*"), *run.glob("stages/*/.*.old")]
    assert not strays, "left over in shards or checkpoints"
    return found


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("seconds")}


def _plain(path: Path) -> Any:
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    return plain(torch.load(path, weights_only=True))


def assert_same(run: Path, wanted: dict[str, Any]) -> None:
    found = traces(run)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name] != wanted[name]]
    assert not different, [(name, found[name], wanted[name]) for name in different][:1]


class Reference:
    """A run that nobody disturbed, in this process; it leaves everything imported and warm."""

    def __init__(self, output: Path) -> None:
        crash._reached.clear()
        self.outcome = execute(load(recipe(output)))
        self.reached = dict(crash._reached)
        self.path = output / "micro"
        self.traces = traces(self.path)


@pytest.fixture(scope="module", autouse=True)
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(crash.VARIABLE, "export:before-write:1")  # points count, and none is deadly
        return Reference(tmp_path_factory.mktemp("reference"))


# -- deaths ----------------------------------------------------------------------------------------


POINTS = [
    name
    for name in crash.POINTS + crash.RUN_POINTS
    if name != "checkpoint:replacing" and not name.startswith("export:")
]
"""What a run reaches: no step is saved twice, and nothing is exported."""


def test_every_point_is_reached(reference: Reference) -> None:
    assert set(reference.reached) == set(POINTS)
    lines = metrics(reference.path.parent, "rewarded")
    assert max(line["grad_norm"] for line in lines) > 0, "the rewards teach nothing"


COUNTS = {
    "checkpoint:pruning": (1, 2),
    # In the middle of a stage, after its first checkpoint: once with data, once with a guide.
    "iteration:after-generate": (7, 10),
    "iteration:after-update": (8, 10),
    **{name: (1, 12) for name in POINTS if name.startswith("commit:")},
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_point(tmp_path: Path, reference: Reference, point: str) -> None:
    """Again and again in the same run, each time a little later."""
    for count in COUNTS.get(point, (1, 3)):
        assert finish(recipe(tmp_path), f"{point}:{count}") == -signal.SIGKILL
    assert finish(recipe(tmp_path)) == 0
    assert_same(tmp_path / "micro", reference.traces)


def test_killed_at_random(tmp_path: Path, reference: Reference) -> None:
    """Three times, wherever it is then."""
    rng = random.Random(11)
    stages = tmp_path / "micro" / "stages"
    for stage in ("taught", "back", "rewarded"):
        child = start(recipe(tmp_path))
        _until((stages / stage / "metrics.jsonl").exists)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert wait(child) in (-signal.SIGKILL, 0)
    assert finish(recipe(tmp_path)) == 0
    assert_same(tmp_path / "micro", reference.traces)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted(tmp_path: Path, reference: Reference, workers: int) -> None:
    """Ctrl-C, and the same command again."""
    values = recipe(tmp_path, workers=workers)
    child = start(values)
    _until((tmp_path / "micro" / "stages" / "back" / "metrics.jsonl").exists)
    os.kill(child, signal.SIGINT)
    assert wait(child) == 130
    assert finish(values) == 0
    assert_same(tmp_path / "micro", reference.traces)


def test_interrupted_and_repeated_in_the_same_process(tmp_path: Path, reference: Reference) -> None:
    """As in a notebook, where the traceback keeps everything of the first try alive."""

    class Impatient(Callback):
        def on_iteration(self, stage: Any, iteration: int, *_: Any) -> None:
            if (stage.name, iteration) == ("back", 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        execute(load(recipe(tmp_path)), [Impatient()])
    execute(load(recipe(tmp_path)))
    assert_same(tmp_path / "micro", reference.traces)
    assert kept.tb is not None


def test_inside_a_running_event_loop(tmp_path: Path, reference: Reference) -> None:
    """As a notebook has one: rollouts move to threads of their own."""

    async def cell() -> None:
        execute(load(recipe(tmp_path)))

    asyncio.run(cell())
    assert_same(tmp_path / "micro", reference.traces)


def test_killed_with_workers(tmp_path: Path, reference: Reference) -> None:
    """The workers of a parent that died end by themselves, and do not hold the run."""
    values = recipe(tmp_path, workers=2)
    child = start(values)
    _until((tmp_path / "micro" / "stages" / "back" / "metrics.jsonl").exists)
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    _until(lambda: _free(tmp_path / "micro" / "stages" / "back"))
    assert finish(values) == 0
    assert_same(tmp_path / "micro", reference.traces)


def test_a_worker_that_is_killed_stops_the_run(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out; the same command goes on."""
    crash._reached.clear()
    values = recipe(tmp_path, workers=2)
    with monkeypatch.context() as patch:
        patch.setenv(crash.VARIABLE, "iteration:after-update:3")  # only workers get there
        with pytest.raises(EngineError, match="a worker process was killed; repeat the command"):
            execute(load(values))
    execute(load(values))
    assert_same(tmp_path / "micro", reference.traces)


def _free(stage: Path) -> bool:
    try:
        Store(stage).close()
    except StoreError:
        return False
    return True


def test_killed_in_the_middle_of_a_tokenizer(tmp_path: Path, reference: Reference) -> None:
    """What it left of the folder is not taken for a tokenizer."""

    def work() -> None:
        from transformers import PreTrainedTokenizerFast

        save = PreTrainedTokenizerFast.save_pretrained

        def half(self: Any, folder: Path) -> None:
            save(self, folder)
            (Path(folder) / "tokenizer_config.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        PreTrainedTokenizerFast.save_pretrained = half  # type: ignore[method-assign]
        execute(load(recipe(tmp_path)))

    assert wait(fork(work)) == -signal.SIGKILL
    assert finish(recipe(tmp_path)) == 0
    assert_same(tmp_path / "micro", reference.traces)


# -- nothing is done twice -------------------------------------------------------------------------


PAID = (
    "iteration:after-generate:1",
    "iteration:after-update:2",
    "commit:before:2",
    "commit:torn:1",
)


def test_paid_rollouts_are_read_back(tmp_path: Path) -> None:
    """What was played before a death between two commits costs no request again."""
    asked, stage = [], recipe(tmp_path)["stages"][-1] | {"init": None, "checkpoint_every": 1}
    for points in ((), PAID):
        folder = tmp_path / str(len(points))
        folder.mkdir()
        values = recipe(folder, stages=[stage], evaluate={"policies": []})
        for point in points:
            assert finish(values, point, folder / "calls") == -signal.SIGKILL
        assert finish(values, calls=folder / "calls") == 0
        asked.append((folder / "calls").stat().st_size)
    assert asked[0] == asked[1] > 100
    assert_same(tmp_path / "4" / "micro", traces(tmp_path / "0" / "micro"))


def test_a_finished_run_is_only_read(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path: path.stat().st_mtime_ns for path in reference.path.rglob("*")}
    monkeypatch.setattr(iteration.Training, "run", None)
    monkeypatch.setattr("agentdistill.collection.collect", None)
    monkeypatch.setattr("agentdistill.recipe.evaluate", None)
    again = execute(load(recipe(reference.path.parent)))
    assert again == reference.outcome
    assert {path: path.stat().st_mtime_ns for path in reference.path.rglob("*")} == files


def test_finished_stages_are_not_run_again(tmp_path: Path, reference: Reference) -> None:
    """Only what is missing is done: here one stage and its evaluation."""
    shutil.copytree(reference.path, tmp_path / "micro")
    shutil.rmtree(tmp_path / "micro" / "stages" / "rewarded")
    (tmp_path / "micro" / "evaluation" / "rewarded-greedy.json").unlink()
    events = Events()
    execute(load(recipe(tmp_path)), [events])
    assert [(name, stage) for name, stage, *_ in events.seen if name != "iteration"] == [
        ("start", "rewarded"),
        ("end", "rewarded"),
    ]
    assert_same(tmp_path / "micro", reference.traces)


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_stage_start(self, stage: Any, folder: Path, iteration: int) -> None:
        self.seen.append(("start", stage.name, iteration))

    def on_iteration(self, stage: Any, iteration: int, metrics: Any, progress: float) -> None:
        self.seen.append(("iteration", stage.name, iteration))

    def on_stage_end(self, stage: Any, summary: Any) -> None:
        self.seen.append(("end", stage.name, summary))


def test_workers_change_nothing(tmp_path: Path, reference: Reference) -> None:
    """Also where two stages and several evaluations run side by side."""
    outcome = execute(load(recipe(tmp_path, workers=2)))
    assert_same(tmp_path / "micro", reference.traces)
    assert outcome.results == reference.outcome.results
    assert list(outcome.stages) == list(reference.outcome.stages)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sampling": {"max_tokens": 3}}, {"concurrency": 2}]
)
def test_another_configuration_in_the_same_folder_is_refused(
    reference: Reference, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"name='micro': .* another configuration"):
        execute(load(recipe(reference.path.parent, **change)))


# -- what a stage does -----------------------------------------------------------------------------


def test_the_curriculum_hands_over_earlier_and_earlier(reference: Reference) -> None:
    with Store(reference.path / "stages" / "back", readonly=True) as store:
        episodes = list(store.trajectories("back"))
    with Store(reference.path / "stages" / "shown", readonly=True) as store:
        guides = {t.task.key: t for t in store.trajectories("shown")}
    for t in episodes:
        guide = guides[t.task.key]
        replayed = max(0, min(len(guide.turns) - 1 - t.counter, len(guide.turns) - 1))
        assert len(t.start.actions) == replayed == len(t.turns) - len(t.acted)
        assert [turn.actions for turn in t.turns[:replayed]] == [
            turn.actions for turn in guide.turns[:replayed]
        ]
        assert not t.faults
    assert {t.counter for t in episodes} == {0, 1, 2, 3}
    totals = reference.outcome.stages["back"]
    assert totals["replayed_steps"] == sum(len(t.start.actions) for t in episodes) > 0
    assert totals["env_steps"] == sum(t.env_steps for t in episodes) > 0


def test_versions_of_weights_are_on_every_turn(tmp_path: Path, reference: Reference) -> None:
    with Store(reference.path / "stages" / "rewarded", readonly=True) as store:
        for t in store.trajectories():
            assert {turn.actor.version for turn in t.acted} == {t.provenance["iteration"]}


def test_groups_are_samples_of_one_task(reference: Reference) -> None:
    with Store(reference.path / "stages" / "rewarded", readonly=True) as store:
        episodes = list(store.trajectories())
    groups: dict[str, list[Any]] = {}
    for t in episodes:
        groups.setdefault(t.group, []).append(t)
    assert len(groups) == 8
    for members in groups.values():
        assert [t.sample for t in members] == [0, 1, 2, 3]
        assert len({t.task.key for t in members}) == 1
        assert len({t.turns[0].text for t in members}) > 1, "samples have seeds of their own"


def single(output: Path, stage: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe of one train stage that learns from the (untrained) teacher."""
    whole = {"name": "only", "teacher": "teacher", "iterations": 2, "tasks": 3, **stage}
    return recipe(output, stages=[whole], **{"evaluate": {"policies": []}, **changes})


def metrics(output: Path, stage: str = "only") -> list[dict[str, Any]]:
    text = (output / "micro" / "stages" / stage / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_too_many_faults_stop_a_stage_and_it_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = with_tokenizer(single(tmp_path, {"tasks": 6}))
    act = Corridor._advance

    def weak(self: Corridor, action: str) -> Any:
        if self._goal > 2:
            raise OSError("gone")
        return act(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(Corridor, "_advance", weak)
        with pytest.raises(EnvError, match=r"of 6 episodes .* max_fault_rate=0\.2.*OSError: gone"):
            execute(load(values))
    execute(load(values))
    assert len(metrics(tmp_path)) == 2


def with_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """Train the tokenizer now, on an environment that is still sound."""
    config = load(values)
    run = Run(config)
    run.prepare()
    run.tokenizer(config.models["student"])
    return values


@pytest.mark.parametrize("method", ["opd", "opd-exact", "grpo"])
def test_a_stage_survives_iterations_without_a_single_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Every episode breaks at once: counted, and nothing to learn from."""
    stage: dict[str, Any] = {"method": method, "max_fault_rate": 1.0, "samples": 2}
    if method == "grpo":
        stage["teacher"] = None
    values = with_tokenizer(single(tmp_path, stage))
    before = tiny_weights(values)
    monkeypatch.setattr(Corridor, "_begin", lambda self, task: 1 / 0)
    execute(load(values))
    for line in metrics(tmp_path):
        assert (line["faults"], line["episodes"], line["success"]) == (6, 0, None)
    assert tiny_weights(values, "only") == before


def tiny_weights(values: dict[str, Any], name: str = "student") -> list[Any]:
    return [p.tolist() for p in Run(load(values)).model(name).model.parameters()]


def test_streams_that_do_not_fit_are_counted_or_refused(tmp_path: Path) -> None:
    stage = {"iterations": 1, "tasks": 6}
    execute(load(single(tmp_path, stage)))
    with Store(tmp_path / "micro" / "stages" / "only", readonly=True) as store:
        lengths = sorted(len(t.streams[0]) for t in store.trajectories())
    limit = lengths[2]
    kept = sum(length <= limit for length in lengths)
    assert kept < 6
    execute(load(single(tmp_path / "b", {**stage, "max_length": limit})))
    (whole,), (part,) = metrics(tmp_path), metrics(tmp_path / "b")
    assert (whole["dropped_streams"], part["dropped_streams"]) == (0, 6 - kept)
    assert 0 < part["rows"] < whole["rows"]
    with pytest.raises(ConfigError, match=r"stages\.only\.max_length=8: .* longer than 8 tokens"):
        execute(load(single(tmp_path / "c", {**stage, "max_length": 8})))


def test_evaluation_while_training(tmp_path: Path) -> None:
    values = single(tmp_path, {"iterations": 4, "evaluate_every": 2})
    values["evaluate"] = {"policies": [], "tasks": 4}
    execute(load(values))
    lines = metrics(tmp_path)
    tuned = {"tune/sampled/success", "tune/greedy/optimal", "tune/greedy/invalid"}
    assert [tuned <= line.keys() for line in lines] == [False, True, False, True]
    values["evaluate"]["tasks"] = 50
    with pytest.raises(ConfigError, match=r"evaluate\.tasks=50"):
        execute(load(values | {"name": "other"}))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
def test_adapters_and_dropout_are_seeded(tmp_path: Path, reference: Reference) -> None:
    """What torch draws from its global generators comes from the run's seed, and only inside."""
    import torch

    folder = reference.path / "stages" / "taught" / "model"
    lora = {"rank": 2, "alpha": 4, "dropout": 0.3}
    student = {"kind": "local", "path": str(folder), "device": "cpu", "lora": lora}
    models = {
        "teacher": {"kind": "local", "path": str(folder), "device": "cpu"},
        "student": student,
    }
    stage = {"teacher": "teacher", "method": "opd-exact", "iterations": 3, "lr": 1e-2}
    stage |= {"checkpoint_every": 1}
    before = torch.random.get_rng_state()
    execute(load(single(tmp_path / "a", stage, models=models)))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(17)
    values = single(tmp_path / "b", stage, models=models)
    assert finish(values, "iteration:after-update:2") == -signal.SIGKILL
    execute(load(values))
    torch.random.set_rng_state(before)
    first = traces(tmp_path / "a" / "micro")
    assert "stages/only/model/adapter_model.safetensors" in first
    assert_same(tmp_path / "b" / "micro", first)


def test_every_combination_that_is_accepted_runs(tmp_path: Path) -> None:
    """One iteration at every point of the space that no constraint refuses."""
    accepted = [chosen for point in COMBINATIONS if verdict(chosen := combination(*point)) is None]
    overs = itertools.cycle(["token", "turn", "step", "stream", "trajectory", "group"])
    stages = [recipe(tmp_path)["stages"][0] | {"only_success": True}]
    for number, chosen in enumerate(accepted):
        fields = chosen.model_dump(exclude={"do", "name"}, exclude_unset=True)
        fields["axes"]["over"] = next(overs)
        teacher = "teacher" if fields.pop("teacher") else None
        stages.append({**fields, "name": f"point_{number}", "teacher": teacher, "tasks": 2})
    values = recipe(tmp_path, stages=stages, evaluate={"policies": []}, sampling={"max_tokens": 1})
    outcome = execute(load(values))
    assert len(outcome.stages) == 1 + len(accepted) > 50
    for number, chosen in enumerate(accepted):
        (line,) = metrics(tmp_path, f"point_{number}")
        assert line["rows"] > 0 and math.isfinite(line["grad_norm"]), chosen.axes
        moves = chosen.axes["signal"]["divergence"] != "none"
        assert line["grad_norm"] > 0 or not moves, chosen.axes


def test_iterations_are_counted_in_turns(tmp_path: Path) -> None:
    base = micro(tmp_path)
    demos, taught, distilled = base["stages"]
    distilled = {**distilled, "turns": 40, "iterations": 3}
    stages = [demos, taught, {**distilled, "name": "full"}]
    stages.append({**distilled, "name": "window", "method": "tcod-f2b"})
    guided = {"method": "tcod-b2f", "guide": "demos", "axes": {"start": {"horizon": "k"}}}
    stages.append({**distilled, "name": "back", **guided})
    stages.append({**distilled, "name": "group", "method": "grpo", "samples": 3, "teacher": None})
    execute(load({**base, "stages": stages, "evaluate": {"policies": []}}))
    for name in ("full", "window", "back", "group"):
        with Store(tmp_path / "micro" / "stages" / name, readonly=True) as store:
            found = list(store.trajectories(name, committed=True))
        for n in range(3):
            mine = [t for t in found if t.counter == n]
            acted = [len(t.acted) for t in mine]
            last = sum(acted[-3:] if name == "group" else acted[-1:])
            assert sum(acted) >= 40, "too few turns"
            assert sum(acted) - last < 40, "more episodes than needed"
            groups = [t.group for t in mine]
            assert len(set(groups)) == len(mine) // (3 if name == "group" else 1)
    with pytest.raises(ConfigError, match="recorded episodes are counted in tasks"):
        execute(load({**base, "stages": [demos, {**taught, "turns": 5}], "evaluate": {}}))


def test_turns_survive_a_crash(tmp_path: Path) -> None:
    def values(output: Path) -> dict[str, Any]:
        demos, taught, distilled = micro(output)["stages"]
        stages = [demos, {**taught, "iterations": 2}, {**distilled, "turns": 30}]
        return recipe(output, stages=stages, evaluate={"policies": []})

    assert finish(values(tmp_path / "whole")) == 0
    # Two iterations of "taught" count as well: these are the second and the fifth of "distilled".
    for count in (4, 3):
        crashed = finish(values(tmp_path / "torn"), f"iteration:after-generate:{count}")
        assert crashed == -signal.SIGKILL
    assert finish(values(tmp_path / "torn")) == 0
    assert_same(tmp_path / "torn" / "micro", traces(tmp_path / "whole" / "micro"))
