"""The one-card benchmark's tiny sizes on a card: bfloat16, measured memory and busy time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_tiny_size_runs_on_the_card(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "one_card.json"
    command = [sys.executable, str(FOLDER / "one_card.py"), "--small", "--output", str(output)]
    done = subprocess.run(
        command,
        cwd=FOLDER.parent,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["gpu"] and found["note"] == "" and found["device"] != "cpu"
    assert found["size"]["name"] == "tiny"
    assert 0 < found["ours"]["peak_gb"] < 2
    assert 0 <= found["ours"]["idle"] < 1
    assert set(found["goals"]) == {"fits in 80 GB", "idle at most 10%", "3 times trl's fastest"}
    for name in ("trl", "trl, no checkpointing"):
        assert found[name]["ratio"] > 0
        # The same ids and weights; ours multiplies in bfloat16, trl by autocast from float32.
        assert found[name]["apart"] < 0.1
