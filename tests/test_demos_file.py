"""Demonstrations on the disk: one file that many read at once, embeddings, and speed."""

from __future__ import annotations

import os
import pickle
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentdistill.crash import VARIABLE
from agentdistill.demos import Demos, SentenceEmbedder
from agentdistill.demos.index import Texts
from agentdistill.errors import ConfigError, MissingExtraError, StoreError
from agentdistill.records import Trajectory
from tests.rooms import KITCHEN, STUDY, episode, rooms

ROOT = Path(__file__).resolve().parents[1]


# -- on the disk -----------------------------------------------------------------------------------


def test_a_new_build_leaves_readers_alone(tmp_path: Path) -> None:
    old = Demos.build([KITCHEN], tmp_path)
    new = Demos.build([STUDY], tmp_path)
    assert old.search(observation="a sink", task=None)[0].goal == "wash an apple"
    assert new.search(observation="a lamp", task=None)[0].goal == "light a pen"
    assert old.version != new.version == Demos.open(tmp_path, verify=True).version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.bin", "lock"]


def test_another_process_maps_the_file_itself(tmp_path: Path) -> None:
    rooms = [episode(n, [f"room {n}", "a very long hall " * 200]) for n in range(50)]
    Demos.build(rooms, tmp_path)
    demos = Demos.open(tmp_path, exclude=[rooms[3].task.key])
    data = pickle.dumps(demos)
    assert len(data) < 1000
    again = pickle.loads(data)
    found = again.search(observation="room 3", task=None)
    assert found == demos.search(observation="room 3", task=None)
    assert rooms[3].task.key not in {match.task for match in found}


READER = """
import sys
from agentdistill.demos import Demos
for _ in range(40):
    demos = Demos.open(sys.argv[1], verify=True)
    (match,) = demos.search(observation="a room", task=None, k=1)
    steps = {step.observation.split()[2] for step in match.steps}
    assert len(steps) == 1 and len(demos) == 3 * int(steps.pop()), match
print("fine")
"""


def test_many_read_while_one_builds(tmp_path: Path) -> None:
    Demos.build(rooms(1), tmp_path)
    command = [sys.executable, "-c", READER, str(tmp_path)]
    readers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    built = 0
    while any(reader.poll() is None for reader in readers):
        built += 1
        Demos.build(rooms(1 + built % 5), tmp_path)
        time.sleep(0.02)
    assert [reader.communicate()[0] for reader in readers] == ["fine\n"] * 3
    assert built > 3


