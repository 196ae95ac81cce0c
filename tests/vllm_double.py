"""What stands for a vLLM server in fast tests: a replay of recorded answers, or a small model.

``Double(answer)`` is a real HTTP server on this machine that asks ``answer(path, payload)`` for
(status, document) and keeps what it was asked. ``Replay`` gives what a real server once said to the
same request (tests/engines/recorded/record_vllm.py); ``Living`` computes its answers with
:class:`HFEngine`, and takes weights by path and adapters as vLLM does.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from agentdistill.engines.base import Sampling, ScoreRequest
from agentdistill.engines.hf import HFEngine
from agentdistill.students import local
from tests.doubles import LocalServer

RECORDED = Path(__file__).parent / "engines" / "recorded" / "vllm.json"
WORDS = [f"w{i}" for i in range(57)]
SPECIAL = ["<user>", "<assistant>", "<end>", "<pad>"]
END = 59

Answer = Callable[[str, Any], tuple[int, Any]]


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id."""
    words = {word: i for i, word in enumerate([*WORDS, *SPECIAL])}
    found = Tokenizer(models.WordLevel(words, unk_token="w0"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=found, eos_token="<end>", pad_token="<pad>", unk_token="w0"
    )
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return fast


def model(seed: int = 0) -> Any:
    """A random model whose answers depend on its context; the same for the same seed."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=END,
        pad_token_id=60,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Double(LocalServer):
    """Use as a context manager; ``url`` is where it is."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.asked: list[tuple[str, Any]] = []
        self.keys: set[str] = set()
        self.at_once = self._now = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.root

    def serve(self, http: BaseHTTPRequestHandler, body: bytes) -> None:
        payload = json.loads(body) if body else None
        with self._lock:
            self.asked.append((http.path, payload))
            self.keys.add(http.headers.get("Authorization", ""))
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        try:
            status, said = self._answer(http.path, payload)
        finally:
            with self._lock:
                self._now -= 1
        if status == 0:  # the connection breaks
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
            return
        answer = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        http.send_response(status)
        http.send_header("Content-Length", str(len(answer)))
        http.end_headers()
        http.wfile.write(answer)


def key(path: str, payload: Any) -> str:
    """A request without what is drawn anew every time."""
    kept = {k: v for k, v in (payload or {}).items() if k != "cache_salt"}
    return f"{path} {json.dumps(kept, sort_keys=True)}"


class Replay:
    """What a real server said to the same requests."""

    def __init__(self, file: Path = RECORDED) -> None:
        held = json.loads(file.read_text())
        self.version: str = held["version"]
        self._known: dict[str, Any] = held["exchanges"]

    def __call__(self, path: str, payload: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        found = self._known.get(key(path, payload))
        assert found is not None, f"nobody recorded {key(path, payload)}"
        return found[0], found[1]


class Living:
    """A small model behind vLLM's protocol."""

    def __init__(self, served: Any, words: Any, *, adapters: bool = False) -> None:
        self.words, self.adapters, self.paused = words, adapters, False
        self.engine = HFEngine(served, words, stop_ids=[])
        self.loaded: dict[str, HFEngine] = {}
        self.reloads: list[str] = []
        self.deaf = False
        """Whether it says that it has read weights, and does not."""
        self._lock = threading.Lock()

    def __call__(self, path: str, payload: Any) -> tuple[int, Any]:
        with self._lock:
            return self._do(path, payload)

    def _do(self, path: str, payload: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/metrics":
            lora = "# HELP vllm:lora_requests_info\n" if self.adapters else ""
            return 200, 'vllm:cache_config_info{enable_prefix_caching="True"} 1.0\n' + lora
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "max_model_len": 8192, "parent": None}]}
        if path == "/tokenize":
            return 200, {"tokens": self.words.encode(payload["prompt"], add_special_tokens=False)}
        if path in ("/pause?mode=wait", "/resume"):
            self.paused = path != "/resume"
            return 200, {"status": "ok"}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/collective_rpc":
            return self._reload(payload["kwargs"]["weights_path"])
        if path == "/v1/load_lora_adapter":
            return self._adapter(payload)
        if path == "/v1/unload_lora_adapter":
            return (200, "ok") if self.loaded.pop(payload["lora_name"], None) else (404, "none")
        if path == "/v1/chat/completions":
            message = {"role": "assistant", "content": "left"}
            usage = {"prompt_tokens": 3, "completion_tokens": 1}
            choices = [{"message": message, "finish_reason": "stop"}] * payload["n"]
            return 200, {"choices": choices, "usage": usage}
        assert path == "/v1/completions"
        return self._complete(payload)

    def _reload(self, path: str) -> tuple[int, Any]:
        assert self.paused
        if not Path(path).exists():
            return 500, {"error": {"message": f"no such folder: {path}"}}
        self.reloads.append(path)
        if not self.deaf:
            fresh = AutoModelForCausalLM.from_pretrained(path)
            self.engine = HFEngine(fresh, self.words, stop_ids=[])
        return 200, {"results": [None]}

    def _adapter(self, payload: Any) -> tuple[int, Any]:
        import peft

        if not self.adapters or payload["lora_name"] in self.loaded:
            return 400, {"error": {"message": "refused"}}
        with local._quiet():
            fresh = peft.AutoPeftModelForCausalLM.from_pretrained(payload["lora_path"])
        self.loaded[payload["lora_name"]] = HFEngine(fresh, self.words, stop_ids=[])
        return 200, "ok"

    def _complete(self, payload: Any) -> tuple[int, Any]:
        import asyncio

        assert not self.paused
        known = {"base": self.engine, **self.loaded}
        if payload["model"] not in known:
            return 404, {"error": {"message": f"no model {payload['model']}"}}
        engine, prompt = known[payload["model"]], payload["prompt"]
        engine.stop_ids = frozenset(payload.get("stop_token_ids") or ())
        engine._batch._stop_ids = engine.stop_ids
        k = payload.get("prompt_logprobs")
        choice: dict[str, Any] = {"prompt_logprobs": None, "finish_reason": "length"}
        if k is not None:
            request = ScoreRequest(prompt, range(1, len(prompt)))
            choice["prompt_logprobs"] = [None, *self._rows(engine, request, k)]
        sampling = Sampling(payload["temperature"], max_tokens=payload["max_tokens"])
        sample = asyncio.run(engine.generate(prompt, sampling, seed=payload["seed"]))
        choice["token_ids"], choice["prompt_token_ids"] = list(sample.ids), prompt
        choice["logprobs"] = {"token_logprobs": list(sample.logp)}
        if payload.get("logprobs"):
            whole = [*prompt, *sample.ids]
            drawn = ScoreRequest(whole, range(len(prompt), len(whole)))
            best = engine.score_now([drawn], payload["logprobs"])[0].top_logp.tolist()
            named = [{f"token_id:{i}": value for i, value in enumerate(row)} for row in best]
            choice["logprobs"]["top_logprobs"] = named
        if sample.stop == "stop":
            choice["finish_reason"] = "stop"
        return 200, {"choices": [choice], "usage": {}}

    def _rows(self, engine: HFEngine, request: ScoreRequest, k: int) -> list[Any]:
        scores = engine.score_now([request], k or 1)[0]
        rows = []
        assert scores.top_ids is not None and scores.top_logp is not None
        for n, position in enumerate(request.positions):
            row = {str(request.ids[position]): {"logprob": float(scores.logp[n]), "rank": 999}}
            pairs = zip(scores.top_ids[n, :k], scores.top_logp[n, :k], strict=True)
            for rank, (token, value) in enumerate(pairs, 1):
                row[str(token)] = {"logprob": float(value), "rank": rank}
            rows.append(row)
        return rows
