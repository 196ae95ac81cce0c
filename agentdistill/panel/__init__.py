"""Panels: fixed tasks with everything that a number on them depends on, so that people can compare.

``file.py`` says what a panel is, ``make.py`` makes one and compares it with an environment,
``play.py`` lets scripted policies play it. Built-in ones are in ``built_in``. No torch here.
"""

from agentdistill.panel.file import Panel, PanelTask, Reference, load, names, requests, save
from agentdistill.panel.make import (
    FREE,
    bare,
    check,
    deviations,
    filled,
    for_tuning,
    lasting,
    make,
    of_config,
    tuning_part,
)
from agentdistill.panel.play import POLICIES, Replay, judge, reproduces, score

__all__ = [
    "FREE",
    "POLICIES",
    "Panel",
    "PanelTask",
    "Reference",
    "Replay",
    "bare",
    "check",
    "deviations",
    "filled",
    "for_tuning",
    "judge",
    "lasting",
    "load",
    "make",
    "names",
    "of_config",
    "reproduces",
    "requests",
    "save",
    "score",
    "tuning_part",
]
