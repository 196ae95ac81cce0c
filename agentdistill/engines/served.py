"""A student that is trained here and draws its responses on a server: how its weights get there.

Invariants
----------
* The server is brought to the present weights before it is asked, and only then: after an update
  (:meth:`ServedEngine.publish`), or when another model of this process had it in between.
* Weights travel through a folder that both sides see: complete or not there, named by version, and
  removed once the next one is in use.
* What travelled is proved: after a probe, the likeliest tokens must have the log-probabilities that
  the weights in this process give them, or nothing else is drawn.
* Versions on samples are those of the trainer.
"""

from __future__ import annotations

import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from agentdistill.engines import answers
from agentdistill.engines.base import Sample, Sampling, ScoreRequest
from agentdistill.engines.endpoint import Endpoint, ServerError
from agentdistill.engines.vllm import COMPLETIONS, VLLMEngine
from agentdistill.errors import EngineError
from agentdistill.files import refusing
from agentdistill.records import FloatArray

Write = Callable[[Path], None]
"""Writes the present weights into a folder that does not exist yet."""

Local = Callable[[ScoreRequest, int], FloatArray]
"""The k largest log-probabilities at each position of a request, by the weights here [N, k]."""

_HELD: dict[str, tuple[object, int]] = {}
"""By server: whose weights, in which version, it has by path (a server has one set of them)."""

_PROOF = 16
"""Tokens that are drawn to prove that weights have arrived."""

_ALTERNATIVES = 5
"""And how many alternatives to each are compared."""

_DEV = "start the server with VLLM_SERVER_DEV_MODE=1"
_LORA = "start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class Courier(ABC):
    """Brings weights to one server."""

    def __init__(self, endpoint: Endpoint, folder: Path, seen_as: str | None, name: str) -> None:
        """Nothing is written.

        Args:
            endpoint: the server.
            folder: shared with it.
            seen_as: the same folder as the server names it; None: as we do.
            name: of the student, part of every folder's name.
        """
        self.endpoint, self.folder = endpoint, folder.expanduser().absolute()
        self._seen_as, self.name = seen_as, f"{name}-{uuid.uuid4().hex[:8]}"
        self._last: Path | None = None

    @abstractmethod
    def has(self, version: int) -> bool:
        """Whether the server has ``version`` of these weights now."""

    @abstractmethod
    def doubt(self) -> None:
        """Nobody knows what the server has."""

    @abstractmethod
    def load(self, path: str, version: int) -> str | None:
        """Let the server read ``path``; return the name to ask for, None for the served one."""

    def send(self, write: Write, version: int) -> str | None:
        """Write the weights, let the server read them, and remove what it had before."""
        place = self.folder / f"{self.name}-v{version}"
        unfinished = place.with_name(f".{place.name}.tmp")
        with refusing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (unfinished, place):
                shutil.rmtree(leftover, ignore_errors=True)
            write(unfinished)
            unfinished.rename(place)
        there = str(place) if self._seen_as is None else f"{self._seen_as}/{place.name}"
        try:
            name = self.load(there, version)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        if self._last not in (None, place):
            shutil.rmtree(str(self._last), ignore_errors=True)
        self._last = place
        return name

    def close(self) -> None:
        """Remove what was written."""
        if self._last is not None:
            shutil.rmtree(self._last, ignore_errors=True)
            self._last = None

    def _command(self, path: str, payload: dict[str, Any] | None, remedy: str) -> Any:
        """One command; where the server does not know it, the error says how to start it."""
        try:
            return self.endpoint.call(path, payload)
        except ServerError as error:
            if error.status in (400, 403, 404, 405, 500):
                line = f"{self.endpoint.url}{path} failed: {error.said}; {remedy}, and let it read "
                line += f"{self._seen_as or self.folder}"
                raise ServerError(line, error.said, error.status) from error
            raise


class ByPath(Courier):
    """Whole weights: the server pauses, reads them in place of its own, and forgets its caches."""

    def has(self, version: int) -> bool:
        """Whether they are what was last read there (by anybody in this process)."""
        return _HELD.get(self.endpoint.url) == (self, version)

    def doubt(self) -> None:
        """Also for others who have brought it theirs."""
        _HELD.pop(self.endpoint.url, None)

    def load(self, path: str, version: int) -> None:
        """Pause, reload, reset, resume; resumes whatever happens."""
        self.doubt()
        self._command("/pause?mode=wait", None, _DEV)
        try:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            self._command("/collective_rpc", reload, _DEV)
            self._command("/reset_prefix_cache", None, _DEV)
        finally:
            self._command("/resume", None, _DEV)
        _HELD[self.endpoint.url] = self, version


