"""OpenAI's chat completions: requests read strictly, answers written as its clients expect them.

Invariants
----------
* A parameter is honoured, or refused by name, or one of :data:`IGNORED`, which change no answer's
  format; none is dropped in silence.
* Every error has OpenAI's body, and a status that makes clients do the right thing: they try again
  after 429 and 5xx, and not after the others.
* ``usage`` is everything that was spent on the answer; an extension field says on whom.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentdistill.engines.base import Message, Sample, Sampling
from agentdistill.errors import AgentDistillError, BudgetError, EngineError, UnfitError
from agentdistill.importing.lines import read_message
from agentdistill.policy import total
from agentdistill.records import Json, Usage

IGNORED = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort",
    "safety_identifier", "service_tier", "store", "user", "verbosity",
})  # fmt: skip
"""Parameters without effect here; ``metadata`` goes into a recording."""

_NEUTRAL: dict[str, tuple[Json, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Parameters that are refused unless they say what would happen anyway."""

FIELD = "agentdistill"
"""Extension field of an answer, and prefix of its headers."""


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``kind`` is what OpenAI calls ``type``."""
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        said = {"message": message, "type": kind, "param": param, "code": code}
        self.body: Json = {"error": said}


def api_error(error: Exception) -> ApiError:
    """What the client is told of ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BudgetError):
        quota = "insufficient_quota"
        return ApiError(402, str(error), kind=quota, param=error.limit, code=quota)
    if isinstance(error, UnfitError):
        return ApiError(400, str(error), code="unfit_request")
    if isinstance(error, EngineError):
        return _of_engine(error)
    if isinstance(error, TimeoutError):
        return ApiError(504, "no answer in time; raise --timeout", kind="timeout", code="timeout")
    if isinstance(error, AgentDistillError):
        return ApiError(500, str(error), kind="server_error", code=type(error).__name__)
    return ApiError(500, "an error of the server; its log says more", kind="server_error")


def _of_engine(error: EngineError) -> ApiError:
    """Who answers for us failed; with its status where the client can do something about it."""
    status = getattr(error, "status", None)
    if status in (400, 413, 422):
        return ApiError(400, str(error), code="refused_by_provider")
    if status == 429:
        return ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="provider_busy",
            headers={"Retry-After": "5"},
        )
    return ApiError(502, str(error), kind="upstream_error", code="provider_failed")


# -- requests --------------------------------------------------------------------------------------

