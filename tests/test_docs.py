"""What the guides say is run, and where their links point exists.

A fenced ``python`` or ``bash`` block is executed when the line before it is
``<!-- test: run -->``. The blocks of one file run in order in one empty directory; its Python
blocks share a namespace. ``<!-- test: needs NAME -->`` gives a guide the markers of these names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
MARK = re.compile(r"^\s*<!-- test: run -->\s*$", re.MULTILINE)
NEEDS = re.compile(r"^<!-- test: needs ([\w ]+) -->$", re.MULTILINE)
RUN = re.compile(r"^<!-- test: run -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*:")


class Block(NamedTuple):
    """One executable block and the line its code starts on."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The blocks of ``text`` that are to be run."""
    found = RUN.finditer(text)
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in found]


def links(text: str) -> list[str]:
    """Targets inside this repository, without their anchors; code is no link."""
    targets = [first or second for first, second in LINK.findall(FENCED.sub("", text))]
    paths = [target.partition("#")[0] for target in targets if not REMOTE.match(target)]
    return [path for path in paths if path]


def run(block: Block, name: str, namespace: dict[str, object]) -> None:
    """Execute one block in the current directory."""
    if block.language == "python":
        # The empty lines make a traceback show the line of the guide.
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
    elif block.language == "bash":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{name}:{block.line}\n{done.stdout}\n{done.stderr}"
    else:
        raise AssertionError(f"{name}:{block.line}: cannot run {block.language!r}")


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _runnable(guide: Path) -> Any:
    names = " ".join(NEEDS.findall(guide.read_text())).split()
    marks = [getattr(pytest.mark, name) for name in names]
    return pytest.param(guide, id=_relative(guide), marks=marks)


RUNNABLE = [_runnable(guide) for guide in GUIDES if MARK.search(guide.read_text())]


@pytest.mark.parametrize("guide", RUNNABLE)
def test_blocks_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = guide.read_text()
    found = blocks(text)
    assert len(found) == len(MARK.findall(text)), "a marker without a block below it"
    namespace: dict[str, object] = {"__name__": "__guide__"}
    for block in found:
        run(block, _relative(guide), namespace)


@pytest.mark.parametrize("guide", GUIDES, ids=_relative)
def test_links_resolve(guide: Path) -> None:
    dead = [target for target in links(guide.read_text()) if not (guide.parent / target).exists()]
    assert dead == []


def test_blocks_are_found_run_and_can_fail() -> None:
    text = "a\n<!-- test: run -->\n```python\nx = 1\n```\n```python\nx = 2\n```\n"
    assert blocks(text) == [Block("python", "x = 1\n", 4)]
    namespace: dict[str, object] = {}
    run(Block("python", "x = 1\n", 4), "guide.md", namespace)
    run(Block("python", "y = x + 1\n", 9), "guide.md", namespace)
    assert namespace["y"] == 2
    run(Block("bash", "true | cat\n", 1), "guide.md", namespace)
    with pytest.raises(AssertionError, match=r"guide\.md:7"):
        run(Block("bash", "false | cat\n", 7), "guide.md", namespace)
    with pytest.raises(ZeroDivisionError) as caught:
        run(Block("python", "1 / 0\n", 12), "guide.md", namespace)
    assert caught.traceback[-1].lineno == 11  # counted from 0


def test_links_are_found() -> None:
    text = '[a](x.md#y) [b](https://z) [c](#d)\n```\n[e](f)\n```\n![g](h.png "i") <img src="j.svg">'
    assert links(text) == ["x.md", "h.png", "j.svg"]
