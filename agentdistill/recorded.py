"""Results that are on record: read back, and whether two of them were played the same way.

Invariants: a file is never completed from another one that says otherwise; what numbers depend on
is compared, places on a machine (options that are paths) are not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentdistill.config import read as read_yaml
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result
from agentdistill.panel import FREE, lasting

SCRIPTED = ("expert", "random")

# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """The results of one file or run folder.

    Attributes:
        file: where they were read.
        results: of all policies and modes; without outcomes where the file has none.
        folder: of the run, None where the file is not in one.
    """

    file: Path
    results: tuple[Result, ...]
    folder: Path | None

    @cached_property
    def seed(self) -> int | None:
        """Of the run, where it is known."""
        if self.folder is None:
            return None
        return int(read_yaml(self.folder / "config.yaml").get("seed", 0))

    def result(self, policy: str, mode: str | None) -> Result:
        """That of ``policy``, by task; ConfigError where there is none.

        Without a ``mode`` it is the sampled one, where there is one.
        """
        mine = {result.mode: result for result in self.results if result.policy == policy}
        order = [mode, "-"] if mode else ["sampled", "-", "greedy"]
        found = next((mine[each] for each in order if each in mine), None)
        if found is None:
            known = ", ".join(f"{r.policy} {r.mode}" for r in self.results)
            wanted = f"{policy} {mode or ''}".strip()
            remedy = f"{self.file} has {known}"
            raise ConfigError(remedy, key="policy", value=wanted)
        return found if found.keys else self._with_outcomes(found)

    def _with_outcomes(self, result: Result) -> Result:
        """``result`` as the run's own evaluation has it, by task."""
        suffix = "" if result.mode == "-" else f"-{result.mode}"
        file = (self.folder or Path()) / "evaluation" / f"{result.policy}{suffix}.json"
        if self.folder is None or not file.exists():
            remedy = "has no outcomes by task; give the run's folder, or a file of `eval --output`"
            raise ConfigError(remedy, key="results", value=str(self.file))
        (found,) = _results(file)
        if (found.panel, found.success, found.episodes) != (
            result.panel,
            result.success,
            result.episodes,
        ):
            raise ConfigError(f"{file} says otherwise", key="results", value=str(self.file))
        return found


def read(path: str | Path) -> Recorded:
    """The results in a run folder, its results.json, or a file of ``agentdistill eval --output``.

    Raises:
        ConfigError: there are none.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        if (file / "results.json").exists():
            file /= "results.json"
        else:
            played = sorted(file.glob("evaluation/*.json"))
            results = tuple(result for each in played for result in _results(each))
            if not results:
                remedy = "this folder has no evaluation; run `agentdistill train` to its end"
                raise ConfigError(remedy, key="results", value=str(path))
            return Recorded(file, results, _run_folder(file))
    folder = _run_folder(file.parent) or _run_folder(file.parent.parent)
    return Recorded(file, tuple(_results(file)), folder or _run_folder(_parsed(file).get("path")))


def _run_folder(folder: str | Path | None) -> Path | None:
    found = None if folder is None else Path(folder)
    return found if found and (found / "config.yaml").is_file() else None


def _parsed(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        remedy = f"cannot be read ({reason}); give a run's folder or its results.json"
        raise ConfigError(remedy, key="results", value=str(file)) from None
    return values if isinstance(values, dict) else {}


def _results(file: Path) -> list[Result]:
    values = _parsed(file)
    try:
        found = [Result.of_json(row) for row in values.get("results", [values])]
    except (TypeError, KeyError, AttributeError):
        found = []
    if not found:
        raise ConfigError("holds no results", key="results", value=str(file))
    return found


# -- the same tasks, played the same way -----------------------------------------------------------


def differences(first: Result, second: Result, names: Sequence[str] = ("A", "B")) -> list[str]:
    """In what two results were played otherwise, a line each; empty where they can be compared.

    Places on a machine are not compared, and neither is sampling with a policy that has none.
    """
    facts = [_facts(first), _facts(second)]
    if None in (first.setting.get("sampling"), second.setting.get("sampling")):
        facts = [{k: v for k, v in each.items() if k[:9] != "sampling."} for each in facts]
    found = [
        f"{key}: {facts[0].get(key)!r} in {names[0]}, {facts[1].get(key)!r} in {names[1]}"
        for key in dict.fromkeys([*facts[0], *facts[1]])
        if facts[0].get(key) != facts[1].get(key)
    ]
    keys = set(first.keys), set(second.keys)
    if first.panel != second.panel and (keys[0] != keys[1] or not keys[0]):
        sizes = f"{len(keys[0])} in {names[0]}, {len(keys[1])} in {names[1]}"
        found.insert(0, f"tasks: {sizes}, {len(keys[0] & keys[1])} of them the same")
    return found


def _facts(result: Result) -> dict[str, Any]:
    """What the numbers depend on besides tasks and policy, flat."""
    said = result.setting
    options = lasting(said.get("options") or {})
    sections = {
        "environment": said.get("env"),
        "options": {key: value for key, value in options.items() if key not in FREE},
        "prompt": said.get("prompt"),
        "sampling": said.get("sampling"),
        "limits": said.get("limits"),
    }
    found = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in (section or {}).items()
    }
    seed = said.get("panel", {}).get("seed")
    return json.loads(json.dumps({**found, "max_turns": said.get("max_turns"), "seed": seed}))  # type: ignore[no-any-return]
