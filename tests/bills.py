"""A model with a price, calls to it, and their bill by hand."""

from __future__ import annotations

import asyncio
from dataclasses import astuple
from decimal import Decimal
from fractions import Fraction
from typing import Any

import agentdistill.cli.cost  # noqa: F401  (adds its verb)
from agentdistill.ledger import Ledger, Price
from agentdistill.records import Usage

CHEAP = Price(Decimal(3), Decimal("3.75"), Decimal("0.3"), Decimal(15))
MODEL = "acme/large"
KNOWN = {MODEL: CHEAP}
MOST = Usage(input=1000, output=100)  # 1000 * 3.75 + 100 * 15 millionths at most
WORST = Decimal("0.00525")


def exactly(usage: Usage) -> Fraction:
    """The bill for ``usage`` of CHEAP, by hand."""
    thousandths = 3000, 300, 3750, 15000  # in the order of Usage's fields
    tokens = zip(astuple(usage), thousandths, strict=True)
    return Fraction(sum(count * price for count, price in tokens), 10**9)


async def pay(ledger: Ledger, usage: Usage = MOST, **more: Any) -> None:
    async with ledger.call("teacher", MODEL, MOST) as one:
        one.settle(usage, **more)


def paid(ledger: Ledger, count: int = 1, **more: Any) -> None:
    async def several() -> None:
        for _ in range(count):
            await pay(ledger, **more)

    asyncio.run(several())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
