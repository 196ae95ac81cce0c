"""ScienceWorld without Java: parts and listings, the gateway's protocol, what is missing."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.envs.make import make
from agentdistill.envs.scienceworld import simulator
from agentdistill.envs.scienceworld.env import ID, ScienceWorldEnv
from agentdistill.envs.scienceworld.gateway import Gateway, Long, Ref, _plain, _written
from agentdistill.envs.scienceworld.problems import (
    SPLITS,
    VARIATIONS,
    checked_simplifications,
    listing,
    part,
)
from agentdistill.errors import ConfigError, EnvError, MissingExtraError

# -- parts and listings ----------------------------------------------------------------------------


def _official(count: int) -> tuple[list[int], list[int], list[int]]:
    """The rule as ScienceWorld states it: groups of a quarter; two, one, and the rest up to two."""
    quarter = count // 4
    starts = range(0, count, quarter)
    groups = [list(range(start, min(start + quarter, count))) for start in starts]
    return groups[0] + groups[1], groups[2], list(itertools.chain(*groups[3:5]))


@pytest.mark.parametrize("count", sorted({5, 6, 7, 8, 9, 11, 1387, *VARIATIONS.values()}))
def test_parts_follow_the_official_rule(count: int) -> None:
    assert tuple(list(part(split, count)) for split in SPLITS) == _official(count)


def test_thirty_tasks_have_7207_variations_and_each_is_in_one_part() -> None:
    assert (len(VARIATIONS), sum(VARIATIONS.values())) == (30, 7207)
    whole = [problem for split in SPLITS for problem in listing(split, 0, VARIATIONS)]
    assert len(whole) == len(set(whole)) == 7207


def test_a_listing_is_balanced_seeded_and_can_be_cut_per_task() -> None:
    first = list(itertools.islice(listing("test", 1, VARIATIONS), 60))
    names = [name for name, _ in first]
    assert set(names[:30]) == set(names[30:]) == set(VARIATIONS)
    assert first == list(itertools.islice(listing("test", 1, VARIATIONS), 60))
    assert first != list(itertools.islice(listing("test", 2, VARIATIONS), 60))
    assert set(listing("test", 1, VARIATIONS)) == set(listing("test", 2, VARIATIONS))
    cut = sorted(listing("test", 1, {"boil": 30, "melt": 30}, per_task=2))
    assert cut == [("boil", 21), ("boil", 22), ("melt", 21), ("melt", 22)]


def test_simplifications_have_one_spelling() -> None:
    assert checked_simplifications("openDoors, teleportAction,openDoors", ["boil"]) == (
        checked_simplifications("teleportAction,openDoors", ["boil"])
    )
    assert checked_simplifications("", ["boil"]) == ""
    assert checked_simplifications(" easy", ["power-component"]) == "easy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["boil", "fry"]}, r"tasks='fry': one of boil, change"),
        ({"tasks": []}, "at least one name"),
        ({"tasks": "boil"}, "needs a list"),
        ({"simplifications": "easy,openDoors"}, "'easy' alone, or a list from"),
        ({"simplifications": "openDoor"}, "'easy' alone, or a list from"),
        ({"simplifications": "noElectricalAction"}, "needs wires: power-component"),
        ({"per_task": 0}, "per_task=0"),
        ({"score": "mean"}, "one of 'last', 'best'"),
        ({"heap_mb": 8}, "heap_mb=8"),
        ({"deadline": 0}, "deadline=0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScienceWorldEnv(**options)


def test_the_instruction_names_the_commands_that_the_simplifications_leave() -> None:
    easy = ScienceWorldEnv().instruction
    assert "teleport to" in easy and "connect OBJ to OBJ" in easy
    plain = ScienceWorldEnv(simplifications="").instruction
    assert "teleport to" not in plain and "connect OBJ to OBJ" in plain
    tight = ScienceWorldEnv(tasks=["boil"], simplifications="noElectricalAction").instruction
    assert "connect" not in tight


# -- what is missing -------------------------------------------------------------------------------


def test_without_java_the_remedy_is_named_and_the_card_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "scienceworld.jar"
    path.write_bytes(b"")
    monkeypatch.setattr(simulator, "jar", lambda: path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    env = ScienceWorldEnv()
    assert env.card.splits == SPLITS
    with pytest.raises(ConfigError, match="install one, such as the package openjdk"):
        env.tasks("train")
    assert any("Java" in line for line in ScienceWorldEnv.availability().needs)


def test_java_home_is_looked_into_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert simulator.java() == str(program)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "find_spec", lambda name: None)
    env = ScienceWorldEnv()
    assert env.card.data == ""
    with pytest.raises(MissingExtraError, match=r"pip install 'agentdistill\[scienceworld\]'"):
        env.tasks("train")


def test_an_unknown_split_is_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(ConfigError, match="split='valid'"):
        ScienceWorldEnv().tasks("valid")


def test_construction_starts_nothing_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, agentdistill.envs.scienceworld.env as e; env = e.ScienceWorldEnv(); env.card; "
        "env.availability(); env.tools; env.close(); "
        "assert not {'py4j', 'scienceworld', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_java_that_cannot_start_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho Could not reserve enough space >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(simulator, "need", lambda: (str(program), tmp_path / "x.jar"))
    monkeypatch.setattr(simulator, "_classpath", str)
    with pytest.raises(EnvError, match=r"status 1 \(Could not reserve enough space\)"):
        simulator.Simulator(256, 10)


def test_a_java_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\nexec cat\n")
    program.chmod(0o755)
    monkeypatch.setattr(simulator, "need", lambda: (str(program), tmp_path / "x.jar"))
    monkeypatch.setattr(simulator, "_classpath", str)
    with pytest.raises(EnvError, match=r"did not start within 0\.3 s"):
        simulator.Simulator(256, 0.3)


def test_the_registered_id_makes_it() -> None:
    env = make(ID, {"tasks": ["boil"]})
    assert isinstance(env, ScienceWorldEnv)
    assert make(ID, {"max_steps": 30}).card.step_limit == 30


# -- the protocol ----------------------------------------------------------------------------------


@contextmanager
def _server(answers: Sequence[bytes], hang: bool = False) -> Iterator[tuple[int, list[bytes]]]:
    """Accept one connection, answer each part that arrives, keep what arrived; hang up or not."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                for answer in answers:
                    heard.append(connection.recv(65536))
                    connection.sendall(answer)
                if hang:
                    connection.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1], heard
        thread.join(5)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (b"!ysa\\nb\\\\n\n", "a\nb\\n"),
        (b"!yi7\n", 7),
        (b"!yd0.5\n", 0.5),
        (b"!ybtrue\n", True),
        (b"!yv\n", None),
        (b"!yro12\n", Ref("o12")),
        (b"!ylo3\n", Ref("o3")),
    ],
)
def test_a_call_and_its_answer(answer: bytes, value: Any) -> None:
    with _server([b"!yv\n", answer]) as (port, heard):
        gateway = Gateway(port, "secret", 5)
        target = Ref("o1")
        assert gateway.call(target, "m", "x\ny", 1, Long(2), True, target) == value
        gateway.close()
    assert heard == [b"A\nsecret\n", b"c\no1\nm\nsx\\ny\ni1\nL2\nbtrue\nro1\ne\n"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_survive_the_protocol(text: str) -> None:
    written = _written(text)
    assert "\n" not in written and "\r" not in written
    assert _plain(written[1:]) == text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"!zsjava.lang.Bad: no\\n\\tat x\n", "an exception in Java: java.lang.Bad: no$"),
        (b"!x\n", "an exception in Java: no details"),
        (b"!ysbroken off", "the connection broke"),
        (b"", "no answer within 0.5 s"),
    ],
)
def test_what_is_no_answer_is_an_error(answer: bytes, message: str) -> None:
    with _server([b"!yv\n", answer], hang=not answer) as (port, _):
        gateway = Gateway(port, "secret", 0.5)
        with pytest.raises(EnvError, match=message):
            gateway.call(Ref("o1"), "m")
        gateway.close()


def test_a_wrong_token_and_nobody_there_are_errors() -> None:
    with _server([b"!x\n"]) as (port, _), pytest.raises(EnvError, match="in Java"):
        Gateway(port, "wrong", 5)
    with pytest.raises(EnvError, match="no connection"):
        Gateway(port, "wrong", 5)


def test_a_forked_process_leaves_its_parents_simulator_alone() -> None:
    class Other(simulator.Simulator):
        def __init__(self) -> None:
            self._owner, self._gateway = os.getpid() + 1, None

    other = Other()
    assert not other.alive
    other.close()  # would fail: it has no child to stop
