"""What a vLLM server answers to a completion of token ids, as samples and scores.

Invariants: pure functions of a JSON answer, checked against what was asked; an answer that does not
fit (other prompt ids, a log-probability too few) is an error, never a shorter result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agentdistill.engines.base import Sample, ScoreRequest, Scores
from agentdistill.errors import EngineError
from agentdistill.records import FloatArray, Usage


def sample(
    answer: Mapping[str, Any],
    prompt: Sequence[int],
    decode: Callable[[tuple[int, ...]], str],
    stop_ids: frozenset[int],
    version: int,
    scaled: bool,
) -> Sample:
    """The one completion of ``answer``.

    Args:
        answer: of ``/v1/completions`` with ``return_token_ids`` and ``logprobs``.
        prompt: ids that were asked.
        decode: ids → text.
        stop_ids: what ends a turn.
        version: of the weights.
        scaled: the temperature was neither 0 nor 1: a server gives log-probabilities at temperature
            1, which are not those that the ids were drawn with, so they become NaN.

    Raises:
        EngineError: the answer is none to this prompt.
    """
    choice = _choice(answer)
    ids, same = choice.get("token_ids"), choice.get("prompt_token_ids")
    if ids is None:
        raise EngineError("the server gives no token ids: it needs vLLM 0.10.2 or newer")
    if same is not None and list(same) != list(prompt):
        raise EngineError("the server changed the ids of the prompt, and must not")
    drawn = tuple(int(i) for i in ids)
    if choice.get("finish_reason") not in ("stop", "length") or not drawn:
        raise EngineError(f"the server broke off an answer ({choice.get('finish_reason')})")
    logp = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(logp) != len(drawn) or any(value is None for value in logp):
        raise EngineError(f"{len(logp)} log-probabilities for {len(drawn)} sampled ids")
    values = tuple(float("nan") if scaled else float(value) for value in logp)
    stop = "stop" if drawn[-1] in stop_ids else "length"
    used = _usage(answer, len(prompt), len(drawn))
    return Sample(drawn, values, decode(drawn), stop, version, used)


def scores(answer: Mapping[str, Any], request: ScoreRequest, top_k: int = 0) -> Scores:
    """What the server says about the tokens of ``request``.

    Args:
        answer: of ``/v1/completions`` with ``prompt_logprobs`` of at least ``top_k``.
        request: what was asked; the answer may end at its last position.
        top_k: alternatives that are wanted of every position.

    Raises:
        EngineError: a position lacks its token, or alternatives.
    """
    said = _choice(answer).get("prompt_logprobs")
    if not isinstance(said, list) or len(said) <= max(request.positions, default=0):
        raise EngineError("the server gives no log-probabilities of the prompt")
    rows = [said[position] or {} for position in request.positions]
    tokens = [str(int(request.ids[position])) for position in request.positions]
    if any(token not in row for token, row in zip(tokens, rows, strict=True)):
        raise EngineError("the server's log-probabilities are those of other tokens")
    pairs = zip(tokens, rows, strict=True)
    logp = np.asarray([row[token]["logprob"] for token, row in pairs], np.float32)
    if not np.isfinite(logp).all():
        raise EngineError("the server's log-probabilities are not finite")
    if not top_k:
        return Scores(logp)
    best = [sorted(row.items(), key=lambda item: item[1]["rank"])[:top_k] for row in rows]
    if any(len(row) < top_k for row in best):
        raise EngineError(f"the server gives fewer than top_k={top_k} alternatives")
    ids = np.asarray([[int(token) for token, _ in row] for row in best], np.int32)
    values = np.asarray([[each["logprob"] for _, each in row] for row in best], np.float32)
    shape = (len(rows), top_k)
    return Scores(logp, None, ids.reshape(shape), values.reshape(shape))


def likeliest(answer: Mapping[str, Any], k: int) -> FloatArray:
    """The ``k`` largest log-probabilities at every sampled position [N, k], largest first.

    Raises:
        EngineError: there are fewer.
    """
    rows = (_choice(answer).get("logprobs") or {}).get("top_logprobs") or []
    if not rows or any(len(row) < k for row in rows):
        raise EngineError(f"the server gives fewer than {k} alternatives of its samples")
    return np.asarray([sorted(row.values(), reverse=True)[:k] for row in rows], np.float32)


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise EngineError("an answer without choices: is this a vLLM server?")
    return choices[0]


def _usage(answer: Mapping[str, Any], prompt: int, drawn: int) -> Usage:
    """Tokens; what came from the prefix cache only where the server says so."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    cached = min(int(details.get("cached_tokens") or 0), prompt)
    return Usage(prompt - cached, cached, 0, drawn)