class ByAdapter(Courier):
    """Adapters: every version is a model of its own there, beside the frozen base."""

    _name: str | None = None
    _version: int | None = None

    def has(self, version: int) -> bool:
        """Whether they were the last that we loaded."""
        return self._version == version

    def doubt(self) -> None:
        """The adapter is loaded, and not what it should be."""
        self._version = None

    def load(self, path: str, version: int) -> str:
        """Load the new adapter, then drop the old one."""
        name = f"{self.name}-v{version}"
        if self._name == name:  # the same version once more, after a failure
            self._drop()
        self._command("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, _LORA)
        self._drop()
        self._name, self._version = name, version
        return name

    def close(self) -> None:
        """Unload it, too."""
        with suppress(ServerError):  # a server that is gone has nothing to unload
            self._drop()
        super().close()

    def _drop(self) -> None:
        if self._name is None:
            return
        old, self._name, self._version = self._name, None, None
        self._command("/v1/unload_lora_adapter", {"lora_name": old}, _LORA)


class ServedEngine(VLLMEngine):
    """Draws on a server what weights in this process would draw; see the module docstring."""

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: Any,
        courier: Courier,
        write: Write,
        local: Local,
        *,
        probe: Sequence[int],
        tolerance: float = 0.1,
        **options: Any,
    ) -> None:
        """Nothing is sent before :meth:`wake`.

        Args:
            endpoint: where it is.
            tokenizer: of the model.
            courier: how weights get there.
            write: writes the present weights.
            local: says how likely the likeliest tokens are by the present weights.
            probe: a prompt that the server answers after every journey.
            tolerance: largest mean difference of what both sides give its tokens, in nats.
            options: of :class:`VLLMEngine`.
        """
        super().__init__(endpoint, tokenizer, **options)
        self._courier, self._write, self._local = courier, write, local
        self._probe, self._tolerance = [int(i) for i in probe], tolerance
        self._asked_as, self._arrived = "", False
        self.journeys = 0
        """How often weights were sent."""

    @property
    def model(self) -> str:
        """What requests call the present weights."""
        return self._asked_as

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Draw one response with the present weights."""
        self.wake()
        return await super().generate(ids, sampling, seed=seed, session=session)

    def publish(self, version: int) -> None:
        """The weights changed, also where the version did not: they travel before the next draw."""
        super().publish(version)
        self._arrived = False

    def wake(self) -> None:
        """Bring the server to the present weights, if it has others.

        Raises:
            EngineError: it cannot be brought there, or says other things with them.
        """
        self.connect()
        if not (self._arrived and self._courier.has(self.version)):
            self._asked_as = self._courier.send(self._write, self.version) or self.served
            self.journeys += 1
            self._prove()
            self._arrived = True

    def _prove(self) -> None:
        """After a probe, the likeliest tokens must be as likely there as they are here.

        The likeliest alone would not do: a trained model is sure of it whatever else is wrong.
        """
        greedy = Sampling(temperature=0.0, max_tokens=_PROOF)
        payload = {
            **self._asking(self._probe, greedy, 0),
            "logprobs": _ALTERNATIVES,
            "return_tokens_as_token_ids": True,
            "cache_salt": uuid.uuid4().hex,
        }
        answer = self.endpoint.call(COMPLETIONS, payload)
        drawn = answers.sample(answer, self._probe, self._decode, frozenset(), self.version, False)
        start, whole = len(self._probe), [*self._probe, *drawn.ids]
        ours = self._local(ScoreRequest(whole, range(start, len(whole))), _ALTERNATIVES)
        gap = float(np.abs(ours - answers.likeliest(answer, _ALTERNATIVES)).mean())
        if not gap <= self._tolerance:
            self._courier.doubt()
            raise EngineError(
                f"{self.endpoint.url} has read version {self.version} of {self.name} and still "
                f"says something else (by {gap:.3g} nats a token, tolerance {self._tolerance:g}): "
                "serve a model of the same architecture, which nobody else updates, let folder and "
                "seen_as name one place, and raise tolerance where the server is in bfloat16"
            )

    async def close(self) -> None:
        """Remove what was written."""
        self._courier.close()
