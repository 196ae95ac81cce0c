"""The paper index: every method by name."""

from __future__ import annotations

import difflib

from agentdistill.errors import ConfigError
from agentdistill.methods import grpo, kd, opd, sft, tcod
from agentdistill.methods.space import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        sft.SFT,
        kd.KD,
        kd.KD_SFT,
        opd.OPD,
        opd.OPD_EXACT,
        tcod.F2B,
        tcod.B2F,
        tcod.F2B_EXACT,
        tcod.B2F_EXACT,
        grpo.GRPO,
    )
}


def get(name: str) -> Method:
    """The method called ``name``; ConfigError with the nearest known one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
        raise ConfigError(f"unknown method; {hint}", key="method", value=name)
    return METHODS[name]
