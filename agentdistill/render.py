"""Messages ⇄ token streams: from an episode to the exact ids that a model is asked with.

Invariants
----------
* Token in, token out: a prompt is joined from *context pieces* (text, tokenised once) and from the
  ids that were sampled. Sampled ids are never decoded and encoded again.
* Earlier reasoning is dropped by deleting its tokens, never by editing text.
* Special tokens come from the template, the instruction and the sampler alone. What an environment
  or an answer *says* is text, also where it spells the name of one: nobody ends a turn by printing.
* A response that ended by length gets the end-of-turn id inserted, as context.
* The template's frames (what stands before, between and after messages) are read off the
  tokenizer's own chat template by probing it with sentinels, once.

No torch here; the tokenizer is any ``transformers`` tokenizer with a chat template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

from agentdistill import actions
from agentdistill.actions import Parsed
from agentdistill.config import PromptConfig
from agentdistill.errors import ConfigError
from agentdistill.records import Author, Kind, StreamBuilder, Trajectory, Turn, digest


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


def _valid(text: str) -> str:
    """``text`` with ``?`` for lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


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


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens of one past response: ids, kinds, and who is named as their author."""

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    author: Author


class Renderer:
    """Turns episodes into prompts for one tokenizer and one prompt preset."""

    def __init__(self, tokenizer: Tokenizer, prompt: PromptConfig, instruction: str = "") -> None:
        """Probe the template.

        Args:
            tokenizer: of the model that will read the prompts.
            prompt: the preset.
            instruction: the environment's own instruction, used where the preset asks for it.
        """
        self.tokenizer, self.prompt = tokenizer, prompt
        self.frames = Frames.probe(tokenizer)
        self.grammar = actions.grammar(prompt.grammar)
        self.instruction = instruction if prompt.instruction == "env" else prompt.instruction
        self.end = int(tokenizer.eos_token_id)
        added = tokenizer.added_tokens_decoder
        self._special = {self.end, *(i for i, token in added.items() if token.special)}
        self.encode = lru_cache(maxsize=1 << 16)(self._encode)
        self._framed = lru_cache(maxsize=1 << 16)(self._frame)
        self._opening = self.frames.opening(self.instruction)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text of ours, in which special tokens count."""
        return tuple(self.tokenizer.encode(_valid(text), add_special_tokens=False))

    def plain(self, text: str) -> tuple[int, ...]:
        """Ids of a text of somebody else's, in which names of special tokens are only text."""
        ids = self.encode(text)
        if self._special.isdisjoint(ids):
            return ids
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return tuple(self.tokenizer.encode(_valid(text), **options))

    def _frame(self, lead: str, text: str) -> tuple[int, ...]:
        """Ids of ``lead``, ``text`` and the reply frame, in one go as the template's would be.

        Unless ``text`` brings special tokens of its own: then it is encoded apart, without them.
        """
        ids = self._encode(lead + text + self.frames.reply)
        before, after = self.encode(lead), self.encode(self.frames.reply)
        if self._marks(ids) == self._marks(before) + self._marks(after):
            return ids
        return before + self.plain(text) + after

    def _marks(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._special]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of how text becomes tokens: preset, instruction, frames, vocabulary."""
        vocabulary: dict[str, int] = getattr(self.tokenizer, "get_vocab", dict)()
        return digest(
            [
                self.prompt.model_dump(),
                self.instruction,
                dataclasses.astuple(self.frames),
                sorted(vocabulary.items()),
            ]
        )

    def context(self, observation: str, *, first: bool) -> tuple[int, ...]:
        """Ids between the previous response (or nothing) and the response to ``observation``."""
        shown = self.prompt.observation.replace("{observation}", observation)
        return self._framed(self._opening if first else self.frames.between, shown)

    def written(self, text: str, author: Author = Author.ACTOR, *, ended: bool = True) -> Reply:
        """A response that exists only as text, as tokens, with its end of turn if it ``ended``."""
        ids = (*self.plain(text), self.end) if ended else self.plain(text)
        return Reply(ids, self.kinds(ids, self.grammar(text)), author)

    def kinds(self, ids: Sequence[int], parsed: Parsed) -> tuple[int, ...]:
        """:class:`Kind` of every response token, from the character spans of its parse."""
        kinds = [int(Kind.FORMAT)] * len(ids)
        for span, kind in ((parsed.reason_span, Kind.REASON), (parsed.act_span, Kind.ACT)):
            if span is not None:
                start, end = self._tokens_of(ids, span)
                kinds[start:end] = [int(kind)] * (end - start)
        return tuple(kinds)

    def _tokens_of(self, ids: Sequence[int], span: tuple[int, int]) -> tuple[int, int]:
        """Token range that covers characters ``span`` of the decoded ids."""
        body = len(ids) - 1 if ids and ids[-1] == self.end else len(ids)
        if body <= 1:
            return 0, body
        start, end = (self._token_at(ids, char, body) for char in span)
        last = slice(span[1])
        if self._text(ids[:end])[last] != self._text(ids[:body])[last]:
            end += 1  # this token holds the end of the span and the beginning of what follows
        return start, end

    def _token_at(self, ids: Sequence[int], char: int, body: int) -> int:
        """Number of the token in which character ``char`` begins; ``body`` beyond the text."""
        low, high = 0, body + 1
        while low < high:
            middle = (low + high) // 2
            longer = len(self._text(ids[:middle])) > char
            low, high = (low, middle) if longer else (middle + 1, high)
        return low - 1

    def _text(self, ids: Sequence[int]) -> str:
        """As the engines decode, or character positions would not fit their texts."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(list(ids), **options)


