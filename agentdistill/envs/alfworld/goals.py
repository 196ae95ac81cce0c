"""What a game asks for, read from its PDDL goal.

Invariants: nothing here needs the package alfworld; the type of a task follows from the goal's
predicates, wherever the file lies and whatever its folder is called.
"""

from __future__ import annotations

import re

LOOK = "look_at_obj_in_light"
SIMPLE = "pick_and_place_simple"
CLEAN = "pick_clean_then_place_in_recep"
HEAT = "pick_heat_then_place_in_recep"
COOL = "pick_cool_then_place_in_recep"
TWO = "pick_two_obj_and_place"

TYPES = (LOOK, SIMPLE, CLEAN, HEAT, COOL, TWO)
"""The task types, as ALFRED calls them."""

_MARKS = (("(istoggled ", LOOK), ("(isclean ", CLEAN), ("(ishot ", HEAT), ("(iscool ", COOL))


def kind(problem: str) -> str:
    """The task type of a PDDL problem (or of its goal); "" for any other goal."""
    goal = _goal(problem)
    for mark, name in _MARKS:
        if mark in goal:
            return name
    puts = len(set(re.findall(r"\(inreceptacle \?(\w+)", goal)))
    return {1: SIMPLE, 2: TWO}.get(puts, "")


def parameters(problem: str) -> dict[str, str]:
    """A problem's type and classes under ALFRED's names, in lower case.

    Keys: ``task_type, object_target, parent_target, toggle_target, mrecep_target, object_sliced``.
    """
    goal = _goal(problem)
    lamps = re.findall(r"\(istoggled \?(\w+)", goal)
    classes = re.findall(r"\(objecttype \?(\w+) (\w+)type\)", goal)
    parents = re.findall(r"\(receptacletype \?\w+ (\w+)type\)", goal)
    things = [name for variable, name in classes if variable not in lamps]
    toggles = [name for variable, name in classes if variable in lamps]
    return {
        "task_type": kind(problem),
        "object_target": next(iter(things), ""),
        "parent_target": next(iter(parents), ""),
        "toggle_target": next(iter(toggles), ""),
        "mrecep_target": "",
        "object_sliced": "",
    }


def _goal(problem: str) -> str:
    return " ".join(problem[problem.rfind("(:goal") :].lower().split())
