"""A checkpoint is whole or not there, and reads back as it was saved."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentdistill.checkpoint import Checkpoints, load_state, save_state
from agentdistill.crash import VARIABLE
from agentdistill.errors import ConfigError, StoreError
from tests.store_worker import ROOT


def put(text: str):
    def write(directory: Path) -> None:
        (directory / "model").mkdir()
        (directory / "model" / "weights").write_text(text)
        (directory / "state").write_text(text[::-1])

    return write


def steps(checkpoints: Checkpoints) -> list[int]:
    return [step for step, _ in checkpoints.complete()]


def test_latest_is_what_was_saved_last_and_old_ones_go(run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (3, 9, 10, 100):
        path = checkpoints.save(step, write=put(f"weights {step}"))
        assert checkpoints.latest() == (step, path)
        assert (path / "model" / "weights").read_text() == f"weights {step}"
    assert steps(checkpoints) == [10, 100]
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["00000010", "00000100"]
    assert json.loads((path / "complete.json").read_text()) == {
        "step": 100,
        "files": {"model/weights": 11, "state": 11},
    }


def test_saving_a_step_again_replaces_it(run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir)
    for text in ("old", "new"):
        checkpoints.save(1, write=put(text))
    assert (run_dir / "00000001" / "state").read_text() == "wen"
    assert os.listdir(run_dir) == ["00000001"]


def test_rollback_removes_later_ones(run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, keep=5)
    for step in range(4):
        checkpoints.save(step, write=put("x"))
    checkpoints.rollback(1)
    assert steps(checkpoints) == [0, 1]
    checkpoints.rollback(-1)
    assert checkpoints.latest() is None


def damage_size(path: Path) -> None:
    (path / "state").write_text("longer than before")


@pytest.mark.parametrize(
    "damage",
    [
        damage_size,
        lambda path: (path / "model" / "weights").unlink(),
        lambda path: (path / "complete.json").unlink(),
        lambda path: (path / "complete.json").write_text('{"step": 2'),
        lambda path: (path / "complete.json").write_text('{"step": 1, "files": {}}'),
        lambda path: (path / "complete.json").write_text("[]"),
    ],
)
def test_incomplete_ones_are_ignored(run_dir: Path, damage) -> None:
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, write=put("one"))
    damage(checkpoints.save(2, write=put("two")))
    assert steps(checkpoints) == [1]
    assert steps(Checkpoints(run_dir, readonly=True)) == [1]
    checkpoints.save(2, write=put("two"))
    assert steps(checkpoints) == [1, 2]


def test_readonly_changes_nothing(run_dir: Path) -> None:
    (run_dir / ".00000001.tmp").mkdir()
    reader = Checkpoints(run_dir, readonly=True)
    assert reader.latest() is None
    assert Checkpoints(run_dir / "absent", readonly=True).latest() is None
    for act in (lambda: reader.save(1, write=put("x")), lambda: reader.rollback(0)):
        with pytest.raises(StoreError, match="reading only"):
            act()
    assert os.listdir(run_dir) == [".00000001.tmp"]
    Checkpoints(run_dir)
    assert os.listdir(run_dir) == []


def test_bad_arguments_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="keep=0"):
        Checkpoints(run_dir, keep=0)
    with pytest.raises(ConfigError, match="step=-1"):
        Checkpoints(run_dir).save(-1, write=put("x"))


# -- a disk that refuses ---------------------------------------------------------------------------


def full(directory: Path) -> None:
    (directory / "part").write_text("half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_fsync(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_leaves_what_was_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, write=put("one"))
    with pytest.raises(StoreError, match=r"00000002: No space left on device; free space"):
        checkpoints.save(2, write=full)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(2, write=lambda directory: 1 / 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_fsync)
        with pytest.raises(StoreError, match="check the disk"):
            checkpoints.save(1, write=put("two"))
    assert os.listdir(run_dir) == ["00000001"]
    assert (checkpoints.latest()[1] / "state").read_text() == "eno"


def test_a_failed_replacement_brings_the_old_one_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, write=put("one"))
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(StoreError, match="free space"):
            checkpoints.save(1, write=put("two"))
    assert os.listdir(run_dir) == ["00000001"]
    assert (checkpoints.latest()[1] / "state").read_text() == "eno"


def test_killed_while_replacing_the_only_one(run_dir: Path) -> None:
    code = f"""
