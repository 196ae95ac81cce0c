"""Plans: each part against measured tensors, seconds from real iterations, and clear refusals."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config

from agentdistill.config import LocalModel, LoraConfig, TinyModel, TrainStage, load
from agentdistill.engines.forward import body, hidden_states
from agentdistill.engines.hf import HFEngine
from agentdistill.engines.kv import SlotKV
from agentdistill.methods.index import get
from agentdistill.optimise import Optimiser, backward
from agentdistill.plan import iterations, memory, plan, sizes
from agentdistill.plan import step as steps
from agentdistill.plan.memory import Lengths
from agentdistill.run import Run
from agentdistill.students import local, tiny
from agentdistill.table import build
from agentdistill.teachers.scorer import LocalScorer
from tests.cli_calls import RECIPE, answer, call, refused
from tests.dense import episode
from tests.losses import term_of

WORDS = 1200
ESTIMATE = 2.0
"""Estimates are held within this factor of what is measured."""
QWEN_17 = {"hidden_size": 2048, "layers": 28, "heads": 16, "groups": 8, "wide": 6144, "dim": 128}
QWEN_8 = {
    "hidden_size": 4096,
    "layers": 36,
    "heads": 32,
    "groups": 8,
    "wide": 12288,
    "dim": 128,
    "tied": False,
}
TOY = {"hidden_size": 64, "layers": 2, "heads": 4, "groups": 2, "wide": 160, "dim": 16}


def qwen(folder: Path, words: int = WORDS, **shape: Any) -> str:
    """A folder with a Qwen3's config.json and nothing else."""
    known = {**TOY, "tied": True, **shape}
    Qwen3Config(
        vocab_size=words,
        hidden_size=known["hidden_size"],
        intermediate_size=known["wide"],
        num_hidden_layers=known["layers"],
        num_attention_heads=known["heads"],
        num_key_value_heads=known["groups"],
        head_dim=known["dim"],
        tie_word_embeddings=known["tied"],
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)


def real(path: str, dtype: str, lora: LoraConfig | None = None) -> Any:
    build: Any = AutoModelForCausalLM.from_config
    model = build(Qwen3Config.from_pretrained(path), dtype=getattr(torch, dtype))
    return model if lora is None else local.add_lora(model, lora)


class Peak(TorchDispatchMode):
    """Bytes of the tensors made inside that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _plain(t)}
        for tensor in filter(_plain, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)
        self.most = max(self.most, self.now)
        return result


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "count"), [(QWEN_17, 1_720_574_976), (QWEN_8, 8_190_735_360)])
def test_published_models_are_counted_without_weights(
    tmp_path: Path, shape: dict[str, Any], count: int
) -> None:
    path = qwen(tmp_path, 151_936, **shape)
    found = sizes.size(LocalModel(path=path, dtype="bfloat16", device="cuda:0"))
    assert (found.parameters, found.trained) == (count, count)
    assert (found.gradients, found.masters) == (2 * count, 4 * count)
    assert found.kv == 2 * shape["layers"] * 8 * 128 * 2
    assert (found.device, found.vocabulary) == ("cuda:0", 151_936)


LORA = LoraConfig(rank=4, alpha=8)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_masters_gradients_and_state_are_exact(
    tmp_path: Path, dtype: Any, lora: LoraConfig | None
) -> None:
    """What the optimiser really holds after a step, tensor by tensor."""
    path = qwen(tmp_path)
    found = sizes.size(LocalModel(path=path, dtype=dtype, device="cpu", lora=lora))
    model = real(path, dtype, lora)
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    stage = TrainStage(name="s", iterations=1)
    optimiser = Optimiser(model, stage)
    table = build([episode(n, [(4, 9)], vocab=WORDS) for n in range(2)])
    backward(model.train(), table, [term_of("nll")], {}, micro_tokens=64)
    assert found.gradients == sum(p.grad.nbytes for p in optimiser.parameters)
    optimiser.step(0.0)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    masters = [m for m in optimiser.masters if m.untyped_storage()._cdata not in own]
    assert found.masters == sum(m.nbytes for m in masters)
    states = [t for s in optimiser.adam.state.values() for t in s.values()]
    assert found.state == sum(t.nbytes for t in states)
    assert found.trained == sum(p.numel() for p in optimiser.parameters)


def test_a_tiny_model_is_counted_from_its_fields() -> None:
    config = TinyModel(hidden=32, layers=3, heads=4)
    words: Any = sizes._Words(config.tokenizer.vocabulary)
    model = tiny.build(config, words, 0)
    found = sizes.size(config)
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (found.device, found.masters) == ("cpu", 0)


# -- the other parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, dtype: Any, lora: LoraConfig | None
) -> None:
    path = qwen(tmp_path, layers=4)
    found = sizes.size(LocalModel(path=path, dtype=dtype, device="cpu", lora=lora))
    model = real(path, dtype, lora).train()
    ids = [torch.arange(300) % WORDS for _ in range(2)]
    with Peak() as peak:
        hidden = hidden_states(model, ids, [torch.arange(1, 301)] * 2)
        held = peak.now
    assert hidden.requires_grad
    assert found.kept * 600 == pytest.approx(held, rel=0.1)
    assert found.kept_square == 0


def test_eager_attention_keeps_a_square(tmp_path: Path) -> None:
    config = LocalModel(path=qwen(tmp_path), dtype="float32", device="cpu", attention="eager")
    found = sizes.size(config)
    layers, heads, numbers = 2, 4, 4
    assert layers * heads * numbers <= found.kept_square <= 4 * layers * heads * numbers


@pytest.mark.parametrize("name", ["nll", "reverse_kl", "forward_kl", "jsd"])
def test_an_update_takes_what_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Activations, chunks and gradients together, over the peak of a real backward pass."""
    words = 20_000
    monkeypatch.setattr("agentdistill.optimise.CHUNK_BYTES", 4 * words * 128)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 4 * words * 128)
    path = qwen(tmp_path, words)
    found = sizes.size(LocalModel(path=path, dtype="float32", device="cpu"))
    student, teacher = real(path, "float32").train(), real(path, "float32")
    table = build([episode(n, [(4, 120)], vocab=words) for n in range(4)])
    scorer = LocalScorer("teacher", teacher)
    scorer.score(table, {"hidden"}, micro_tokens=10_000)
    with Peak() as peak:
        backward(student, table, [term_of(name)], {"teacher": scorer.head}, micro_tokens=10_000)
    full = name != "nll"
    axes = get("opd-exact" if full else "sft").axes
    tokens = sum(len(v.ids) for v in table.views["plain"] if v is not None)
    lengths = Lengths(4, 124, tokens, len(table), 4, 4, "")
    stage = TrainStage(name="s", iterations=1, micro_tokens=10_000)
    parts = memory.parts(stage, axes, found, found if full else None, lengths, 4)
    planned = {p.name: p.bytes for p in parts}
    planned = sum(planned[part] for part in ("gradients", "activations", "loss chunks"))
    assert peak.most / ESTIMATE <= planned <= peak.most * ESTIMATE


