"""Rooms for generated ALFWorld games: what stands in them and where things are left.

Invariants: a scene follows from (version, room, number) alone, in every process; no two scenes of a
room have the same furniture, and each has what the room's task types need (a kitchen its sink,
microwave and fridge).
Names count from 1 in every class without gaps, as the engine numbers them.

The numbers are rounded counts over 500 official games (valid_seen and a sample of train); which
thing may lie where is not decided here but by the tables of the package alfworld.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from random import Random

VERSION = "1"
"""Changes whenever the same (type, seed, split) would give another game."""

SCENES = 30
"""Scenes of each room; the first ``HELD_OUT`` are for the split valid_unseen only."""

HELD_OUT = 6

CLOSED = 0.8
"""Share of cabinets and drawers with a door: official scenes show the content of the others."""

ALWAYS_CLOSED = frozenset({"Fridge", "Microwave", "Safe"})


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a name, such as ``cabinet 3``: the class as ALFRED spells it, and a number."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        """What the engine calls it."""
        return f"{self.kind.lower()} {self.number}"

    @property
    def id(self) -> str:
        """Its PDDL object.

        The engine numbers the ids of a class from the last in sorted order to the first, takes
        the class from what precedes ``_bar_``, and appends "basin" where an id contains it.
        """
        serial = f"{999 - self.number:03d}"
        if self.kind.endswith("Basin"):
            return f"{self.kind.removesuffix('Basin')}_bar_{serial}_bar_{self.kind}"
        return f"{self.kind}_bar_{serial}"


@dataclass(frozen=True, slots=True)
class Receptacle(Entity):
    """A piece of furniture; ``closed`` ones must be opened before their content shows."""

    closed: bool = False


@dataclass(frozen=True, slots=True)
class Item(Entity):
    """A thing that lies in or on a receptacle; ``fixed`` ones cannot be taken."""

    at: Receptacle
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """A kind of room.

    Attributes:
        furniture: class → equally likely counts.
        things: class → share of the scenes that have any.
        fixtures: class → (equally likely counts, classes of furniture that carry it); they keep
            their place in a scene.
    """

    furniture: Mapping[str, tuple[int, ...]]
    things: Mapping[str, float]
    fixtures: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class Scene:
    """One room layout: furniture, fixtures, and the classes of things that occur in it."""

    room: str
    number: int
    receptacles: tuple[Receptacle, ...]
    fixtures: tuple[Item, ...]
    things: tuple[str, ...]

    def of(self, *kinds: str) -> list[Receptacle]:
        """The receptacles of these classes."""
        return [receptacle for receptacle in self.receptacles if receptacle.kind in kinds]


def _always(names: str) -> dict[str, float]:
    return dict.fromkeys(names.split(), 1.0)


ROOMS: Mapping[str, Room] = {
    "Kitchen": Room(
        furniture={
            "Cabinet": (4, 8, 10, 10, 12, 13, 16, 19, 21, 25),
            "CoffeeMachine": (1,),
            "CounterTop": (1, 2, 2, 3, 3, 4),
            "DiningTable": (0, 0, 0, 0, 1, 1, 2, 2, 2),
            "Drawer": (1, 3, 4, 4, 5, 6, 8, 12),
            "Fridge": (1,),
            "GarbageCan": (1,),
            "Microwave": (1,),
            "Shelf": (0, 0, 0, 0, 0, 0, 3),
            "SideTable": (0, 0, 0, 0, 0, 0, 0, 0, 2),
            "SinkBasin": (1,),
            "StoveBurner": (4,),
            "Toaster": (1,),
        },
        things=_always(
            "Apple Bowl Bread ButterKnife Cup DishSponge Egg Fork Knife Lettuce Mug Pan "
            "PepperShaker Plate Pot Potato SaltShaker SoapBottle Spatula Spoon Tomato"
        )
        | {"Kettle": 0.5, "WineBottle": 0.45, "Ladle": 0.4, "Glassbottle": 0.25, "Vase": 0.15}
        | {"Statue": 0.15, "CellPhone": 0.15, "Book": 0.1, "SprayBottle": 0.1}
        | {"CreditCard": 0.1, "Pen": 0.05, "Pencil": 0.05},
        fixtures={"HousePlant": ((0, 0, 1), ("CounterTop", "DiningTable"))},
    ),
    "LivingRoom": Room(
        furniture={
            "ArmChair": (1, 1, 1, 2, 2, 3),
            "Cabinet": (0, 0, 0, 0, 0, 4),
            "CoffeeTable": (0, 1, 1, 1, 2, 2),
            "DiningTable": (0, 0, 1, 1, 1, 2),
            "Drawer": (0, 1, 3, 4, 4, 5, 7, 8),
            "Dresser": (0, 0, 1),
            "GarbageCan": (1,),
            "Ottoman": (0, 0, 0, 0, 0, 1),
            "Safe": (0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
            "Shelf": (0, 0, 0, 0, 2, 6),
            "SideTable": (0, 1, 2, 2, 3, 3),
            "Sofa": (1, 1, 1, 2),
            "TVStand": (0, 0, 1),
        },
        things=_always("Box CreditCard KeyChain Laptop Pillow RemoteControl Statue")
        | {"Newspaper": 0.7, "WateringCan": 0.55, "Watch": 0.55, "Vase": 0.5, "Plate": 0.35}
        | {"TissueBox": 0.35, "CellPhone": 0.35, "Book": 0.35, "Pen": 0.2, "Pencil": 0.2}
        | {"Bowl": 0.1, "Candle": 0.1},
        fixtures={
            "DeskLamp": ((0, 0, 1), ("SideTable", "CoffeeTable")),
            "HousePlant": ((0, 1, 1), ("SideTable", "CoffeeTable")),
            "Television": ((0, 1, 1), ("TVStand", "Dresser")),
        },
    ),
    "Bedroom": Room(
        furniture={
            "ArmChair": (0, 0, 0, 0, 1),
            "Bed": (1, 1, 1, 1, 1, 2),
            "Cabinet": (0, 0, 0, 0, 0, 0, 0, 2),
            "Desk": (0, 1, 1),
            "DiningTable": (0, 0, 0, 0, 0, 1),
            "Drawer": (2, 2, 3, 4, 5, 6, 10, 12, 16),
            "Dresser": (0, 1),
            "GarbageCan": (1,),
            "LaundryHamper": (0, 0, 0, 1),
            "Safe": (0, 0, 0, 0, 0, 1),
            "Shelf": (0, 0, 1, 1, 2, 5, 7, 10),
            "SideTable": (0, 0, 1, 1, 2, 2),
        },
        things=_always("AlarmClock Book CD CellPhone CreditCard KeyChain Laptop Pen Pencil Pillow")
        | {"Mug": 0.55, "Box": 0.5, "BaseballBat": 0.5, "TennisRacket": 0.5, "Bowl": 0.5}
        | {"BasketBall": 0.4, "TissueBox": 0.2, "Statue": 0.15, "Cloth": 0.1, "Watch": 0.1}
        | {"RemoteControl": 0.1, "Vase": 0.05},
        fixtures={
            "DeskLamp": ((0, 1, 1, 1, 1, 1, 1, 1, 2), ("Desk", "Dresser", "SideTable", "Shelf")),
            "HousePlant": ((0, 0, 0, 0, 1), ("Shelf", "Desk")),
        },
    ),
    "Bathroom": Room(
        furniture={
            "BathtubBasin": (0, 1, 1),
            "Cabinet": (0, 0, 0, 3, 4, 5),
            "Cart": (0, 0, 0, 0, 0, 0, 0, 0, 0, 2),
            "CounterTop": (0, 1, 1, 1, 1, 1, 2),
            "Drawer": (0, 0, 0, 2, 4, 4, 8),
            "Dresser": (0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
            "GarbageCan": (1, 1, 2),
            "HandTowelHolder": (1, 1, 2),
            "Shelf": (0, 0, 0, 2),
            "SideTable": (0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
            "SinkBasin": (1, 2),
            "Toilet": (1, 1, 1, 1, 2),
            "ToiletPaperHanger": (1,),
            "TowelHolder": (1, 1, 2),
        },
        things=_always("Candle Cloth HandTowel SoapBar SoapBottle SprayBottle ToiletPaper Towel")
        | {"TissueBox": 0.2, "DishSponge": 0.2},
        fixtures={},
    ),
}

SINGLE = frozenset({"BaseballBat", "BasketBall", "HandTowel", "TennisRacket", "Towel"})
"""Things that lie about once at most unless the goal asks for more."""

HOLDS_ONE = frozenset(
    {"CoffeeMachine", "HandTowelHolder", "StoveBurner", "ToiletPaperHanger", "TowelHolder"}
)

CROWD: Mapping[str, float] = {
    "BathtubBasin": 2.5,
    "Bed": 4.0,
    "CounterTop": 3.5,
    "CoffeeTable": 3.5,
    "Desk": 5.0,
    "DiningTable": 5.0,
    "Dresser": 3.5,
    "Fridge": 4.0,
    "SinkBasin": 1.5,
    "Sofa": 2.5,
    "SideTable": 2.0,
    "Shelf": 1.2,
    "Toilet": 2.5,
    "GarbageCan": 1.0,
    "Cabinet": 0.55,
    "Drawer": 0.6,
    "StoveBurner": 0.7,
}
"""How likely a thing lies on one receptacle of a class, relative to others; 1 where not named."""

HOMES: Mapping[str, Mapping[str, float]] = {
    "HandTowel": {"HandTowelHolder": 30.0},
    "Kettle": {"StoveBurner": 5.0},
    "Laptop": {"Bed": 4.0},
    "Mug": {"CoffeeMachine": 6.0},
    "Pan": {"StoveBurner": 8.0, "Cabinet": 0.3},
    "Pot": {"StoveBurner": 15.0, "Cabinet": 0.3},
}
"""Where a class of things belongs: factors on ``CROWD``."""


def pull(thing: str, receptacle: str) -> float:
    """How likely ``thing`` lies at one receptacle of that class, relative to other receptacles."""
    return CROWD.get(receptacle, 1.0) * HOMES.get(thing, {}).get(receptacle, 1.0)


def scene(room: str, number: int) -> Scene:
    """Layout ``number`` (0 to ``SCENES`` - 1) of ``room`` (a key of ``ROOMS``)."""
    return _scenes(room)[number]


@cache
def _scenes(room: str) -> tuple[Scene, ...]:
    """All layouts of a room; no two have the same furniture, or one could not be held out."""
    rng, scenes = Random(f"{VERSION}/{room}"), dict[tuple[str, ...], Scene]()
    while len(scenes) < SCENES:
        drawn = _layout(room, len(scenes), rng)
        scenes.setdefault(tuple(receptacle.kind for receptacle in drawn.receptacles), drawn)
    return tuple(scenes.values())


def _layout(room: str, number: int, rng: Random) -> Scene:
    plan = ROOMS[room]
    receptacles = tuple(
        Receptacle(kind, index + 1, _closed(kind, rng))
        for kind, counts in plan.furniture.items()
        for index in range(rng.choice(counts))
    )
    things = tuple(thing for thing, share in plan.things.items() if rng.random() < share)
    fixtures: list[Item] = []
    for kind, (counts, carriers) in plan.fixtures.items():
        places = [place for place in receptacles if place.kind in carriers]
        chosen = rng.sample(places, min(rng.choice(counts), len(places)))
        fixtures += [Item(kind, index + 1, place, True) for index, place in enumerate(chosen)]
    return Scene(room, number, receptacles, tuple(fixtures), things)


def _closed(kind: str, rng: Random) -> bool:
    if kind in ("Cabinet", "Drawer"):
        return rng.random() < CLOSED
    return kind in ALWAYS_CLOSED
