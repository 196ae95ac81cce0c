"""On one CUDA card: the numbers of the CPU within rounding, whole iterations, bounded memory.

A session of their own: ``pytest -m gpu``. Nothing here needs more than 4 GiB of the card.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentdistill.callbacks import Callback
from agentdistill.config import TinyModel, TokenizerConfig, load
from agentdistill.engines.base import Sample, Sampling, ScoreRequest
from agentdistill.engines.forward import device_of
from agentdistill.engines.hf import HFEngine
from agentdistill.iteration import Training
from agentdistill.optimise import backward
from agentdistill.recipe import execute
from agentdistill.run import Run
from agentdistill.students import local, tiny
from agentdistill.table import build
from agentdistill.teachers.scorer import LocalScorer
from tests.dense import episode, make_model
from tests.losses import term_of
from tests.toy import Corridor, micro

pytestmark = pytest.mark.gpu

GPU = "cuda:0"
WORDS = 300
EXACT, ROUGH = 1e-4, 0.15
"""Largest difference of log-probabilities: float32 in another order, and bfloat16 (8 bits)."""


def model(dtype: torch.dtype, device: str) -> Any:
    return make_model(0, dtype=torch.float32, vocab=WORDS).to(dtype).to(device).eval()


class Words:
    """As much of a tokenizer as an engine needs."""

    eos_token_id = 0

    def decode(self, ids: Any, **_: Any) -> str:
        return "" if list(ids) == [0] else " ".join(map(str, ids))


def requests() -> list[ScoreRequest]:
    source = np.random.default_rng(0)
    lengths = (3, 40, 17, 90, 2)
    return [ScoreRequest(source.integers(1, WORDS, n), np.arange(1, n)) for n in lengths]


@pytest.mark.parametrize("dtype, close", [(torch.float32, EXACT), (torch.bfloat16, ROUGH)])
def test_forward_and_scores_are_those_of_the_cpu(dtype: torch.dtype, close: float) -> None:
    wanted = HFEngine(model(torch.float32, "cpu"), Words()).score_now(requests())
    engine = HFEngine(model(dtype, GPU), Words())
    for mine, theirs in zip(engine.score_now(requests()), wanted, strict=True):
        assert mine.logp.dtype == np.float32
        np.testing.assert_allclose(mine.logp, theirs.logp, atol=close)
        np.testing.assert_allclose(mine.entropy, theirs.entropy, atol=close)
    table = build([episode(n, [(4, 9), (3, 5)], vocab=WORDS) for n in range(3)])
    found = []
    for who in (model(torch.float32, "cpu"), engine.model):
        LocalScorer("it", who).score(table, {"logp", "entropy"})
        found.append(table["logp/it"])
    assert found[1].device.type == "cpu"
    torch.testing.assert_close(found[1], found[0], atol=close, rtol=0)


def generated(engine: HFEngine, **sampling: Any) -> list[Sample]:
    async def all_of_them() -> list[Sample]:
        options = Sampling(max_tokens=12, **sampling)
        prompts = [request.ids.tolist() for request in requests()]
        return await asyncio.gather(
            *(engine.generate(ids, options, seed=n) for n, ids in enumerate(prompts))
        )

    return asyncio.run(all_of_them())


def test_generation_in_float32_is_that_of_the_cpu() -> None:
    for temperature in (0.0, 1.0):
        there, here = (
            generated(HFEngine(model(torch.float32, device), Words()), temperature=temperature)
            for device in (GPU, "cpu")
        )
        assert [s.ids for s in there] == [s.ids for s in here]
        for one, other in zip(there, here, strict=True):
            np.testing.assert_allclose(one.logp, other.logp, atol=EXACT)


@pytest.mark.parametrize("dtype, close", [(torch.float32, EXACT), (torch.bfloat16, ROUGH)])
def test_what_is_sampled_is_scored_alike(dtype: torch.dtype, close: float) -> None:
    """With keys and values kept, token by token, or in one forward."""
    engine = HFEngine(model(dtype, GPU), Words())
    samples = generated(engine, temperature=1.0)
    whole = []
    for request, sample in zip(requests(), samples, strict=True):
        ids = np.concatenate([request.ids, sample.ids])
        whole.append(ScoreRequest(ids, np.arange(len(request.ids), len(ids))))
    for sample, scores in zip(samples, engine.score_now(whole), strict=True):
        np.testing.assert_allclose(sample.logp, scores.logp, atol=close)


# -- whole iterations -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two small models with one tokenizer."""
    words = tiny.train_tokenizer(
        tiny.corpus(Corridor(), "plain", episodes=8, seed=0), TokenizerConfig(vocabulary=320)
    )
    found = {}
    for seed, name in enumerate(("teacher", "student")):
        folder = tmp_path_factory.mktemp(name)
        small = TinyModel(hidden=32, heads=2, layers=2)
        local.save(tiny.build(small, words, seed), words, folder)
        found[name] = str(folder)
    return found


def recipe(output: Path, folders: dict[str, str], method: str, **student: Any) -> dict[str, Any]:
    models = {name: {"kind": "local", "path": path} for name, path in folders.items()}
    models["student"] |= student
    stage = {"name": "only", "teacher": "teacher", "method": method, "iterations": 2, "tasks": 4}
    return micro(output, models=models, stages=[stage], evaluate={"policies": []})


@pytest.mark.parametrize("method", ["opd", "opd-exact"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4, "dropout": 0.1}])
def test_a_stage_trains_on_the_card(
    tmp_path: Path, folders: dict[str, str], method: str, lora: Any
) -> None:
    """Everything in bfloat16 but adapters and masters; two runs need not agree bit by bit."""
    config = load(recipe(tmp_path, folders, method, lora=lora))
    training = Training(Run(config), config.stage("only"), Callback())
    training.store.close()
    assert training.teacher is not None
    places = {device_of(who.model).type for who in (training.teacher, training.student)}
    assert places == {"cuda"}
    assert {p.dtype for p in training.optimiser.masters} == {torch.float32}
    assert {p.dtype for p in training.teacher.model.parameters()} == {torch.bfloat16}
    before = {
        name: value.cpu().clone() for name, value in training.student.model.state_dict().items()
    }
    execute(config)
    stage = tmp_path / "micro" / "stages" / "only"
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["grad_norm"]) for line in lines)
    local.load_weights(training.student.model, stage / "model")
    for name, value in training.student.model.state_dict().items():
        assert bool(value.isfinite().all())
        if lora is None or "lora_B" in name:
            assert not torch.equal(value.cpu(), before[name]), name


def test_teacher_and_student_may_be_on_two_devices(tmp_path: Path, folders: dict[str, str]) -> None:
    outcome = execute(load(recipe(tmp_path, folders, "opd-exact", device="cpu")))
    assert outcome.stages["only"]["iterations"] == 2


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "nll"])
def test_a_large_vocabulary_takes_a_chunk_at_a_time(name: str) -> None:
    """8,160 rows of 150,000 words: 4.6 GiB as one float32 matrix, and there would be several."""
    words, rows = 150_000, 480
    student, teacher = (
        make_model(seed, dtype=torch.bfloat16, vocab=words).to(GPU) for seed in (0, 1)
    )
    table = build([episode(n, [(3, rows)], vocab=words) for n in range(17)])
    assert len(table) == 8160
    scorer = LocalScorer("teacher", teacher)
    scorer.score(table, {"hidden"}, micro_tokens=4096)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch = backward(
        student, table, [term_of(name)], {"teacher": scorer.head}, micro_tokens=1 << 20
    )
    assert batch.rows == 8160
    assert math.isfinite(batch.losses[name])
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
