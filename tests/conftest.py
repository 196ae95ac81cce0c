"""Settings for every test, and the reasons why one is skipped.

The environment variables are set before anything can import torch: one thread (tiny models get
slower with two), no model hub, no warning about forked tokenizers. Property tests draw the same
examples every time and have no deadline of their own, so that a slow machine changes no result;
``pytest --hypothesis-profile default`` draws new ones.
"""

from __future__ import annotations

import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

from agentdistill.engines import vllm_setup
from agentdistill.envs.appworld import setup as appworld

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a job that a shell put into the background: nothing here could be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PACKAGES = {
    "alfworld": ("alfworld",),
    "litellm": ("litellm",),
    "openai": ("openai",),
    "serve": ("starlette", "uvicorn"),
}
"""What tests with a marker import."""


def _missing(marker: str) -> str | None:
    """Why a test with this marker cannot run here; None if it can."""
    if marker == "java" and shutil.which("java") is None:
        return "needs a Java runtime: no `java` on PATH"
    if marker == "browser" and find_spec("playwright") is None:
        return "needs a browser: no package playwright"
    if marker == "browser" and shutil.which("chromium") is None:
        return "needs a browser: no `chromium` on PATH, such as the package chromium"
    if marker == "appworld" and appworld.python() is None:
        return "needs AppWorld in a virtual environment of its own: agentdistill setup appworld"
    if marker == "vllm" and vllm_setup.python() is None:
        return "needs vLLM in a virtual environment of its own: agentdistill setup vllm"
    lacking = [name for name in PACKAGES.get(marker, ()) if find_spec(name) is None]
    return f"needs the package {', '.join(lacking)}" if lacking else None


def _cuda_missing(alone: bool) -> str | None:
    """Why tests on a GPU cannot run; hides the devices unless only such tests were selected."""
    if not alone:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "needs a session of its own: pytest -m gpu"
    torch = pytest.importorskip("torch")
    return None if torch.cuda.is_available() else "needs a CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for item in items:
        reasons = (_missing(mark.name) for mark in item.iter_markers())
        for reason in filter(None, reasons):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep CUDA from every test that did not ask for it (``-m`` has been applied by now)."""
    on_gpu = [item for item in session.items if item.get_closest_marker("gpu")]
    reason = _cuda_missing(alone=len(on_gpu) == len(session.items) > 0)
    for item in on_gpu if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An empty directory for one run."""
    path = tmp_path / "run"
    path.mkdir()
    return path
