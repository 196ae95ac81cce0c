"""What was asked and answered, one line of JSON each, as ``agentdistill import`` reads it.

Invariants: a line holds messages, tools, sampling and the answer; no headers, no addresses, and no
key that this process knows. A line is there before its answer is sent. What a client says in
``metadata`` of the task (``task``, ``task_id``, ``goal``, ``plan``, ``split``) becomes a fact of
the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from agentdistill.engines.replies import scrub
from agentdistill.files import refusing
from agentdistill.records import Json

FACTS = ("task", "task_id", "goal", "plan", "split")


class Recording:
    """A file that lines are appended to; by several processes, too."""

    def __init__(self, path: Path) -> None:
        """Open ``path``, which only its owner may read.

        Raises:
            StoreError: the disk refuses (here and in every method).
        """
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with refusing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, flags, 0o600)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")  # whoever wrote here before was killed in a line

    def add(self, request: Mapping[str, Json], answer: Mapping[str, Json], at: int) -> None:
        """Append one exchange."""
        metadata = request.get("metadata")
        given = metadata if isinstance(metadata, dict) else {}
        facts = {name: given[name] for name in FACTS if isinstance(given.get(name), str)}
        kept = {name: value for name, value in request.items() if name != "metadata"}
        record = {"at": at, "request": kept, "response": answer, "metadata": facts}
        line = scrub(json.dumps(record, ensure_ascii=False)).encode() + b"\n"
        with refusing(self.path):
            while line:
                line = line[os.write(self._file, line) :]

    def close(self) -> None:
        """Close the file; once."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1  # the number may be somebody else's from now on
