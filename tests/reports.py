"""What the tests of the report share: two runs, a way to read pages, texts that mean harm."""

from __future__ import annotations

import dataclasses
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentdistill import api
from agentdistill.records import Actor, Fault, StepResult, Task, Trajectory, Turn
from agentdistill.store import Store
from tests.toy import micro

HOSTILE = "</pre><script>window.hacked=1</script><img src=x onerror='hacked=1'>\"'&amp; {{ 7*7 }}"
NASTY = "\x1b[31mred\x1b[0m \x00 \u202eevil\u202c \ud800 \x85 end\r\n"


class Reader(HTMLParser):
    """Elements, attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = tag if tag in ("style", "script") else self._inside

    def handle_endtag(self, tag):
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data):
        if not self._inside:
            self.text += data


def recipe(output: Path, **changes):
    """Four stages that take a second or two."""
    base = micro(output)
    tiny = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 20}}
    student = {"teacher": "taught", "tasks": 4, "iterations": 4}
    names = ["expert", "taught", "distilled", "windowed"]
    return {
        **base,
        "models": {"teacher": tiny, "student": tiny},
        "stages": [
            {"name": "demos", "do": "collect", "episodes": 12, "batch": 6},
            {"name": "taught", "model": "teacher", "method": "sft", "data": "demos", "tasks": 4,
             "iterations": 3},
            {"name": "distilled", "method": "opd", **student},
            {"name": "windowed", "method": "tcod-f2b", **student},
        ],
        "evaluate": {"policies": names, "tasks": 4},
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one recipe."""
    output = tmp_path_factory.mktemp("runs")
    return [
        api.distill(recipe(output, name=f"seed{seed}", seed=seed)).path for seed in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def weighed(tmp_path_factory) -> Path:
    """A run whose stages weigh steps, follow a schedule and read notes; in a second or two."""
    base = recipe(tmp_path_factory.mktemp("weighed"), name="weighed")
    tiny = base["models"]["student"]
    few = {"model": "student", "iterations": 1, "tasks": 2, "samples": 2, "guide": "demos"}
    return api.distill(
        {
            **base,
            "sampling": {"max_tokens": 3},
            "models": {
                **base["models"],
                "stranger": {**tiny, "tokenizer": {"vocabulary": 320, "episodes": 5}},
            },
            "stages": [
                *base["stages"][:2],
                {"name": "stepped", "teacher": "taught", "method": "sod", "tasks": 4, "samples": 2,
                 "iterations": 3},
                {"name": "cache", "do": "collect", "policy": "stepped", "episodes": 24,
                 "batch": 24, "only_success": False, "avoid_held_out": False},
                {"name": "moved", "teacher": "taught", "method": "taid", "tasks": 4,
                 "iterations": 3},
                {"name": "told", "method": "pi-distill", **few},
            ],
            "evaluate": {"policies": []},
        }
    ).path  # fmt: skip


def copied(runs, tmp_path: Path) -> Path:
    """A run of one's own to spoil."""
    return Path(shutil.copytree(runs[0], tmp_path / "copy"))


def hostile_trajectory(kind: str, turns: int = 1) -> Trajectory:
    text = HOSTILE + NASTY
    turn = Turn(
        0,
        text,
        Actor(text),
        text=text,
        actions=(text,),
        results=(StepResult(text, 0.0, optimal=None),),
    )
    many = tuple(dataclasses.replace(turn, index=index) for index in range(turns))
    return Trajectory(
        Task("tests/Corridor-v0", "train", {"at": kind}),
        f"demos/0/{kind}",
        0,
        many,
        (),
        "fault:env" if kind == "fault" else "success",
        kind != "fault",
        1.0,
        faults=(Fault(text, text, 0),) if kind == "fault" else (),
        goal=text,
    )


def plant(run: Path, trajectories: list[Trajectory]) -> None:
    """Commit them to the run's collect stage."""
    with Store(run / "stages" / "demos") as store:
        store.commit("demos", 99, [store.write("demos", 99, trajectories)], {})
