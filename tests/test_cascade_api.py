"""A cascade whose student and teacher are behind an API: one request per step, one ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentdistill.config import RunConfig
from agentdistill.evaluation import evaluate
from agentdistill.run import Run
from tests.provider import Move, Provider

pytestmark = [
    pytest.mark.litellm,
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier.*:UserWarning"),
]

PRICES = {"small": {"input": "0.40", "output": "1.60"}, "large": {"input": "3", "output": "15"}}


def settings(url: str, output: Path) -> RunConfig:
    models = {
        name: {"kind": "api", "model": f"openai/{name}", "base_url": url, "price": PRICES[name]}
        for name in PRICES
    }
    mix = {"student": "small", "teacher": "large", "samples": 3}
    return RunConfig.model_validate(
        {
            "output": str(output),
            "env": {"id": "tests.toy:Corridor"},
            "prompt": "chat",
            "models": models,
            "policies": {"mix": mix},
            "evaluate": {"policies": ["mix", "large"], "tasks": 4},
        }
    )


def test_samples_share_a_request_and_everything_is_booked(tmp_path: Path) -> None:
    def moves(number: int, payload: dict[str, Any]) -> Move:
        if payload["model"] == "large":
            return Move("right")
        assert payload["n"] == 3
        return Move(["right", "left", "right"] if number % 2 else ["left"] * 3)

    with Provider(moves) as provider, Run(settings(provider.url, tmp_path)) as the_run:
        found = evaluate(the_run, "mix", "sampled")
        total = the_run.providers.ledger.total
    assert found.faults == 0 and found.cost is not None
    assert found.asked is not None and 0 < found.asked < 1
    assert found.teacher_calls == found.tokens["large"]["calls"]
    assert total.money > 0
    assert 4 * found.cost["paid"] == pytest.approx(float(total.money))  # whoever counts
    counted = found.tokens.values()
    assert sum(part["input"] for part in counted) == total.usage.input
    assert sum(part["output"] for part in counted) == total.usage.output > 0


def test_roles_are_those_of_the_cascade(tmp_path: Path) -> None:
    with Provider([Move("right")]) as provider, Run(settings(provider.url, tmp_path)) as the_run:
        policy: Any = the_run.policy("mix")
        assert (policy.student.engine.role, policy.teacher.engine.role) == ("student", "teacher")
        assert policy.student.engine.name == "small"
