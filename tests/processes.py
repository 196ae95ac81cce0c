"""What tests want to know of other processes."""

from __future__ import annotations

import time
from pathlib import Path


def gone(process: int, seconds: float = 10.0) -> bool:
    """Whether ``process`` ends within ``seconds`` (one that waits to be buried has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
