"""The same episodes under full history, a window of 2, and reasoning that is dropped.

How a prompt shows the past decides how many streams an episode has, and nothing else: the trained
ids, their log-probabilities and every mean over turns, trajectories or groups are the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from agentdistill.config import PromptConfig, TokenizerConfig
from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling
from agentdistill.objective import Term, TokenLoss
from agentdistill.policy import ModelPolicy
from agentdistill.records import Kind, Trajectory
from agentdistill.render import Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.students.tiny import train_tokenizer
from agentdistill.table import Table, build
from tests.dense import keys, mean_over
from tests.toy import Corridor

PROMPTS = {
    "full": PromptConfig(grammar="action"),
    "window": PromptConfig(grammar="action", window=2),
    "drop": PromptConfig(grammar="action", drop_reasoning=True),
}


@cache
def tokenizer() -> Any:
    # The tokenizer merges within lines only, so that no token is both a thought and an action.
    texts = ["<think>go on</think>\n<action>left</action>", "<action>right</action>", "P...G\ngo"]
    return train_tokenizer(texts * 5, TokenizerConfig(vocabulary=320))


class Scripted(Engine):
    """Says what its seed says, whatever the prompt; often in ids that no text encodes to."""

    name = "scripted"
    capabilities = Capabilities(ids=True)

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        source = random.Random(seed)
        thought = source.choice(["", "<think>go on</think>\n"])
        text = f"{thought}<action>{source.choice(['left', 'right'])}</action>"
        cut = source.randrange(len(text))
        parts = [text[:cut], text[cut:]]
        words = [i for p in parts for i in tokenizer().encode(p, add_special_tokens=False)]
        ended = source.random() < 0.7
        said = (*words, tokenizer().eos_token_id) if ended else tuple(words)
        return Sample(said, tuple(-i / 64 for i in said), text, "stop" if ended else "length")


@cache
def played(name: str, told: bool = False) -> tuple[Trajectory, ...]:
    """Six episodes in three groups; ``told``: made again from their texts alone."""
    renderer = Renderer(tokenizer(), PROMPTS[name], Corridor().instruction)
    policy = ModelPolicy("student", Scripted(), renderer, Sampling())
    tasks = list(Corridor().tasks("train"))[:3]
    requests = [
        Request(task, 10 * n + k, f"g{n}", k) for n, task in enumerate(tasks) for k in (0, 1)
    ]
    found = run(rollout(policy, Corridor, requests, max_turns=7, grammar="action"))
    return tuple(materialise(t, renderer) for t in found) if told else tuple(found)


def by_trajectory(table: Table, column: str) -> list[list[float]]:
    return [
        table[column][table.index["trajectory"] == number].tolist()
        for number in range(len(table.trajectories))
    ]


def test_the_episodes_are_worth_comparing() -> None:
    lengths = [len(t.turns) for t in played("full")]
    assert len(lengths) == 6 and max(lengths) >= 5
    stops = {turn.stop for t in played("full") for turn in t.turns}
    assert stops == {"stop", "length"}
    for trajectory in played("full"):
        for turn in trajectory.turns:
            assert turn.verdict == "ok"


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_trained_ids_do_not_depend_on_what_the_prompt_shows(name: str, told: bool) -> None:
    mine, full = build(played(name, told)), build(played("full", told))
    for column in ("token", "turn", "kind", "author"):
        assert by_trajectory(mine, column) == by_trajectory(full, column)
    sampler = mine["logp/sampler"]
    if told:
        assert bool(sampler.isnan().all())
    else:
        assert torch.equal(sampler, -mine["token"] / 64)


@pytest.mark.parametrize("told", [False, True])
def test_streams_follow_the_exact_prefix_rule(told: bool) -> None:
    for name in PROMPTS:
        for trajectory in played(name, told):
            spans = [turn.span for turn in trajectory.turns]
            opened = [t for t in range(1, len(spans)) if spans[t].stream != spans[t - 1].stream]
            last = range(1, len(spans))
            if name == "full":
                assert opened == []
            elif name == "window":
                assert opened == [t for t in last if t > 2]
            else:
                assert opened == [t for t in last if trajectory.turns[t - 1].reasoning]
            assert len(trajectory.streams) == len(opened) + 1


def test_dropped_reasoning_is_in_no_later_prompt() -> None:
    for trajectory in played("drop"):
        for stream in trajectory.streams:
            shown = tokenizer().decode(stream.ids[stream.kind != Kind.REASON].tolist())
            assert "think" not in shown and "<action>" in shown


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("over", ["token", "turn", "step", "trajectory", "group"])
def test_means_are_those_of_the_full_history(over: Any, name: str) -> None:
    values = {}
    for prompt in ("full", name):
        table = build(played(prompt))
        table["x"] = (table["token"] + 100 * table["turn"]).double()
        term = Term("x", TokenLoss((), lambda logp, _: logp), over=over)
        weights = term.row_weights(table, torch.ones(len(table), dtype=torch.bool))
        values[prompt] = float((weights.double() * table["x"]).sum())
        plain = mean_over(table["x"], keys(table, over), [True] * len(table))
        assert values[prompt] == pytest.approx(float(plain), rel=1e-6)
    assert values[name] == pytest.approx(values["full"], rel=1e-6)
