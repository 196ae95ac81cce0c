"""Any transformers causal LM by folder or hub id: full training or LoRA, dtype and device chosen.

Invariants
----------
* Models are saved and loaded as ordinary transformers folders (model and tokenizer together; an
  adapter as an ordinary peft folder), so that nothing here is needed to use a result.
* Adapters are float32, whatever their base is stored in; whole models in bfloat16 are trained by
  way of float32 masters (:class:`agentdistill.optimise.Optimiser`). float16 would need its losses
  scaled, so it is for models that only act or teach.
* Weights are set completely or not at all: a folder of another model is refused, and changes
  nothing.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from agentdistill.config import LocalModel, LoraConfig
from agentdistill.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def device_of(name: str) -> str:
    """``auto`` → the first GPU when there is one, else the CPU."""
    import torch

    if name != "auto":
        return name
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def load(
    config: LocalModel, *, trained: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``config``, with adapters where it asks for them.

    A folder that is an adapter comes with its base, and is what training goes on with.

    Args:
        config: what to load.
        trained: whether a stage trains it, and not only asks it.

    Raises:
        ConfigError: the folder or hub id cannot be loaded, or not as the configuration says.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = _place(config.path)
    adapter = (Path(where) / "adapter_config.json").exists()
    if adapter and config.lora is not None:
        remedy = "is an adapter already, with a rank and targets of its own: remove lora"
        raise ConfigError(remedy, key="path", value=config.path)
    options = _options(config, whole=trained and config.lora is None and not adapter)
    reader: Any = AutoModelForCausalLM
    if adapter:
        import peft

        reader, options["is_trainable"] = peft.AutoPeftModelForCausalLM, True
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=config.revision)
        with _quiet():
            model = reader.from_pretrained(where, **options)
    except Exception as error:  # a broken folder raises whatever its reader does
        remedy = "cannot be loaded; give a transformers folder or a reachable hub id"
        raise ConfigError(f"{remedy} ({_line(error)})", key="path", value=config.path) from error
    if config.lora is not None:
        model = add_lora(model, config.lora)
    try:
        return model.to(device_of(config.device)), tokenizer
    except (RuntimeError, AssertionError) as error:  # torch has no own error for either
        remedy = f"cannot be used; give auto, cpu, or a device that is here ({_line(error)})"
        raise ConfigError(remedy, key="device", value=config.device) from error


def tokenizer_of(path: str) -> Any:
    """The tokenizer in a folder or at a hub id.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_place(path))
    except ConfigError:
        raise
    except Exception as error:  # a broken folder raises whatever its reader does
        remedy = "no tokenizer there; give the folder or hub id of the model that is served"
        raise ConfigError(f"{remedy} ({_line(error)})", key="tokenizer", value=path) from error


def _place(path: str) -> str:
    """An absolute folder, so that an adapter finds its base from anywhere, or a hub id as it is."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return os.path.abspath(folder)
    if path.startswith((".", "~", "/")) or path.count("/") > 1:
        remedy = "no such folder; give one with a model and its tokenizer, or a hub id (owner/name)"
        raise ConfigError(remedy, key="path", value=path)
    return path


def _options(config: LocalModel, *, whole: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained``; ``whole`` if all weights will be trained."""
    import torch

    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device_of(config.device) == "cpu" else "bfloat16"
    if whole and dtype == "float16":
        remedy = "overflows in training; use bfloat16, float32, or lora"
        raise ConfigError(remedy, key="dtype", value=dtype)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "revision": config.revision}
    if config.attention:
        options["attn_implementation"] = config.attention
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what peft says to its own authors: of an old name, and that GPT-2 is transposed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|fan_in_fan_out")
        yield


def _line(error: Exception) -> str:
    """What ``error`` says, in one short line."""
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …")


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """``model`` with frozen weights and fresh float32 adapters.

    Raises:
        ConfigError: the model has none of the modules that the adapters are for.
    """
    import peft

    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
    try:
        with _quiet():
            return peft.get_peft_model(model, adapters)  # type: ignore[return-value]
    except ValueError as error:
        remedy = f"does not fit {type(model).__name__}; give all-linear, or names of its modules"
        raise ConfigError(
            f"{remedy} ({_line(error)})", key="lora.targets", value=config.targets
        ) from error


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model (or its adapters alone) and tokenizer as an ordinary folder."""
    # Or peft would ask the hub, at each checkpoint, whether the vocabulary has grown. It never has.
    options: dict[str, Any] = {"save_embedding_layers": False} if _adapted(model) else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Set the weights of ``model``, or its adapters, to those that :func:`save` wrote.

    Raises:
        EngineError: the folder is damaged, or holds the weights of another model.
    """
    adapted = _adapted(model)
    file = folder / ("adapter_model.safetensors" if adapted else "config.json")
    if not file.exists():
        kind = "adapter" if adapted else "whole model"
        raise EngineError(f"{folder} holds no {kind}: there is no {file.name}")
    try:
        saved = _adapters(file) if adapted else _weights(folder)
    except Exception as error:  # a broken folder raises whatever its reader does
        raise EngineError(f"the weights in {folder} cannot be read ({_line(error)})") from error
    if adapted:
        import peft

        mine = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        mine = model.state_dict()
    for key in [*mine, *saved]:
        shapes = [tuple(held[key].shape) if key in held else None for held in (mine, saved)]
        if shapes[0] != shapes[1]:
            one, other = (shape or "nothing" for shape in shapes)
            raise EngineError(
                f"{folder} holds the weights of another model: {key} is {other} there and {one} "
                "here; use the folder of a model with the same configuration"
            )
    if adapted:
        peft.set_peft_model_state_dict(model, saved)
    else:
        model.load_state_dict(saved)


def _adapted(model: PreTrainedModel) -> bool:
    """Whether peft wraps ``model``; its import is too slow to ask it."""
    return hasattr(model, "peft_config")


def _adapters(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _weights(folder: Path) -> dict[str, Tensor]:
    """By transformers' own reader: shards, tied weights, and names that differ on the disk."""
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained  # its type does not know the second result
    loaded, report = read(folder, dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"missing: {', '.join(sorted(report['missing_keys']))}")
    found: dict[str, Tensor] = loaded.state_dict()
    return found


def save_served(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what a server reads: as :func:`save`, with a head of its own where it is tied.

    vLLM 0.32 reads weights in place of its own, and keeps its old head where a folder has none,
    also where head and embedding are one tensor. Where the head stands apart it reads all of it.
    """
    if _adapted(model) or not getattr(model.config, "tie_word_embeddings", False):
        save(model, tokenizer, folder)
        return
    state = dict(model.state_dict())
    head: Any = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    for name, values in state.items():
        if values.data_ptr() == head.data_ptr():
            state[name] = values.clone()
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
