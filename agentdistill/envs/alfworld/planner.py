"""Plans from any state of a game: fast-downward on the part of the problem that matters.

Invariants: a plan leads from the given facts to the goal; it is the cheapest in the domain's costs
(1 for going, opening, taking and putting, 5 for the rest) among those that use nothing but what
:func:`relevant` keeps. Facts are (predicate, arguments...) with fast-downward's lower-case names.

The engine's own planner searches the whole room in order of cost, which takes 1 to 20 seconds in a
kitchen. What a plan can be about is little: the things and places that the goal names, the
appliance that it needs, what the agent holds, and where all of that is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

Fact = tuple[str, ...]

APPLIANCES = {"isclean": "sinkbasintype", "ishot": "microwavetype", "iscool": "fridgetype"}
"""What the goal wants of a thing → the type of receptacle that does it."""

CHOICE = 4
"""Receptacles considered of those that are all the same to a plan, such as empty drawers."""


class _Index(dict[str, set[Fact]]):
    """Facts by predicate."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        super().__init__()
        for predicate, *arguments in facts:
            self.setdefault(predicate, set()).add(tuple(arguments))

    def __missing__(self, predicate: str) -> set[Fact]:
        return set()

    def relation(self, predicate: str) -> dict[str, str]:
        """A predicate of two arguments, the second by the first."""
        return {first: second for first, second in self[predicate]}


def relevant(facts: Iterable[Fact], goal: str, agent: str) -> set[str]:
    """Names of the things, receptacles, locations and types that a plan may need.

    Args:
        facts: what is true now.
        goal: the text of the goal in PDDL.
        agent: the agent's name.
    """
    known, goal = _Index(facts), goal.lower()
    wanted = set(re.findall(r"\w+type\b", goal))
    wanted |= {kind for trait, kind in APPLIANCES.items() if f"({trait} " in goal}
    held = {thing for _, thing in known["holds"]}
    kind_of = known.relation("objecttype")
    things = {thing for thing, kind in kind_of.items() if kind in wanted} | held
    here = {spot for who, spot in known["atlocation"] if who == agent}
    places = {place for thing, place in known["inreceptacle"] if thing in things}
    for kind in wanted:
        places |= _some(known, {kind}, here)
    for thing in held:
        places |= _some(known, _homes(known, kind_of.get(thing, "")), here)
    spots = {spot for place, spot in known["receptacleatlocation"] if place in places} | here
    kinds = {kind_of[thing] for thing in things & kind_of.keys()}
    kinds |= {kind for place, kind in known["receptacletype"] if place in places}
    return {agent} | things | places | spots | kinds | wanted


def _homes(known: _Index, kind: str) -> set[str]:
    """The types of receptacles that take things of type ``kind``."""
    return {home for home, guest in known["cancontain"] if guest == kind}


def _some(known: _Index, kinds: Collection[str], here: Collection[str]) -> set[str]:
    """A few receptacles of these types: first those ``here``, then those without a closed door."""
    at = known.relation("receptacleatlocation")
    closed = known["openable"] - known["opened"]
    found = [place for place, kind in known["receptacletype"] if kind in kinds]
    found.sort(key=lambda place: (at.get(place, "") not in here, (place,) in closed, place))
    return set(found[:CHOICE])


def problem(facts: Iterable[Fact], goal: str, types: Mapping[str, str], domain: str) -> str:
    """The planning problem in PDDL: from ``facts`` to ``goal`` with what matters.

    Args:
        facts: what is true now.
        goal: the end of the game's own problem, from ``(:goal`` on.
        types: name → type of everything in the game.
        domain: the text of the domain; the types that it names must be declared.
    """
    known = [fact for fact in facts if "@" not in fact[0]]  # without the translator's own
    agent = next(name for name, kind in types.items() if kind == "agent")
    named = set(re.findall(r"\w+type\b", domain.lower()))
    kept = (relevant(known, goal, agent) | named) & types.keys()
    objects = "\n".join(f"{name} - {types[name]}" for name in sorted(kept))
    init = "\n".join(f"({' '.join(fact)})" for fact in sorted(known) if kept.issuperset(fact[1:]))
    head = "(define (problem rest)\n(:domain alfred)"
    return f"{head}\n(:objects\n{objects})\n(:init\n{init})\n{goal}"
