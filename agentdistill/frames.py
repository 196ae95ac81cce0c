"""What a chat template puts around the messages, read off the template itself.

Invariant: the frames are found by probing the tokenizer's own chat template with sentinels; what
the joined conversation has otherwise than the template is noted, never mended in silence.

No torch here; the tokenizer is any ``transformers`` tokenizer with a chat template.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentdistill.actions import THINK
from agentdistill.errors import ConfigError


class Tokenizer(Protocol):
    """The part of a ``transformers`` tokenizer that rendering needs."""

    eos_token: str
    eos_token_id: int

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens that are cut out of a text before it is split: id → its name and ``special``."""

    def encode(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> list[int]:
        """Ids of ``text``; names of special tokens are text if ``split_special_tokens``."""

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Text of ``ids``."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The conversation as text."""


@dataclass(frozen=True, slots=True)
class Frames:
    """The fixed texts of a chat template around the messages.

    A conversation reads: ``head`` observation ``reply`` response ``between`` observation ``reply``
    response …; with a system message ``system`` instruction ``after_system`` replaces ``head``.

    Attributes:
        system: before the instruction, or None where the template has no system role.
        after_system: between the instruction and the first observation.
        head: before the first observation without an instruction.
        reply: between an observation and the response to it.
        between: between a response (its end-of-turn token included) and the next observation.
        notes: in what the joined conversation differs from the template's own rendering.
    """

    system: str | None
    after_system: str
    head: str
    reply: str
    between: str
    notes: tuple[str, ...] = ()

    @classmethod
    def probe(cls, tokenizer: Tokenizer) -> Frames:
        """Read the frames off ``tokenizer``'s chat template.

        Raises:
            ConfigError: there is no chat template, it refuses a conversation, or it has no
                end-of-turn token after a response.
        """
        end = tokenizer.eos_token
        if not end:
            raise ConfigError(_NO_END, key="eos_token", value=end)

        def render(*contents: str, system: str | None = None) -> str:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return str(text)

        first, second, said, rules = "Q1marker", "Q2marker", "R1marker", "S0marker"
        try:
            head, reply = _cut(render(first), first)
            _, rest = _cut(render(first, said, second), said)
            between, _ = _cut(rest, second)
        except Exception as error:  # templates raise whatever they like
            line = " ".join(str(error).split())
            raise ConfigError(f"the tokenizer has no usable chat template ({line})") from error
        if not between.startswith(end):
            raise ConfigError(_NO_END, key="eos_token", value=end)
        between = between[len(end) :]
        system, after = _probe_system(render, rules, first, head)
        frames = cls(system, after, head, reply, between)
        joined = frames._join(end, first, said, second)
        note = "earlier turns are rendered differently by the template itself"
        return (
            frames
            if joined == render(first, said, second)
            else dataclasses.replace(frames, notes=(note,))
        )

    def _join(self, end: str, first: str, said: str, second: str) -> str:
        return self.head + first + self.reply + said + end + self.between + second + self.reply

    @property
    def opened(self) -> str:
        """The end of ``reply`` that opens a thought, "" where responses begin outside of one."""
        found = re.search(rf"{THINK}\s*\Z", self.reply)
        return found.group() if found else ""

    def opening(self, instruction: str) -> str:
        """Everything before the first observation."""
        if not instruction:
            return self.head
        if self.system is None:
            return f"{self.head}{instruction}\n\n"
        return self.system + instruction + self.after_system


_NO_END = (
    "the chat template puts no end-of-turn token after a response; set the tokenizer's "
    "eos_token to the one the template writes"
)


def _cut(text: str, marker: str) -> tuple[str, str]:
    before, found, after = text.partition(marker)
    if not found:
        raise ValueError("it drops a message")
    return before, after


def _probe_system(render: Any, rules: str, first: str, head: str) -> tuple[str | None, str]:
    try:
        system, rest = _cut(render(first, system=rules), rules)
    except Exception:  # templates raise whatever they like to refuse a role
        return None, head
    return system, _cut(rest, first)[0]
