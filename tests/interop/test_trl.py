"""trl's GRPOTrainer on our environments: the tools it describes, the tasks, two real steps."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("torch")

from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.errors import ConfigError, EnvError
from agentdistill.interop.trl import dataset, environment_factory
from agentdistill.records import Task

SOKOBAN = "agentdistill/Sokoban-v0"
SMALL = {"height": 6, "width": 6}


class Workshop(TextEnv):
    """Tools with every type of argument; breaks when told to."""

    @property
    def card(self) -> Card:
        return Card("tests/Workshop-v0", "1", "", "Apache-2.0", ("train",), step_limit=3)

    @property
    def instruction(self) -> str:
        return "Use the tools."

    @property
    def tools(self) -> list[dict[str, Any]]:
        properties = {
            "name": {"type": "string", "description": "Which tool."},
            "times": {"type": "integer", "description": "How often."},
            "force": {"type": "number"},
            "careful": {"type": "boolean"},
        }
        parameters = {"type": "object", "properties": properties, "required": ["name"]}
        function = {"name": "use", "description": "Use a tool.", "parameters": parameters}
        return [{"type": "function", "function": function}]

    def tool_action(self, name: str, arguments: Any) -> str:
        return f"{name} {json.dumps(arguments, sort_keys=True)}"

    def tasks(self, split: str, seed: int = 0) -> Any:
        return iter([Task("tests/Workshop-v0", "train", {"number": n}) for n in range(3)])

    def _begin(self, task: Task) -> str:
        if task.payload["number"] == 2:
            raise EnvError("the door is locked")
        return f"workshop {task.payload['number']}"

    def _advance(self, action: str) -> Moved:
        if "dynamite" in action:
            raise EnvError("the workshop is gone")
        return Moved(action, 0.5, score=0.25, success="saw" in action, terminated="saw" in action)


TARGET = "tests.interop.test_trl:Workshop"


def test_the_tools_read_as_the_environment_describes_them() -> None:
    from transformers.utils import get_json_schema

    described = get_json_schema(environment_factory(TARGET)().use)["function"]
    [expected] = [tool["function"] for tool in Workshop().tools]
    assert described["name"] == "use"
    assert described["description"] == "Use a tool."
    assert described["parameters"]["required"] == ["name"]
    found = {k: v["type"] for k, v in described["parameters"]["properties"].items()}
    assert found == {k: v["type"] for k, v in expected["parameters"]["properties"].items()}
    assert described["parameters"]["properties"]["times"]["description"] == "How often."
    moves = get_json_schema(environment_factory(SOKOBAN, options=SMALL)().move)["function"]
    assert moves["parameters"]["properties"]["direction"]["enum"] == ["Up", "Down", "Left", "Right"]


def test_rows_of_the_dataset_play_their_own_task() -> None:
    rows = dataset(SOKOBAN, options=SMALL, number=3, seed=5)
    playground = environment_factory(SOKOBAN, options=SMALL)()
    seen = [playground.reset(**row) for row in rows]
    assert seen == [json.loads(row["task"])[2]["level"] for row in rows]
    assert len(set(seen)) == 3
    assert playground.reset(**rows[0]) == seen[0]


@pytest.mark.parametrize(
    ("reward", "expected"), [("score", 0.25), ("success", 1.0), ("return", 1.0)]
)
def test_rewards(reward: Any, expected: float) -> None:
    playground = environment_factory(TARGET, reward=reward)()
    first = dataset(TARGET, number=1)[0]
    assert playground.reset(**first) == "workshop 0"
    assert playground.get_reward() == 0
    assert playground.use(name="file", times=2) == 'use {"name": "file", "times": 2}'
    playground.use(name="saw")
    assert playground.get_reward() == expected
    assert playground.use(name="saw") == "The episode has ended."
    assert playground.get_reward() == expected, "a call after the end must not count"


def test_a_fault_is_no_reward_and_the_next_task_is_played() -> None:
    playground = environment_factory(TARGET)()
    rows = dataset(TARGET, number=3)
    playground.reset(**rows[0])
    playground.use(name="dynamite")
    assert playground.get_reward() is None
    assert playground.reset(**rows[2]) == "The episode has ended."
    assert playground.get_reward() is None
    playground.reset(**rows[1])
    assert playground.get_reward() == 0


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="reward='points': one of score, success, return"):
        environment_factory(TARGET, reward="points")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="describes no tools"):
        environment_factory("tests.toy:Corridor")


CALL = '<tool_call>\n{"name": "move", "arguments": {"direction": "%s"}}\n</tool_call>'


def _caller(rows: Any, tools: list[Any]) -> tuple[Any, Any]:
    """A tiny model that has learnt to call the tool, and its tokenizer with Qwen3's template."""
    import torch
    import trl

    from agentdistill.config import TinyModel, TokenizerConfig
    from agentdistill.students.tiny import build, train_tokenizer

    calls = [CALL % way for way in ("Up", "Down", "Left", "Right")]
    levels = [json.loads(row["task"])[2]["level"] for row in rows]
    tokenizer = train_tokenizer([*levels, *calls * 50], TokenizerConfig(vocabulary=600))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text()
    model = build(TinyModel(hidden=32, layers=1), tokenizer, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        messages = [rows[0]["prompt"][0], {"role": "user", "content": levels[step % len(levels)]}]
        prompt = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )
        asked = tokenizer.encode(prompt)
        said = [*tokenizer.encode(calls[step % 4]), tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(asked) + said])
        loss = model(input_ids=torch.tensor([asked + said]), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, tokenizer


def test_grpo_trains_two_steps_on_sokoban(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOConfig, GRPOTrainer

        rows = dataset(SOKOBAN, options=SMALL, number=4)
        playground = environment_factory(SOKOBAN, options=SMALL, reward="return")
        model, tokenizer = _caller(rows, [playground().move])
        before = {name: value.clone() for name, value in model.named_parameters()}
        config = GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=400,
            max_tool_calling_iterations=3,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            environment_factory=playground,
        )
        trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    assert sum(log["tools/call_frequency"] for log in logs) > 0, "no tool was ever called"
    assert all(log["tools/failure_frequency"] == 0 for log in logs)
    assert all(log["rewards/SokobanEnv/mean"] < 0 for log in logs), "a step of Sokoban costs 0.1"
    moved = [name for name, value in model.named_parameters() if not value.equal(before[name])]
    assert moved
