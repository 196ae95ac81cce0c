"""TextWorld's PDDL engine, made quick without changing what it says.

Invariants
----------
* What a player sees is byte for byte what plain TextWorld shows (the tests compare whole episodes);
  only work that TextWorld repeats is done once.
* :func:`quicken` changes textworld for the whole process: call it in a process of its own.

Where the time goes in textworld 1.7 on official games: of a step of 30 to 70 ms nearly all is
parsing the same rules and queries again with TatSu and deriving the same commands again; of a reset
of 0.8 to 2.2 s nearly all is grounding the problem, four times: at load and at reset, and each time
once more for a planner that may never be asked.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import re
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache, lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from textworld.envs.pddl import PddlEnv, textgen
from textworld.envs.pddl import logic as pddl
from textworld.logic import Proposition, Rule

from agentdistill.envs.alfworld.planner import problem as rest_of
from agentdistill.errors import StoreError
from agentdistill.files import replacing

KEPT = 4
"""Grounded problems that a process keeps in memory."""

KEPT_ON_DISK = 10_000
"""Grounded problems in the cache folder (about 15 kB each); the oldest go first."""

fast_downward = pddl.fast_downward

_TASK = re.compile(r'"(Your task is to: [^"\\#{}\[\]]*)"')
_QUERIED = re.compile(r"(\w+)\(")


@contextmanager
def argv_kept() -> Iterator[None]:
    """Give ``sys.argv`` back: fast-downward's translator puts its own there."""
    before = sys.argv
    try:
        yield
    finally:
        sys.argv = before


@cache
def quicken() -> Translator:
    """Let textworld parse each rule, query and grammar once and ground each problem once."""
    textgen._parse_and_convert = _remember_rules(textgen._parse_and_convert)
    textgen.copy_context = _copy_context
    Rule.parse_conjunctive_query = lru_cache(maxsize=4096)(Rule.parse_conjunctive_query)
    pddl._parse_and_convert = _remember_grammars(pddl._parse_and_convert)
    translator = Translator(fast_downward.pddl2sas)
    fast_downward.pddl2sas = translator
    return translator


def _remember_rules(parse: Callable[..., Any]) -> Callable[..., Any]:
    """``parse`` with a memory; callers write to the symbols, so each gets symbols of its own."""
    remembered = lru_cache(maxsize=4096)(lambda text, rule: parse(text, rule_name=rule))

    def parsed(text: str, rule_name: str, trace: bool = False) -> Any:
        return copy.deepcopy(remembered(text, rule_name))

    return parsed


def _remember_grammars(parse: Callable[..., Any]) -> Callable[..., Any]:
    """``parse`` with a memory for grammars that differ in the sentence of the task only."""
    remembered = lru_cache(maxsize=8)(lambda text, rule: parse(text, rule_name=rule))

    def parsed(text: str, rule_name: str) -> Any:
        sentences = _TASK.findall(text)
        if len(sentences) != 1:
            return parse(text, rule_name=rule_name)
        actions, common = remembered(_TASK.sub('"the task"', text), rule_name)
        own = json.dumps({"task": [{"rhs": sentences[0]}]})
        grammar = textgen.ContextSensitiveGrammar()
        grammar.update(common)
        grammar._rules["task"] = textgen.ContextSensitiveGrammar.parse(own)._rules["task"]
        return actions, grammar

    return parsed