def test_the_cache_is_planned_as_the_engine_makes_it(tmp_path: Path) -> None:
    path = qwen(tmp_path)
    found = sizes.size(LocalModel(path=path, dtype="bfloat16", device="cpu"))
    decoder = body(real(path, "bfloat16"))
    kv = SlotKV(decoder, torch.device("cpu"), max_slots=64, keep=True, budget=1 << 16)
    prompts = [[1] * 100 for _ in range(9)]
    with torch.no_grad():
        kv.extend(kv.open([str(n) for n in range(9)], prompts), prompts)
    held = sum(t.nbytes for layer in kv._buffers._layers for t in layer)
    lengths = Lengths(9, 100, 900, 900, 9, 9, "")
    parts = memory._playing(found, lengths, 9)
    assert {p.name: p.bytes for p in parts}["KV cache"] == held


def test_scoring_takes_what_is_planned(tmp_path: Path) -> None:
    path = qwen(tmp_path, 4000, wide=400)
    found = sizes.size(LocalModel(path=path, dtype="float32", device="cpu"))
    model = real(path, "float32").eval()
    table = build([episode(n, [(4, 250)], vocab=4000) for n in range(4)])
    lengths = Lengths(4, 254, 4 * 254, len(table), 4, 4, "")
    stage = TrainStage(name="s", iterations=1)
    for method, want in (("opd", "logp"), ("opd-exact", "hidden")):
        with Peak() as peak:
            LocalScorer("teacher", model).score(table, {want})
        parts = memory._scoring(stage, get(method).axes, found, found, lengths)
        planned = sum(p.bytes for p in parts if p.name != "scoring by the student")
        assert peak.most / ESTIMATE <= planned <= peak.most * ESTIMATE, method