from pathlib import Path
from agentdistill.checkpoint import Checkpoints
checkpoints = Checkpoints({str(run_dir)!r}, keep=1)
for text in ("old", "new"):
    checkpoints.save(1, write=lambda path: (path / "state").write_text(text))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, VARIABLE: "checkpoint:replacing:1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert (Checkpoints(run_dir, keep=1).latest()[1] / "state").read_text() == "old"
    assert os.listdir(run_dir) == ["00000001"]


# -- torch -----------------------------------------------------------------------------------------


def trained():
    """A small model with an optimiser and a scheduler that have taken a few steps."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    advance(model, optimizer, scheduler)
    return model, optimizer, scheduler


def advance(model, optimizer, scheduler) -> None:
    import torch

    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()
        scheduler.step()


def test_training_goes_on_as_if_never_stopped(run_dir: Path) -> None:
    import torch

    model, optimizer, scheduler = trained()
    generator = np.random.default_rng(7)
    state = {
        "weights": model.state_dict(),
        "numpy": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
        "counter": 3,
        "bank": [("skill", 0.1 + 0.2), {"seen": None}],
    }
    save_state(run_dir / "state.pt", optimizer, scheduler, state)
    advance(model, optimizer, scheduler)
    again, optimizer_again, scheduler_again = trained()
    advance(again, optimizer_again, scheduler_again)
    advance(again, optimizer_again, scheduler_again)
    assert not torch.equal(again.weight, model.weight)
    loaded = load_state(run_dir / "state.pt", optimizer_again, scheduler_again)
    again.load_state_dict(loaded["weights"])
    advance(again, optimizer_again, scheduler_again)
    assert torch.equal(again.weight, model.weight)
    assert scheduler_again.get_last_lr() == scheduler.get_last_lr()
    assert (loaded["counter"], loaded["bank"]) == (3, state["bank"])
    assert loaded["numpy"] == state["numpy"]
    assert torch.equal(loaded["torch"], state["torch"])


class Bandit:
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"ucb": [Bandit()]}, r"\['state'\]\['ucb'\]\[0\] is Bandit"),
        ({"rate": np.float64(0.5)}, r"\['rate'\] is float64"),
        ({"seen": {1, 2}}, r"\['seen'\] is set"),
        ({np.int64(1): 2}, r"a key of .*is int64"),
    ],
)
def test_state_that_would_not_load_is_refused(run_dir: Path, value: object, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        save_state(run_dir / "state.pt", state=value)
    assert os.listdir(run_dir) == []


def test_loading_what_is_not_ours(run_dir: Path) -> None:
    import torch

    path = run_dir / "state.pt"
    with pytest.raises(StoreError, match="No such file"):
        load_state(path)
    for content in (b"", b"garbage", b"PK\x03\x04" + b"\x00" * 30):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="use an older one"):
            load_state(path)
    torch.save(Bandit(), path)
    with pytest.raises(StoreError, match="use an older one"):
        load_state(path)
    torch.save({"optimizer": None}, path)
    with pytest.raises(StoreError, match="not written by save_state"):
        load_state(path)
    save_state(path, state=1)
    with pytest.raises(StoreError, match="saved without optimizer"):
        load_state(path, trained()[1])


def test_a_disk_that_refuses_torch_and_safetensors(run_dir: Path) -> None:
    import resource

    import torch
    from safetensors.torch import save_file

    tensors = {"w": torch.zeros(10_000)}
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(1, write=lambda path: save_state(path / "state.pt", state=tensors))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        for write in (
            lambda path: save_state(path / "state.pt", state=tensors),
            lambda path: torch.save(tensors, path / "state.pt"),
            lambda path: save_file(tensors, path / "model.safetensors"),
        ):
            with pytest.raises(StoreError, match=r"cannot use .*00000002.*; ") as caught:
                checkpoints.save(2, write=write)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(run_dir) == ["00000001"]
