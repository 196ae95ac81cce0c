"""The models of a run: tiny ones from scratch, local ones, those on servers and behind an API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from agentdistill.config.api import ApiModel, PriceConfig
from agentdistill.config.prompts import Section
from agentdistill.config.servers import ServerConfig, VllmModel


class TokenizerConfig(Section):
    """The tokenizer that a ``tiny`` model trains for itself."""

    vocabulary: int = Field(1024, ge=300)
    """At most so many tokens."""
    episodes: int = Field(400, ge=1)
    """Random and expert episodes that make up its corpus."""
    pieces: Literal["lines", "words"] = "lines"
    """What no token reaches beyond: a line (grids, whose rows become tokens), or a word with the
    number after it (sentences out of which names such as "desk 1" are to be copied)."""


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"


class TinyModel(Section):
    """A Qwen3 architecture from scratch, with a tokenizer trained on the environment's texts."""

    kind: Literal["tiny"] = "tiny"
    hidden: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    feed_forward: int | None = None
    """None takes three times ``hidden``."""
    init_std: float = Field(0.05, gt=0)
    tokenizer: TokenizerConfig = TokenizerConfig()
    server: ServerConfig | None = None
    """Where its responses are drawn; None: in this process."""
    price: PriceConfig | None = None
    """What it would cost behind an API, for results; None: it has no price."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyModel:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            sizes = f"hidden={self.hidden}, heads={self.heads}"
            raise ValueError(f"{sizes}: hidden / heads must be an even whole number")
        return self


class LocalModel(Section):
    """Any transformers causal LM, by folder or hub id."""

    kind: Literal["local"] = "local"
    path: str
    """Folder or hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: float32 on a CPU, bfloat16 on a GPU (trained through float32 masters)."""
    device: str = "auto"
    """``auto``: the first GPU, else the CPU."""
    attention: str | None = None
    """Attention implementation of transformers, such as ``flash_attention_2``."""
    lora: LoraConfig | None = None
    """None trains all weights."""
    revision: str | None = None
    server: ServerConfig | None = None
    """Where its responses are drawn; None: in this process."""
    price: PriceConfig | None = None
    """What it would cost behind an API, for results; None: it has no price."""


def tag(key: str, default: str) -> Discriminator:
    """Which member of a union a mapping is meant to be: its ``key``, else ``default``."""

    def read(value: Any) -> Any:
        return value.get(key, default) if isinstance(value, Mapping) else getattr(value, key, None)

    return Discriminator(read)


ModelConfig = Annotated[
    Annotated[TinyModel, Tag("tiny")]
    | Annotated[LocalModel, Tag("local")]
    | Annotated[ApiModel, Tag("api")]
    | Annotated[VllmModel, Tag("vllm")],
    tag("kind", "tiny"),
]
