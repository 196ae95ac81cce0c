"""Panels: fixed tasks with everything that a number on them depends on, so that people can compare.

``file.py`` says what a panel is, ``make.py`` makes one and compares it with an environment,
``play.py`` lets scripted policies play it. Built-in ones are in ``built_in``. No torch here.
"""

from agentdistill.panel.file import Panel, PanelTask, Reference, load, names, requests, save
from agentdistill.panel.make import check, deviations, for_tuning, make, of_config
from agentdistill.panel.play import POLICIES, Replay, reproduces, score

__all__ = [
    "POLICIES",
    "Panel",
    "PanelTask",
    "Reference",
    "Replay",
    "check",
    "deviations",
    "for_tuning",
    "load",
    "make",
    "names",
    "of_config",
    "reproduces",
    "requests",
    "save",
    "score",
]
