"""The links at the top level are for readers; nothing may be imported through them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("envs", "teachers", "students")


def _python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("room", ROOMS)
def test_link_is_relative_and_resolves(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert os.readlink(link) == f"agentdistill/{room}"
    assert (link / "__init__.py").samefile(ROOT / "agentdistill" / room / "__init__.py")


@pytest.mark.parametrize("room", ROOMS)
def test_bare_name_is_refused(room: str) -> None:
    done = _python("-c", f"import {room}", cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import this package as agentdistill.{room}" in done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_full_name_is_accepted(room: str) -> None:
    done = _python("-c", f"import agentdistill.{room}", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def _is_editable() -> bool:
    try:
        origin = metadata.distribution("agentdistill").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return False
    return bool(json.loads(origin or "{}").get("dir_info", {}).get("editable"))


@pytest.mark.skipif(not _is_editable(), reason="needs an editable install (make test has one)")
def test_editable_install_does_not_put_the_root_on_the_path(tmp_path: Path) -> None:
    code = "import agentdistill, json, sys; print(json.dumps([agentdistill.__file__, sys.path]))"
    done = _python("-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    module, path = json.loads(done.stdout)
    assert Path(module).samefile(ROOT / "agentdistill" / "__init__.py")
    assert ROOT not in [Path(entry).resolve() for entry in path]


def test_tools_are_told_the_real_folders() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    wheel = tools["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert tools["pytest"]["testpaths"] == ["tests"]
    assert tools["mypy"]["files"] == tools["coverage"]["run"]["source"] == wheel == ["agentdistill"]
    assert tools["hatch"]["build"]["dev-mode-exact"] is True
    for folder in ("agentdistill", "tests"):
        assert (ROOT / folder / "__init__.py").is_file()
        assert not (ROOT / folder).is_symlink()


def test_linter_sees_each_file_once() -> None:
    done = _python("-m", "ruff", "check", "--show-files", cwd=ROOT)
    seen = [Path(line).resolve() for line in done.stdout.splitlines()]
    assert ROOT / "agentdistill" / "envs" / "__init__.py" in seen
    assert len(seen) == len(set(seen))


def test_every_dependency_has_a_pin_that_its_bounds_admit() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["train"], *extras["dev"]]:
        wanted = Requirement(text)
        assert pins[canonicalize_name(wanted.name)] in wanted.specifier
    assert pins["torch"] == "2.13.0"


def test_transformers_that_vllm_pins_is_admitted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    train = [Requirement(text) for text in project["optional-dependencies"]["train"]]
    [wanted] = [requirement for requirement in train if requirement.name == "transformers"]
    assert "5.19.0" in wanted.specifier