class Conversation:
    """One episode as one model reads it; grows by observations and replies."""

    def __init__(self, renderer: Renderer) -> None:
        """Start empty."""
        self._renderer = renderer
        self._observations: list[str] = []
        self._replies: list[Reply] = []
        # With the whole history a prompt begins with all that was joined before: kept, not redone.
        self._ids: list[int] = []
        self._authors: list[int] = []
        self._joined = 0

    def __len__(self) -> int:
        """Number of turns with a reply."""
        return len(self._replies)

    def add(self, observation: str, reply: Reply) -> None:
        """Append one finished turn."""
        self._observations.append(observation)
        self._replies.append(reply)

    def ask(self, observation: str) -> tuple[list[int], list[int]]:
        """The prompt for ``observation``: ids and authors, of equal length."""
        window = self._renderer.prompt.window
        first = 0
        if window is not None:
            first = max(0, len(self) - window)
            self._ids, self._authors, self._joined = [], [], first
        for index in range(self._joined, len(self)):
            self._context(self._ids, self._authors, self._observations[index], first=index == first)
            self._reply(self._ids, self._authors, self._replies[index])
        self._joined = len(self)
        ids, authors = list(self._ids), list(self._authors)
        self._context(ids, authors, observation, first=first == len(self))
        return ids, authors

    def _context(
        self, ids: list[int], authors: list[int], observation: str, *, first: bool
    ) -> None:
        piece = self._renderer.context(observation, first=first)
        ids += piece
        authors += [int(Author.CONTEXT)] * len(piece)

    def _reply(self, ids: list[int], authors: list[int], reply: Reply) -> None:
        kept: Sequence[int] = reply.ids
        if self._renderer.prompt.drop_reasoning:
            pairs = zip(reply.ids, reply.kinds, strict=True)
            kept = [token for token, kind in pairs if kind != Kind.REASON]
        ids += kept
        authors += [int(reply.author)] * len(kept)
        if not kept or kept[-1] != self._renderer.end:
            ids.append(self._renderer.end)
            authors.append(int(Author.CONTEXT))


def materialise(trajectory: Trajectory, renderer: Renderer) -> Trajectory:
    """``trajectory`` with streams made from its texts, for a trajectory that has none.

    Nobody sampled these tokens, so their log-probabilities are NaN. Existing streams are
    replaced: another tokenizer or another preset reads the same episode differently.
    """
    conversation, builder = Conversation(renderer), StreamBuilder()
    turns: list[Turn] = []
    for turn in trajectory.turns:
        replay = turn.author is Author.REPLAY
        # A later prompt shows a response again: there it is context (a row is there only once).
        shown_as = Author.REPLAY if replay else Author.CONTEXT
        reply = renderer.written(turn.text, shown_as, ended=turn.stop != "length")
        span = None
        if not replay:
            ids, authors = conversation.ask(turn.observation)
            nobody = [float("nan")] * len(reply.ids)
            span = builder.extend(
                ids,
                reply.ids,
                logp=nobody,
                kind=reply.kinds,
                author=turn.author,
                prompt_author=authors,
            )
        turns.append(dataclasses.replace(turn, span=span))
        conversation.add(turn.observation, reply)
    provenance = {**trajectory.provenance, "renderer": renderer.fingerprint}
    return dataclasses.replace(
        trajectory, turns=tuple(turns), streams=builder.finish(), provenance=provenance
    )
