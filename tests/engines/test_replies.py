"""When a provider is asked again, and what its answers and errors are read as; no network."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.engines import patience, replies
from agentdistill.engines.base import Message
from agentdistill.engines.patience import Failure, Patience
from agentdistill.records import Usage

KEY, SECRET = "TEST_PROVIDER_KEY", "sk-0123456789abcdef-secret"
HI = [Message("system", "Be brief."), Message("user", "hi")]


# -- patience -----------------------------------------------------------------


def test_retry_after_in_every_form() -> None:
    asked = patience.asked_to_wait
    assert asked({"Retry-After": "2.5"}) == 2.5 and asked({"retry-after-ms": "40"}) == 0.04
    assert asked({}) is None and asked({"Retry-After": "soon"}) is None
    assert asked({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert (asked({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}) or 0) > 1e9


def test_an_exhausted_rate_limit_says_for_how_long() -> None:
    reset = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"}
    assert patience.exhausted_for(reset) == 62
    tokens = {"X-RateLimit-Remaining-Tokens": "0", "X-RateLimit-Reset-Tokens": "350ms"}
    assert patience.exhausted_for(
        {**reset, **tokens, "x-ratelimit-reset-requests": "?"}
    ) == pytest.approx(0.35)
    assert patience.exhausted_for({"x-ratelimit-remaining-requests": "3"}) == 0


def test_retries_share_one_budget_that_answers_refill() -> None:
    shared = Patience(retries=3, budget=2)
    broken = Failure(500, "no", again=True)
    assert shared.another(broken, 1) and shared.another(broken, 1)
    assert not shared.another(broken, 1)  # the budget is empty
    for _ in range(11):
        shared.answered({})
    assert shared.another(broken, 3)
    assert not Patience(retries=3).another(broken, 4)
    assert not Patience().another(Failure(400, "no", again=False), 1)
    assert not Patience().another(Failure(429, "no", again=True, wait=1e4), 1)


# -- what was said ------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(["prompt_tokens", "completion_tokens", "cache_creation_input_tokens"]),
        st.one_of(st.none(), st.integers(-9, 10**9), st.floats(), st.text(max_size=3)),
    ),
    st.text(min_size=1, max_size=40),
)
def test_counts_stay_possible_whatever_a_provider_says(counts: dict[str, Any], text: str) -> None:
    most = replies.worst_case(HI, (), 1, 8)
    answer = {"choices": [{"message": {"content": text}}], "usage": counts}
    reply = replies.read(answer, HI, most)
    usage = reply.usage
    used = usage.input + usage.cache_read + usage.cache_write
    assert 0 < used <= most.input
    assert 0 < usage.output <= max(most.output, len(text.encode(errors="replace")) + 200)
    if reply.estimated:
        return
    assert (used, usage.output) == (counts["prompt_tokens"], counts["completion_tokens"])


def test_usage_in_four_classes() -> None:
    most = Usage(input=10_000, output=100)
    counts = {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 60},
        "cache_creation_input_tokens": 30,
    }
    answer = {"choices": [{"message": {"content": "x"}}], "usage": counts}
    assert replies.read(answer, HI, most).usage == Usage(10, 60, 30, 7)
    counts["prompt_tokens"] = 80  # more from the cache than there was
    assert replies.read(answer, HI, most).estimated


def test_samples_of_one_answer_add_up() -> None:
    choices = tuple(replies.Choice(str(number), "stop") for number in range(3))
    reply = replies.Reply(choices, Usage(10, 20, 30, 8))
    samples = reply.samples()
    assert [s.usage.input for s in samples] == [10, 0, 0]
    assert sum(s.usage.output for s in samples) == 8 and samples[0].usage.input == 10
    assert replies.Reply.of_json(json.loads(json.dumps(reply.to_json()))) == reply


def test_secrets_leave_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setenv("SOME_API_KEY", "sk-somebody-elses-0123456789")
    replies.guard(KEY)
    assert replies.scrub(f"bad key {SECRET}!") == f"bad key <{KEY}>!"
    assert replies.scrub("sk-somebody-elses-0123456789") == "<SOME_API_KEY>"
    assert replies.scrub("sk-") == "sk-"
