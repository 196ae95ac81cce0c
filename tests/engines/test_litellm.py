"""Models behind an API: the real litellm against a provider on this machine that misbehaves."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentdistill.engines import replies
from agentdistill.engines.base import Message, Sample, Sampling
from agentdistill.engines.patience import Patience
from agentdistill.errors import BudgetError, ConfigError, EngineError
from agentdistill.ledger import Ledger, Price, SpendLimits
from agentdistill.records import Usage
from agentdistill.request_cache import RequestCache
from tests.provider import Move, Provider, call, told

KEY, SECRET = "TEST_PROVIDER_KEY", "sk-0123456789abcdef-secret"
HI = [Message("system", "Be brief."), Message("user", "hi")]
SHORT = Sampling(max_tokens=8)
PRICE = Price("2", "2.5", "0.2", "10")
real = pytest.mark.litellm
pytestmark = [  # litellm's own, which it hides from everybody who does not make them errors
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def engine(provider: Provider | None, **options: Any) -> Any:
    from agentdistill.engines.litellm import LiteLLMEngine

    url = provider.url if provider else "http://127.0.0.1:9/v1"
    defaults = {"base_url": url, "key_env": KEY, "patience": Patience(base=0.01), "timeout": 10}
    model = options.pop("model", "openai/small")
    return LiteLLMEngine(model, **{**defaults, **options})


def ask(one: Any, *, n: int = 1, **options: Any) -> list[Sample]:
    return asyncio.run(one.chat(HI, SHORT, n=n, **options))


def counted(samples: Sequence[Sample]) -> tuple[int, int, int, int]:
    usages = [sample.usage for sample in samples]
    return tuple(  # type: ignore[return-value]
        sum(getattr(usage, name) for usage in usages)
        for name in ("input", "cache_read", "cache_write", "output")
    )


# -- the real client ------------------------------------------------------------------------------


@real
def test_an_answer_with_everything() -> None:
    tool = {"type": "function", "function": {"name": "walk", "parameters": {"type": "object"}}}
    walk = call("walk", '{"way": "right"}')
    move = Move(text="I go", reasoning="hm", calls=[walk], bills=Usage(5, 100, 0, 7))
    with Provider([move]) as provider:
        (sample,) = ask(engine(provider), tools=[tool], seed=2**40 + 5)
        sent = provider.asked[0]
    assert (sample.text, sample.reasoning, sample.stop) == ("I go", "hm", "stop")
    assert sample.tool_calls == (walk,) and (sample.ids, sample.logp) == ((), ())
    assert (sample.usage, sample.estimated) == (Usage(5, 100, 0, 7), False)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["tools"] == [tool] and sent["seed"] == 5 and "n" not in sent
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("small", 1.0, 8)
    assert provider.keys == [f"Bearer {SECRET}"]


@real
def test_another_format_in_the_same_four_classes() -> None:
    counts = {"input_tokens": 10, "output_tokens": 4}
    counts |= {"cache_creation_input_tokens": 20, "cache_read_input_tokens": 30}
    answer = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [{"type": "text", "text": "right"}],
        "stop_reason": "max_tokens",
        "usage": counts,
    }
    with Provider([Move(raw=answer)]) as provider:
        one = engine(provider, model="anthropic/claude-sonnet-4-5")
        samples = ask(one, n=2)
        assert len(provider.asked) == 2  # this provider takes no n
    assert {(sample.text, sample.stop) for sample in samples} == {("right", "length")}
    assert samples[0].usage == Usage(10, 30, 20, 4) and not samples[0].estimated


@real
def test_no_key_is_sent_that_was_not_asked_for() -> None:
    with Provider() as provider:
        ask(engine(provider, key_env=None))
    assert provider.keys == ["Bearer none"]  # not OPENAI_API_KEY


@real
@pytest.mark.parametrize("kind", ["openai", "hosted_vllm"])  # the two ways of litellm to send
@pytest.mark.parametrize(
    "fault",
    [
        Move(fault="refuse", status=500),
        Move(fault="refuse", status=429),
        Move(fault="cut"),
        Move(fault="garble"),
        Move(fault="alien"),
        Move(fault="tear"),
        Move(fault="drop"),
        Move(usage={"prompt_tokens": "many", "completion_tokens": 1, "total_tokens": 1}),
    ],
    ids=lambda move: f"{move.fault or 'counts'}{move.status}",
)
def test_what_can_be_tried_again_is(fault: Move, kind: str) -> None:
    with Provider([fault, fault, Move(text="left")]) as provider:
        ledger = Ledger(None, prices={f"{kind}/small": PRICE})
        (sample,) = ask(engine(provider, model=f"{kind}/small", ledger=ledger))
        assert sample.text == "left" and len(provider.asked) == 3
    billed = sum((PRICE.cost(usage) for usage in provider.billed), start=PRICE.cost(Usage()))
    if fault.fault == "refuse":
        assert ledger.total.money == billed  # to the cent
    else:  # nobody knows: counted at the most that it can have been
        lost = PRICE.cost(replies.worst_case(HI, (), 1, 8))
        assert ledger.total.money == 2 * lost + PRICE.cost(Usage(input=10, output=3)) >= billed
    assert ledger.total.calls == 3


@real
def test_a_hang_ends_in_time() -> None:
    with Provider([Move(fault="hang"), Move()]) as provider:
        (sample,) = ask(engine(provider, timeout=0.3))
    assert sample.text == "right" and len(provider.asked) == 2


@real
@pytest.mark.parametrize(
    ("move", "says"),
    [
        (Move(fault="refuse", status=400, message="no such thing"), ("400", "no such thing")),
        (Move(fault="refuse", status=401, message=f"bad {SECRET}"), ("401", KEY)),
        (Move(fault="refuse", status=404), ("404", "base_url")),
        (Move(fault="refuse", status=429, message="insufficient_quota"), ("429", "credit")),
        (
            Move(fault="refuse", status=429, headers={"Retry-After": "9999"}),
            ("asks to wait 9999 s",),
        ),
    ],
)
def test_what_cannot_be_helped_is_said_once(move: Move, says: Sequence[str]) -> None:
    with Provider([move]) as provider, pytest.raises(EngineError) as caught:
        ask(engine(provider, name="teacher"))
    assert len(provider.asked) == 1
    shown = "".join(traceback.format_exception(caught.value))
    assert str(caught.value).startswith("teacher failed: ") and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in says)
    assert SECRET not in shown


@real
def test_one_error_after_all_tries() -> None:
    with Provider([Move(fault="refuse", status=503)]) as provider:
        one = engine(provider, patience=Patience(retries=2, base=0.01))
        with pytest.raises(EngineError, match=r"\(3 tries\): 503: .*try later"):
            ask(one)
        assert len(provider.asked) == 3
    with pytest.raises(EngineError, match=r"no connection; check base_url"):
        ask(engine(None, patience=Patience(retries=1, base=0.01)))


@real
def test_retry_after_holds_for_everybody() -> None:
    first = Move(fault="refuse", status=429, headers={"Retry-After": "0.5"})
    with Provider(lambda number, _: first if number == 0 else Move()) as provider:
        one = engine(provider, concurrency=1)

        async def both() -> None:
            await asyncio.gather(one.chat(HI, SHORT), one.chat(HI, SHORT, seed=1))

        asyncio.run(both())
        times = provider.times
    assert len(times) == 3 and times[1] - times[0] >= 0.5


@real
def test_an_exhausted_limit_pauses_before_the_next_request() -> None:
    empty = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
    with Provider([Move(headers=empty), Move()]) as provider:
        one = engine(provider)

        async def twice() -> None:
            await one.chat(HI, SHORT)
            await one.chat(HI, SHORT)

        asyncio.run(twice())
        times = provider.times
    assert times[1] - times[0] >= 0.4


@real
def test_requests_in_flight_are_bounded() -> None:
    with Provider([Move(after=0.02)]) as provider:
        one = engine(provider, concurrency=4)

        async def many() -> list[list[Sample]]:
            asked = [one.chat(HI, SHORT, seed=number) for number in range(24)]
            return list(await asyncio.gather(*asked))

        assert len(asyncio.run(many())) == len(provider.asked) == 24
        assert 2 <= provider.at_once <= 4


@real
def test_n_in_one_request_where_the_provider_takes_it() -> None:
    texts = ["a", "b", "c"]
    with Provider([Move(text=texts, bills=Usage(input=10, output=8))]) as provider:
        samples = ask(engine(provider), n=3)
        assert [sample.text for sample in samples] == texts and len(provider.asked) == 1
    assert counted(samples) == (10, 0, 0, 8)


@real
@pytest.mark.parametrize("refuses", [True, False])
def test_n_in_several_requests_elsewhere(refuses: bool) -> None:
    def moves(number: int, payload: dict[str, Any]) -> Move:
        if refuses and payload.get("n", 1) > 1:
            return Move(fault="refuse", status=400, message="n must be 1")
        return Move(text=str(payload["seed"]), most=1)

    with Provider(moves) as provider:
        one = engine(provider)
        samples = ask(one, n=3, seed=7)
        again = ask(one, n=2, seed=20)
        assert len(provider.asked) == (6 if refuses else 5)  # learnt once
    assert sorted(sample.text for sample in samples) == ["7", "8", "9"]
    assert {sample.text for sample in again} == {"20", "21"}
    assert counted(samples) == (30, 0, 0, 9)


@real
@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -5, "completion_tokens": 3}])
def test_missing_and_impossible_counts_are_estimated(usage: Any) -> None:
    with Provider([Move(usage=usage, text="walk to the right")]) as provider:
        (sample,) = ask(engine(provider))
    assert sample.estimated and sample.usage.input > 0 and sample.usage.output > 0


@real
def test_counts_above_the_possible_are_cut() -> None:
    with Provider([Move(usage=told(Usage(10**7, 0, 0, 10**7)))]) as provider:
        (sample,) = ask(engine(provider))
    assert sample.estimated and sample.usage.input == replies.worst_case(HI, (), 1, 8).input


@real
def test_a_paid_answer_is_never_paid_twice(tmp_path: Path) -> None:
    with Provider([Move(text="left", reasoning="hm", calls=[call("f", "{}")])]) as provider:
        for _ in range(2):
            ledger = Ledger(None, prices={"openai/small": PRICE})
            one = engine(provider, ledger=ledger, answers=RequestCache(tmp_path))

            async def same(one: Any = one) -> list[list[Sample]]:
                return list(await asyncio.gather(*(one.chat(HI, SHORT) for _ in range(5))))

            found = asyncio.run(same())
            assert all(samples == found[0] for samples in found)
        assert len(provider.asked) == 1 and ledger.total.calls == 0
        ask(one, seed=1)  # another sample is another answer
        assert len(provider.asked) == 2


@real
def test_no_limit_is_exceeded_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    faults = [Move(fault="refuse", status=status) for status in (429, 500, 503)]
    right = [Move(bills=Usage(input=40 + number, output=3)) for number in range(5)]

    def moves(number: int, _: Any) -> Move:
        return faults[number % 3] if number % 4 == 3 else right[number % 5]

    limit = SpendLimits(money="0.004")
    ledger = Ledger(tmp_path / "ledger", limit, {"openai/small": PRICE})
    with Provider(moves) as provider, ledger as book:
        one = engine(provider, ledger=book, concurrency=32)

        async def many() -> list[Any]:
            asked = (one.chat(HI, SHORT, seed=number) for number in range(64))
            return list(await asyncio.gather(*asked, return_exceptions=True))

        found = asyncio.run(many())
        billed = sum((PRICE.cost(usage) for usage in provider.billed), start=PRICE.cost(Usage()))
        assert book.total.money == billed <= limit.money  # to the cent
    refused = [one for one in found if isinstance(one, BaseException)]
    answers = [one for one in found if isinstance(one, list)]
    assert refused and all(isinstance(one, BudgetError) for one in refused)
    assert len(answers) == len(provider.billed) and len(answers) + len(refused) == 64


@real
def test_a_cancelled_request_counts_as_lost() -> None:
    with Provider([Move(fault="hang")]) as provider:
        ledger = Ledger(None, prices={"openai/small": PRICE})
        one = engine(provider, ledger=ledger)

        async def leave() -> None:
            async with asyncio.timeout(0.5):
                await one.chat(HI, SHORT)

        with pytest.raises(TimeoutError):
            asyncio.run(leave())
    assert ledger.total.money == PRICE.cost(replies.worst_case(HI, (), 1, 8))


@real
def test_keys_are_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    why = Move(fault="refuse", status=500, message=f"why {SECRET}")
    ledger = Ledger(tmp_path / "ledger", prices={"openai/small": PRICE})
    with Provider([why, Move(text=f"I am {SECRET}")]) as provider, ledger as book:
        one = engine(provider, ledger=book, answers=RequestCache(tmp_path / "answers"))
        (sample,) = ask(one)
        shown = [repr(one), repr(vars(one)), repr(sample), caplog.text, *capfd.readouterr()]
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert sample.text == f"I am <{KEY}>" and len(written) >= 2
    assert not any(SECRET in text for text in [*shown, *written])


@real
def test_setup_that_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"TEST_NO_SUCH_KEY.*not set"):
        engine(None, key_env="TEST_NO_SUCH_KEY")
    from agentdistill.engines.litellm import LiteLLMEngine

    with pytest.raises(ConfigError, match="provider/model"):
        LiteLLMEngine("nonsense", key_env=KEY)


@real
def test_token_ids_are_refused_and_text_is_promised() -> None:
    one = engine(None)
    assert one.capabilities.text and not one.capabilities.ids
    with pytest.raises(EngineError, match="no token ids"):
        asyncio.run(one.generate([1], SHORT))


@real
def test_loops_come_and_go() -> None:
    from agentdistill.engines.client import client

    ended: list[str] = []

    async def once(one: Any, seed: int) -> str:
        ended.append(f"-{id(asyncio.get_running_loop())}")
        return str((await one.chat(HI, SHORT, seed=seed))[0].text)

    with Provider() as provider:
        one = engine(provider)
        for seed in range(3):  # each in a loop of its own, at an address that is used again
            assert asyncio.run(once(one, seed)) == "right"
    kept = client().in_memory_llm_clients_cache.cache_dict
    assert not one._loops and not any(str(key).endswith(tuple(ended)) for key in kept)


def test_engines_of_one_loop_end_with_it(caplog: pytest.LogCaptureFixture) -> None:
    with Provider() as provider:
        two = [engine(provider), engine(provider, role="teacher")]

        async def both() -> None:
            await asyncio.gather(*(one.chat(HI, SHORT) for one in two))

        asyncio.run(both())
    assert not caplog.records, "asyncio logs what fails while a loop ends"
