"""How much memory a model takes, without its weights.

Invariants
----------
* Nothing is downloaded and no weight is read or allocated: the architecture is built on torch's
  device ``meta``, where tensors have a shape, a type and no numbers. Tied weights count once,
  adapters are those that peft would make.
* Bytes of weights, masters, gradients and AdamW's state are exact: the optimiser of this library
  keeps what :class:`agentdistill.optimise.Optimiser` says, and nothing else.
* Activations are what autograd keeps of one forward pass of the body, counted on fake tensors
  (which ``meta`` cannot do: attention would not know which kernel to take): bytes per token, for
  any architecture. Of what grows with the square of the length only eager attention keeps anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentdistill.config import LocalModel, ModelConfig, TinyModel
from agentdistill.errors import ConfigError
from agentdistill.students import local, tiny

if TYPE_CHECKING:
    from torch import nn

WIDTHS = (64, 128)
"""Lengths at which activations are counted, to tell what is linear in them from what is not."""


@dataclass(frozen=True, slots=True)
class Size:
    """One model, in numbers and bytes.

    Attributes:
        parameters: numbers, adapters included.
        trained: numbers that a stage trains.
        weights: bytes of all parameters and buffers.
        gradients: bytes of one gradient each, in the weights' own type.
        masters: bytes of float32 copies (of trained weights in half precision).
        state: bytes of AdamW: two float32 moments each, and a step count per tensor.
        largest: bytes of the largest trained tensor, in float32.
        each: bytes of one number of the body.
        kv: bytes of keys and values per token.
        work: bytes per token that a forward without gradients holds at once (estimate).
        kept: bytes per token that autograd keeps of a forward.
        kept_square: the same per pair of tokens of one sequence.
        hidden: width of the hidden states.
        vocabulary: rows of the input embedding.
        head_trained: whether the projection to the vocabulary has a gradient.
        context: longest sequence, tokens.
        device: where it lives.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    masters: int
    state: int
    largest: int
    each: int
    kv: int
    work: int
    kept: float
    kept_square: float
    hidden: int
    vocabulary: int
    head_trained: bool
    context: int
    device: str


def size(config: ModelConfig, key: str = "model") -> Size:
    """The size of the model that ``config`` describes; ``key`` is what the configuration calls it.

    A ``tiny`` model's vocabulary counts as large as its tokenizer may get.

    Raises:
        ConfigError: the folder or hub id is not on this machine, or not as the configuration says.
    """
    return _size(config.model_dump_json(), key)


@lru_cache(maxsize=16)
def _size(described: str, key: str) -> Size:
    import torch
    from pydantic import TypeAdapter

    config: Any = TypeAdapter(ModelConfig).validate_json(described)
    with torch.device("meta"):
        if isinstance(config, TinyModel):
            words: Any = _Words(config.tokenizer.vocabulary)
            return of(tiny.build(config, words, 0), "cpu")
        eager = config.attention == "eager"
        return of(_skeleton(config, key), local.device_of(config.device), eager=eager)


