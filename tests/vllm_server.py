"""Real vLLM servers for tests: started from a folder, ended with the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from agentdistill.engines import vllm_setup
from agentdistill.engines.endpoint import Endpoint

READY = 240.0
"""Seconds; one takes 45 on an idle machine."""


class Server:
    """One server; use as a context manager, and :meth:`wait` before it is asked."""

    def __init__(self, model: Path, log: Path, *flags: str) -> None:
        python = vllm_setup.python()
        assert python is not None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.endpoint = Endpoint(self.url)
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
        try:
            self.endpoint.wait(READY)
        except Exception:
            print(self.log.read_text()[-4000:])
            raise
        return self

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
