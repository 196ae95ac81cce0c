"""vLLM servers: a frozen model on one, and where the responses of a trained one are drawn.

Invariant: as in :mod:`~agentdistill.config.api`, a key is only ever named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from agentdistill.config.api import PriceConfig, named_key
from agentdistill.config.prompts import Section

_URL = r"^https?://[^\s@?#]+$"


class VllmModel(Section):
    """A model on a vLLM server, by token ids: it acts and scores, and is not trained."""

    kind: Literal["vllm"] = "vllm"
    base_url: str = Field(pattern=_URL)
    """Of the server, with or without ``/v1``. Nothing secret belongs in it."""
    tokenizer: str
    """Folder or hub id of the model's tokenizer and chat template; prompts are made here."""
    served: str | None = None
    """What the server calls the model; None takes the only one."""
    key_env: str | None = None
    """*Name* of the environment variable with the server's key; None sends none."""
    top_k: int = Field(20, ge=0)
    """Most alternatives that are asked for at a position; the server's ``--max-logprobs`` must
    admit them."""
    concurrency: int = Field(64, ge=1)
    """Requests at once."""
    timeout: float = Field(600.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(3, ge=0)
    """Tries after the first, where the connection breaks."""
    ready: float = Field(120.0, gt=0)
    """Seconds until the server must be ready."""
    price: PriceConfig | None = None
    """What it would cost behind an API, for results; None: it has no price."""

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, values: Any) -> Any:
        return named_key(values, cls.model_fields) if isinstance(values, Mapping) else values


class ServerConfig(Section):
    """A vLLM server that draws the responses of a model which is trained in this process.

    It is brought to the trained weights before each iteration's rollout.
    """

    base_url: str = Field(pattern=_URL)
    """Of the server, with or without ``/v1``. Nothing secret belongs in it."""
    folder: str
    """Through which weights travel; both sides see it."""
    seen_as: str | None = Field(None, pattern=r"^/.*[^/]$")
    """The same folder as the server names it; None: as we do."""
    weights: Literal["auto", "lora", "path"] = "auto"
    """How weights travel: adapters that the server loads beside its base, or whole weights that it
    reads in place of its own (``VLLM_SERVER_DEV_MODE=1``). ``auto``: adapters where the model has
    some."""
    served: str | None = None
    """What the server calls the model (of adapters: the base); None takes the only one."""
    key_env: str | None = None
    """*Name* of the environment variable with the server's key; None sends none."""
    concurrency: int = Field(256, ge=1)
    """Requests at once."""
    timeout: float = Field(600.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(3, ge=0)
    """Tries after the first, where the connection breaks."""
    ready: float = Field(120.0, gt=0)
    """Seconds until the server must be ready."""
    tolerance: float = Field(0.1, gt=0)
    """Largest mean difference, in nats a token, between what the server and this process say about
    a probe after weights have travelled; bfloat16 on the server needs some."""

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, values: Any) -> Any:
        return named_key(values, cls.model_fields) if isinstance(values, Mapping) else values