# -- whole plans -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("plan")
    values = {**RECIPE, "output": str(output / "runs")}
    (output / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(output / "recipe.yaml")


def test_a_plan_has_measured_seconds_and_leaves_nothing(recipe: str) -> None:
    found = answer("plan", recipe)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == ["demos", "taught", "distilled", "later"]
    assert found["step"] == "measured"
    for name in ("taught", "distilled", "later"):
        stage = stages[name]
        assert set(stage["seconds"]) == {"generate", "score", "update"}
        assert stage["hours"] == pytest.approx(
            stage["iterations"] * sum(stage["seconds"].values()) / 3600
        )
        assert stage["lengths"]["source"].startswith("a measured step")
        (device,) = stage["devices"].values()
        assert device["fits"] and device["peak"] == max(device[p] for p in memory.PHASES)
        update = sum(p["bytes"] for p in stage["parts"] if "update" in p["phases"])
        assert device["update"] == update
    assert stages["distilled"]["lengths"]["episodes"] == 4
    assert stages["distilled"]["iterations"] == 3
    assert stages["distilled"]["env_steps"] == 3 * stages["distilled"]["lengths"]["env_steps"] > 0
    assert stages["taught"]["env_steps"] == 0
    assert "KV cache" not in {part["name"] for part in stages["taught"]["parts"]}
    assert "teacher's hidden states" in {part["name"] for part in stages["later"]["parts"]}
    parts = [*stages.values(), found["evaluation"]]
    assert found["hours"] == pytest.approx(sum(part["hours"] for part in parts)) and found["hours"]
    assert found["evaluation"] == {**found["evaluation"], "episodes": 6 + 12 + 12}
    assert not (Path(recipe).parent / "runs").exists()


def test_without_a_step_there_are_no_seconds(recipe: str) -> None:
    result = call("plan", recipe, "--no-step")
    assert result.exit_code == 0, result.stderr
    assert "step: not measured (--no-step)" in result.stdout
    assert "hours: unknown" in result.stdout and "seconds of" not in result.stdout
    assert "one random episode, 4 characters a token, 6 turns of 2 tokens" in result.stdout
    assert "| optimiser state " in result.stdout and "3 iterations, 72 env" in result.stdout
    found = answer("plan", recipe, "--no-step")
    assert found["hours"] is None and found["stages"][1]["seconds"] is None


def test_what_does_not_fit_is_not_tried(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "capacity", lambda device: ("toy", 1000))
    monkeypatch.setattr(steps, "measure", lambda config: pytest.fail("measured"))
    found = plan(load(recipe))
    assert found["step"] == "not measured: stage taught does not fit on cpu (toy)"
    assert "of 1e-06 GB" in call("plan", recipe).stdout


def test_weights_that_are_not_here_cost_the_seconds_only(recipe: str, tmp_path: Path) -> None:
    values = yaml.safe_load(Path(recipe).read_text())
    values["models"]["student"] = {"kind": "local", "path": qwen(tmp_path), "device": "cpu"}
    found = plan(load(values))
    assert found["step"].startswith("not measured: path=")
    assert found["stages"][2]["student"]["vocabulary"] == WORDS


def test_episodes_are_scaled_to_the_iteration() -> None:
    one = Lengths(4, 900, 2000, 400, 20, 24, "x")
    stage = TrainStage(name="s", iterations=9, env_steps=120, tasks=6, samples=2)
    whole = steps.scaled(one, stage, 800)
    assert whole == Lengths(12, 800, 6000, 1200, 60, 72, "x")
    assert iterations(stage, whole.env_steps) == 2
    assert iterations(stage, 1) == 9
    turns = stage.model_copy(update={"turns": 33, "max_length": 500})
    assert steps.scaled(one, turns, 800).episodes == 7
    assert steps.scaled(one, turns, 800).context == 500


def test_mistakes_are_one_clear_line(recipe: str, tmp_path: Path) -> None:
    assert "models.student.path='nobody/nothing'" in refused(
        2, "plan", recipe, 'models.student={"kind": "local", "path": "nobody/nothing"}'
    )
    assert "no such folder" in refused(
        2, "plan", recipe, 'models.student={"kind": "local", "path": "/no/such/folder"}'
    )
    assert "stages.distilled.lr" in refused(2, "plan", recipe, "stages.distilled.lr=-1")
    assert refused(2, "plan", str(tmp_path / "none.yaml"))


def test_a_device_that_is_elsewhere_is_said_so(recipe: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without the device")
    model = {"kind": "local", "path": qwen(tmp_path), "device": "cuda:0"}
    found = answer("plan", recipe, f"models.student={json.dumps(model)}")
    assert "does not fit on cuda:0" not in found["step"]
    device = found["stages"][2]["devices"]["cuda:0"]
    assert (device["name"], device["fits"]) == ("not on this machine", None)
    assert found["stages"][2]["student"]["masters"] > 0, "bfloat16 on a GPU"


def test_a_probe_reads_the_whole_of_a_curriculum(recipe: str) -> None:
    """Of a curriculum that lengthens episodes its end is measured, not its start."""
    values = yaml.safe_load(Path(recipe).read_text())
    stage = {**values["stages"][2], "method": "tcod-f2b", "iterations": 40}
    one = load({**values, "stages": [*values["stages"][:2], stage], "evaluate": {}})
    found = steps.measure(one)["distilled"].lengths
    with Run(one) as the_run:
        assert found.turns > found.episodes and found.turns <= 4 * the_run.max_turns


def test_an_engine_of_a_real_model_agrees(tmp_path: Path) -> None:
    """The context is what the engine refuses to exceed."""
    path = qwen(tmp_path)
    model = real(path, "float32")
    words: Any = type("Words", (), {"eos_token_id": 0, "decode": lambda *a, **k: ""})()
    engine = HFEngine(model, words)
    assert sizes.size(LocalModel(path=path, device="cpu")).context == engine._limit
