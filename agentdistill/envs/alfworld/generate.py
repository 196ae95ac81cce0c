"""Own ALFWorld games of all six task types, made from the data in the package alfworld alone.

Invariants
----------
* :func:`generate` is a function of (kind, seed, split) and the installed package: the same game in
  every process.
* No goal is true at the start, and the walkthrough wins in the fewest commands that somebody needs
  who knows where everything is.
* ``train`` and ``valid_seen`` share scenes but no goal: a (type, scene, thing, receptacle class)
  belongs to one of them for ever. ``valid_unseen`` has scenes of its own.

Rules and wording are the package's: domain, grammar, which class may lie in which, what can be
heated, cooled or cleaned, goals and instruction templates (generate_package.py). Rooms are ours
(rooms.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations, product
from random import Random
from typing import Any
from zlib import crc32

from agentdistill.envs.alfworld.generate_package import Package
from agentdistill.envs.alfworld.generate_package import package as installed
from agentdistill.envs.alfworld.rooms import (
    HELD_OUT,
    HOLDS_ONE,
    SCENES,
    SINGLE,
    VERSION,
    Entity,
    Item,
    Receptacle,
    Scene,
    pull,
    scene,
)
from agentdistill.errors import ConfigError

__all__ = ["SPLITS", "TYPES", "VERSION", "generate"]

SPLITS = ("train", "valid_seen", "valid_unseen")

_LOOK, _TWO = "look_at_obj_in_light", "pick_two_obj_and_place"


@dataclass(frozen=True, slots=True)
class _Type:
    """A task type: the rooms it happens in (with weights), and what it does on the way.

    Attributes:
        rooms: room → how often, as in the official games.
        tool: the class of receptacle that changes the thing, or None.
        action: the domain's action there.
        able: the domain's predicate that the thing must have.
    """

    rooms: Mapping[str, float]
    tool: str | None = None
    action: str = ""
    able: str = ""


_KINDS: Mapping[str, _Type] = {
    _LOOK: _Type({"Bedroom": 0.85, "LivingRoom": 0.15}),
    "pick_and_place_simple": _Type(
        {"Bathroom": 0.35, "LivingRoom": 0.25, "Bedroom": 0.25, "Kitchen": 0.15}
    ),
    "pick_clean_then_place_in_recep": _Type(
        {"Kitchen": 0.75, "Bathroom": 0.25}, "SinkBasin", "CleanObject", "cleanable"
    ),
    "pick_heat_then_place_in_recep": _Type({"Kitchen": 1.0}, "Microwave", "HeatObject", "heatable"),
    "pick_cool_then_place_in_recep": _Type({"Kitchen": 1.0}, "Fridge", "CoolObject", "coolable"),
    _TWO: _Type({"Bedroom": 0.35, "Bathroom": 0.3, "LivingRoom": 0.2, "Kitchen": 0.15}),
}

TYPES: tuple[str, ...] = tuple(_KINDS)
"""The six task types, as ALFWorld names them."""

_SEEN_SHARE = 8
"""One goal in this many belongs to valid_seen, the others to train."""

_DOMAIN_CONSTANTS = {
    "rtype": ("SinkBasinType", "MicrowaveType", "FridgeType"),
    "otype": ("SinkType", "KnifeType", "ButterKnifeType"),
}
"""Types that some version of the domain names: they must be declared in every problem."""

_START = "loc_bar_start"


@dataclass(frozen=True, slots=True)
class _Goal:
    """``thing``: the class to find. ``end``: the class of receptacle or lamp it must get to."""

    kind: str
    scene: Scene
    thing: str
    end: str


def generate(kind: str, seed: int, split: str) -> dict[str, Any]:
    """Make the content of a ``game.tw-pddl`` file.

    Args:
        kind: one of ``TYPES``.
        seed: any integer; nearly every seed gives another problem.
        split: one of ``SPLITS``.

    Returns:
        ``pddl_domain``, ``grammar``, ``pddl_problem``, ``solvable``, ``walkthrough`` (commands
        that win, in the installed wording) and ``task_type``.

    Raises:
        ConfigError: unknown ``kind`` or ``split``, or a broken installation of alfworld.
        MissingExtraError: the package alfworld is not installed.
    """
    for key, value, known in (("kind", kind, TYPES), ("split", split, SPLITS)):
        if value not in known:
            raise ConfigError(f"must be one of {', '.join(known)}", key=key, value=value)
    package = installed()
    rng = Random(f"{VERSION}/{kind}/{split}/{seed}")
    goal = _draw(_goals(kind, split), kind, rng)
    items = _furnish(goal, package, rng)
    words = {"obj": goal.thing, "recep": goal.end, "toggle": goal.end}
    template = rng.choice(package.goals[kind]["templates"])
    instruction = template.format(**{key: word.lower() for key, word in words.items()})
    return {
        "pddl_domain": package.domain,
        "grammar": package.grammar.replace("UNKNOWN GOAL", instruction),
        "pddl_problem": _problem(goal, items, package),
        "solvable": True,
        "walkthrough": min(_plans(goal, items, package), key=len),
        "task_type": kind,
    }


# -- what to ask for ------------------------------------------------------------------------------


@cache
def _goals(kind: str, split: str) -> dict[str, dict[int, dict[str, list[str]]]]:
    """Every goal of a split: room → scene → class of thing → classes it can be brought to."""
    numbers = range(HELD_OUT) if split == "valid_unseen" else range(HELD_OUT, SCENES)
    tree: dict[str, dict[int, dict[str, list[str]]]] = {}
    for room, number in product(_KINDS[kind].rooms, numbers):
        for goal in _offers(kind, scene(room, number)):
            if split == "valid_unseen" or split == _seen_split(goal):
                things = tree.setdefault(room, {}).setdefault(number, {})
                things.setdefault(goal.thing, []).append(goal.end)
    return tree


def _seen_split(goal: _Goal) -> str:
    text = f"{goal.kind}/{goal.scene.room}/{goal.scene.number}/{goal.thing}/{goal.end}"
    return "train" if crc32(text.encode()) % _SEEN_SHARE else "valid_seen"


def _offers(kind: str, place: Scene) -> Iterator[_Goal]:
    """The goals that a scene allows: the thing has somewhere else to be at the start."""
    package, rule = installed(), _KINDS[kind]
    classes = dict.fromkeys(receptacle.kind for receptacle in place.receptacles)
    lamp = any(fixture.kind == "DeskLamp" for fixture in place.fixtures)
    for thing in place.things:
        if rule.able and thing not in package.able[rule.able]:
            continue
        homes = [home for home in classes if home in package.allowed[thing]]
        ends = (["DeskLamp"] if lamp else []) if kind == _LOOK else homes
        for end in ends:
            goal = _Goal(kind, place, thing, end)
            crowded = kind == _TWO and end in HOLDS_ONE
            elsewhere = any(home not in HOLDS_ONE for home in homes if _may_start(goal, home))
            if end != rule.tool and elsewhere and not crowded:
                yield goal


def _may_start(goal: _Goal, home: str) -> bool:
    """Whether the thing asked for may lie there: not where it must go, nor where it is changed."""
    rule = _KINDS[goal.kind]
    return home != rule.tool and (home != goal.end or rule.tool is not None)


def _draw(tree: Mapping[str, Any], kind: str, rng: Random) -> _Goal:
    """A goal: the room as often as officially, then scene, thing and end evenly."""
    weights = [_KINDS[kind].rooms[room] for room in tree]
    room = rng.choices(list(tree), weights)[0]
    number = rng.choice(list(tree[room]))
    thing = rng.choice(list(tree[room][number]))
    return _Goal(kind, scene(room, number), thing, rng.choice(tree[room][number][thing]))


# -- what lies where ------------------------------------------------------------------------------


def _furnish(goal: _Goal, package: Package, rng: Random) -> list[Item]:
    """Put things into the scene; those that the goal names first, so that they find room."""
    full: set[Receptacle] = set()
    items = list(goal.scene.fixtures)
    numbers: Counter[str] = Counter()
    for thing in _things(goal, rng):
        places = [
            receptacle
            for receptacle in goal.scene.receptacles
            if receptacle not in full
            and receptacle.kind in package.allowed[thing]
            and (thing != goal.thing or _may_start(goal, receptacle.kind))
        ]
        if places:
            chances = [pull(thing, receptacle.kind) for receptacle in places]
            place = rng.choices(places, chances)[0]
            numbers[thing] += 1
            items.append(Item(thing, numbers[thing], place))
            full |= {place} if place.kind in HOLDS_ONE else set()
    return items


def _things(goal: _Goal, rng: Random) -> Iterator[str]:
    """Classes of things, once per copy: the goal's first, then the scene's in random order."""
    yield from [goal.thing] * rng.randint(2 if goal.kind == _TWO else 1, 4)
    rest = [thing for thing in goal.scene.things if thing != goal.thing]
    copies = [thing for thing in rest for _ in range(1 if thing in SINGLE else rng.randint(1, 3))]
    rng.shuffle(copies)
    yield from copies


# -- how to win -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Walk:
    """Commands of somebody who walks through the room, opening only what must be open."""

    wording: Mapping[str, str]
    commands: list[str] = field(default_factory=list)
    at: Receptacle | None = None
    opened: set[Receptacle] = field(default_factory=set)

    def say(self, action: str, receptacle: Receptacle, item: Item | None = None) -> None:
        names = {"r": receptacle.name, "o": item.name if item else ""}
        self.commands.append(self.wording[action].format(**names))

    def go(self, receptacle: Receptacle) -> None:
        if self.at != receptacle:
            self.say("GotoLocation", receptacle)
            self.at = receptacle

    def reach(self, receptacle: Receptacle) -> None:
        self.go(receptacle)
        if receptacle.closed and receptacle not in self.opened:
            self.say("OpenObject", receptacle)
            self.opened.add(receptacle)

    def take(self, item: Item) -> None:
        self.reach(item.at)
        self.say("PickupObject", item.at, item)

    def put(self, item: Item, receptacle: Receptacle) -> None:
        self.reach(receptacle)
        self.say("PutObject", receptacle, item)


def _plans(goal: _Goal, items: Iterable[Item], package: Package) -> Iterator[list[str]]:
    """Every direct way to win: each choice of things, of the tool, and of where to end."""
    rule, things = _KINDS[goal.kind], list(items)
    copies = [item for item in things if item.kind == goal.thing]
    if goal.kind == _LOOK:
        lamps = [item for item in things if item.kind == goal.end]
        for item, lamp in product(copies, lamps):
            walk = _Walk(package.commands)
            walk.take(item)
            walk.go(lamp.at)
            walk.say("ToggleObject", lamp.at, lamp)
            yield walk.commands
        return
    tools: list[Receptacle | None] = [*goal.scene.of(rule.tool)] if rule.tool else [None]
    carried = permutations(copies, 2 if goal.kind == _TWO else 1)
    for chosen, tool, end in product(carried, tools, goal.scene.of(goal.end)):
        walk = _Walk(package.commands)
        for item in chosen:
            walk.take(item)
            if tool:
                walk.go(tool)
                walk.say(rule.action, tool, item)
            walk.put(item, end)
        yield walk.commands


# -- the problem ----------------------------------------------------------------------------------


def _problem(goal: _Goal, items: list[Item], package: Package) -> str:
    place = goal.scene
    asked = package.goals[goal.kind]["pddl"].replace("#", "-")
    # The template closes the whole definition.
    end = asked.format(obj=goal.thing, recep=goal.end, toggle=goal.end)
    head = f"(define (problem {place.room}_{place.number:02d})\n(:domain alfred)"
    objects = "\n".join(_objects(place, items))
    facts = "\n".join(_facts(place, items, package))
    return f"{head}\n(:objects\n{objects}\n)\n(:init\n{facts}\n)\n{end.strip()}\n"


def _objects(place: Scene, items: list[Item]) -> Iterator[str]:
    yield "agent1 - agent"
    for sort, entities in (("object", items), ("receptacle", place.receptacles)):
        yield from (f"{entity.id} - {sort}" for entity in entities)
        short = "rtype" if sort == "receptacle" else "otype"
        types = (f"{entity.kind}Type" for entity in entities)
        yield from (
            f"{name} - {short}" for name in dict.fromkeys([*_DOMAIN_CONSTANTS[short], *types])
        )
    yield from (f"{name} - location" for name in (_START, *map(_spot, place.receptacles)))


def _spot(receptacle: Entity) -> str:
    """Where to stand before a receptacle; one place each."""
    return f"loc_bar_{receptacle.id}"


def _facts(place: Scene, items: list[Item], package: Package) -> Iterator[str]:
    yield f"(atLocation agent1 {_START})"
    for receptacle in place.receptacles:
        yield f"(receptacleType {receptacle.id} {receptacle.kind}Type)"
        yield f"(receptacleAtLocation {receptacle.id} {_spot(receptacle)})"
        if receptacle.closed:
            yield f"(openable {receptacle.id})"
    kinds = dict.fromkeys(item.kind for item in items)
    for home, kind in product(dict.fromkeys(r.kind for r in place.receptacles), kinds):
        if home in package.allowed.get(kind, ()):
            yield f"(canContain {home}Type {kind}Type)"
    for item in items:
        yield f"(objectType {item.id} {item.kind}Type)"
        yield f"(inReceptacle {item.id} {item.at.id})"
        yield f"(objectAtLocation {item.id} {_spot(item.at)})"
        yield from (f"({word} {item.id})" for word in _traits(item, package))


def _traits(item: Item, package: Package) -> Iterator[str]:
    """The predicates that a thing has by its class."""
    if not item.fixed:
        yield "pickupable"
    if item.kind in package.hollow:
        yield "isReceptacleObject"
    yield from (word for word, kinds in package.able.items() if item.kind in kinds)
