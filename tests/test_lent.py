"""Where a whole group fails, successes of a teacher take some places, by their text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentdistill.config import RunConfig, load
from agentdistill.contexts import lent
from agentdistill.errors import ConfigError
from agentdistill.policy import ExpertPolicy, Policy, RandomPolicy
from agentdistill.progress import detail
from agentdistill.providers import Providers
from agentdistill.recipe import execute, validate
from agentdistill.records import Trajectory
from agentdistill.run import Run
from agentdistill.table import build
from tests.templates import renderer
from tests.test_informed import play
from tests.test_training import timeless

TINY = {
    "hidden": 16,
    "heads": 1,
    "layers": 1,
    "tokenizer": {"vocabulary": 320, "episodes": 8},
}


def config(folder: Path, group: dict[str, Any], **changes: Any) -> RunConfig:
    stage = {
        "name": "rl", "model": "student", "teacher": "big", "method": "grpo", "tasks": 4,
        "samples": 4, "iterations": 3, "axes": {"group": group}, **changes,
    }  # fmt: skip
    api = {"kind": "api", "model": "openai/large", "base_url": "http://127.0.0.1:9/v1"}
    return load(
        {
            "output": str(folder),
            "env": {"id": "tests.toy:Corridor", "max_turns": 8},
            "prompt": "bare",
            "sampling": {"max_tokens": 2},
            "models": {"student": TINY, "big": api},
            "stages": [stage],
        }
    )


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whoever asks for the model behind an API gets the expert; the roles that were asked for."""
    roles: list[str] = []
    plain = Run.policy

    def policy(self: Run, name: str, sampling: Any = None, role: str = "student") -> Policy:
        if name != "big":
            return plain(self, name, sampling, role)
        roles.append(role)
        return ExpertPolicy(self.config.prompt.grammar)

    monkeypatch.setattr(Run, "policy", policy)
    monkeypatch.setattr("agentdistill.recipe._check_providers", lambda the_run: None)
    monkeypatch.setattr("agentdistill.probing.elsewhere", lambda config: [])
    return roles


def groups(config: RunConfig) -> list[list[Trajectory]]:
    """The stored episodes of the stage, four samples a group."""
    with Run(config) as the_run:
        episodes = the_run.episodes("rl")
    found: dict[str, list[Trajectory]] = {}
    for trajectory in episodes:
        found.setdefault(trajectory.group, []).append(trajectory)
    return list(found.values())


def test_failed_groups_are_lent_what_the_teacher_did(tmp_path: Path, teacher: list[str]) -> None:
    made = config(tmp_path, {"edit": "teacher", "replace": 2})
    execute(made)
    edited = 0
    for group in groups(made):
        given = [t for t in group if t.provenance.get("edit") == "teacher"]
        own = [t for t in group if t not in given]
        edited += bool(given)
        assert len(group) == 4 and sorted(t.sample for t in group) == [0, 1, 2, 3]
        assert len(given) in (0, 2) and all(t.success for t in given)
        assert any(t.success for t in own) != bool(given), "only groups in which nobody succeeded"
    assert edited and teacher == ["teacher"], "one policy, booked as the teacher's"
    lines = (made.path / "stages/rl/metrics.jsonl").read_text().splitlines()
    spent = json.loads(lines[-1])["total/env_steps"]
    assert spent > sum(t.env_steps for group in groups(made) for t in group), "tries are counted"
    assert any(json.loads(line).get("grad_norm", 0) > 0 for line in lines)


def test_an_iteration_says_what_was_spent(
    tmp_path: Path, teacher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paid = {"spent/calls": 1200, "spent/tokens": 34000, "spent/money": 0.25}
    monkeypatch.setattr(Providers, "spent", lambda self: paid)
    made = config(tmp_path, {"edit": "teacher"}, iterations=1)
    execute(made)
    (line,) = (made.path / "stages/rl/metrics.jsonl").read_text().splitlines()
    assert paid.items() <= json.loads(line).items()
    assert detail(0, json.loads(line)).endswith("1,200 calls, 34,000 tokens, money 0.2500")


def test_it_goes_on_to_the_same_weights(tmp_path: Path, teacher: list[str]) -> None:
    from safetensors.numpy import load_file

    weights = []
    for name in ("a", "b"):
        made = config(tmp_path / name, {"edit": "teacher"}, checkpoint_every=1)
        if name == "b":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("agentdistill.iteration.Training._update", _interrupted)
                execute(made)
        execute(made)
        weights.append(load_file(made.path / "stages/rl/model/model.safetensors"))
    one, two = weights
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    logs = [(tmp_path / name / "run/stages/rl/metrics.jsonl").read_text() for name in "ab"]
    one, two = ([timeless(json.loads(line)) for line in log.splitlines()] for log in logs)
    assert one == two


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_teacher_that_fails_leaves_the_group(
    tmp_path: Path, teacher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomPolicy, "choose", lambda self, episode: "stay")
    asking = Run.policy

    def policy(self: Run, name: str, *more: Any) -> Policy:
        return RandomPolicy("plain") if name == "big" else asking(self, name, *more)

    monkeypatch.setattr(Run, "policy", policy)
    made = config(tmp_path, {"edit": "teacher", "attempts": 1}, iterations=1)
    execute(made)
    assert not any("edit" in t.provenance for group in groups(made) for t in group)


def test_what_was_lent_has_rows_and_no_probabilities() -> None:
    mine = renderer()
    (played, *_), _ = play(mine)
    given = lent(played, mine)
    one, other = build([given]), build([played])
    assert one["token"].tolist() == other["token"].tolist()
    assert bool(one["logp/sampler"].isnan().all())
    assert given.derived_from == played.id and given.provenance["edit"] == "teacher"


def test_it_needs_a_teacher_and_groups(tmp_path: Path) -> None:
    for change, words in (
        ({"teacher": None}, "needs a teacher"),
        ({"samples": 1}, "at least 2 samples"),
        ({"method": "opd"}, "it answers in text only"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(config(tmp_path, {"edit": "teacher"}, **change))


def test_its_report_does_without_the_teacher_s_tokens(tmp_path: Path, teacher: list[str]) -> None:
    from agentdistill.report import report

    made = config(tmp_path, {"edit": "teacher"}, iterations=1)
    execute(made)
    assert report([made.path], tmp_path / "report.html", score=True).scored > 0
