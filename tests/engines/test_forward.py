"""Ragged forward: every layout gives the numbers of one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from agentdistill.engines import forward
from agentdistill.errors import EngineError

PEFT_WARNS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers 5
)
WORDS = 61
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "llama": lambda: LlamaConfig(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=WORDS, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2
    ),
    "sliding": lambda: MistralConfig(**SHAPE, sliding_window=5),
}


def build(config: PretrainedConfig) -> nn.Module:
    """A random model, always the same one."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """One model of each family."""
    return build(CONFIGS[request.param]())


def ragged(lengths: list[int]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Random sequences and some positions in each (every third one has none)."""
    random = np.random.default_rng(3)
    ids = [random.integers(0, WORDS, n) for n in lengths]
    where = [
        [] if i % 3 == 2 else sorted(set(random.integers(1, n + 1, 4).tolist()))
        for i, n in enumerate(lengths)
    ]
    return ids, where


def one_by_one(model: nn.Module, ids: list[np.ndarray], where: list[list[int]]) -> torch.Tensor:
    """The same states from plain forwards of whole sequences."""
    states = [
        model(input_ids=torch.tensor(row)[None], output_hidden_states=True).hidden_states[-1][0]
        for row in ids
    ]
    return torch.cat([s[[p - 1 for p in w]] for s, w in zip(states, where, strict=True)])


@pytest.mark.parametrize("packed", [False, True])
def test_layouts_agree(model: nn.Module, packed: bool) -> None:
    """Padded (in several groups) and packed equal one sequence at a time, in the given order."""
    ids, where = ragged([7, 190, 3, 12, 1, 200, 40, 2])
    with torch.no_grad():
        wanted = one_by_one(model, ids, where)
        got = forward.hidden_states(model, ids, where, packed=packed)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_groups_were_needed_for_the_test_above() -> None:
    """The lengths used there do not fit one padded group."""
    assert len(forward.length_groups(np.array([7, 190, 12, 1, 200, 2]))) > 1


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_do_not_depend_on_the_layout(packed: bool) -> None:
    """The loss of a ragged batch has the gradient of the sum over single sequences."""
    ids, where = ragged([5, 9, 4, 30])
    gradients = []
    for single in (True, False):
        model = build(CONFIGS["llama"]())
        if single:
            states = one_by_one(model, ids, where)
        else:
            states = forward.hidden_states(model, ids, where, packed=packed)
        tokens = torch.arange(len(states)) % WORDS
        forward.log_probs_at(model, states, tokens, chunk=3)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_tensors_and_lists_are_taken_alike() -> None:
    """Ids and positions may be tensors, arrays or lists."""
    model = build(CONFIGS["llama"]())
    ids, where = ragged([5, 9])
    plain = forward.hidden_states(model, [row.tolist() for row in ids], where)
    tensors = forward.hidden_states(
        model, [torch.tensor(row) for row in ids], [torch.tensor(w) for w in where]
    )
    assert torch.equal(plain, tensors)


def test_nothing_asked_gives_nothing() -> None:
    """No positions: zero rows of the right width, no forward."""
    model = build(CONFIGS["llama"]())
    assert forward.hidden_states(model, [[1, 2]], [[]]).shape == (0, 64)


@pytest.mark.parametrize("position", [0, 4, -1])
def test_positions_outside_are_refused(position: int) -> None:
    """Position 0 has nothing before it; the one after the end is the last that can be predicted."""
    model = build(CONFIGS["llama"]())
    forward.hidden_states(model, [[1, 2, 3]], [[3]])
    with pytest.raises(ValueError, match=r"sequence 0: positions must lie in 1\.\.3"):
        forward.hidden_states(model, [[1, 2, 3]], [[position]])


SCALED: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=2.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0),
    **CONFIGS,
}


@pytest.mark.parametrize("family", SCALED)
def test_log_probs_are_the_models_own(family: str) -> None:
    """Log-probabilities and entropies equal those of the model's logits, for any chunk."""
    model = build(SCALED[family]())
    ids, where = ragged([9, 14])
    own = []
    for row, wanted in zip(ids, where, strict=True):
        own.append(model(input_ids=torch.tensor(row)[None]).logits[0, [p - 1 for p in wanted]])
    logp = torch.cat(own).log_softmax(-1)
    tokens = torch.arange(len(logp))
    states = forward.hidden_states(model, ids, where)
    for chunk in (None, 1, 3):
        got, entropy = forward.log_probs_at(model, states, tokens, chunk=chunk)
        torch.testing.assert_close(got, logp[tokens, tokens], atol=1e-4, rtol=1e-4)
        reference = torch.distributions.Categorical(logits=logp).entropy()
        torch.testing.assert_close(entropy, reference, atol=1e-4, rtol=1e-4)


def test_head_never_sees_more_rows_than_a_chunk() -> None:
    """Logits of all rows never exist at once, neither forward nor backward."""
    model = build(CONFIGS["llama"]())
    seen: list[int] = []
    forward.head(model).register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    states = torch.randn(10, 64, requires_grad=True)
    logp, _ = forward.log_probs_at(model, states, torch.zeros(10, dtype=torch.int64), chunk=4)
    assert seen == [4, 4, 2]
    logp.sum().backward()
    assert sorted(seen) == [2, 2, 4, 4, 4, 4]  # computed again, chunk by chunk


@PEFT_WARNS
def test_peft_wrapped_models_use_their_adapter() -> None:
    """The body inside a LoRA wrapper is run with the adapter, and the adapter gets gradients."""
    base = build(CONFIGS["qwen3"]())
    ids, where = ragged([6, 8])
    before = forward.hidden_states(base, ids, where).detach()
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    states = forward.hidden_states(wrapped, ids, where)
    assert (states - before).abs().max() > 1e-2
    torch.testing.assert_close(states, one_by_one(wrapped, ids, where), atol=1e-5, rtol=1e-4)
    forward.log_probs_at(wrapped, states, torch.zeros(len(states), dtype=torch.int64))[
        0
    ].sum().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora" in n)


@PEFT_WARNS
def test_prompt_learning_is_refused() -> None:
    """Its virtual tokens would silently be missing."""
    wrapped = get_peft_model(
        build(CONFIGS["llama"]()),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(EngineError, match="prompt-learning"):
        forward.hidden_states(wrapped, [[1, 2]], [[1]])


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=40),
    budget=st.one_of(st.none(), st.integers(1, 4000)),
)
def test_groups_hold_each_row_once_and_waste_little(lengths: list[int], budget: int | None) -> None:
    """Every row is in one group; padding and padded size stay within their limits."""
    rows = np.array(lengths)
    groups = forward.length_groups(rows, spare=64, budget=budget)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(rows)))
    for group in groups:
        padded, real = len(group) * rows[group].max(), rows[group].sum()
        assert padded - real <= max(64, real // 4)
        assert budget is None or padded <= budget or len(group) == 1
