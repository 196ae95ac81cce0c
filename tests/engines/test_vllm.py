"""The vLLM engine against recorded answers, a small model behind its protocol, and faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from agentdistill.engines.base import Message, Sampling, ScoreRequest
from agentdistill.engines.endpoint import Endpoint, ServerError
from agentdistill.engines.hf import HFEngine
from agentdistill.engines.patience import Patience
from agentdistill.engines.probing import by_ids
from agentdistill.engines.vllm import VLLMEngine
from agentdistill.errors import ConfigError, EngineError
from tests.vllm_double import Double, Living, Replay, model, tokenizer

PROMPT = [57, 3, 14, 15, 9, 2, 6, 59, 58]
DRAWN, GREEDY, SHORT = Sampling(max_tokens=12), Sampling(0.0, max_tokens=6), Sampling(max_tokens=2)
SCORED = [ScoreRequest([5, 3, 1, 4, 1, 5, 9], [1, 3, 6]), ScoreRequest(PROMPT, range(1, 9))]
LONG = [5] * 200
MESSAGES = [Message("user", "w3 w14")]


def ask(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


@pytest.fixture(scope="module")
def here() -> HFEngine:
    """The recorded model, in this process."""
    return HFEngine(model(), tokenizer())


@pytest.fixture
def replay() -> Iterator[tuple[VLLMEngine, Double]]:
    with Double(Replay()) as double:
        yield VLLMEngine(Endpoint(double.url), tokenizer(), top_k=7), double


def engine(url: str, **options: Any) -> VLLMEngine:
    patience = Patience(2, base=0.01)
    return VLLMEngine(Endpoint(url, timeout=5.0, patience=patience, **options), tokenizer())


def _gap(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


# -- what a real server said ----------------------------------------------------------------------


def test_recorded_samples_are_as_likely_as_the_local_model_says(replay, here) -> None:
    there, double = replay
    for sampling, seed in ((DRAWN, 3), (GREEDY, 0)):
        sample = ask(there.generate(PROMPT, sampling, seed=seed))
        whole = [*PROMPT, *sample.ids]
        ours = here.score_now([ScoreRequest(whole, range(len(PROMPT), len(whole)))])[0]
        assert _gap(sample.logp, ours.logp) < 1e-4
        assert sample.stop == ("stop" if sample.ids[-1] == 59 else "length")
        assert sample.usage.input == len(PROMPT) and sample.usage.output == len(sample.ids)
    greedy = ask(here.generate(PROMPT, GREEDY))
    assert (sample.ids, sample.text) == (greedy.ids, greedy.text)
    _, payload = double.asked[-1]
    assert payload["prompt"] == PROMPT and "messages" not in payload
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} <= payload.keys()


def test_recorded_scores_and_alternatives_are_the_local_scorers(replay, here) -> None:
    there, double = replay
    mine = here.score_now(SCORED, 4)
    for top_k in (0, 4):
        theirs = ask(there.score(SCORED, top_k=top_k))
        assert max(_gap(a.logp, b.logp) for a, b in zip(theirs, mine, strict=True)) < 1e-4
    for a, b in zip(theirs, mine, strict=True):
        assert a.top_ids.shape == (len(a.logp), 4)
        assert (a.top_ids == b.top_ids).all() and _gap(a.top_logp, b.top_logp) < 1e-4
    salts = [p["cache_salt"] for path, p in double.asked if p and "prompt_logprobs" in p]
    assert len(set(salts)) == len(salts) == 4  # one request a sequence, none reads the cache


def test_recorded_chat_and_refusals(replay) -> None:
    there, _ = replay
    answers = ask(there.chat(MESSAGES, SHORT, n=2))
    assert len(answers) == 2 and sum(a.usage.output for a in answers) == 4
    with pytest.raises(ServerError, match="7") as refused:
        ask(there.score(SCORED[:1], top_k=7))
    assert refused.value.status == 400
    with pytest.raises(EngineError, match=r"do not fit into the 128 of .*--max-model-len"):
        ask(there.generate(LONG, SHORT))
    there.limit = None
    with pytest.raises(ServerError, match="400"):
        ask(there.generate(LONG, SHORT))


def test_a_probe_finds_what_the_recorded_server_admits(replay) -> None:
    there, _ = replay
    report = ask(by_ids(there, PROMPT, "teacher", "vllm"))
    able = report.able
    assert (able.top_k, there.top_k) == (5, 5)
    assert able.ids and able.sampled and able.text and not (able.full or able.at_ids or able.hidden)
    assert report.repeat is not None and report.repeat < 1e-4
    assert report.agree is not None and report.agree < 1e-4
    assert any("prefix caching" in note for note in able.notes)


# -- requests -------------------------------------------------------------------------------------


@pytest.fixture
def living() -> Iterator[tuple[Living, Double]]:
    behind = Living(model(), tokenizer())
    with Double(behind) as double:
        yield behind, double


def test_equal_seeds_give_equal_answers_and_a_stop_id_ends_one(living) -> None:
    there = engine(living[1].url)
    first = ask(there.generate(PROMPT, DRAWN, seed=1))
    assert first == ask(there.generate(PROMPT, DRAWN, seed=1))
    assert first.ids != ask(there.generate(PROMPT, DRAWN, seed=2)).ids
    there.stop_ids = frozenset({first.ids[3]})
    short = ask(there.generate(PROMPT, DRAWN, seed=1))
    assert short.stop == "stop" and short.ids == first.ids[: first.ids.index(first.ids[3]) + 1]


def test_another_temperature_has_no_log_probabilities(living) -> None:
    sample = ask(engine(living[1].url).generate(PROMPT, Sampling(0.5, max_tokens=3)))
    assert len(sample.ids) == 3 and np.isnan(sample.logp).all()


def test_no_more_requests_at_once_than_configured(living) -> None:
    behind, double = living
    double._answer = lambda path, payload: (time.sleep(0.02), behind(path, payload))[1]
    there = engine(double.url, concurrency=3)

    async def many() -> None:
        await asyncio.gather(*(there.generate(PROMPT, SHORT, seed=i) for i in range(9)))

    ask(many())
    assert double.at_once == 3
    ask(many())  # another event loop: new connections, nothing left of the old ones
    assert len(there.endpoint._loops) == 0


def test_a_broken_connection_is_tried_again_and_a_refusal_is_not(living) -> None:
    behind, double = living
    faults: list[tuple[int, Any]] = []
    double._answer = lambda path, payload: (
        faults.pop() if faults and path == "/v1/completions" else behind(path, payload)
    )
    there = engine(double.url)
    there.connect()
    wanted = ask(there.generate(PROMPT, SHORT, seed=1))
    faults += [(0, None), (503, {"error": {"message": "paused"}})]
    assert ask(there.generate(PROMPT, SHORT, seed=1)) == wanted
    for status, said, line in (
        (400, {"error": {"message": "bad"}}, "400: bad"),
        (500, {"detail": "dead"}, r"500: dead.*log"),
        (200, "no json", "no JSON"),
        (200, {"choices": []}, "without choices"),
    ):
        faults.append((status, said))
        with pytest.raises(EngineError, match=line):
            ask(there.generate(PROMPT, SHORT))
        assert not faults
    faults += [(0, None)] * 3
    with pytest.raises(ServerError, match="3 tries"):
        ask(there.generate(PROMPT, SHORT))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prompt_token_ids": [1]}, "changed the ids"),
        ({"token_ids": None}, "no token ids"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "1 log-probabilities for 2"),
        ({"finish_reason": "abort"}, "broke off"),
    ],
)
def test_an_answer_that_does_not_fit_is_an_error(living, change: Any, line: str) -> None:
    behind, double = living

    def other(path: str, payload: Any) -> tuple[int, Any]:
        status, said = behind(path, payload)
        if path == "/v1/completions":
            said["choices"][0].update(change)
        return status, said

    double._answer = other
    with pytest.raises(EngineError, match=line):
        ask(engine(double.url).generate(PROMPT, SHORT))


def test_scores_of_other_tokens_are_an_error(living) -> None:
    behind, double = living

    def shifted(path: str, payload: Any) -> tuple[int, Any]:
        status, said = behind(path, payload)
        if path == "/v1/completions":
            rows = said["choices"][0]["prompt_logprobs"]
            said["choices"][0]["prompt_logprobs"] = [None, None, *rows[1:-1]]
        return status, said

    double._answer = shifted
    with pytest.raises(EngineError, match="other tokens"):
        ask(engine(double.url).score(SCORED[1:]))


def test_scores_that_change_are_not_believed(living) -> None:
    """As with a prefix cache that is read where it must not be."""
    behind, double = living
    calls = iter(range(100))

    def drifting(path: str, payload: Any) -> tuple[int, Any]:
        status, said = behind(path, payload)
        if payload and "prompt_logprobs" in payload and next(calls) == 2:
            for row in said["choices"][0]["prompt_logprobs"][1:]:
                for each in row.values():
                    each["logprob"] += 0.1
        return status, said

    double._answer = drifting
    with pytest.raises(EngineError, match=r"nats apart on average.*no-enable-prefix-caching"):
        ask(by_ids(engine(double.url), PROMPT, "teacher", "vllm"))


def test_another_tokenizer_is_refused(living) -> None:
    behind, double = living
    double._answer = lambda path, payload: (
        (200, {"tokens": [1, 2]}) if path == "/tokenize" else behind(path, payload)
    )
    with pytest.raises(EngineError, match="makes other ids of the same text"):
        ask(by_ids(engine(double.url), PROMPT, "teacher", "vllm"))


def test_a_server_for_adapters_does_not_score() -> None:
    with Double(Living(model(), tokenizer(), adapters=True)) as double:
        there = engine(double.url)
        there.connect()
        assert not there.capabilities.sampled
        with pytest.raises(EngineError, match="enable-lora"):
            ask(there.score(SCORED))
        report = ask(by_ids(there, PROMPT, "teacher", "vllm"))
        assert not report.able.sampled and report.repeat is None
    assert not any(p and "prompt_logprobs" in p for _, p in double.asked)


# -- readiness and keys ---------------------------------------------------------------------------


def test_readiness_has_a_deadline_and_an_error_that_says_what_to_do() -> None:
    place = Endpoint("http://127.0.0.1:9/v1", key="models.teacher.base_url")
    there = VLLMEngine(place, tokenizer(), ready=0.3, served="big")
    began = time.monotonic()
    with pytest.raises(ServerError) as error:
        ask(there.generate(PROMPT, SHORT))
    assert 0.2 < time.monotonic() - began < 2.0
    for part in ("http://127.0.0.1:9 ", "0.3 s", "vllm serve big", "models.teacher.base_url"):
        assert part in str(error.value)


def test_it_waits_for_a_server_that_is_starting(living) -> None:
    behind, double = living
    after = time.monotonic() + 0.4
    double._answer = lambda path, payload: (
        (503, "loading") if time.monotonic() < after else behind(path, payload)
    )
    engine(double.url).connect()
    assert time.monotonic() >= after


def test_a_model_that_is_not_served_is_a_configuration_error(living) -> None:
    there = VLLMEngine(Endpoint(living[1].url), tokenizer(), served="other")
    with pytest.raises(ConfigError, match="serves base"):
        there.connect()


def test_the_key_is_sent_and_shown_nowhere(living, monkeypatch: pytest.MonkeyPatch) -> None:
    _, double = living
    monkeypatch.setenv("MY_SERVER", "s3cret-value")
    there = engine(double.url, key_env="MY_SERVER")
    ask(there.generate(PROMPT, SHORT))
    assert double.keys == {"Bearer s3cret-value"}
    double._answer = lambda path, payload: (401, {"error": {"message": "bad s3cret-value"}})
    with pytest.raises(ServerError) as error:
        ask(there.generate(PROMPT, SHORT))
    assert "s3cret" not in f"{error.value}{there!r}{there.endpoint!r}"
    assert "MY_SERVER" in str(error.value)
    monkeypatch.delenv("MY_SERVER")
    with pytest.raises(ConfigError, match="not set"):
        engine(double.url, key_env="MY_SERVER")


def test_proxies_of_the_environment_are_not_used(living, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert ask(engine(living[1].url).generate(PROMPT, SHORT)).ids


def test_an_engine_in_this_process_gives_everything(here) -> None:
    report = ask(by_ids(here, PROMPT, "student", "in process"))
    able = report.able
    assert able.full and able.hidden and able.at_ids and able.top_k == 61
    assert torch.tensor(report.agree) < 1e-4
