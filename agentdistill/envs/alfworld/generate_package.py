"""The data of the installed package alfworld that generated games are made of.

Invariant: the files are read by path, so that the package itself, which creates a folder in the
user's cache when imported, is not imported; nothing here needs TextWorld.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from agentdistill.errors import ConfigError, MissingExtraError


@dataclass(frozen=True, slots=True)
class Package:
    """What the installed package says.

    Attributes:
        domain: the PDDL domain.
        grammar: the TextWorld grammar, with a gap for the instruction.
        allowed: class of thing → classes of receptacle that may hold it.
        able: predicate → classes of things that have it.
        hollow: classes of things that are receptacles themselves.
        goals: task type → its PDDL goal and instruction templates.
        commands: action → its wording, with ``{o}`` and ``{r}`` for the names.
    """

    domain: str
    grammar: str
    allowed: Mapping[str, frozenset[str]]
    able: Mapping[str, frozenset[str]]
    hollow: frozenset[str]
    goals: Mapping[str, Mapping[str, Any]]
    commands: Mapping[str, str]


@cache
def package() -> Package:
    """Read the package's data; once per process.

    Raises:
        MissingExtraError: the package is not installed.
        ConfigError: its files are not those that games are made of.
    """
    found = find_spec("alfworld")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("the environment ALFWorld", "alfworld")
    root = Path(found.submodule_search_locations[0])
    try:
        domain = (root / "data" / "alfred.pddl").read_text(encoding="utf-8")
        grammar = (root / "data" / "alfred.twl2").read_text(encoding="utf-8")
        constants = _module(root / "gen" / "constants.py")
        library = _module(root / "gen" / "goal_library.py")
        return _read(domain, grammar, constants, library.gdict)
    except (OSError, AttributeError) as error:
        remedy = "pip install --force-reinstall --no-deps alfworld"
        raise ConfigError(f"the package alfworld is incomplete ({error}): {remedy}") from error


def _module(path: Path) -> ModuleType:
    """Run one file of the package, which imports nothing, without the package around it."""
    spec = spec_from_file_location(f"_agentdistill_alfworld_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(
    domain: str, grammar: str, constants: ModuleType, goals: Mapping[str, Mapping[str, Any]]
) -> Package:
    holds: Mapping[str, set[str]] = constants.VAL_RECEPTACLE_OBJECTS
    things = sorted(set().union(*holds.values()))
    able = constants.VAL_ACTION_OBJECTS
    return Package(
        domain,
        grammar,
        {thing: frozenset(r for r, held in holds.items() if thing in held) for thing in things},
        {word.lower(): frozenset(kinds) for word, kinds in able.items()},
        frozenset(constants.MOVABLE_RECEPTACLES),
        goals,
        commands(grammar),
    )


def commands(grammar: str) -> dict[str, str]:
    """Action → wording: alfworld 0.3 says "put X in/on Y" where 0.4 says "move X to Y"."""
    found = re.findall(r'action (\w+) \{\s*template\s*::\s*"([^"]*)"', grammar)
    # The place to go to is a query over the state, in brackets.
    return {action: re.sub(r"\[.*\]", "{r}", words) for action, words in found}
