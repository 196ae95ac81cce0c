"""The paper index: every method by name."""

from __future__ import annotations

import difflib
import importlib

from agentdistill.errors import ConfigError
from agentdistill.methods import (
    agent_distillation,
    g_opd,
    gkd,
    grpo,
    kd,
    kepo,
    lightning,
    opd,
    opsd,
    paced,
    pi_distill,
    redi,
    rlad,
    rlsd,
    scope,
    sdpo,
    sft,
    skill_sd,
    sod,
    taid,
    tcod,
    uni_opd,
)
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
        sod.SOD,
        skill_sd.SKILL_SD,
        gkd.GKD,
        g_opd.EXOPD,
        lightning.LIGHTNING,
        opsd.OPSD,
        pi_distill.PI_DISTILL,
        pi_distill.PI_OPSD,
        sdpo.SDPO,
        sdpo.SRPO,
        rlad.RLAD,
        rlsd.RLSD,
        kepo.KEPO,
        paced.PACED,
        redi.REDI,
        taid.TAID,
        agent_distillation.AGENT_DISTILLATION,
        scope.SCOPE,
        uni_opd.UNI_OPD,
    )
}


def get(name: str) -> Method:
    """The method called ``name``, or ``module:NAME`` of one of your own.

    Raises:
        ConfigError: with the nearest known name, or what is wrong with the module.
    """
    if ":" in name:
        return _own(name)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
        raise ConfigError(f"unknown method; {hint}", key="method", value=name)
    return METHODS[name]


def _own(name: str) -> Method:
    """A method of somebody else's module; importing it registers its rules."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(str(error), key="method", value=name) from error
    if not isinstance(found, Method):
        raise ConfigError("is no Method", key="method", value=name)
    return found
