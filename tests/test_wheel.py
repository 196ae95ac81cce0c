"""What a user gets from the wheel, in an environment that holds the base dependencies only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}

pytestmark = pytest.mark.wheel


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that cannot see this checkout through the environment."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env={**env, **PLAIN}, capture_output=True, text=True)


def _check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    _check(_run(*build, cwd=out))
    [path] = out.glob("agentdistill-*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that holds the wheel and what it requires."""
    home = tmp_path_factory.mktemp("empty")
    _check(_run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    python = home / "venv" / "bin" / "python"
    pins = ROOT / "constraints.txt"
    _check(_run(*pip, "--python", python, "install", "-qq", "-c", pins, wheel, cwd=home))
    return python.parent


def test_wheel_holds_each_file_of_the_package_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    held = [name for name in names if ".dist-info/" not in name]
    package = (path for path in (ROOT / "agentdistill").rglob("*") if path.is_file())
    files = [path.relative_to(ROOT) for path in package if "__pycache__" not in path.parts]
    assert sorted(held) == sorted(path.as_posix() for path in files)
    assert "agentdistill/py.typed" in held


def test_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [licence] = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_base_install_is_light(bin_dir: Path) -> None:
    code = "from importlib.util import find_spec as f; print(f('torch'), f('transformers'))"
    assert _check(_run(bin_dir / "python", "-c", code, cwd=bin_dir)).split() == ["None", "None"]


def test_environment_runs_an_episode_by_its_full_id(bin_dir: Path) -> None:
    code = """
import gymnasium
env = gymnasium.make("agentdistill.envs:agentdistill/Sokoban-v0")
observation, info = env.reset(seed=0)
steps, over = 0, False
while not over:
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    steps, over = steps + 1, terminated or truncated
print(steps, type(observation).__name__, "success" in info)
"""
    out = _check(_run(bin_dir / "python", "-c", code, cwd=bin_dir))
    steps, kind, has_success = out.split()
    assert int(steps) > 0
    assert (kind, has_success) == ("str", "True")


def test_cli_lists_environments(bin_dir: Path) -> None:
    out = _check(_run(bin_dir / "agentdistill", "envs", "--json", cwd=bin_dir))
    assert "agentdistill/Sokoban-v0" in json.dumps(json.loads(out))


@pytest.mark.parametrize("verb", ["quickstart", "train"])
def test_cli_names_the_missing_extra(bin_dir: Path, tmp_path: Path, verb: str) -> None:
    [recipe] = bin_dir.parent.glob("lib/*/site-packages/agentdistill/recipes/quickstart.yaml")
    words = [verb, recipe] if verb == "train" else [verb]
    done = _run(bin_dir / "agentdistill", *words, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "pip install 'agentdistill[train]'" in done.stderr
    assert "Traceback" not in done.stderr


EXTRAS = {
    "alfworld": "agentdistill/ALFWorld-v0",
    "scienceworld": "agentdistill/ScienceWorld-v0",
    "webshop": "agentdistill/WebShop-v0",
}
CHECKED = """
import sys
from importlib.util import find_spec
from agentdistill.envs.check import check_env
if __name__ == "__main__":  # an environment's worker imports this again where it is spawned
    options = {"tasks": ["find-animal"]} if "Science" in sys.argv[1] else {}
    report = check_env(sys.argv[1], episodes=1, seconds=0.1, budget=4, kwargs=options)
    print(report)
    heavy = [name for name in ("torch", "transformers", "vllm") if name in sys.modules or find_spec(name)]
    print("heavy:", heavy)
    sys.exit(not report.ok or bool(heavy))
"""  # noqa: E501


def _venv(wheel: Path, home: Path, extra: str) -> Path:
    """Python of a new environment with the wheel and one extra."""
    _check(_run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    python = home / "bin" / "python"
    what = (f"{wheel}[{extra}]", "-c", ROOT / "constraints.txt")
    _check(_run(*pip, "--python", python, "install", "-qq", *what, cwd=home))
    return python


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.timeout(900)  # what ALFWorld needs is compiled, unless pip still has it
def test_one_extra_is_enough_and_brings_no_torch(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    if extra == "scienceworld" and shutil.which("java") is None:
        pytest.skip("needs a Java runtime: no `java` on PATH")
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA", "AGENTDISTILL_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    python = _venv(wheel, tmp_path / "venv", extra)
    script = tmp_path / "checked.py"
    script.write_text(CHECKED)
    print(_check(_run(python, script, EXTRAS[extra], cwd=tmp_path)))


def test_what_is_missing_is_said_by_name(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base install lists every environment and says how to get the rest of it."""
    monkeypatch.setenv("AGENTDISTILL_HOME", str(tmp_path / "home"))
    found = json.loads(_check(_run(bin_dir / "agentdistill", "envs", "--json", cwd=tmp_path)))
    text = json.dumps(found)
    for extra, name in EXTRAS.items():
        assert name in text
        assert f"agentdistill[{extra}]" in text
        done = _run(bin_dir / "agentdistill", "envs", "check", name, cwd=tmp_path)
        assert done.returncode in (1, 3), done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert f"agentdistill[{extra}]" in done.stdout + done.stderr
    assert "agentdistill setup appworld" in text
