"""Records what a real vLLM server answers, for the tests that have none: vllm.json beside this.

Needs ``agentdistill setup vllm``. Run it from the repository's root:
``python -m tests.engines.recorded.record_vllm``.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from agentdistill.engines.endpoint import ServerError
from agentdistill.engines.local_server import Server
from agentdistill.engines.probing import by_ids
from agentdistill.engines.vllm import VLLMEngine
from tests import vllm_double
from tests.engines.test_vllm import DRAWN, GREEDY, LONG, MESSAGES, PROMPT, SCORED, SHORT


def record(url: str, tokenizer: Any) -> dict[str, Any]:
    """Every exchange that the tests need, by request."""
    held: dict[str, Any] = {}

    async def all_of_it(engine: VLLMEngine) -> None:
        await engine.generate(PROMPT, DRAWN, seed=3)
        await engine.generate(PROMPT, GREEDY, seed=0)
        for top_k in (0, 4):
            await engine.score(SCORED, top_k=top_k)
        await engine.chat(MESSAGES, SHORT, n=2)
        for refused in (engine.score(SCORED[:1], top_k=7), engine.generate(LONG, SHORT)):
            try:
                await refused
            except ServerError as error:
                print("refused:", error)
        engine.top_k = 7
        await by_ids(engine, PROMPT, "teacher", "vllm")

    endpoint = vllm_double_endpoint(url, held)
    engine = VLLMEngine(endpoint, tokenizer, top_k=7)
    engine.connect()
    engine.limit = None  # let the server refuse
    asyncio.run(all_of_it(engine))
    return held


def vllm_double_endpoint(url: str, held: dict[str, Any]) -> Any:
    """An endpoint that writes down what it is told."""
    from agentdistill.engines import endpoint as module

    class Recorder(module.Endpoint):
        async def _once(self, client: Any, path: str, payload: Any) -> Any:
            answer = await client.post(self.url + path, json=payload)
            held[vllm_double.key(path, payload)] = [answer.status_code, _small(answer.json())]
            return module._read(answer)

        def call(self, path: str, payload: Any = None, **options: Any) -> Any:
            answer = super().call(path, payload, **options)
            if path == "/metrics":
                kept = [line for line in answer.splitlines() if "cache_config_info" in line]
                answer = "\n".join(kept)
            if path != "/health":
                held[vllm_double.key(path, payload)] = [200, answer]
            return answer

    return Recorder(url)


def _small(answer: Any) -> Any:
    """``answer`` without what is None."""
    if isinstance(answer, dict):
        return {name: _small(value) for name, value in answer.items() if value is not None}
    return [_small(value) for value in answer] if isinstance(answer, list) else answer


def main() -> None:
    """Start a server, record, and write the file."""
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name) / "model", vllm_double.tokenizer()
        vllm_double.model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        flags = ("--served-model-name", "tiny", "--max-logprobs", "5", "--max-model-len", "128")
        with Server(folder, Path(name) / "log", *flags) as server:
            server.wait()
            held = record(server.url, tokenizer)
            version = server.endpoint.call("/version", method="GET")["version"]
    document = {"version": version, "exchanges": held}
    vllm_double.RECORDED.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    print(f"{len(held)} exchanges with vLLM {version}")


if __name__ == "__main__":
    main()
