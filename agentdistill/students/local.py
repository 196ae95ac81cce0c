"""Any transformers causal LM by folder or hub id: full training or LoRA, dtype and device chosen.

Models are saved and loaded as ordinary transformers folders (model and tokenizer together; an
adapter as an ordinary peft folder), so that nothing here is needed to use a result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentdistill.config import LocalModel, LoraConfig
from agentdistill.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def device_of(name: str) -> str:
    """``auto`` → the first GPU when there is one, else the CPU."""
    import torch

    if name != "auto":
        return name
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def load(config: LocalModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``config``, with adapters where it asks for them.

    Raises:
        ConfigError: the folder or hub id cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device_of(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "revision": config.revision}
    if config.attention:
        options["attn_implementation"] = config.attention
    path = Path(config.path)
    adapter = (path / "adapter_config.json").exists()
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision)
        if adapter:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(
                config.path, is_trainable=True, **options
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(config.path, **options)
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        remedy = f"cannot be loaded; give a transformers folder or a reachable hub id ({line})"
        raise ConfigError(remedy, key="path", value=config.path) from error
    if config.lora is not None and not adapter:
        model = add_lora(model, config.lora)
    return model.to(device), tokenizer


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """``model`` with frozen weights and fresh adapters."""
    import peft

    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, adapters)  # type: ignore[return-value]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as an ordinary transformers folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Set the weights of ``model`` to those saved in ``folder`` (same architecture).

    Raises:
        EngineError: the folder holds another architecture.
    """
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    result: Any
    if file.exists():
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model, load_file(file))
        unexpected = list(result.unexpected_keys)
        missing: list[str] = []
    else:
        state: dict[str, Any] = {}
        for part in sorted(folder.glob("model*.safetensors")):
            state.update(load_file(part))
        result = model.load_state_dict(state, strict=False)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        missing = [key for key in result.missing_keys if key not in tied]
        unexpected = list(result.unexpected_keys)
    if unexpected or missing:
        raise EngineError(f"{folder} holds other weights: {(unexpected + missing)[:3]}")
