"""A local model behind the server: 64 clients at once, and each has its own answer."""

from __future__ import annotations

import threading

import pytest

from agentdistill.config import TinyModel
from agentdistill.engines.hf import HFEngine
from agentdistill.engines.templated import TemplatedEngine
from agentdistill.students.tiny import build
from tests import templates
from tests.servers import Running, chat

pytestmark = pytest.mark.serve


def test_64_clients_of_one_model_get_what_they_get_alone() -> None:
    words = templates.tokenizer("tiny")
    model = build(TinyModel(hidden=32, heads=2, layers=1), words, 3)
    engine = TemplatedEngine(HFEngine(model, words, name="tiny"), words)
    found: dict[int, str] = {}

    def ask(server: Running, number: int) -> str:
        body = chat(f"P{'.' * number}G\nstart", seed=number, max_tokens=6)
        status, answer, _ = server.ask(body)
        assert status == 200
        return str(answer["choices"][0]["message"]["content"])

    with Running(engine) as server:
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: ask(server, n)}))  # type: ignore[misc]
            for n in range(64)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = {number: ask(server, number) for number in range(0, 64, 4)}
    assert len(found) == 64 and len(set(found.values())) > 32
    assert alone == {number: found[number] for number in alone}
