"""Training goes on after any death as if nothing had happened, and is not done twice.

Every run is a forked child of this process, in which torch and transformers are imported already.
What two runs left behind is compared by :func:`traces`: weights, optimiser, task stream, commits,
metrics and evaluations, bit by bit; only clocks may differ.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentdistill import crash
from agentdistill.config import load
from agentdistill.recipe import execute
from agentdistill.store import Store
from tests.toy import micro

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TINY = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 10}}


def recipe(output: Path, **changes: Any) -> dict[str, Any]:
    """Every kind of stage, as small as can be."""
    stages = [
        {"name": "demos", "do": "collect", "episodes": 6, "batch": 3},
        {"name": "taught", "model": "teacher", "method": "sft", "data": "demos",
         "iterations": 5, "tasks": 4, "lr": 1e-2, "checkpoint_every": 2},
        {"name": "shown", "do": "collect", "policy": "taught", "episodes": 5, "batch": 3,
         "only_success": False},
        {"name": "back", "teacher": "taught", "guide": "shown", "method": "tcod-b2f-exact",
         "axes": {"start": {"eta": 1}}, "iterations": 4, "tasks": 2, "updates": 2,
         "checkpoint_every": 2, "schedule": "cosine", "warmup": 0.3},
        {"name": "rewarded", "init": "back", "method": "grpo", "iterations": 4, "tasks": 2,
         "samples": 4, "checkpoint_every": 1},
    ]  # fmt: skip
    values = {
        "models": {"teacher": TINY, "student": TINY},
        "env": {"id": "tests.toy:Corridor", "max_turns": 5},
        "sampling": {"max_tokens": 2},
        "stages": stages,
        "evaluate": {"policies": ["expert", "taught", "rewarded"], "tasks": 3},
    }
    return micro(output, **{**values, **changes})


# -- runs in children --------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """Start ``work`` in a child; it exits with 0, 130 after an interrupt, or 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
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


# -- what a run leaves behind -----------------------------------------------------------------------


def traces(run: Path) -> dict[str, Any]:
    """Everything that must not depend on how often a run died."""
    found: dict[str, Any] = {}
    older = [
        path for one in run.glob("stages/*/checkpoints") for path in sorted(one.iterdir())[:-1]
    ]
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if any(path.is_relative_to(checkpoint) for checkpoint in older):
            continue  # a death before the last pruning leaves one more
        if path.suffix == ".safetensors" or name.startswith(("evaluation/", "tokenizers/")):
            if path.is_file() and not name.endswith(".tmp"):
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
    """A run that nobody disturbed."""

    def __init__(self, output: Path) -> None:
        self.calls = output / "calls"
        reached = output / "reached"

        def work() -> None:
            os.environ[crash.VARIABLE] = "export:before-write:1"  # counts, and is never reached
            _count_calls(self.calls)
            execute(load(recipe(output)))
            reached.write_text(json.dumps(crash._reached))

        began = time.monotonic()
        assert wait(fork(work)) == 0
        self.seconds = time.monotonic() - began
        self.reached: dict[str, int] = json.loads(reached.read_text())
        self.traces = traces(output / "micro")


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what children need, and nothing that a fork would not survive."""
    import torch
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3

    import agentdistill.iteration  # noqa: F401

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


# -- deaths ---------------------------------------------------------------------------------------------


NEVER = {
    "checkpoint:replacing",
    "export:before-write",
    "export:before-rename",
    "export:after-rename",
}
"""Points that a run does not reach: no step is saved twice, nothing is exported."""

POINTS = [name for name in crash.POINTS + crash.RUN_POINTS if name not in NEVER]


def test_every_point_is_reached(reference: Reference) -> None:
    assert set(reference.reached) == set(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_point(tmp_path: Path, reference: Reference, point: str) -> None:
    """Again and again in the same run, each time a little later."""
    for count in (1, 2, 4, 7):
        code = finish(recipe(tmp_path), f"{point}:{count}")
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert count > 1
    assert finish(recipe(tmp_path)) == 0
    assert_same(tmp_path / "micro", reference.traces)
