"""A chat template with tools, and a token engine that says what a test wants said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling
from agentdistill.records import Usage
from tests import templates

TOOLS = """{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n' -}}{%- endif -%}
{%- for tool in tools -%}{{- (tool | tojson) + '\n' -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if not (tools and loop.first and m.role == 'system') -%}
{{- '<|im_start|>' + m.role + '\n' + m.content -}}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
{%- if open is defined -%}{{- '<think>\n' -}}{%- endif -%}"""
"""System message and tools in one block, calls as Qwen writes them; ``open`` begins a thought."""


def tokenizer(**variables: object) -> Any:
    """A tokenizer that wears it."""
    found = templates.tokenizer("qwen")
    found.chat_template = "".join(f"{{%- set {n} = {v!r} -%}}" for n, v in variables.items())
    found.chat_template += TOOLS
    return found


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """A tool in OpenAI's format; ``properties`` are the types of its arguments."""
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema}
    return {
        "type": "function",
        "function": {"name": name, "description": "does", "parameters": parameters},
    }


class Spoken(Engine):
    """Takes ids and gives the texts of a script in turn; keeps what it was asked."""

    name = "spoken"

    def __init__(self, tokenizer: Any, *script: str, stop: str = "stop") -> None:
        self._tokenizer, self._script, self._stop = tokenizer, script, stop
        self.asked: list[tuple[list[int], Sampling, int]] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(ids=True, notes=("a script",))

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        self.asked.append((list(ids), sampling, seed))
        text = self._script[(len(self.asked) - 1) % len(self._script)]
        said = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        usage = Usage(len(ids), 0, 0, len(said))
        return Sample(said, (-0.5,) * len(said), text, self._stop, version=3, usage=usage)
