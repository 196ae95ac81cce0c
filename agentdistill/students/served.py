"""A student whose responses are drawn on a vLLM server while it is trained in this process.

Invariant: nothing is asked of the server before somebody wants to act.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentdistill.config import ServerConfig
from agentdistill.engines.base import ScoreRequest
from agentdistill.engines.served import ByAdapter, ByPath, Courier, ServedEngine
from agentdistill.engines.vllm import reach
from agentdistill.errors import ConfigError
from agentdistill.records import FloatArray
from agentdistill.students import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from agentdistill.engines.hf import HFEngine


def serve(
    config: ServerConfig,
    here: HFEngine,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    key: str,
    probe: Sequence[int],
) -> ServedEngine:
    """An engine that draws on the server what ``here`` would draw.

    Args:
        config: of the server.
        here: the engine of the same weights in this process.
        model: those weights.
        tokenizer: of the model.
        key: where ``config`` stands.
        probe: a prompt to prove that weights have arrived.

    Raises:
        ConfigError: the way in which weights shall travel does not fit the model.
    """
    adapted = hasattr(model, "peft_config")
    if (config.weights == "lora") != adapted and config.weights != "auto":
        remedy = "the model has adapters: use lora" if adapted else "the model has no adapters"
        raise ConfigError(f"{remedy}, or auto", key=f"{key}.weights", value=config.weights)
    endpoint = reach(config, key)
    way: type[Courier] = ByAdapter if adapted else ByPath
    name = "".join(letter if letter.isalnum() else "-" for letter in here.name)
    courier = way(endpoint, Path(config.folder), config.seen_as, name)

    def said(request: ScoreRequest, k: int) -> FloatArray:
        (scores,) = here.score_now([request], k)
        assert scores.top_logp is not None  # because k > 0
        return scores.top_logp

    return ServedEngine(
        endpoint,
        tokenizer,
        courier,
        partial(local.save_served, model, tokenizer),
        said,
        probe=probe,
        tolerance=config.tolerance,
        name=here.name,
        served=config.served,
        stop_ids=sorted(here.stop_ids),
        ready=config.ready,
        remedy=f"start it ({' '.join(command('FOLDER', adapted=adapted))})",
    )


def write_folder(model: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Write what a server of ``model`` is started from; return the words of the command.

    Of a model with adapters that is its base, from which the adapters are taken off.
    """
    adapted = hasattr(model, "peft_config")
    if adapted:
        model = model.unload()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        local.save_served(model, tokenizer, folder)
    return command(str(folder), adapted=adapted)


def command(folder: str, *, adapted: bool) -> list[str]:
    """How a server that takes weights from here is started, after ``env`` or in a shell."""
    if adapted:
        return ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "vllm", "serve", folder, "--enable-lora"]
    return ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", os.fspath(folder)]