_Stop = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Function(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(min_length=1)
    parameters: dict[str, Any] | None = None


class _Tool(_Section):
    type: Literal["function"]
    function: _Function


class _StreamOptions(_Section):
    include_usage: bool = False
    include_obfuscation: bool = False


class _ChatRequest(_Section):
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[_Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: int = Field(1, ge=1, le=128)
    stop: _Stop | list[_Stop] = []
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, read.

    Attributes:
        model: whom the client asks.
        messages: the chat.
        tools: what may be called; empty where the client wants no calls.
        sampling: how to draw.
        n: how many answers.
        seed: the client's; without one a random one, 0 for greedy answers.
        stop: texts before which an answer ends.
        stream: as server-sent events.
        with_usage: the last event says what was spent.
        calls: whether calls are wanted.
        said: what a recording keeps of the request.
    """

    model: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    sampling: Sampling
    n: int
    seed: int
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    calls: bool
    said: Json = field(repr=False)


def read(body: bytes, defaults: Sampling) -> Asked:
    """A request's body; what it does not say of sampling is as in ``defaults``.

    Raises:
        ApiError: 400, with the parameter that is wrong.
    """
    try:
        given = json.loads(body, parse_constant=_no_constant)
        json.dumps(given, ensure_ascii=False).encode()  # lone surrogates: nobody takes them
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ApiError(400, "the body is not a JSON object")
    request = _checked(given)
    tools = given.get("tools") or []
    wanted = request.tool_choice == "auto"
    sampling = _sampling(request, defaults)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    if len(stop) > 4:
        raise ApiError(400, "at most 4 stop sequences", param="stop")
    free = 0 if request.temperature == 0 else secrets.randbits(63)
    return Asked(
        model=request.model,
        messages=tuple(_message(n, message) for n, message in enumerate(request.messages)),
        tools=tuple(tools) if wanted else (),
        sampling=sampling,
        n=request.n,
        seed=free if request.seed is None else request.seed,
        stop=tuple(stop),
        stream=request.stream,
        with_usage=request.stream_options.include_usage,
        calls=wanted,
        said=_kept(given),
    )


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is no JSON")


def _checked(given: Mapping[str, Json]) -> _ChatRequest:
    found = {}
    for name, value in given.items():
        if value is None or name in IGNORED:
            continue
        if name not in _NEUTRAL:
            found[name] = value
        elif value not in _NEUTRAL[name]:
            remedy = "is not supported here: leave it out"
            raise ApiError(400, f"{name} {remedy}", param=name, code="unsupported_parameter")
    try:
        return _ChatRequest.model_validate(found)
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter {where}"
        return ApiError(400, message, param=where, code="unknown_parameter")
    if name == "tool_choice":
        message = "tool_choice: only auto and none are supported"
        return ApiError(400, message, param=name, code="unsupported_parameter")
    return ApiError(400, f"{where}: {first['msg']}", param=where)


def _sampling(request: _ChatRequest, defaults: Sampling) -> Sampling:
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "max_tokens": request.max_completion_tokens or request.max_tokens,
    }
    return replace(defaults, **{name: v for name, v in given.items() if v is not None})


def _message(number: int, given: Mapping[str, Json]) -> Message:
    try:
        read_ = read_message(given)
        calls = tuple(_call(call) for call in read_.calls)
    except ValueError as error:
        where = f"messages.{number}"
        raise ApiError(400, f"{where}: {error}", param=where) from error
    role = "system" if read_.role == "developer" else read_.role
    return Message(role, read_.text, calls, read_.answers)


def _call(call: Mapping[str, Json]) -> Mapping[str, Json]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no function with a name")
    if not isinstance(function.get("arguments"), str) or not isinstance(call.get("id"), str):
        raise ValueError("a tool call has no id, or no arguments as JSON text")
    said = {"name": function["name"], "arguments": function["arguments"]}
    return {"id": call["id"], "type": "function", "function": said}


_RECORDED = (
    "model", "messages", "tools", "tool_choice", "n", "stop", "max_tokens",
    "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "metadata",
)  # fmt: skip


def _kept(given: Mapping[str, Json]) -> dict[str, Json]:
    return {name: given[name] for name in _RECORDED if given.get(name) is not None}


# -- answers ---------------------------------------------------------------------------------------


def completion(
    asked: Asked, samples: Sequence[Sample], *, name: str, identity: str, created: int
) -> dict[str, Json]:
    """The whole answer."""
    return {
        "id": f"chatcmpl-{identity}",
        "object": "chat.completion",
        "created": created,
        "model": name,
        "choices": [_choice(number, each, asked) for number, each in enumerate(samples)],
        "usage": usage([sample.usage for sample in samples]),
        FIELD: {"policy": name, "answers": [told(sample) for sample in samples]},
    }


def told(sample: Sample) -> dict[str, Json]:
    """Who gave an answer, and what it took, where an engine says so (``serving.cascade``)."""
    said = getattr(sample, "told", None)
    return dict(said) if said is not None else {"by": "model"}


def headers(answer: Mapping[str, Json]) -> dict[str, str]:
    """The same in short; of several answers, separated by commas."""
    extension = answer[FIELD]
    found = {"policy": [extension["policy"]]}
    for key in ("by", "agreement"):
        values = [each[key] for each in extension["answers"] if key in each]
        found |= {key: values} if values else {}
    return {f"x-{FIELD}-{key}": ",".join(map(str, values)) for key, values in found.items()}


def usage(parts: Sequence[Usage]) -> dict[str, Json]:
    """Token counts as OpenAI writes them: cached tokens are part of the prompt's."""
    whole = total(*parts)
    prompt = whole.input + whole.cache_read + whole.cache_write
    return {
        "prompt_tokens": prompt,
        "completion_tokens": whole.output,
        "total_tokens": prompt + whole.output,
        "prompt_tokens_details": {"cached_tokens": whole.cache_read},
    }


def _choice(number: int, sample: Sample, asked: Asked) -> dict[str, Json]:
    text, cut = _until(sample.text, asked.stop)
    calls = [dict(call) for call in sample.tool_calls] if asked.calls else []
    message: dict[str, Json] = {
        "role": "assistant",
        "content": None if calls and not text else text,
    }
    if sample.reasoning:
        message["reasoning_content"] = sample.reasoning
    if calls:
        message["tool_calls"] = calls
    reason = "length" if sample.stop == "length" and not cut else "stop"
    if calls and reason == "stop":
        reason = "tool_calls"
    return {"index": number, "message": message, "logprobs": None, "finish_reason": reason}


def _until(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """``text`` before the first of ``stop``, and whether that was there."""
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def events(answer: Mapping[str, Json], *, with_usage: bool) -> Iterator[bytes]:
    """``answer`` as server-sent events."""
    whole = {name: answer[name] for name in ("id", "created", "model", FIELD)}
    whole["object"] = "chat.completion.chunk"
    if with_usage:
        whole["usage"] = None
    for choice in answer["choices"]:
        said = dict(choice["message"])
        if "tool_calls" in said:
            said["tool_calls"] = [{"index": n, **c} for n, c in enumerate(said["tool_calls"])]
        content = said.pop("content")
        deltas = [{"role": said.pop("role"), "content": ""}]
        deltas += [{"content": content}] if content else []
        deltas += [{name: value} for name, value in said.items()]
        for delta in deltas:
            yield _event({**whole, "choices": [_part(choice, delta, None)]})
        yield _event({**whole, "choices": [_part(choice, {}, choice["finish_reason"])]})
    if with_usage:
        yield _event({**whole, "choices": [], "usage": answer["usage"]})
    yield b"data: [DONE]\n\n"


def _part(choice: Mapping[str, Json], delta: Json, reason: str | None) -> Json:
    part = {"index": choice["index"], "delta": delta, "logprobs": None}
    return {**part, "finish_reason": reason}


def _event(value: Json) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
