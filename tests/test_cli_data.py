"""The commands `agentdistill data` and `agentdistill envs`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentdistill.cli import data as verb
from agentdistill.cli import lists
from agentdistill.envs import sources
from agentdistill.envs.base import Availability
from agentdistill.envs.sokoban.env import SokobanEnv
from agentdistill.envs.sources import Dataset, Source
from tests.cli_calls import ROOT, answer, call, python, refused
from tests.envs.web import Site, serving

BODY = b"a product" * 5000


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or touches this machine's data."""
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA", "APPWORLD_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGENTDISTILL_HOME", str(tmp_path / "home" / "cache"))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The data set `toy`: a file whose hash is known and an archive about which nothing is."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("top/level.txt", "####")
    digest = hashlib.sha256(BODY).hexdigest()
    with serving(Site({"/shop.json": BODY, "/levels.zip": packed.getvalue()})) as found:
        parts = (
            Source("shop.json", f"{found.url}/shop.json", "us", "MIT", len(BODY), digest),
            Source("levels", f"{found.url}/levels.zip", "them", "CC0-1.0", member="top"),
        )
        toy = Dataset("toys", parts, "toy", "TOY_DATA", "small")
        monkeypatch.setitem(sources.DATASETS, "toy", toy)
        yield found


# -- data ------------------------------------------------------------------------------------------


