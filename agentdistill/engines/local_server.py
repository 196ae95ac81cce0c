"""A vLLM server on this machine, without a GPU: started from a folder, ended with a block.

Invariant: whatever ends the block, no process of the server is left.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from agentdistill.engines import vllm_setup
from agentdistill.engines.endpoint import Endpoint, ServerError
from agentdistill.errors import EngineError

READY = 240.0
"""Seconds; one takes 45 on an idle machine."""


class Server:
    """Use as a context manager, and :meth:`wait` before it is asked; several start at once."""

    def __init__(self, model: Path, log: Path, *flags: str) -> None:
        """Start it on a free port of this machine.

        Args:
            model: a transformers folder.
            log: file for what it says; its folder must exist.
            flags: further ones of ``vllm serve``; the last of two equal ones counts.

        Raises:
            EngineError: it is not installed.
        """
        python = vllm_setup.python()
        if python is None:
            raise EngineError(f"no vLLM for this machine: {vllm_setup.REMEDY}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.endpoint = Endpoint(self.url, key="url")
        command = [str(python), *vllm_setup.SERVE, *vllm_setup.FLAGS]
        command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-model-len", "1024", "--max-num-seqs", "64", *flags]
        foreign = ("PYTHONPATH", "VIRTUAL_ENV")
        environ = {name: value for name, value in os.environ.items() if name not in foreign}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=environ | vllm_setup.ENVIRON,
                cwd=log.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> Server:
        """Itself, once it is ready.

        Raises:
            EngineError: it is not ready in time, with the end of what it said.
        """
        try:
            self.endpoint.wait(READY)
        except ServerError as error:
            last = " | ".join(self.log.read_text(errors="replace").splitlines()[-8:])
            raise EngineError(f"{error}; it said: {last[-1500:]}") from error
        return self

    def __enter__(self) -> Server:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End its whole process group."""
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
