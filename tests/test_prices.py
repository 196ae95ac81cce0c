"""What tokens cost: exact, in four classes, from the configuration or litellm's table."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentdistill.cli.cost  # noqa: F401  (adds its verb)
from agentdistill import prices as prices_module
from agentdistill.errors import ConfigError
from agentdistill.ledger import Price, SpendLimits
from agentdistill.prices import Prices
from agentdistill.records import Usage
from tests.bills import CHEAP, MOST, WORST

# -- prices ----------------------------------------------------------------------------------------


def test_a_bill_is_exact() -> None:
    usage = Usage(input=1_234_567, cache_read=89, cache_write=1, output=3)
    by_hand = Decimal("3.703701") + Decimal("0.0000267") + Decimal("0.00000375") + Decimal("45e-6")
    assert CHEAP.cost(usage) == by_hand
    assert Price(0.1, 0.2, 0.3, 0.7).cost(Usage(1, 1, 1, 3)) == Decimal("2.7e-6")  # type: ignore[arg-type]
    assert CHEAP.most(MOST) == WORST


@given(st.tuples(*[st.integers(0, 10**6)] * 3), st.permutations((0, 1, 2)), st.integers(0, 10**6))
def test_no_division_of_the_prompt_costs_more_than_the_worst(
    prompt: tuple[int, int, int], order: list[int], above: int
) -> None:
    most, moved = Usage(*prompt, 7), Usage(*(prompt[place] for place in order), 7)
    long = Price(Decimal(1), Decimal(9), Decimal(1), Decimal(20))
    tiered = Price(Decimal(3), Decimal(3), Decimal(4), Decimal(15), above, long)
    for price in (CHEAP, tiered):
        assert price.cost(moved) <= price.most(most)
        assert price.cost(Usage(sum(prompt) // 2, 0, 0, 7)) <= price.most(most)


def test_long_prompts_have_a_price_of_their_own() -> None:
    long = Price(Decimal(6), Decimal(6), Decimal(6), Decimal(30))
    price = Price(Decimal(3), Decimal(3), Decimal(3), Decimal(15), 1000, long)
    assert price.cost(Usage(600, 400)) == Decimal("0.003")
    assert price.cost(Usage(600, 401)) == Decimal("0.006006")


@pytest.mark.parametrize("value", [-1, "much", float("nan"), float("inf")])
def test_what_is_no_price_or_limit_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"price\.output"):
        Price(Decimal(1), Decimal(1), Decimal(1), value)
    with pytest.raises(ConfigError, match=r"budget\.tokens"):
        SpendLimits(tokens=value)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A litellm that may not be imported, with a price table beside its code."""
    models = {
        "big": {"litellm_provider": "acme", "input_cost_per_token": 3e-06,
                "output_cost_per_token": 1.5e-05, "cache_read_input_token_cost": 3e-07,
                "input_cost_per_token_above_200k_tokens": 6e-06,
                "output_cost_per_token_above_200k_tokens": 2.25e-05},
        "acme/full": {"input_cost_per_token": 1e-06, "cache_creation_input_token_cost": 1.25e-06,
                      "output_cost_per_token": 2e-06, "output_cost_per_reasoning_token": 4e-06},
        "acme/zero": {"input_cost_per_token": 0, "output_cost_per_token": 0.0},
        "acme/image": {"output_cost_per_image": 0.04},
    }  # fmt: skip
    (tmp_path / "litellm").mkdir()
    (tmp_path / "litellm" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "litellm" / prices_module._TABLE).write_text(json.dumps(models))
    (tmp_path / "litellm-7.8.9.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: litellm\nVersion: 7.8.9\n"
    (tmp_path / "litellm-7.8.9.dist-info" / "METADATA").write_text(facts)
    monkeypatch.delitem(sys.modules, "litellm", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    prices_module._litellm.cache_clear()
    yield
    prices_module._litellm.cache_clear()


@pytest.mark.usefixtures("table")
def test_litellm_s_table_is_read_and_named() -> None:
    found = Prices({"acme/own": CHEAP, "acme/full": CHEAP})
    big = found.find("acme/big")
    assert big is not None
    assert big.source == "litellm 7.8.9"
    assert big.price.cost(Usage(10, 20, 30, 40)) == Decimal("0.000726")
    assert big.price.cost(Usage(200_001, 0, 0, 2)) == Decimal("1.200051")
    full = Prices().find("acme/full")
    assert full is not None
    assert full.price == Price(Decimal(1), Decimal("1.25"), Decimal(1), Decimal(4))
    for name in ("acme/own", "acme/full"):
        own = found.find(name)
        assert own is not None
        assert (own.price, own.source) == (CHEAP, "configuration")
    for name in ("other/big", "acme/zero", "acme/image", "acme/none"):
        assert found.find(name) is None
    assert "litellm" not in sys.modules


@pytest.mark.skipif(not prices_module.find_spec("litellm"), reason="needs the package litellm")
def test_the_table_of_the_real_litellm() -> None:
    prices_module._litellm.cache_clear()
    found = Prices().find("anthropic/claude-sonnet-4-5")
    assert found is not None
    assert found.price == Price(Decimal(3), Decimal("3.75"), Decimal("0.3"), Decimal(15))
