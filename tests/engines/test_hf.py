"""The in-process engine against plain forwards, one row at a time and without any cache."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from agentdistill.engines import batch, spans
from agentdistill.engines.base import Engine, Sample, Sampling, ScoreRequest
from agentdistill.engines.hf import HFEngine
from agentdistill.engines.kv import SlotKV
from agentdistill.errors import EngineError

END = 60
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160}
KEPT: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "llama": lambda: LlamaConfig(**SHAPE),
    "gpt2": lambda: GPT2Config(**GPT2, initializer_range=0.2),
    "eager": lambda: LlamaConfig(**SHAPE, attn_implementation="eager"),
}
REFILLED: dict[str, Callable[[], PretrainedConfig]] = {
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=6),
    "mixed": lambda: Qwen3Config(
        **SHAPE,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
}
WORDS = [f"w{i}" for i in range(END)]


def build(config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """A random model whose answers depend on its context."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id; the last id ends a turn."""
    words = {word: i for i, word in enumerate([*WORDS, "</s>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def engine(model: nn.Module | None = None, **settings: Any) -> HFEngine:
    """An engine on ``model`` (a Llama by default)."""
    return HFEngine(build(KEPT["llama"]()) if model is None else model, tokenizer(), **settings)


def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run coroutines at the same time; exceptions are results."""

    async def run() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

    return asyncio.run(run())


def prompt(seed: int, length: int) -> list[int]:
    """Random ids."""
    return random.Random(seed).choices(range(END), k=length)


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the next token from one forward over everything."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def plain_greedy(model: nn.Module, ids: Sequence[int], most: int) -> list[int]:
    """Greedy decoding without cache or batch."""
    out: list[int] = []
    while len(out) < most and END not in out:
        out.append(int(plain_logits(model, [*ids, *out]).argmax()))
    return out


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[int]]:
    """Tokens, padding included, of every forward of the body."""
    tokens: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _m, _args, named: tokens.append(named["input_ids"].numel()), with_kwargs=True
    )
    yield tokens
    hook.remove()


GREEDY = Sampling(temperature=0, max_tokens=3)


async def episode(
    engine: Engine, number: int, turns: int, sampling: Sampling, *, first: int = 9, pauses: int = 0
) -> tuple[list[list[int]], list[Sample]]:
    """A session whose history grows by ragged observations; the prompts and the samples."""
    source, ids = random.Random(number), prompt(number, 1 + number % first)
    prompts, samples = [], []
    for turn in range(turns):
        for _ in range(source.randrange(pauses + 1) * 5):
            await asyncio.sleep(0)
        ids = ids + source.choices(range(END), k=source.randrange(1, 14))
        sample = await engine.generate(
            ids, sampling, seed=number * 100 + turn, session=f"episode {number}"
        )
        prompts.append(ids)
        samples.append(sample)
        ids = ids + list(sample.ids)
    return prompts, samples


@pytest.mark.parametrize("family", KEPT)
def test_kept_kv_gives_the_greedy_ids_of_plain_forwards(family: str) -> None:
    """32 sessions of 6 ragged turns, of which changing subsets run together."""
    model = build(KEPT[family]())
    tested = engine(model)
    assert tested.capabilities.notes == ()
    results = together(*(episode(tested, i, 6, GREEDY, pauses=2) for i in range(32)))
    for prompts, samples in results:
        for ids, sample in zip(prompts, samples, strict=True):
            assert list(sample.ids) == plain_greedy(model, ids, 3)
            assert sample.stop == ("stop" if sample.ids[-1] == END else "length")
        for before, sample, ids in zip(samples, samples[1:], prompts[1:], strict=False):
            known = len(ids) - sample.usage.input
            assert sample.usage.cache_read == known > 0
            assert known == before.usage.input + before.usage.cache_read + len(before.ids) - 1


@pytest.mark.parametrize("family", REFILLED)
def test_windows_are_computed_again_and_say_so(family: str) -> None:
    """Layers that forget cannot be kept: the answers are right and the reason is known."""
    model = build(REFILLED[family]())
    tested = engine(model)
    (note,) = tested.capabilities.notes
    assert "KV is not kept between turns" in note and "sliding" in note
    for prompts, samples in together(*(episode(tested, i, 3, GREEDY, first=20) for i in range(6))):
        for ids, sample in zip(prompts, samples, strict=True):
            assert list(sample.ids) == plain_greedy(model, ids, 3)
            assert sample.usage.cache_read == 0 and sample.usage.input == len(ids)


def test_models_that_ignore_the_cache_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe compares with plain forwards, so an unknown kind of model is not trusted."""
    model = build(KEPT["llama"]())
    inner = model.get_decoder()
    plain = inner.forward
    monkeypatch.setattr(inner, "forward", lambda **kw: plain(**{**kw, "position_ids": None}))
    (note,) = engine(model).capabilities.notes
    assert "answers differently" in note


def test_models_without_a_usable_cache_are_refused() -> None:
    """Mamba ignores the cache that it is handed: its answers would be those of the last token."""
    config = MambaConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2)
    with pytest.raises(EngineError, match="cannot generate: MambaModel answers differently"):
        engine(build(config))


MIXED = [
    Sampling(temperature=1.0, max_tokens=4),
    Sampling(temperature=0.5, top_p=0.8, max_tokens=2),
    Sampling(temperature=2.0, top_k=5, max_tokens=3),
    Sampling(temperature=0, max_tokens=4),
    Sampling(temperature=1.5, top_k=20, top_p=0.9, max_tokens=1),
]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral"])
def test_samples_do_not_depend_on_who_else_is_in_the_batch(family: str) -> None:
    """The same seeds give the same ids alone, in a batch, in batches of 5, and with kept KV."""
    model = build((KEPT | REFILLED)[family]())
    asked = [(prompt(i, 3 + i % 11), MIXED[i % len(MIXED)], i) for i in range(20)]

    def run(tested: HFEngine, session: str | None = None) -> list[Sample]:
        return together(
            *(
                tested.generate(ids, sampling, seed=seed, session=session and f"{session}{seed}")
                for ids, sampling, seed in asked
            )
        )

    alone = [
        together(engine(model).generate(ids, sampling, seed=seed))[0]
        for ids, sampling, seed in asked
    ]
    kept = engine(model)
    run(kept, "s")
    for other in (run(engine(model)), run(engine(model, max_batch=5)), run(kept, "s")):
        for one, two in zip(alone, other, strict=True):
            assert one.ids == two.ids
            assert one.logp == pytest.approx(two.logp, abs=1e-4)


def test_each_token_is_the_inverse_of_the_distribution_at_one_uniform_number() -> None:
    """Ids and log-probabilities equal those worked out from plain logits, number by number."""
    model, sampling = build(KEPT["qwen3"]()), Sampling(temperature=1.3, max_tokens=6)
    tested = engine(model, stop_ids=[])
    for seed in range(10):
        ids = prompt(seed, 8)
        (sample,) = together(tested.generate(ids, sampling, seed=seed))
        numbers = random.Random(seed)
        for i, token in enumerate(sample.ids):
            logp = (plain_logits(model, [*ids, *sample.ids[:i]]) / 1.3).log_softmax(-1)
            sums = logp.double().exp().cumsum(-1)
            assert token == int((sums <= numbers.random() * sums[-1]).sum())
            assert sample.logp[i] == pytest.approx(float(logp[token]), abs=1e-4)


def kept_by_hand(weights: list[float], top_k: int, top_p: float) -> set[int]:
    """The nucleus by definition, in whole numbers of weight."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: top_k or None]
    total, chosen, mass = sum(weights[i] for i in order), set(), 0.0
    for i in order:
        if mass >= top_p * total:
            break
        chosen.add(i)
        mass += weights[i]
    return chosen


@given(
    weights=st.lists(st.integers(1, 64), min_size=1, max_size=12),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]),
)
def test_nucleus_by_definition(weights: list[int], top_k: int, top_p: float) -> None:
    """top-k first, then the fewest tokens that reach top-p of what is left; ties by id."""
    row = torch.tensor([weights], dtype=torch.float32)
    limits = torch.tensor([[top_k or 1 << 31]]), torch.tensor([[top_p]])
    result = batch.nucleus(row, *limits)[0]
    inside = set(result.nonzero().flatten().tolist())
    assert inside == kept_by_hand([float(w) for w in weights], top_k, top_p)
    assert all(result[i] == weights[i] for i in inside)


def test_a_row_that_asked_for_everything_keeps_its_tail() -> None:
    """Beside a row with a nucleus, a token far below fp32 rounding is still there."""
    row = torch.tensor([[1.0, 1e-9], [1.0, 1e-9]])
    kept = batch.nucleus(row, torch.tensor([[1 << 31]] * 2), torch.tensor([[1.0], [0.5]]))
    assert (kept > 0).tolist() == [[True, True], [True, False]]


def test_rows_with_and_without_a_nucleus_share_a_batch() -> None:
    """top_k=1 always draws the likeliest token, whatever the row beside it does."""
    model = build(KEPT["llama"]())
    tested, ids = engine(model), prompt(1, 6)
    narrow = Sampling(temperature=5, top_k=1, max_tokens=1)
    wide = Sampling(temperature=5, max_tokens=1)
    seen = set()
    for seed in range(8):
        one, two = together(
            tested.generate(ids, narrow, seed=seed), tested.generate(ids, wide, seed=seed)
        )
        assert list(one.ids) == plain_greedy(model, ids, 1)
        seen.add(two.ids)
    assert len(seen) > 4


def test_ties_go_to_the_lowest_id() -> None:
    """A head of zeros makes every token equally likely."""
    model = build(KEPT["llama"]())
    nn.init.zeros_(model.lm_head.weight)
    (sample,) = together(engine(model).generate([5], Sampling(temperature=0, max_tokens=2)))
    assert sample.ids == (0, 0)
    assert sample.logp == pytest.approx([-math.log(61)] * 2)


@pytest.mark.parametrize("family", [*KEPT, *REFILLED])
def test_score_gives_the_log_probabilities_of_the_sampler(family: str) -> None:
    """At temperature 1 scoring the sampled ids returns what generation returned."""
    tested = engine(build((KEPT | REFILLED)[family]()), budget=64)
    results = together(*(episode(tested, i, 3, Sampling(max_tokens=4)) for i in range(5)))
    pairs = [pair for prompts, samples in results for pair in zip(prompts, samples, strict=True)]
    requests = [
        ScoreRequest([*ids, *sample.ids], range(len(ids), len(ids) + len(sample.ids)))
        for ids, sample in pairs
    ]
    scores = asyncio.run(tested.score([*requests, ScoreRequest([1, 2], [])]))
    for (_, sample), score in zip(pairs, scores, strict=False):
        np.testing.assert_allclose(score.logp, sample.logp, atol=1e-4)
        assert (score.entropy > 0).all() and (score.entropy <= math.log(61) + 1e-5).all()
    assert len(scores[-1].logp) == 0 and tested.score_now([]) == []


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (ScoreRequest([1, 2], [0]), r"positions must lie in 1\.\.1"),
        (ScoreRequest([1, 2], [2]), r"positions must lie in 1\.\.1"),
        (ScoreRequest([1, 2, 3], [2, 1]), "positions must increase"),
        (ScoreRequest([1, 61], [1]), r"ids 1\.\.61 exceed 0\.\.60"),
        (ScoreRequest([1] * 161, [1]), "161 ids exceed max_position_embeddings=160"),
    ],
)
def test_scoring_refuses_by_number(request_: ScoreRequest, problem: str) -> None:
    """The message names the request that is wrong."""
    with pytest.raises(EngineError, match=f"score request 1: {problem}"):
        engine().score_now([ScoreRequest([1, 2], [1]), request_])


def test_waiting_requests_share_a_forward() -> None:
    """16 concurrent requests: one prefill, then one forward per further token."""
    model = build(KEPT["llama"]())
    tested = engine(model, stop_ids=[])
    with forwards(model) as ran:
        calls = (tested.generate(prompt(i, 4 + i % 3), GREEDY) for i in range(16))
        together(*calls)
    assert ran == [sum(4 + i % 3 for i in range(16)), 16, 16]


@pytest.mark.parametrize("gap", [1, 2])
def test_requests_that_keep_coming_share_a_forward(gap: int) -> None:
    """The queue must be quiet for two passes of the loop: environments differ in their passes."""
    model = build(KEPT["llama"]())
    tested = engine(model)

    async def late(passes: int) -> None:
        for _ in range(passes):
            await asyncio.sleep(0)
        await tested.generate([passes, 1], Sampling(max_tokens=1))

    with forwards(model) as ran:
        together(*(late(gap * i) for i in range(8)))
    assert ran == [16]


def test_rows_leave_the_batch_when_they_are_done() -> None:
    """Three neighbours and nearly so (1, 2, 5 of 8), then two, then the longest one alone."""
    model = build(KEPT["llama"]())
    tested = engine(model, stop_ids=[])
    lengths = [1, 9, 2, 1, 1, 3, 1, 1]
    asked = [Sampling(temperature=0, max_tokens=n) for n in lengths]
    with forwards(model) as ran:
        samples = together(
            *(tested.generate(prompt(i, 5), s, session=str(i)) for i, s in enumerate(asked))
        )
    assert [s.usage.output for s in samples] == lengths
    assert ran == [40, 3, 2, 1, 1, 1, 1, 1, 1]
    for i, sample in enumerate(samples):
        assert list(sample.ids) == plain_greedy(model, prompt(i, 5), lengths[i])


def test_a_stop_id_ends_a_response_and_is_part_of_it() -> None:
    """Ids include the end, text does not show special tokens."""
    model = build(KEPT["llama"]())
    first = plain_greedy(model, [7, 8], 1)[0]
    ended, open_ = together(
        engine(model, stop_ids=[first]).generate([7, 8], GREEDY),
        engine(model, stop_ids=[]).generate([7, 8], GREEDY),
    )
    assert (ended.ids, ended.stop, ended.usage.output) == ((first,), "stop", 1)
    assert (len(open_.ids), open_.stop, open_.ids[0]) == (3, "length", first)
    assert ended.text == WORDS[first]
    nn.init.zeros_(model.lm_head.weight)
    model.lm_head.weight.data[END] = 1000 * model.model.norm(torch.ones(64))
    model.lm_head.weight.data[END] = model(
        input_ids=torch.tensor([[7, 8]]), output_hidden_states=True
    ).hidden_states[-1][0, -1]
    (sample,) = together(engine(model).generate([7, 8], GREEDY))
    assert (sample.ids, sample.text, sample.stop) == ((END,), "", "stop")


def test_ends_of_another_tokenizer_are_not_taken_over() -> None:
    """A bare Llama configuration calls id 2 the end, which is a word here."""
    model = build(KEPT["llama"]())
    assert model.generation_config.eos_token_id == 2
    assert engine(model).stop_ids == {END}
    silent = tokenizer()
    silent.eos_token = None
    (note,) = HFEngine(model, silent).capabilities.notes
    assert "every response runs to max_tokens" in note


@pytest.mark.parametrize("call", [0, 1_000_000, 1 << 40])
@pytest.mark.parametrize("family", KEPT)
def test_uneven_chunks_are_read_without_padding(
    family: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt, short ones and answers that go on share a forward, however it is cut up."""
    monkeypatch.setitem(spans.CALL_BYTES, "cpu", call)
    model = build(KEPT[family]())
    tested = engine(model, stop_ids=[])
    prompts = [prompt(i, 140 if i == 4 else 3 + i % 2) for i in range(12)]

    async def ask(number: int) -> Sample:
        for _ in range(15 * (number % 3)):
            await asyncio.sleep(0)
        return await tested.generate(prompts[number], longer(9), session=f"{number}")

    with forwards(model) as ran:
        samples = together(*(ask(i) for i in range(12)))
    assert sum(ran) == sum(map(len, prompts)) + 12 * 8
    for ids, sample in zip(prompts, samples, strict=True):
        plain = plain_greedy(model, ids, 9)  # ends with the end, where the engine goes on
        assert len(sample.ids) == 9 and list(sample.ids)[: len(plain)] == plain


def test_large_prefills_take_several_forwards() -> None:
    """No forward has more tokens than the budget, and each row gets its own answer."""
    model = build(KEPT["llama"]())
    tested = engine(model, stop_ids=[], budget=64)
    with forwards(model) as ran:
        samples = together(*(tested.generate(prompt(i, 26 + i), longer(2)) for i in range(5)))
    assert ran == [30 + 29, 28 + 27, 26, 5]
    for i, sample in enumerate(samples):
        assert list(sample.ids) == plain_greedy(model, prompt(i, 26 + i), 2)


def weights_change(tested: HFEngine, publish: Callable[[int], None]) -> tuple[Sample, list[int]]:
    """Second turn of a session between whose turns the weights changed; its answer and its ids."""
    ids = prompt(3, 30)
    (first,) = together(tested.generate(ids, GREEDY, session="a"))
    tested.model.load_state_dict(build(KEPT["llama"](), seed=9).state_dict())
    publish(7)
    ids = [*ids, *first.ids, 5, 6]
    (second,) = together(tested.generate(ids, Sampling(temperature=0, max_tokens=9), session="a"))
    return second, ids


def test_publish_drops_what_old_weights_computed() -> None:
    """After new weights everything is computed again."""
    tested = engine(stop_ids=[])
    sample, ids = weights_change(tested, tested.publish)
    assert sample.version == 7
    assert (sample.usage.input, sample.usage.cache_read) == (35, 0)
    assert list(sample.ids) == plain_greedy(tested.model, ids, 9)


def test_stale_kv_would_be_seen() -> None:
    """Planted fault: slots that survive new weights change the answer of the test above."""
    tested = engine(stop_ids=[])
    sample, ids = weights_change(tested, lambda version: Engine.publish(tested, version))
    assert sample.usage.cache_read == 32
    assert list(sample.ids) != plain_greedy(tested.model, ids, 9)


def test_the_session_used_longest_ago_makes_room() -> None:
    """Two slots, three sessions: b is forgotten, a and c are kept; answers stay right."""
    tested = engine(max_slots=2, stop_ids=[])
    one = Sampling(temperature=0, max_tokens=1)

    def ask(session: str, ids: list[int]) -> int:
        (sample,) = together(tested.generate(ids, one, session=session))
        assert list(sample.ids) == plain_greedy(tested.model, ids, 1)
        return sample.usage.cache_read

    a, b, c = (prompt(i, 5) for i in range(3))
    assert [ask("a", a), ask("b", b), ask("a", [*a, 1]), ask("c", c)] == [0, 0, 5, 0]
    assert [ask("a", [*a, 1, 2]), ask("c", [*c, 1]), ask("b", [*b, 1])] == [6, 5, 0]


def test_more_sessions_than_slots_stay_right() -> None:
    """Batches are cut to the slots, and slots of the running batch are never taken."""
    model = build(KEPT["qwen3"]())
    tested = engine(model, max_slots=3)
    for prompts, samples in together(*(episode(tested, i, 4, GREEDY, pauses=1) for i in range(8))):
        for ids, sample in zip(prompts, samples, strict=True):
            assert list(sample.ids) == plain_greedy(model, ids, 3)


def test_release_forgets_and_others_move_up() -> None:
    """A released session starts anew; those that remain keep theirs, wherever it lies now."""
    tested = engine(stop_ids=[])
    one = Sampling(temperature=0, max_tokens=1)
    prompts = {str(i): prompt(i, 6) for i in range(9)}

    def turn(names: Sequence[str]) -> list[Sample]:
        return together(*(tested.generate(prompts[n], one, session=n) for n in names))

    turn(list(prompts))
    for name in "0135":
        tested.release(name)
    tested.release("nobody")
    for name in prompts:
        prompts[name] = [*prompts[name], 3, 4]
    with forwards(tested.model) as ran:
        left = turn("24678")
        assert ran == [10]
    for name, sample in zip("24678", left, strict=True):
        assert (sample.usage.input, sample.usage.cache_read) == (2, 6)
        assert list(sample.ids) == plain_greedy(tested.model, prompts[name], 1)
    assert [s.usage.cache_read for s in turn("01")] == [0, 0]


def test_only_the_common_prefix_is_reused() -> None:
    """An edited history is computed from the first difference on; the same prompt from its end."""
    tested = engine(stop_ids=[])
    ids = prompt(1, 12)
    reads = []
    for asked in (ids, ids, [*ids[:7], 59, 3], ids[:4], [*ids[:4], 9]):
        (sample,) = together(tested.generate(asked, GREEDY, session="a"))
        assert list(sample.ids) == plain_greedy(tested.model, asked, 3)
        reads.append(sample.usage.cache_read)
    assert reads == [0, 11, 7, 3, 4]


def test_a_session_twice_in_one_batch_is_harmless() -> None:
    """Two requests of one session at once do not write into each other's slot."""
    tested = engine(stop_ids=[])
    for _ in range(2):
        both = [prompt(1, 9), prompt(2, 7)]
        samples = together(*(tested.generate(ids, GREEDY, session="a") for ids in both))
        for ids, sample in zip(both, samples, strict=True):
            assert list(sample.ids) == plain_greedy(tested.model, ids, 3)


def test_without_reuse_nothing_is_kept() -> None:
    """``reuse_kv=False`` computes every prompt anew."""
    tested = engine(reuse_kv=False)
    for prompts, samples in together(*(episode(tested, i, 3, GREEDY) for i in range(4))):
        for ids, sample in zip(prompts, samples, strict=True):
            assert sample.usage.cache_read == 0
            assert list(sample.ids) == plain_greedy(tested.model, ids, 3)


@pytest.mark.parametrize(
    ("ids", "sampling", "problem"),
    [
        (
            prompt(1, 158),
            GREEDY,
            r"158 prompt tokens and max_tokens=3 do not fit into max_position_embeddings=160",
        ),
        ([], GREEDY, "0 prompt tokens"),
        ([1], Sampling(max_tokens=0), "max_tokens=0"),
        ([1, 61], GREEDY, r"prompt ids 1\.\.61 exceed 0\.\.60"),
        ([1, -1], GREEDY, r"prompt ids -1\.\.1 exceed"),
        ([1], Sampling(temperature=-1), "temperature >= 0"),
        ([1], Sampling(top_p=0), "top_p <= 1"),
    ],
)
def test_a_bad_request_fails_alone(ids: list[int], sampling: Sampling, problem: str) -> None:
    """Its neighbours in the batch get their answers."""
    tested = engine(stop_ids=[])
    before, bad, after = together(
        tested.generate([1, 2], GREEDY),
        tested.generate(ids, sampling, session="bad"),
        tested.generate([3, 4], GREEDY),
    )
    assert list(before.ids) == plain_greedy(tested.model, [1, 2], 3)
    assert list(after.ids) == plain_greedy(tested.model, [3, 4], 3)
    with pytest.raises(EngineError, match=problem):
        raise bad


def test_a_full_context_is_allowed() -> None:
    """Prompt and response that fill the positions exactly."""
    tested = engine(stop_ids=[])
    (sample,) = together(tested.generate(prompt(1, 157), GREEDY))
    assert list(sample.ids) == plain_greedy(tested.model, prompt(1, 157), 3)


def test_an_unexpected_error_fails_its_batch_and_nothing_else() -> None:
    """Everybody in the batch hears of it; the next batch, of kept sessions too, is right."""
    tested = engine(max_batch=2, stop_ids=[])
    ids = [prompt(i, 6) for i in range(4)]
    names = ["a", "b", "c", "d"]
    together(*(tested.generate(i, GREEDY, session=n) for i, n in zip(ids, names, strict=True)))
    calls = []

    def explode(_module: nn.Module, _inputs: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")

    hook = tested.model.model.layers[1].register_forward_pre_hook(explode)
    longer = [[*i, 1, 2] for i in ids]
    results = together(
        *(tested.generate(i, GREEDY, session=n) for i, n in zip(longer, names, strict=True))
    )
    hook.remove()
    for failed in results[:2]:
        assert isinstance(failed, EngineError) and isinstance(failed.__cause__, MemoryError)
        assert str(failed) == "batch of 2 failed: MemoryError: no room"
    assert results[0] is not results[1]
    for asked, sample in zip(longer[2:], results[2:], strict=True):
        assert list(sample.ids) == plain_greedy(tested.model, asked, 3)
    for asked, name in zip(longer, names, strict=True):
        (sample,) = together(tested.generate(asked, GREEDY, session=name))
        assert list(sample.ids) == plain_greedy(tested.model, asked, 3)


def test_numbers_that_are_not_finite_fail_and_leave_no_trace() -> None:
    """NaN in the weights is an error, not a sample; after repair the same session is right."""
    tested = engine(stop_ids=[])
    weight = tested.model.model.layers[0].mlp.up_proj.weight
    good = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    for sampling in (GREEDY, Sampling(max_tokens=3)):
        (failed,) = together(tested.generate([1, 2, 3], sampling, session="a"))
        assert isinstance(failed, EngineError) and "not finite" in str(failed)
    weight.data.copy_(good)
    (sample,) = together(tested.generate([1, 2, 3, 4], GREEDY, session="a"))
    assert sample.usage.cache_read == 0
    assert list(sample.ids) == plain_greedy(tested.model, [1, 2, 3, 4], 3)


def test_a_cancelled_request_does_not_disturb() -> None:
    """Cancelled before its batch: it is left out, the others get their answers."""
    tested = engine(stop_ids=[])

    async def run() -> list[Sample]:
        tasks = [asyncio.ensure_future(tested.generate([i, 1], GREEDY)) for i in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with forwards(tested.model) as ran:
        results = asyncio.run(run())
    assert ran[0] == 6
    assert isinstance(results[1], asyncio.CancelledError)
    for i in (0, 2, 3):
        assert list(results[i].ids) == plain_greedy(tested.model, [i, 1], 3)


def test_an_interrupted_loop_leaves_the_engine_usable() -> None:
    """What waited in a loop that was stopped never runs; the next loop starts afresh."""
    tested = engine(stop_ids=[])

    async def interrupted() -> None:
        waiting = asyncio.ensure_future(tested.generate([1, 2], GREEDY))
        await asyncio.sleep(0)
        assert not waiting.done()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(interrupted())
    with forwards(tested.model) as ran:
        (sample,) = together(tested.generate([3, 4], GREEDY))
    assert ran == [2, 1, 1]
    assert list(sample.ids) == plain_greedy(tested.model, [3, 4], 3)


def test_a_loop_that_was_closed_under_way_leaves_the_engine_usable() -> None:
    """Nobody cancelled what waited there: its future can never be resolved and is left out."""
    tested = engine(stop_ids=[])
    loop = asyncio.new_event_loop()
    lost = loop.create_task(tested.generate([1, 2], GREEDY))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    with forwards(tested.model) as ran:
        (sample,) = together(tested.generate([3, 4], GREEDY))
    lost._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the point here
    assert not lost.done() and ran == [2, 1, 1]
    assert list(sample.ids) == plain_greedy(tested.model, [3, 4], 3)


def longer(tokens: int) -> Sampling:
    """Greedy, exactly ``tokens`` tokens where no id ends a response."""
    return Sampling(temperature=0, max_tokens=tokens)


async def drawn(ran: Sequence[object], count: int) -> None:
    """Wait until ``count`` forwards were made."""
    while len(ran) < count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_response_comes_with_its_last_token(family: str) -> None:
    """Of three that run together the first is there after 1 forward, the second after 3 of 9."""
    model = build((KEPT | REFILLED)[family]())
    tested = engine(model, stop_ids=[])
    seen: dict[int, int] = {}

    async def ask(number: int, tokens: int) -> Sample:
        sample = await tested.generate(prompt(number, 5), longer(tokens), session=str(number))
        seen[tokens] = len(ran)
        return sample

    with forwards(model) as ran:
        samples = together(ask(1, 3), ask(2, 9), ask(3, 1))
    assert seen == {1: 1, 3: 3, 9: 9} and len(ran) == 9
    for number, tokens, sample in zip((1, 2, 3), (3, 9, 1), samples, strict=True):
        assert list(sample.ids) == plain_greedy(model, prompt(number, 5), tokens)


def test_whoever_was_away_joins_those_who_still_draw() -> None:
    """One who comes back draws beside one who runs; its history was kept, both are right."""
    model = build(KEPT["qwen3"]())
    tested = engine(model, stop_ids=[])
    first, other = prompt(1, 6), prompt(2, 6)

    async def returns() -> tuple[list[int], Sample]:
        answer = await tested.generate(first, longer(1), session="a")
        again = [*first, *answer.ids, 5, 6]
        await drawn(ran, 3)
        return again, await tested.generate(again, longer(2), session="a")

    async def gone() -> None:
        await tested.generate(prompt(3, 6), longer(1), session="gone")

    with forwards(model) as ran:
        stay = tested.generate(other, longer(12), session="b")
        (again, back), _, stays = together(returns(), gone(), stay)
    assert list(stays.ids) == plain_greedy(model, other, 12)
    assert list(back.ids) == plain_greedy(model, again, 2) and back.usage.cache_read == 6
    assert len(ran) == 12, "a batch of its own would have taken two forwards more"
    assert max(ran[1:]) == 4


def test_nobody_waits_for_the_answers_of_others() -> None:
    """As many forwards as the longest of eight episodes has tokens."""
    model = build(KEPT["llama"]())
    tested = engine(model, stop_ids=[])

    async def play(number: int) -> None:
        ids = prompt(number, 6)
        for turn in range(3):
            sample = await tested.generate(
                ids, longer(1 + (number + turn) % 4), session=f"{number}"
            )
            ids = [*ids, *sample.ids, 7, 8]
        tested.release(f"{number}")

    with forwards(model) as ran:
        together(*(play(i) for i in range(8)))
    assert len(ran) == 2 + 3 + 4


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mistral"])
def test_comings_and_goings_change_no_answer(family: str) -> None:
    """Pauses, cancelled requests, sessions that are released while they run or asked twice."""
    model = build((KEPT | REFILLED)[family]())
    tested = engine(model, max_slots=6)
    given: list[tuple[list[int], int, Sample]] = []

    async def live(number: int) -> None:
        source, ids, name = random.Random(number), prompt(number, 4), f"{number % 9}"
        for _ in range(6):
            ids = [*ids, *source.choices(range(END), k=source.randrange(1, 9))]
            tokens = source.randrange(1, 9)
            task = asyncio.ensure_future(tested.generate(ids, longer(tokens), session=name))
            chance = source.random()
            for _ in range(source.randrange(1, 9)):
                await asyncio.sleep(0)
            if chance < 0.2:
                task.cancel()
            if chance < 0.4:
                tested.release(name)
            (answer,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(answer, Sample):
                given.append((ids, tokens, answer))
                ids = [*ids, *answer.ids]
            else:
                assert isinstance(answer, asyncio.CancelledError)
            for _ in range(source.randrange(3) * 7):
                await asyncio.sleep(0)

    assert together(*(live(i) for i in range(12))) == [None] * 12
    assert len(given) > 40
    for ids, tokens, answer in given:
        assert list(answer.ids) == plain_greedy(model, ids, tokens)


def test_a_slot_in_use_is_not_given_away() -> None:
    """The session that waits makes room, not one that runs; a released one does at its end."""
    kv = SlotKV(None, torch.device("cpu"), max_slots=2, keep=True, budget=64)
    (a,), (b,) = kv.open(["a"], [[1, 2]]), kv.open(["b"], [[1]])
    kv.close([b])
    (c,) = kv.open(["c"], [[3]])
    assert (a.index, c.index) == (0, 1)
    kv.release("a")
    kv.close([c])
    (d,) = kv.open(["d"], [[4]])
    assert (a.index, d.index) == (0, 1), "c made room; a still runs"
    kv.close([a, d])
    (e,) = kv.open(["e"], [[5]])
    assert {d.index, e.index} == {0, 1}


def test_samples_do_not_depend_on_when_they_were_asked() -> None:
    """The same seeds give the same ids, whoever is under way at the time."""
    model = build(KEPT["llama"]())

    def play(slow: int) -> list[list[tuple[int, ...]]]:
        tested = engine(model)

        async def one(number: int) -> list[tuple[int, ...]]:
            ids, answers = prompt(number, 5), []
            for turn in range(5):
                for _ in range(number * turn * slow % 11):
                    await asyncio.sleep(0)
                sample = await tested.generate(
                    ids, Sampling(max_tokens=7), seed=number * 9 + turn, session=str(number)
                )
                answers.append(sample.ids)
                ids = [*ids, *sample.ids, number, turn]
            return answers

        with forwards(model) as ran:
            answers = together(*(one(i) for i in range(9)))
        batches.append(ran)
        return answers

    batches: list[list[int]] = []
    assert play(0) == play(3) == play(7)
    assert batches[0] != batches[1] != batches[2]


def test_a_row_that_is_cancelled_leaves_its_batch() -> None:
    """From the next token on the others are alone, and right."""
    tested = engine(stop_ids=[])

    async def run() -> list[Any]:
        tasks = [
            asyncio.ensure_future(tested.generate([i, 1], longer(6), session=str(i)))
            for i in range(3)
        ]
        await drawn(ran, 2)
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with forwards(tested.model) as ran:
        *answers, cancelled = asyncio.run(run())
    assert ran[:2] == [6, 3] and ran[3:] == [2, 2, 2]
    assert isinstance(cancelled, asyncio.CancelledError)
    for i, answer in enumerate(answers):
        assert list(answer.ids) == plain_greedy(tested.model, [i, 1], 6)


def test_an_error_leaves_what_was_delivered_and_who_waits() -> None:
    """Forward 3 fails: the one that ended before has its sample, the one that waits gets it."""
    tested = engine(max_batch=2, stop_ids=[])
    model, calls = tested.model, []

    def explode(_module: nn.Module, _inputs: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")

    hook = model.model.layers[1].register_forward_pre_hook(explode)
    done, failed, too, waited = together(
        tested.generate([1, 2], longer(1), session="a"),
        tested.generate([3, 4], longer(9), session="b"),
        tested.generate([4, 3], longer(9), session="c"),
        tested.generate([5, 6], longer(2), session="d"),
    )
    hook.remove()
    assert list(done.ids) == plain_greedy(model, [1, 2], 1)
    for error in (failed, too):
        assert isinstance(error, EngineError) and "batch of 2 failed: MemoryError" in str(error)
    assert list(waited.ids) == plain_greedy(model, [5, 6], 2)
    again = [1, 2, *done.ids, 7]
    (sample,) = together(tested.generate(again, longer(3), session="a"))
    assert sample.usage.cache_read == 0
    assert list(sample.ids) == plain_greedy(model, again, 3)


def test_a_row_that_is_not_finite_fails_alone() -> None:
    """One row's hidden states become NaN: it hears of it, the others start again and are right."""
    tested = engine(stop_ids=[])
    calls: list[int] = []

    def poison(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.shape[1])
        if len(calls) == 3:
            output = output.clone()
            output[0, 1] = float("nan")
        return output

    hook = tested.model.model.norm.register_forward_hook(poison)
    asked = [prompt(i, 5) for i in range(3)]
    first, second, third = together(*(tested.generate(ids, longer(5)) for ids in asked))
    hook.remove()
    assert isinstance(second, EngineError) and "not finite" in str(second)
    assert calls == [15, 3, 3, 10, 2, 2, 2, 2]
    for sample, ids in ((first, asked[0]), (third, asked[2])):
        assert list(sample.ids) == plain_greedy(tested.model, ids, 5)


def test_new_weights_under_way_start_responses_again() -> None:
    """A response is all of one version: none of its tokens is of weights that are gone."""
    tested, sampling = engine(stop_ids=[]), Sampling(max_tokens=6)
    new = engine(build(KEPT["llama"](), seed=9), stop_ids=[])
    (wanted,) = together(new.generate([1, 2, 3], sampling, seed=4))

    async def run() -> Sample:
        task = asyncio.ensure_future(tested.generate([1, 2, 3], sampling, seed=4, session="a"))
        await drawn(ran, 3)
        tested.model.load_state_dict(new.model.state_dict())
        tested.publish(5)
        return await task

    with forwards(tested.model) as ran:
        sample = asyncio.run(run())
    assert (sample.version, sample.ids) == (5, wanted.ids)
    assert sample.logp == pytest.approx(wanted.logp, abs=1e-4)
    assert len(sample.ids) == len(sample.logp) == 6


def test_an_interrupt_under_way_leaves_the_engine_usable() -> None:
    """A loop that ends between two tokens takes its rows along; the next loop starts afresh."""
    tested = engine(stop_ids=[])

    async def interrupted() -> None:
        lost.append(asyncio.ensure_future(tested.generate([1, 2], longer(9), session="a")))
        await drawn(ran, 3)
        raise KeyboardInterrupt

    lost: list[asyncio.Future[Sample]] = []
    with forwards(tested.model) as ran:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(interrupted())
        assert lost[0].cancelled()
        ran.clear()
        (sample,) = together(tested.generate([3, 4], GREEDY, session="a"))
    assert ran == [2, 1, 1]
    assert list(sample.ids) == plain_greedy(tested.model, [3, 4], 3)


def test_a_loop_that_was_closed_between_two_tokens_leaves_the_engine_usable() -> None:
    """Its row can never be answered: it leaves before the next batch begins."""
    tested = engine(stop_ids=[])
    loop = asyncio.new_event_loop()
    lost = loop.create_task(tested.generate([1, 2], longer(9), session="a"))
    with forwards(tested.model) as ran:
        loop.run_until_complete(drawn(ran, 2))
        loop.close()
        ran.clear()
        samples = together(*(tested.generate([i, 4], GREEDY, session="a") for i in (3, 5)))
    lost._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the point here
    assert not lost.done() and ran == [4, 2, 2]
    for i, sample in zip((3, 5), samples, strict=True):
        assert list(sample.ids) == plain_greedy(tested.model, [i, 4], 3)


def test_closing_under_way_tells_those_who_run() -> None:
    """Rows between two tokens and requests in the queue are refused alike."""
    tested = engine(max_batch=1, stop_ids=[])

    async def run() -> list[Any]:
        tasks = [asyncio.ensure_future(tested.generate([i, 2], longer(9))) for i in (1, 2)]
        await drawn(ran, 2)
        await tested.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with forwards(tested.model) as ran:
        for error in asyncio.run(run()):
            assert isinstance(error, EngineError) and "closed" in str(error)
    assert len(ran) == 2


def test_the_module_is_left_as_it_was() -> None:
    """Dropout is off while generating; every submodule has its own mode afterwards."""
    model = build(KEPT["gpt2"]()).train()
    model.transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    tested = engine(model, stop_ids=[])
    one, two = (together(tested.generate([1, 2, 3], GREEDY))[0] for _ in range(2))
    tested.score_now([ScoreRequest([1, 2], [1])])
    assert [module.training for module in model.modules()] == modes
    assert one.logp == pytest.approx(two.logp)
    assert list(one.ids) == plain_greedy(model.eval(), [1, 2, 3], 3)
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()  # still trainable


def test_unknown_changes_of_the_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does something of its own after the head cannot be run by its parts."""
    model = build(KEPT["llama"]())
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(EngineError, match="changes its logits"):
        engine(model)


def test_prompts_may_be_arrays() -> None:
    """Numpy arrays and tensors of ids are prompts too."""
    tested = engine(stop_ids=[])
    ids = [4, 5, 6]
    one, two, three = together(
        tested.generate(ids, GREEDY),
        tested.generate(np.array(ids), GREEDY),  # type: ignore[arg-type]
        tested.generate(torch.tensor(ids), GREEDY),  # type: ignore[arg-type]
    )
    assert one.ids == two.ids == three.ids


def test_a_closed_engine_refuses() -> None:
    """Requests that wait and requests that come are told so."""
    tested = engine()

    async def run() -> list[Any]:
        waiting = asyncio.ensure_future(tested.generate([1, 2], GREEDY))
        await asyncio.sleep(0)
        await tested.close()
        late = asyncio.ensure_future(tested.generate([1, 2], GREEDY))
        return await asyncio.gather(waiting, late, return_exceptions=True)

    for error in asyncio.run(run()):
        assert isinstance(error, EngineError) and "closed" in str(error)


def test_capabilities() -> None:
    """Weights in this process can do everything."""
    able = engine().capabilities
    assert able.ids and able.sampled and able.full and able.train