def test_data_is_fetched_once_and_checked(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "cache" / "toy"
    first = call("data", "toy")
    assert first.exit_code == 0
    assert "shop.json: 0.0 MB, from us, MIT" in first.stdout
    assert f"shop.json: present, fetched; its hash agrees: {folder / 'shop.json'}" in first.stdout
    assert "levels: present, fetched; its hash was noted: its owner publishes none" in first.stdout
    again = call("data", "toy").stdout.splitlines()
    assert [line.split(": ")[1] for line in again] == ["present, already there"] * 2
    assert len(site.asked) == 2
    report = answer("data", "toy", "--check")
    assert report["ok"] and report["folder"] == str(folder)
    assert [part["state"] for part in report["sources"]] == ["verified", "verified"]
    assert report["sources"][1]["licence"] == "CC0-1.0"


def test_data_elsewhere_says_how_to_use_it(site: Site, tmp_path: Path) -> None:
    assert (
        f"use it with TOY_DATA={tmp_path / 'x'}"
        in call("data", "toy", "--to", str(tmp_path / "x")).stdout
    )
    assert (tmp_path / "x" / "levels" / "level.txt").read_text() == "####"


def test_a_failed_check_exits_with_1_and_fetches_nothing(site: Site, tmp_path: Path) -> None:
    result = call("data", "toy", "--to", str(tmp_path), "--check")
    assert result.exit_code == 1 and "shop.json: absent, not in" in result.stdout
    (tmp_path / "shop.json").write_bytes(bytes(len(BODY)))
    result = call("data", "toy", "--to", str(tmp_path), "--check", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (1, False)
    assert [part["state"] for part in report["sources"]] == ["damaged", "absent"]
    assert site.asked == []


def test_json_stays_one_document_while_fetching(site: Site) -> None:
    report = answer("data", "toy")
    assert [part["state"] for part in report["sources"]] == ["present", "present"]


def test_what_fails_is_one_line(site: Site, tmp_path: Path) -> None:
    site.files["/shop.json"] = bytes(len(BODY))
    result = call("data", "toy")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 4 and "is not the known one" in line
    site.files.clear()
    assert "answers 404 Not Found; by hand: " in call("data", "toy").stderr
    assert "known: alfworld, appworld" in refused(2, "data", "alfredworld")
    (tmp_path / "file").touch()
    assert call("data", "toy", "--to", str(tmp_path / "file" / "x")).exit_code == 5


def test_what_needs_no_data_says_so() -> None:
    assert "Sokoban generates its levels" in call("data", "sokoban").stdout
    report = answer("data", "scienceworld")
    assert report["ok"] and report["sources"] == [] and report["folder"] is None


def test_the_list_shows_what_is_here(site: Site, tmp_path: Path) -> None:
    rows = {line.split("|")[1].strip(): line for line in call("data").stdout.splitlines()}
    assert {"alfworld", "appworld", "boxoban", "sokoban", "webshop", "webshop-full"} <= set(rows)
    assert "| needs none |" in rows["sokoban"] and "| absent " in rows["toy"]
    call("data", "toy")
    (listed,) = [found for found in answer("data") if found["name"] == "toy"]
    assert {part["state"] for part in listed["sources"]} == {"present"}
    assert site.asked and len(site.asked) == 2


def test_a_terminal_shows_a_bar(site: Site, tmp_path: Path) -> None:
    code = (
        "import sys; from agentdistill.envs import sources;"
        "from agentdistill.envs.sources import Dataset, Source;"
        f"sources.DATASETS['toy'] = Dataset('toys', (Source('shop.json', '{site.url}/shop.json',"
        " 'us', 'MIT'),), 'toy');"
        "from agentdistill.cli import app; app(['data', 'toy'])"
    )
    outer, inner = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=inner, env=env) as process:
        os.close(inner)
        shown = b""
        with open(outer, "rb", buffering=0) as screen:
            try:
                while chunk := screen.read(4096):
                    shown += chunk
            except OSError:  # the other end of a terminal was closed
                pass
    assert process.returncode == 0
    assert "45.0/45.0 kB" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


# -- AppWorld's own program ------------------------------------------------------------------------


def program(tmp_path: Path, script: str) -> Path:
    """AppWorld's program, which we only call, as a shell script."""
    path = tmp_path / "home" / "cache" / "appworld" / "venv" / "bin" / "appworld"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "$@"\n{script}\n')
    path.chmod(0o755)
    return path


def test_appworld_is_fetched_by_its_own_program(tmp_path: Path) -> None:
    assert "run `agentdistill setup appworld` first" in refused(4, "data", "appworld")
    root = tmp_path / "root"
    path = program(tmp_path, f'[ "$4" = {root} ] && mkdir -p "$4/data/tasks/one"')
    report = answer("data", "appworld", "--to", str(root))
    assert report["sources"][0]["state"] == "unverified" and report["folder"] == str(root)
    path.write_text("#!/bin/sh\nexit 9\n")  # must not be called where there are tasks
    assert "there, but no hash of it is known" in call("data", "appworld", "--to", str(root)).stdout
    assert call("data", "appworld", "--check").exit_code == 1


def test_an_appworld_program_that_claims_success_is_not_believed(tmp_path: Path) -> None:
    program(tmp_path, "echo Failed to download; exit 0")
    result = call("data", "appworld", "--json")
    assert result.exit_code == 4
    assert "ended with 0 and brought no tasks" in json.loads(result.stdout)["error"]["message"]


# -- envs ------------------------------------------------------------------------------------------


def test_envs_shows_every_registered_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentdistill.envs import ENTRY_POINTS

    here = Availability("sokoban 9", "some levels", ("more levels: get them",))
    monkeypatch.setattr(SokobanEnv, "availability", classmethod(lambda cls: here))
    cards = {card["id"]: card for card in answer("envs")}
    assert set(cards) >= set(ENTRY_POINTS)
    sokoban = cards["agentdistill/Sokoban-v0"]
    assert sokoban["installed"] and sokoban["availability"]["package"] == "sokoban 9"
    assert (sokoban["isolation"], sokoban["licence"]) == ("inline", "Apache-2.0")
    text = call("envs").stdout
    row = next(line for line in text.splitlines() if line.startswith("| agentdistill/Sokoban-v0"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        "sokoban 9",
        "some levels",
        "train, tune, report",
        "inline",
        "Apache-2.0",
        "yes",
    ]
    assert "agentdistill/Sokoban-v0: more levels: get them" in text


def test_an_environment_that_lacks_something_is_listed_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Availability("", "none", ("a map: draw it",), ("a box: buy it",))
    monkeypatch.setattr(SokobanEnv, "availability", classmethod(lambda cls: here))
    card = lists._card("agentdistill/Sokoban-v0")
    assert not card["installed"] and card["availability"]["needs"] == ("a box: buy it",)
    lines = call("envs").stdout.splitlines()
    assert "agentdistill/Sokoban-v0: a box: buy it" in lines
    assert "agentdistill/Sokoban-v0: a map: draw it" in lines


def test_an_environment_whose_code_is_missing_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium

    gymnasium.register("agentdistill/Lost-v0", entry_point="agentdistill.envs.lost:LostEnv")
    try:
        card = lists._card("agentdistill/Lost-v0")
        assert (
            not card["installed"] and "No module named 'agentdistill.envs.lost'" in card["problem"]
        )
        assert call("envs").exit_code == 0
    finally:
        del gymnasium.registry["agentdistill/Lost-v0"]


def test_envs_is_quick_and_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "textworld", "appworld", "scienceworld", "bm25s"]
    code = (
        "import sys; from typer.testing import CliRunner; from agentdistill.cli import app;"
        "assert CliRunner().invoke(app, ['envs', '--json']).exit_code == 0;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python("-c", code).stdout == "[]\n"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert verb.data.__doc__
