"""A student that is trained here and draws on a server: what travels, when, and what is proved."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agentdistill.config import LoraConfig, ServerConfig
from agentdistill.engines.base import Sampling, ScoreRequest
from agentdistill.engines.hf import HFEngine
from agentdistill.engines.served import ServedEngine
from agentdistill.errors import ConfigError, EngineError, StoreError
from agentdistill.students import local
from agentdistill.students.served import serve
from tests.vllm_double import Double, Living, model, tokenizer

PROMPT = [57, 3, 14, 15, 59, 58]
SHORT = Sampling(max_tokens=6)


@dataclass
class Student:
    """Weights here, an engine that draws there, and what is there."""

    model: Any
    here: HFEngine
    engine: ServedEngine
    behind: Living
    double: Double
    folder: Path

    def draw(self, seed: int = 0) -> Any:
        return asyncio.run(self.engine.generate(PROMPT, SHORT, seed=seed))

    def update(self, version: int) -> None:
        shake(self.model)
        self.here.publish(version)
        self.engine.publish(version)

    def agrees(self, sample: Any) -> bool:
        whole = [*PROMPT, *sample.ids]
        rows = ScoreRequest(whole, range(len(PROMPT), len(whole)))
        gap = np.abs(self.here.score_now([rows])[0].logp - np.asarray(sample.logp))
        return bool(gap.max() < 1e-4)


def shake(weights: Any) -> None:
    with torch.no_grad():
        for parameter in weights.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture(params=["path", "lora"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Student]:
    lora = request.param == "lora"
    start = tmp_path / "base"
    model().save_pretrained(start)
    mine = AutoModelForCausalLM.from_pretrained(start)
    if lora:
        mine = local.add_lora(mine, LoraConfig(rank=4, alpha=8))
    torch.manual_seed(1)
    behind = Living(model(), tokenizer(), adapters=lora)
    here = HFEngine(mine, tokenizer(), name="student")
    with Double(behind) as double:
        folder = tmp_path / "shared"
        config = ServerConfig(base_url=double.url, folder=str(folder))
        engine = serve(config, here, mine, tokenizer(), key="models.s.server", probe=PROMPT)
        yield Student(mine, here, engine, behind, double, folder)


def test_the_server_follows_the_weights_and_versions_are_the_trainers(student: Student) -> None:
    assert not student.double.asked  # nothing before somebody wants to act
    for version in range(3):
        student.update(version)
        samples = [student.draw(seed) for seed in range(3)]
        assert all(student.agrees(sample) for sample in samples)
        assert {sample.version for sample in samples} == {version}
        assert student.engine.journeys == version + 1
        assert [path.name[-3:] for path in student.folder.iterdir()] == [f"-v{version}"]
        assert len(student.behind.loaded) <= 1
    asyncio.run(student.engine.close())
    assert not list(student.folder.iterdir()) and not student.behind.loaded


def test_weights_that_only_seem_to_arrive_are_found_out(student: Student) -> None:
    """The planted fault: the server says that it has read them, and has not."""
    student.update(0)
    student.draw()
    if student.behind.adapters:
        student.behind._adapter = lambda payload: (
            student.behind.loaded.update({payload["lora_name"]: student.behind.engine}),
            (200, "ok"),
        )[1]
    student.behind.deaf = True
    student.update(1)
    with pytest.raises(EngineError, match=r"version 1 .* still says something else"):
        student.draw()
    with pytest.raises(EngineError):  # and it is not believed the next time either
        student.draw()


def test_a_folder_that_the_server_does_not_see(student: Student) -> None:
    student.engine._courier._seen_as = "/nowhere"
    if student.behind.adapters:
        student.behind._adapter = lambda payload: (404, {"error": {"message": "no such file"}})
    with pytest.raises(EngineError, match=r"start the server with .* let it read /nowhere"):
        student.draw()
    assert not student.behind.paused
    assert not list(student.folder.iterdir())


def test_a_folder_that_cannot_be_written(student: Student) -> None:
    student.folder.write_text("no folder")
    with pytest.raises(StoreError):
        student.draw()


def test_two_students_of_one_server_take_turns(tmp_path: Path) -> None:
    """A server has one set of weights: whoever draws brings it to its own first."""
    behind = Living(model(), tokenizer())
    with Double(behind) as double:
        config = ServerConfig(base_url=double.url, folder=str(tmp_path / "shared"))
        both = []
        for seed in (1, 2):
            mine = model(seed)
            here = HFEngine(mine, tokenizer(), name=f"s{seed}")
            engine = serve(config, here, mine, tokenizer(), key="server", probe=PROMPT)
            both.append(Student(mine, here, engine, behind, double, tmp_path))
        for _ in range(2):
            for one in both:
                assert one.agrees(one.draw())
        assert [one.engine.journeys for one in both] == [2, 2]
        assert both[1].agrees(both[1].draw()) and both[1].engine.journeys == 2


def test_a_tied_head_travels_as_one_of_its_own(tmp_path: Path) -> None:
    size = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    tied = Qwen3ForCausalLM(Qwen3Config(**size, **layers, tie_word_embeddings=True))
    local.save_served(tied, tokenizer(), tmp_path / "apart")
    assert tied.config.tie_word_embeddings
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert not read.config.tie_word_embeddings
    assert read.lm_head.weight.data_ptr() != read.model.embed_tokens.weight.data_ptr()
    assert torch.equal(read.lm_head.weight, tied.lm_head.weight)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(read(ids).logits, tied(ids).logits)


@pytest.mark.parametrize(("weights", "lora"), [("lora", False), ("path", True)])
def test_a_way_that_does_not_fit_the_model_is_refused(weights: str, lora: bool) -> None:
    mine = local.add_lora(model(), LoraConfig(rank=2)) if lora else model()
    config = ServerConfig(base_url="http://x", folder="/f", weights=weights)
    here = HFEngine(mine, tokenizer())
    with pytest.raises(ConfigError, match=r"server.weights=.* auto"):
        serve(config, here, mine, tokenizer(), key="models.s.server", probe=PROMPT)


def test_new_weights_travel_also_under_an_old_version(student: Student) -> None:
    student.draw()
    student.draw()
    assert student.engine.journeys == 1
    student.update(0)
    assert student.agrees(student.draw()) and student.engine.journeys == 2
