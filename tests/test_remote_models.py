"""Models on servers in whole runs: sampled from, scored, probed, refused; nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agentdistill import probing
from agentdistill.callbacks import Callback
from agentdistill.config import load
from agentdistill.engines.base import Capabilities, Sample
from agentdistill.engines.hf import HFEngine
from agentdistill.engines.probing import by_text
from agentdistill.errors import ConfigError, EngineError
from agentdistill.methods import needs
from agentdistill.methods.index import METHODS, get
from agentdistill.recipe import execute, validate
from agentdistill.rehearsal import rehearse
from agentdistill.rollout import run as wait
from agentdistill.run import Run
from agentdistill.table import build
from agentdistill.teachers.remote import RemoteScorer
from agentdistill.teachers.scorer import LocalScorer
from tests.cli_calls import answer, call, refused
from tests.toy import micro
from tests.vllm_double import Double, Living

TOP = {"divergence": "forward_kl", "coupling": "loss", "support": "teacher", "top_k": 6}


@dataclass
class School:
    """A run with a taught teacher, and both models behind vLLM's protocol."""

    config: Any
    teacher: Path
    frozen: Double
    student: Double
    followed: Living

    def remote(self, output: Path, signal: Any = None, **changes: Any) -> dict[str, Any]:
        teacher = {"kind": "vllm", "base_url": self.frozen.url, "tokenizer": str(self.teacher)}
        student = micro(output)["models"]["student"]
        server = {"base_url": self.student.url, "folder": str(output / "shared")}
        stage = {"name": "distilled", "teacher": "teacher", "method": "opd", "iterations": 3}
        stage |= {"tasks": 3, "lr": 1e-2, "axes": {"signal": signal} if signal else {}}
        return micro(
            output,
            models={"teacher": teacher, "student": {**student, "server": server}},
            stages=[{**stage, **changes}],
            evaluate={"policies": ["teacher", "distilled"], "tasks": 2},
        )


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    output = tmp_path_factory.mktemp("school")
    config = load(micro(output, evaluate={}))
    execute(config, only=["taught"])
    with Run(config) as the_run:
        taught, student = the_run.model("taught"), the_run.model("student")
        with (
            Double(Living(taught.model, taught.tokenizer)) as frozen,
            Double(followed := Living(student.model, student.tokenizer)) as drawn,
        ):
            folder = config.path / "stages" / "taught" / "model"
            yield School(config, folder, frozen, drawn, followed)


