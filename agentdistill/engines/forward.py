"""Ragged sequences through the body of a causal language model, and its head in chunks.

Invariants
----------
* Callers hand over sequences of any length and the positions in question; padding exists only in
  here. The hidden state of position p is the one that *predicts* token p (computed at p - 1).
* Right padding needs no attention mask: nothing real comes after it, and attention is causal.
* Padded, packed and one sequence at a time give the same numbers up to rounding, whatever else is
  in the call.
* Logits of all rows times the whole vocabulary never exist at once, in either direction.

Shape suffixes: N positions in question, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agentdistill.errors import EngineError

Indices = npt.NDArray[np.int64]
Ids = Tensor | npt.NDArray[Any] | Sequence[int]

LOGITS_AT_ONCE = 1 << 24
"""Numbers in one chunk of logits (64 MiB in fp32) when the caller names no chunk."""

SPARE_TOKENS = 32
"""Padding below this is cheaper than one more forward."""


def body(model: nn.Module) -> Any:
    """The transformer under the head of ``model``, also inside a peft wrapper.

    Raises:
        EngineError: prompt-learning adapters live in the wrapper's forward, which is bypassed here.
    """
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise EngineError("prompt-learning adapters cannot be run by their body alone: use LoRA")
    return model.get_decoder()  # type: ignore[operator]


def head(model: nn.Module) -> nn.Module:
    """The projection from hidden states to the vocabulary (before :func:`logits` scales it)."""
    module = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(module, nn.Module):
        raise EngineError(f"{type(model).__name__} has no output embeddings: not a causal model")
    return module


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits [..., V] of ``hidden`` [..., H], scaled and capped as the model does it."""
    return _finish(head(model)(hidden), body(model).config)


def _finish(raw: Tensor, config: Any) -> Tensor:
    """What some families do after the head: Cohere, Granite, Falcon-H1 scale it, Gemma caps it."""
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        factor = getattr(config, name, None)
        if factor is not None and factor != 1:
            raw = raw * factor**power
    cap = getattr(config, "final_logit_softcapping", None)
    return raw if cap is None else torch.tanh(raw / cap) * cap


def log_probs_at(
    model: nn.Module, hidden_NH: Tensor, token_N: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token per row, and the entropy of each row's distribution.

    Differentiable: under gradient each chunk is computed again in the backward pass, so that
    memory stays at one chunk of logits.

    Args:
        model: whose head it is.
        hidden_NH: hidden states that predict the tokens, from :func:`hidden_states`.
        token_N: token ids, int64, on the same device.
        chunk: rows per chunk; by default as many as :data:`LOGITS_AT_ONCE` allows.

    Returns:
        Log-probabilities [N] and entropies [N], natural log, temperature 1, fp32.
    """
    project, config = head(model), body(model).config

    def rows(hidden: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(_finish(project(hidden), config).float(), -1)
        return logp.gather(-1, token[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    if chunk is None:
        chunk = max(1, LOGITS_AT_ONCE // vocabulary(model))
    pairs = zip(torch.split(hidden_NH, chunk), torch.split(token_N, chunk), strict=True)
    if torch.is_grad_enabled() and len(hidden_NH) > chunk:
        parts = [
            checkpoint(rows, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs
        ]
    else:
        parts = [rows(*pair) for pair in pairs]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def device_of(model: nn.Module) -> torch.device:
    """Where ids for ``model`` have to be."""
    place: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    return place


def vocabulary(model: nn.Module) -> int:
    """Number of ids that ``model`` can read (rows of its input embedding)."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def hidden_states(
    model: nn.Module,
    sequences: Sequence[Ids],
    positions: Sequence[Ids],
    *,
    packed: bool | None = None,
) -> Tensor:
    """Hidden states that predict the tokens at ``positions`` of each of ``sequences``.

    Each sequence is cut after the last state that is needed. Differentiable.

    Args:
        model: a causal language model, possibly wrapped by peft.
        sequences: token ids of each sequence.
        positions: per sequence, increasing positions in 1..len (len: the token after the end).
        packed: lay everything end to end in one row instead of padding. By default only where the
            attention kernel takes ragged rows (flash attention and full or sliding layers).

    Returns:
        [N, H], sequence after sequence, positions in their order.

    Raises:
        ValueError: a position lies outside its sequence.
    """
    ids, where = [_array(s) for s in sequences], [_array(p) for p in positions]
    _check_positions(ids, where)
    decoder = body(model)
    place = device_of(model)
    used = [i for i, p in enumerate(where) if len(p)]
    if not used:
        dtype = next(decoder.parameters()).dtype
        return torch.zeros(0, decoder.config.hidden_size, dtype=dtype, device=place)
    ids = [ids[i][: int(where[i].max())] for i in used]
    where = [where[i] for i in used]
    packed = _takes_packed(decoder.config) if packed is None else packed
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    groups = [np.arange(len(ids))] if packed else length_groups(lengths)
    parts = [
        _predictors(decoder, [ids[i] for i in group], [where[i] for i in group], place, packed)
        for group in groups
    ]
    if len(groups) == 1:
        return parts[0]
    counts = np.fromiter(map(len, where), np.int64, len(where))
    return torch.cat(parts)[torch.from_numpy(_restore(np.concatenate(groups), counts)).to(place)]