class _Words:
    """As much of a tokenizer as the building of a model needs."""

    eos_token_id, pad_token_id = 1, 0

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _skeleton(config: LocalModel, key: str) -> nn.Module:
    """The architecture of a local model, with the adapters that it has or gets."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where, adapters = _place(config, key), None
    if (Path(where) / "adapter_config.json").exists():
        if config.lora is not None:
            remedy = "is an adapter already, with a rank and targets of its own: remove lora"
            raise ConfigError(remedy, key=f"models.{key}.path", value=config.path)
        import peft

        adapters = peft.PeftConfig.from_pretrained(where)
        where = str(adapters.base_model_name_or_path)
    try:
        read: Any = AutoConfig.from_pretrained
        known = read(where, revision=config.revision, local_files_only=True)
    except Exception as error:  # a broken folder raises whatever its reader does
        remedy = (
            "its config.json is not on this machine, and planning downloads nothing: give a "
            f"transformers folder, or fetch it by `hf download {where} config.json`"
        )
        raise ConfigError(remedy, key=f"models.{key}.path", value=where) from error
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if local.device_of(config.device) == "cpu" else "bfloat16"
    attention = "eager" if config.attention == "eager" else "sdpa"  # flash keeps what sdpa keeps
    build: Any = AutoModelForCausalLM.from_config
    try:
        model = build(known, dtype=getattr(torch, dtype), attn_implementation=attention)
    except ValueError as error:  # no causal language model, or one without sdpa
        line = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"is no model that can be planned ({line})", key=f"models.{key}.path", value=config.path
        ) from error
    if adapters is not None:
        return _wrapped(model, adapters)
    return model if config.lora is None else local.add_lora(model, config.lora)


def _wrapped(model: Any, adapters: Any) -> nn.Module:
    import peft

    adapters.inference_mode = False
    wrapped: nn.Module = peft.get_peft_model(model, adapters)
    return wrapped


def _place(config: LocalModel, key: str) -> str:
    """An absolute folder or a hub id; says by its key what is neither."""
    try:
        return local._place(config.path)
    except ConfigError as error:
        message = str(error).split(": ", 1)[1]
        raise ConfigError(message, key=f"models.{key}.path", value=config.path) from None


def of(model: nn.Module, device: str, *, eager: bool = False) -> Size:
    """The size of ``model``, with or without numbers in it."""
    import torch

    from agentdistill.engines.forward import body, head, vocabulary

    config = body(model).config
    every = list(model.parameters())
    mine = [p for p in every if p.requires_grad]
    half = [p for p in mine if p.element_size() < 4]
    each = _body_type(body(model)).itemsize
    hidden, kv, work = _widths(config, each)
    kept, square = kept_by_autograd(model)
    projection = head(model).weight
    assert isinstance(projection, torch.Tensor)
    return Size(
        parameters=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in mine),
        weights=sum(t.nbytes for t in (*every, *model.buffers())),
        gradients=sum(p.nbytes for p in mine),
        masters=sum(4 * p.numel() for p in half),
        state=sum(8 * p.numel() + 4 for p in mine),
        largest=max((4 * p.numel() for p in mine), default=0),
        each=each,
        kv=kv,
        work=work,
        kept=kept,
        kept_square=square if eager else 0.0,
        hidden=hidden,
        vocabulary=vocabulary(model),
        head_trained=projection.requires_grad,
        context=int(getattr(config, "max_position_embeddings", None) or 1 << 30),
        device=device,
    )


def _body_type(decoder: Any) -> Any:
    """Type of the body's numbers: the embedding's, since adapters are always float32."""
    return decoder.get_input_embeddings().weight.dtype


def _widths(config: Any, each: int) -> tuple[int, int, int]:
    """Hidden size, bytes of keys and values per token, bytes of work per token.

    Keys and values: 2 · layers · kv_heads · head_dim. A forward without gradients holds at most
    the stream and its norm beside three matrices of the feed-forward, or beside queries, keys,
    values and the float32 copies of their norms.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or hidden // heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    wide = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    kv = 2 * int(config.num_hidden_layers) * groups * dim * each
    feed_forward, attention = 3 * wide * each, 4 * heads * dim * each + 8 * heads * dim
    return hidden, kv, 2 * hidden * each + max(feed_forward, attention)


def kept_by_autograd(model: nn.Module) -> tuple[float, float]:
    """Bytes that autograd keeps of the body's forward: per token, and per pair of tokens."""
    before = model.training
    model.train()
    short, long = (_kept(model, width) for width in WIDTHS)
    model.train(before)
    one, two = WIDTHS
    square = (long / two - short / one) / (two - one)
    return short / one - square * one, square


def _kept(model: nn.Module, width: int) -> int:
    """Bytes of the distinct tensors, weights apart, that a backward of ``width`` tokens needs."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from agentdistill.engines.forward import body

    found: dict[int, Any] = {}
    with FakeTensorMode(), torch.device("cpu"):
        decoder = body(model)
        known = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in (*decoder.named_parameters(), *decoder.named_buffers())
        }
        weights = {tensor.untyped_storage()._cdata for tensor in known.values()}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                found[storage._cdata] = storage  # held, so that no other one gets its address
            return tensor

        inputs = {"input_ids": torch.zeros(1, width, dtype=torch.int64), "use_cache": False}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = torch.func.functional_call(decoder, known, kwargs=inputs)
        del output
    return sum(storage.nbytes() for storage in found.values())