@pytest.mark.parametrize("point", ["before-write", "before-rename", "after-rename"])
def test_a_build_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, point: str) -> None:
    old = Demos.build(rooms(2), tmp_path).version
    code = (
        "import sys; from pathlib import Path; from agentdistill.demos import Demos; "
        "from tests.rooms import rooms; Demos.build(rooms(3), Path(sys.argv[1]))"
    )
    environ = {**os.environ, VARIABLE: f"file:{point}:1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environ)
    assert done.returncode == -signal.SIGKILL
    now = Demos.open(tmp_path, verify=True)
    assert (now.version == old) == (point != "after-rename")
    assert len(now) == (9 if point == "after-rename" else 6)
    assert len(Demos.build(rooms(4), tmp_path)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.bin", "lock"]


def test_damage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="check the path"):
        Demos.open(tmp_path)
    file = tmp_path / "demos.bin"
    Demos.build([KITCHEN, STUDY], tmp_path)
    data = file.read_bytes()
    for torn in (b"", data[:20], data[:100], data[: len(data) // 2], data[:-1]):
        file.write_bytes(torn)
        with pytest.raises(StoreError, match="build"):
            Demos.open(tmp_path)
    changed = bytearray(data)
    changed[-64] ^= 1
    file.write_bytes(changed)
    with pytest.raises(StoreError, match="not what was written"):
        Demos.open(tmp_path, verify=True)


def test_texts_of_any_kind_come_back(tmp_path: Path) -> None:
    texts = ["", "Küche 厨房", "\ud800", "line\nline", "\0"]
    table = Texts(Texts.pack(texts))
    assert [table[n] for n in range(len(texts))] == texts


# -- embeddings ------------------------------------------------------------------------------------


class Letters:
    """A stand-in for a model: the letters of a text as a vector."""

    name = "letters"

    def __call__(self, texts: Sequence[str]) -> Any:
        vectors = np.zeros((len(texts), 26), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for letter in text.lower():
                if "a" <= letter <= "z":
                    row[ord(letter) - 97] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def test_embeddings_take_the_place_of_words(tmp_path: Path) -> None:
    demos = Demos.build([KITCHEN, STUDY], tmp_path, embedder=Letters())
    (match,) = demos.search(observation="knis a", task=None, k=1)  # the letters of "a sink"
    assert match.steps[match.at].observation == "a sink"
    assert match.score == pytest.approx(1, abs=1e-5)
    assert demos.search(observation="knis a", task=KITCHEN.task, k=1)[0].task == STUDY.task.key
    again = Demos.open(tmp_path, embedder=Letters())
    assert again.search(observation="knis a", task=None, k=1) == [match]
    with pytest.raises(ConfigError, match="letters"):
        Demos.open(tmp_path)
    Demos.build([KITCHEN], tmp_path)
    with pytest.raises(ConfigError, match="without"):
        Demos.open(tmp_path, embedder=Letters())


def test_sentence_transformers_are_loaded_when_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            loaded.append(name)

        def encode(self, texts: list[str], **options: bool) -> Any:
            assert options == {"normalize_embeddings": True, "show_progress_bar": False}
            return Letters()(texts)

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model)
    )
    Demos.build([KITCHEN, STUDY], tmp_path, embedder=SentenceEmbedder("small"))
    demos = Demos.open(tmp_path)
    assert loaded == ["small"]  # once, for the build
    assert demos.search(observation="a sink", task=None, k=1)[0].goal == "wash an apple"
    assert loaded == ["small", "small"]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="embeddings"):
        Demos.open(tmp_path).search(observation="a sink", task=None)


# -- speed -----------------------------------------------------------------------------------------


def different(generator: random.Random) -> tuple[list[Trajectory], list[dict[str, str]]]:
    """4000 episodes of 25 observations of 66 words, all different."""
    things = [f"{a}{b}" for a in ("bread", "soap", "book", "desk") for b in range(25)]

    def text(size: int) -> str:
        return " ".join(
            f"a {generator.choice(things)} {generator.randint(1, 30)}," for _ in range(size)
        )

    made = [
        episode(n, [text(22) for _ in range(25)], goal=f"put {text(2)}", plan=text(8))
        for n in range(4000)
    ]
    asked = [
        {"goal": f"put {text(2)}", "observation": text(22), "plan": text(8)} for _ in range(30)
    ]
    return made, asked


def alike(generator: random.Random) -> tuple[list[Trajectory], list[dict[str, str]]]:
    """4000 episodes through one of four mazes, the same but for their ends."""
    made = [
        episode(n, [*(f"maze {n % 4} place {i}" for i in range(24)), f"exit {n}"], goal="go out")
        for n in range(4000)
    ]
    places = [generator.randrange(24) for _ in range(30)]
    return made, [{"goal": "go out", "observation": f"maze 2 place {n}"} for n in places]


@pytest.mark.slow
@pytest.mark.parametrize("corpus", [different, alike])
def test_a_hundred_thousand_steps_are_searched_in_twenty_milliseconds(
    tmp_path: Path,
    corpus: Callable[[random.Random], tuple[list[Trajectory], list[dict[str, str]]]],
) -> None:
    """Median over 30 queries on one core, by words, all keys that there are, six windows each."""
    made, asked = corpus(random.Random(0))
    demos = Demos.build(made, tmp_path)
    assert len(demos) == 100_000
    times = []
    for query in asked:
        begin = time.perf_counter()
        found = demos.search(**query, task=made[0].task)  # type: ignore[arg-type]
        times.append(time.perf_counter() - begin)
        assert len(found) == 6
    assert statistics.median(times) < 0.020