def length_groups(
    lengths: Indices, *, spare: int = SPARE_TOKENS, part: int = 10, budget: int | None = None
) -> list[Indices]:
    """Split rows into groups that can be padded without much waste.

    Args:
        lengths: tokens of each row, int64.
        spare: a group's padding is at most this, or one ``part``-th of its real tokens if that is
            more.
        part: see ``spare``.
        budget: most padded tokens of a group; a single longer row is a group of its own.

    Returns:
        Row numbers of each group; one group keeps the given order, several go from long to short.
    """
    size = len(lengths) * int(lengths.max())
    if _fits(size, int(lengths.sum()), spare, part, budget):
        return [np.arange(len(lengths))]
    order = np.argsort(-lengths, kind="stable")
    cuts, start, real = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        size = int(lengths[order[start]]) * (i - start + 1)
        if i > start and not _fits(size, real + length, spare, part, budget):
            cuts.append(i)
            start, real = i, 0
        real += length
    return [np.asarray(part) for part in np.split(order, cuts)]


def _fits(padded: int, real: int, spare: int, part: int, budget: int | None) -> bool:
    return padded - real <= max(spare, real // part) and (budget is None or padded <= budget)


def fill(rows: Indices, columns: Indices, values: Indices, shape: tuple[int, int]) -> Indices:
    """A zero matrix of ``shape`` with ``values`` at (``rows``, ``columns``)."""
    grid = np.zeros(shape, np.int64)
    grid[rows, columns] = values
    return grid


def within(lengths: Indices) -> Indices:
    """0..n-1 for each n of ``lengths``, concatenated: the place of a flat element in its row."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def _predictors(
    decoder: Any, ids: list[Indices], where: list[Indices], device: torch.device, packed: bool
) -> Tensor:
    """One forward; rows of its flattened output that precede each position."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat, place = np.concatenate(ids), within(lengths)
    counts = np.fromiter(map(len, where), np.int64, len(where))
    if packed:
        starts = np.cumsum(lengths) - lengths
        inputs = _packed_inputs(flat, place, lengths, device)
    else:
        width = int(lengths.max())
        starts = np.arange(len(ids)) * width
        grid = fill(np.repeat(np.arange(len(ids)), lengths), place, flat, (len(ids), width))
        inputs = {"input_ids": torch.from_numpy(grid).to(device)}
    hidden = decoder(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    rows = np.repeat(starts, counts) + np.concatenate(where) - 1
    picked: Tensor = hidden[torch.from_numpy(rows).to(device)]
    return picked


def _packed_inputs(
    flat: Indices, place: Indices, lengths: Indices, device: torch.device
) -> dict[str, Any]:
    """One row of everything; position ids that restart mark the borders for every kernel."""
    borders = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(flat[None]).to(device),
        "position_ids": torch.from_numpy(place[None]).to(device),
        "cu_seq_lens_q": borders.to(device),
        "cu_seq_lens_k": borders.to(device),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _takes_packed(config: Any) -> bool:
    """Recurrent layers would carry their state across borders, so only attention is packed."""
    kernel = getattr(config, "_attn_implementation", None) or ""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kernel.startswith("flash_attention") and kinds <= {
        "full_attention",
        "sliding_attention",
    }


def _restore(order: Indices, counts: Indices) -> Indices:
    """Where each position of the original order lies when rows were computed in ``order``."""
    offsets = np.empty_like(counts)
    offsets[order] = np.cumsum(counts[order]) - counts[order]
    return np.repeat(offsets, counts) + within(counts)


def _array(values: Ids) -> Indices:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, np.int64)


def _check_positions(ids: list[Indices], where: list[Indices]) -> None:
    if len(ids) != len(where):
        raise ValueError(f"{len(ids)} sequences but {len(where)} lists of positions")
    for row, (sequence, wanted) in enumerate(zip(ids, where, strict=True)):
        if len(wanted) and not 1 <= int(wanted.min()) <= int(wanted.max()) <= len(sequence):
            raise ValueError(f"sequence {row}: positions must lie in 1..{len(sequence)}")


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside; afterwards each of ``modules`` has its own mode back.

    Past torch's setter, which takes 4 us a module: this is entered for every token.
    """
    training = [module for module in modules if module.training]
    for module in training:
        object.__setattr__(module, "training", False)
    try:
        yield
    finally:
        for module in training:
            object.__setattr__(module, "training", True)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the model's own logits with those of the parts that this library runs.

    Raises:
        EngineError: they differ.
    """
    ids = torch.arange(3, device=device_of(model))[None]
    wanted = model(input_ids=ids, use_cache=False).logits.float()
    got = logits(model, body(model)(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(got, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
        raise EngineError(
            f"{type(model).__name__} changes its logits after the head in a way that is not known "
            "here: its probabilities would be wrong"
        )
