"""AppWorld's task files, read without AppWorld: lists of tasks, what a task says, its solution.

Invariants: nothing here starts a process or writes a file; a missing or broken file is a
ConfigError of one line with the remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from agentdistill.errors import ConfigError

SPLITS = ("train", "dev", "test_normal", "test_challenge")
"""The official parts: 90, 57, 168 and 417 tasks."""

DOWNLOAD = "run `agentdistill data appworld`"


def listed(root: Path, split: str) -> list[str]:
    """The ids of a split, in the order of its file."""
    path = root / "data" / "datasets" / f"{split}.txt"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot read AppWorld's list of tasks {path}: {DOWNLOAD}, or set APPWORLD_ROOT",
            key="split",
            value=split,
        ) from error
    names = (line.partition(":")[0].strip() for line in lines)  # "id:tag" in some lists
    return list(dict.fromkeys(name for name in names if name))


def shuffled(names: list[str], seed: int) -> list[str]:
    """``names`` in an order that follows from ``seed``; 0 leaves them as they are."""
    if seed:
        names = list(names)
        Random(seed).shuffle(names)
    return names


def folder(root: Path, name: str) -> Path:
    """Where the files of task ``name`` are."""
    return root / "data" / "tasks" / name


def specs(root: Path, name: str) -> dict[str, Any]:
    """What is told to the agent of task ``name``, and ``digest``, the hash of that file."""
    path = folder(root, name) / "specs.json"
    try:
        raw = path.read_bytes()
        found = json.loads(raw)
        person = found.get("supervisor") or found["main_user"]
        return {
            "instruction": str(found["instruction"]),
            "name": f"{person['first_name']} {person['last_name']}",
            "email": str(person["email"]),
            "phone": str(person["phone_number"]),
            "time": str(found["datetime"]).replace("T", " "),
            "version": str(found["db_version"]),
            "digest": hashlib.sha256(raw).hexdigest()[:16],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is missing or damaged: {DOWNLOAD} again", key="task", value=name
        ) from error


def version(root: Path) -> str:
    """The databases' version and a hash of the lists of tasks; "" where there are none."""
    sums = hashlib.sha256()
    first = ""
    for split in SPLITS:
        try:
            names = listed(root, split)
        except ConfigError:
            continue
        sums.update(json.dumps([split, names]).encode())
        first = first or next(iter(names), "")
    if not first:
        return ""
    try:
        return f"{specs(root, first)['version']}-{sums.hexdigest()[:8]}"
    except ConfigError:
        return f"damaged-{sums.hexdigest()[:8]}"


def solution(root: Path, name: str) -> str:
    """The recorded solution as code that solves the task; "" where there is none (the tests)."""
    path = folder(root, name) / "ground_truth" / "compiled_solution.py"
    try:
        code = path.read_text()
    except (OSError, UnicodeError):
        return ""
    # The recordings rely on requests that fail without raising, which agents do not get.
    return f"{code.rstrip()}\n\nrequester.raise_on_failure = False\nsolution(apis, requester)\n"


def scenario_goal_completion(results: Mapping[str, bool]) -> float:
    """Share of the scenarios of which every variant was solved (SGC).

    The share of solved tasks (TGC) is the plain mean of the successes.

    Args:
        results: task id (``<scenario>_<number>``) → whether it was solved.

    Raises:
        ConfigError: no results, or an id without a scenario.
    """
    scenarios: dict[str, bool] = {}
    for name, solved in results.items():
        scenario, _, number = name.rpartition("_")
        if not scenario or not number.isdigit():
            raise ConfigError("an AppWorld task is <scenario>_<number>", key="task", value=name)
        scenarios[scenario] = scenarios.get(scenario, True) and bool(solved)
    if not scenarios:
        raise ConfigError("needs at least one result", key="results", value={})
    return sum(scenarios.values()) / len(scenarios)
