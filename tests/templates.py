"""Chat templates of several families, and a trained tokenizer that can wear them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from agentdistill.config import PromptConfig, TokenizerConfig
from agentdistill.render import Renderer
from agentdistill.students.tiny import train_tokenizer

TEXTS = [
    "Walk to the goal with left and right.",
    "P..G\nstart",
    "<think>the goal is right of me</think><action>right</action>",
    "<think>back</think>\n\n<action>left</action>",
    "Über die Brücke → 右",
]

QWEN = """{%- for m in messages -%}
{%- set said = m.content -%}
{%- if m.role == 'assistant' and '</think>' in said and not loop.last -%}
{%- set said = said.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if think is defined -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- if open is defined -%}{{- '<think>\n' -}}{%- endif -%}
{%- endif -%}"""
"""Drops earlier reasoning; with ``think`` it answers a thought in the generation prompt alone, with
``open`` it begins one there."""

NO_SYSTEM = """{{- '<|pad|>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{{- '<|' + m.role + '|>' + (m.content | trim) + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
"""Begins every sequence with one token and refuses system messages."""

BROKEN = {
    "none": None,
    "refuses": "{{ raise_exception('never') }}",
    "undefined": "{{ messages[0].name.upper() }}",
    "syntax": "{% for m in messages %}",
    "drops": "{{ messages[-1].content }}<|assistant|>",
    "endless": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>",
}

TEMPLATES = ("tiny", "qwen", "no system")


@cache
def _trained() -> Any:
    return train_tokenizer(TEXTS * 4, TokenizerConfig(vocabulary=330))


def tokenizer(template: str = "tiny", **variables: object) -> Any:
    """A tokenizer of its own with one of the templates."""
    found = copy.deepcopy(_trained())
    if template == "qwen":
        found.add_special_tokens(
            {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        )
        found.chat_template = "".join(f"{{%- set {n} = {v!r} -%}}" for n, v in variables.items())
        found.chat_template += QWEN
    elif template == "no system":
        found.chat_template = NO_SYSTEM
    return found


def renderer(template: str = "tiny", instruction: str = "", **prompt: Any) -> Renderer:
    """A renderer with one of the templates."""
    return Renderer(tokenizer(template), PromptConfig(**prompt), instruction)


def rendered(renderer: Renderer, seen: list[str], said: list[str]) -> list[int]:
    """What the template itself makes of a conversation, encoded in one go."""
    seen, messages = list(seen), []
    if renderer.instruction and renderer.frames.system is None:
        seen[0] = f"{renderer.instruction}\n\n{seen[0]}"
    elif renderer.instruction:
        messages.append({"role": "system", "content": renderer.instruction})
    for observation, text in zip(seen, [*said, None], strict=True):
        messages.append({"role": "user", "content": observation})
        if text is not None:
            messages.append({"role": "assistant", "content": text})
    options = {"tokenize": False, "add_generation_prompt": True}
    whole = renderer.tokenizer.apply_chat_template(messages, **options)
    return renderer.tokenizer.encode(whole, add_special_tokens=False)
