"""A killed run goes on as if nothing had happened, and nothing that it committed is lost."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from agentdistill import crash
from agentdistill.checkpoint import Checkpoints
from agentdistill.errors import ConfigError
from agentdistill.store import Store
from tests.store_worker import image, run, start

LENGTH = 4
STORE_POINTS = [name for name in crash.POINTS if name.startswith(("shard:", "commit:"))]
LATEST = {
    "checkpoint:before-write": -2,
    "checkpoint:before-complete": -2,
    "checkpoint:before-rename": -2,
    "checkpoint:after-rename": -1,
    "checkpoint:pruning": 1,
}
"""The latest checkpoint, relative to how often the point was reached (two are kept)."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[object]]:
    """Weights after each iteration, and the trajectories, of a run that nobody interrupts."""
    path = tmp_path_factory.mktemp("reference")
    run(path, LENGTH)
    with Store(path, readonly=True) as store:
        weights = [commit.info["weights"] for commit in store.commits("train")]
        return weights, image(store.trajectories())


def steps(store: Store) -> list[int]:
    return [commit.iteration for commit in store.commits("train")]


def crash_at(path: Path, point: str, count: int) -> None:
    with start(path, LENGTH, f"{point}:{count}") as process:
        assert process.wait() == -signal.SIGKILL, "the point was not reached"


def finish(path: Path, reference: tuple[list[str], list[object]]) -> None:
    """Go on to the end; it must look like a run that nobody interrupted."""
    weights, whole = reference
    assert run(path, LENGTH) == weights[-1]
    with Store(path, readonly=True) as store:
        assert steps(store) == list(range(LENGTH))
        assert image(store.trajectories(committed=None)) == whole
    step, latest = Checkpoints(path / "checkpoints", readonly=True).latest()
    assert (step, (latest / "weights").read_text()) == (LENGTH - 1, weights[-1])
    assert not [*path.rglob("*.tmp"), *path.rglob("*.old")]


@pytest.mark.parametrize("count", range(1, LENGTH))
@pytest.mark.parametrize("point", STORE_POINTS)
def test_at_every_point_of_the_store(
    run_dir: Path, reference: tuple[list[str], list[object]], point: str, count: int
) -> None:
    crash_at(run_dir, point, count)
    whole = reference[1]
    done = count if point == "commit:after" else count - 1
    with Store(run_dir, readonly=True) as store:
        assert steps(store) == list(range(done))
        assert image(store.trajectories()) == whole[: 2 * done]
        report = store.report()
        has_orphan = point in ("shard:after-rename", "commit:before", "commit:torn")
        assert report["uncommitted"] == 2 * has_orphan
        assert report["torn_lines"] == (point == "commit:torn")
        assert report["corrupt_shards"] == report["missing_shards"] == 0
        orphans = image(store.trajectories(committed=False))
        assert orphans == (whole[2 * done : 2 * done + 2] if has_orphan else [])
    finish(run_dir, reference)


@pytest.mark.parametrize("point", LATEST)
def test_at_every_point_of_a_checkpoint(
    run_dir: Path, reference: tuple[list[str], list[object]], point: str
) -> None:
    for count in (1, 2):
        path = run_dir / str(count)
        crash_at(path, point, count)
        checkpoints = Checkpoints(path / "checkpoints", readonly=True)
        latest = checkpoints.latest()
        assert len(checkpoints.complete()) <= 2
        step = count + LATEST[point]
        assert (latest[0] if latest else -1) == step
        assert latest is None or (latest[1] / "weights").read_text() == reference[0][step]
        finish(path, reference)


def test_killed_at_random(run_dir: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    for attempt in range(30):  # a busy machine gets longer, and needs more attempts
        with start(run_dir, 10_000) as process:
            assert process.stdout.readline() == b"begin\n"
            time.sleep(rng.uniform(0.02, 0.12) * (1 + attempt / 6))
            process.kill()
        with Store(run_dir, readonly=True) as store:
            found = steps(store)
            assert found == list(range(len(found)))
            assert len(list(store.trajectories())) == 2 * len(found)
        if attempt >= 5 and found:
            break
    assert found, "the kills came too early to test anything"
    iterations = len(found) + 5
    assert run(run_dir, iterations) == run(tmp_path / "reference", iterations)
    with Store(run_dir) as store, Store(tmp_path / "reference") as other:
        assert image(store.trajectories()) == image(other.trajectories())
        assert store.report()["corrupt_shards"] == 0


def test_misspelt_point_cannot_pass_for_a_survived_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"crash\.POINTS"):
        crash.crash_point("commit:never")
    for wanted in ("commit:befor:1", "commit:before", "commit:before:0", "x"):
        monkeypatch.setenv(crash.VARIABLE, wanted)
        with pytest.raises(ConfigError, match=crash.VARIABLE):
            crash.crash_point("commit:before")