class Heard(Callback):
    """What was found out, and the metrics."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.metrics: list[Any] = []

    def on_probe(self, lines: Any) -> None:
        self.lines += lines

    def on_iteration(self, stage: Any, iteration: int, metrics: Any, progress: float) -> None:
        self.metrics.append(metrics)


def test_a_run_whose_rollouts_and_scores_come_from_servers(school: School, tmp_path: Path) -> None:
    before = len(school.followed.reloads)
    config, heard = load(school.remote(tmp_path, TOP)), Heard()
    outcome = execute(config, [heard])
    assert not any(result.faults for result in outcome.results)
    assert [line.split(" ")[0] for line in heard.lines] == ["teacher", "student"]
    found = json.loads((config.path / "probe.json").read_text())
    assert [each["able"]["sampled"] for each in found] == [True, True]
    # The probe, three iterations, and each evaluation's own engine (two modes).
    assert len(school.followed.reloads) - before == 6
    assert not list((tmp_path / "shared").iterdir())
    with Run(config) as the_run:
        episodes = the_run.episodes("distilled")
        for name, versions in (("student", {0}), ("distilled", set())):
            model = the_run.model(name).model
            table = build(episodes)
            LocalScorer("now", model).score(table)
            gap = (table["logp/now"] - table["logp/sampler"]).abs()
            near = {
                t.turns[0].actor.version
                for number, t in enumerate(episodes)
                if float(gap[table.index["trajectory"] == number].max()) < 1e-4
            }
            assert near == versions  # each iteration was drawn with its own weights
    assert {t.turns[0].actor.version for t in episodes} == {0, 1, 2}


def test_a_remote_scorer_says_what_a_local_one_says(school: School, tmp_path: Path) -> None:
    """One request a stream; the columns, and what a divergence makes of them."""
    config = load(school.remote(tmp_path))
    with Run(school.config) as the_run, Run(config) as other:
        teacher, voice = the_run.model("taught"), other.voice("teacher")
        execute(load(micro(tmp_path / "demos", evaluate={})), only=["demos"])
        config = load(micro(tmp_path / "demos", evaluate={}))
        from agentdistill.render import materialise

        with Run(config) as third:
            played = third.episodes("demos")
        table = build([materialise(t, teacher.renderer) for t in played])
    size = teacher.engine._vocabulary
    remote, here = RemoteScorer("r", voice.engine, size, 6), LocalScorer("h", teacher.model)
    asked = len(school.frozen.asked)
    tokens = [scorer.score(table, ["logp", "hidden"]) for scorer in (remote, here)]
    assert tokens[0] == tokens[1]
    paths = [path for path, _ in school.frozen.asked[asked:]]
    assert paths.count("/v1/completions") == len(table.streams)
    assert float((table["logp/r"] - table["logp/h"]).abs().max()) < 1e-4
    from agentdistill.divergence import teacher_topk_forward_kl

    student = torch.randn(len(table), size, generator=torch.Generator().manual_seed(0))
    student.requires_grad_(True)
    values, slopes = [], []
    for scorer in (remote, here):
        logits = scorer.head(table[f"hidden/{scorer.name}"])
        loss = teacher_topk_forward_kl(student, logits, 6)
        values.append(loss)
        slopes.append(torch.autograd.grad(loss.sum(), student)[0])
    assert torch.allclose(values[0], values[1], atol=1e-4)
    assert torch.allclose(slopes[0], slopes[1], atol=1e-4)
    with pytest.raises(EngineError, match="entropy"):
        remote.score(table, ["entropy"])


# -- refusals -------------------------------------------------------------------------------------

SERVER = Capabilities(ids=True, sampled=True, top_k=20, text=True)


@pytest.mark.parametrize(
    ("method", "axes", "missing"),
    [
        ("opd", {}, ""),
        ("opd", {"signal": TOP}, ""),
        ("opd", {"signal": {**TOP, "top_k": 21}}, "its 21 likeliest tokens"),
        ("opd", {"signal": {**TOP, "support": "student"}}, "whole distributions"),
        ("opd", {"signal": {**TOP, "top_k": None}}, "without top_k needs whole"),
        ("opd", {"signal": {**TOP, "temperature": 2.0}}, "whole distributions"),
        ("opd", {"signal": {**TOP, "share": 1.5}}, "whole distributions"),
        ("opd-exact", {}, "reverse_kl"),
        ("kd-sft", {}, ""),
    ],
)
def test_what_a_method_needs_is_held_against_what_a_server_gives(
    method: str, axes: Any, missing: str
) -> None:
    lacks = "; ".join(needs.lacking(get(method).resolve(axes), SERVER))
    assert (missing in lacks) and bool(missing) == bool(lacks)


def test_weights_in_this_process_are_enough_for_every_method() -> None:
    able = Capabilities(True, True, 10**6, True, True, text=True, at_ids=True, hidden=True)
    for name in METHODS:
        assert not needs.lacking(get(name).resolve({}), able)
        # And text alone is not, wherever somebody else scores or acts.
        axes = get(name).resolve({})
        assert bool(needs.lacking(axes, Capabilities(text=True))) == bool(needs.of_teacher(axes))


def test_a_configuration_that_cannot_work_is_refused_unasked(
    school: School, tmp_path: Path
) -> None:
    asked = len(school.frozen.asked)
    exact = school.remote(tmp_path, method="opd-exact")
    with pytest.raises(ConfigError, match=r"stages.distilled.teacher='teacher'.*reverse_kl"):
        validate(load(exact))
    api = school.remote(tmp_path)
    api["models"]["teacher"] = {"kind": "api", "model": "openai/x"}
    with pytest.raises(ConfigError, match="text only: let it play a collect stage"):
        validate(load(api))
    assert len(school.frozen.asked) == asked


def test_a_server_that_admits_fewer_alternatives_is_refused_at_start(
    school: School, tmp_path: Path
) -> None:
    usual = school.frozen._answer

    def short(path: str, payload: Any) -> tuple[int, Any]:
        if payload and payload.get("prompt_logprobs", 0) > 4:
            return 400, {"error": {"message": "at most 4"}}
        return usual(path, payload)

    school.frozen._answer = short
    try:
        with pytest.raises(ConfigError, match="its 6 likeliest tokens"):
            execute(load(school.remote(tmp_path, TOP)))
    finally:
        school.frozen._answer = usual
    assert not list(tmp_path.rglob("commits.jsonl"))


def test_a_teacher_of_another_language_is_refused_at_start(school: School, tmp_path: Path) -> None:
    other = school.remote(tmp_path)
    other["models"]["student"]["tokenizer"] = {"vocabulary": 320}
    with pytest.raises(ConfigError, match="K1"):
        execute(load(other))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"key_env": "sk-123"}, "name of an environment variable"),
        ({"api_key": "sk-123"}, "name of an environment variable"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "http://user@x"}, "user"),
    ],
)
def test_servers_are_configured_without_secrets(change: Any, line: str) -> None:
    entry = {"kind": "vllm", "base_url": "http://x", "tokenizer": "t", **change}
    with pytest.raises(ConfigError, match=line) as error:
        load({"models": {"teacher": entry}})
    assert "sk-123" not in str(error.value)


def test_two_processes_do_not_share_one_set_of_weights() -> None:
    server = {"base_url": "http://x", "folder": "/f"}
    with pytest.raises(ConfigError, match="set workers: 1"):
        load({"workers": 2, "models": {"student": {"server": server}}})
    adapters = {"kind": "local", "path": "p", "lora": {}, "server": server}
    load({"workers": 2, "models": {"student": adapters}})


def test_a_run_may_go_on_with_its_student_on_another_server() -> None:
    """The weights are ours; a teacher at another address may be another teacher."""
    server = {"base_url": "http://x", "folder": "/f"}
    frozen = {"kind": "vllm", "base_url": "http://x", "tokenizer": "t"}

    def print_of(student: Any, teacher: Any) -> str:
        return load({"models": {"student": student, "teacher": teacher}}).fingerprint

    usual = print_of({"server": server}, frozen)
    moved = {**server, "base_url": "http://y", "timeout": 3}
    assert usual == print_of({"server": moved}, frozen)
    assert usual != print_of({}, frozen)
    assert usual != print_of({"server": server}, {**frozen, "base_url": "http://y"})


def test_a_model_on_a_server_is_not_trained() -> None:
    entry = {"kind": "vllm", "base_url": "http://x", "tokenizer": "t"}
    stage = {"name": "a", "model": "teacher", "method": "sft", "data": "d", "iterations": 1}
    collect = {"do": "collect", "name": "d"}
    with pytest.raises(ConfigError, match="no weights here"):
        load({"models": {"teacher": entry}, "stages": [collect, stage]})


# -- what a user sees -----------------------------------------------------------------------------


def test_the_verb_prints_a_table_and_a_document(school: School, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(school.remote(tmp_path)))
    shown = call("probe", str(file))
    assert shown.exit_code == 0
    rows = {line.split("|")[1].strip(): line for line in shown.stdout.splitlines() if "|" in line}
    assert "follows the weights here" in rows["student"] and rows["teacher"].count("yes") == 3
    assert "samples and scores agree" in shown.stdout
    (teacher,) = answer("probe", str(file), "teacher")
    assert teacher["able"]["top_k"] == 20 and teacher["repeat"] < 1e-4


def test_a_server_that_is_not_there_is_one_line(school: School, tmp_path: Path) -> None:
    config = school.remote(tmp_path)
    config["models"]["teacher"] |= {"base_url": "http://127.0.0.1:9", "ready": 0.2}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    line = refused(4, "probe", str(file), "teacher")
    assert "http://127.0.0.1:9" in line and "vllm serve" in line


def test_the_folder_that_a_server_is_started_from(school: School, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(school.remote(tmp_path)))
    shown = call("server-folder", str(file), "student", str(tmp_path / "start"))
    assert shown.exit_code == 0
    assert shown.stdout.split()[:3] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve"]
    stated = json.loads((tmp_path / "start" / "config.json").read_text())
    assert stated["tie_word_embeddings"] is False
    assert "exists" in refused(2, "server-folder", str(file), "student", str(tmp_path / "start"))


def test_an_api_is_asked_one_thing_or_nothing() -> None:
    class Chats(HFEngine):
        def __init__(self) -> None:
            self.name, self.calls = "api", 0

        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(text=True)

        async def chat(self, messages: Any, sampling: Any, **options: Any) -> list[Sample]:
            self.calls += 1
            assert sampling.max_tokens <= 4
            return [Sample((), (), "yes", "stop")]

    engine = Chats()
    free = wait(by_text(engine, "api", "api", ask=False))
    assert engine.calls == 0 and "would cost" in free.able.notes[-1] and not free.spent
    paid = wait(by_text(engine, "api", "api", ask=True))
    assert engine.calls == 1 and "one call" in paid.spent
    assert "text" in probing.line(paid) and "ids" not in probing.line(paid)


def test_a_rehearsal_needs_no_server(school: School, tmp_path: Path) -> None:
    small = rehearse(load(school.remote(tmp_path)))
    assert probing.elsewhere(small) == []