def _copy_context(context: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose dictionaries can be added to; textworld copies the entities as well."""
    own = {name: dict(context[name]) for name in ("variables", "mapping")}
    return {**context, **own}


class Translator:
    """fast-downward's translation of PDDL into its planning format (grounding), remembered."""

    def __init__(self, translate: Callable[..., Any]) -> None:
        """``translate``: what does the work, ``fast_downward.pddl2sas``."""
        self.folder: Path | None = None  # where translations are kept; None keeps none
        self._translate = translate
        self._known: OrderedDict[str, tuple[Any, str]] = OrderedDict()

    def __call__(
        self, domain: str, problem: str, verbose: bool = False, optimize: bool = False
    ) -> tuple[Any, str]:
        """What textworld calls, twice per state; the version for its planner is left out."""
        if optimize:
            return None, ""
        name = hashlib.sha256(f"{domain}\0{problem}".encode()).hexdigest()[:32]
        if name not in self._known:
            self._known[name] = self._find(domain, problem, name)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return self._known[name]

    def for_planner(self, domain: str, problem: str) -> str:
        """The translation without what no plan needs."""
        with argv_kept():
            return str(self._translate(domain, problem, optimize=True)[1])

    def _find(self, domain: str, problem: str, name: str) -> tuple[Any, str]:
        path = self.folder and self.folder / f"{name}.sas.z"
        with argv_kept():
            if path is not None:
                with suppress(OSError, zlib.error, UnicodeDecodeError):
                    return _task(domain, problem), zlib.decompress(path.read_bytes()).decode()
            task, text = self._translate(domain, problem)
        if path is not None:
            with suppress(StoreError, OSError):  # a cache that cannot be written is no cache
                with replacing(path, "file") as file:
                    file.write(zlib.compress(text.encode(), 6))
                _trim(path.parent)
        return task, text


def _trim(folder: Path) -> None:
    """Delete the older half once there are too many files; others may be at it too."""
    if len(os.listdir(folder)) <= KEPT_ON_DISK:
        return
    files = sorted(os.scandir(folder), key=lambda file: file.stat().st_mtime)
    for file in files[: KEPT_ON_DISK // 2]:
        with suppress(FileNotFoundError):
            os.unlink(file)


def _task(domain: str, problem: str) -> Any:
    """The problem as the translator reads it, not grounded."""
    sys.argv = ["translate.py", "domain", "task"]  # at import it parses its options from there
    lisp, parser, normal = (
        importlib.import_module(f"fast_downward.translate.{name}")
        for name in ("pddl_parser.lisp_parser", "pddl_parser.parsing_functions", "normalize")
    )
    with redirect_stdout(StringIO()):
        task = parser.parse_task(
            *(lisp.parse_nested_list(text.split("\n")) for text in (domain, problem))
        )
        normal.normalize(task)
    return task


def _forget_propositions() -> None:
    """Empty textworld's table of propositions, which grows by a megabyte with every kitchen."""
    table = importlib.import_module("mementos.core")._memento_cache
    for key in [key for key in table if key[0] is Proposition]:
        del table[key]


class Game(PddlEnv):  # type: ignore[misc]
    """A game whose commands are derived once, and which plans only when asked."""

    def __init__(self, infos: Any) -> None:
        """``infos``: what textworld shall report."""
        self._translator = quicken()
        super().__init__(infos)
        self._names: dict[tuple[str, ...], str] = {}

    def load(self, game: Mapping[str, Any]) -> None:
        """Load the content of a game file."""
        _forget_propositions()
        super().load(game)
        self._names = {}
        actions = self._pddl_state.task.actions
        self._changing = {e.literal.predicate.lower() for a in actions for e in a.effects}

    @property
    def problem(self) -> str:
        """The PDDL problem."""
        return str(self._game_data["pddl_problem"])

    @property
    def entities(self) -> dict[str, Any]:
        """Everything in the game by its PDDL name; the ``name`` of each can be set."""
        return dict(self._entity_infos)

    @property
    def understood(self) -> bool:
        """Whether the last step was a command of the game."""
        return self._last_action is not None

    def plan(self) -> list[str]:
        """Commands that lead to the goal from here; none where there is no way."""
        game, state = self._game_data, self._pddl_state
        domain, whole = game["pddl_domain"], game["pddl_problem"]
        facts = [(fact.name, *(arg.name for arg in fact.arguments)) for fact in state.facts]
        goal = whole[whole.index("(:goal") :]
        rest = rest_of(facts, goal, state.name2type, domain)
        library = self.downward_lib
        if library.solve_sas(self._translator.for_planner(domain, rest).encode(), False):
            operators = (fast_downward.Operator * library.get_last_plan_length())()
            library.get_last_plan(operators)
            steps = [operator.name for operator in operators]
            return list(state.plan_to_templated_actions(steps, self._entity_infos))
        library.load_sas_replan(self._translator.for_planner(domain, whole).encode())
        return list(state.replan(self._entity_infos))  # the whole room: slow

    def _gather_infos(self) -> None:
        state = self.state
        state["won"], state["lost"] = self._pddl_state.check_goal(), False
        if self.request_infos.facts:
            facts = self._pddl_state.facts
            state["facts"] = [self._get_human_readable_fact(fact) for fact in facts]
        state["_valid_actions"] = actions = self._pddl_state.all_applicable_actions()
        state["_valid_commands"] = [self._command(action) for action in actions]
        state["admissible_commands"] = sorted(set(state["_valid_commands"]))

    def _command(self, action: Any) -> str:
        """What a player types for ``action``; remembered where no action can change it."""
        key = (action.name, *(variable.name for variable in action.mapping.values()))
        if key in self._names:
            return self._names[key]
        lasting = self._changing.isdisjoint(_QUERIED.findall(action.command_template.lower()))
        context = {
            "state": self._pddl_state,
            "facts": list(self._pddl_state.facts),
            "variables": {ph.name: self._entity_infos[v.name] for ph, v in action.mapping.items()},
            "mapping": action.mapping,
            "entity_infos": self._entity_infos,
        }
        action.command_template = self._logic.grammar.derive(action.command_template, context)
        names = {name: info.name for name, info in self._entity_infos.items()}
        command = str(action.format_command(names))
        if lasting:
            self._names[key] = command
        return command
