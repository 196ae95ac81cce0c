"""Messages ⇄ token streams: from an episode to the exact ids that a model is asked with.

Invariants
----------
* Token in, token out: a prompt is joined from *context pieces* (text, tokenised once) and from the
  ids that were sampled. Sampled ids are never decoded and encoded again.
* Earlier reasoning is dropped by deleting its tokens, never by editing text.
* Special tokens come from the chat template, the system message and the sampler alone. What a user
  message or an answer *says* is text, also where it spells the name of one: nobody ends a turn by
  printing.
* A response that ended by length gets the end-of-turn id inserted, as context.
* What stands before, between and after messages is read off the tokenizer's own chat template, once
  (:mod:`~agentdistill.frames`).
* A note (text for one reader only) is whole tokens right after the opening: without them a prompt
  is, id by id, the prompt that never had one.
* A hint is text before the last observation, of one prompt only: every later prompt is what it
  would be without, so that only the last message is ever new.

No torch here; the tokenizer is any ``transformers`` tokenizer with a chat template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from agentdistill import actions
from agentdistill.actions import Parsed
from agentdistill.config import PromptConfig
from agentdistill.frames import Frames, Tokenizer
from agentdistill.records import Author, Kind, StreamBuilder, Trajectory, Turn, digest
from agentdistill.wording import Wording


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens of one past response: ids, kinds, and who is named as their author."""

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    author: Author


def _valid(text: str) -> str:
    """``text`` with ``?`` for lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


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
        opened, most = bool(self.frames.opened), prompt.max_actions
        self.grammar = actions.grammar(prompt.grammar, opened=opened, most=most)
        self.wording = Wording(prompt, instruction)
        self.instruction = self.wording.system
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

    def _frame(self, lead: str, text: str, reply: str) -> tuple[int, ...]:
        """Ids of ``lead``, ``text`` and the reply frame, in one go as the template's would be.

        Unless ``text`` brings special tokens of its own: then it is encoded apart, without them.
        """
        ids = self._encode(lead + text + reply)
        before, after = self.encode(lead), self.encode(reply)
        if self._marks(ids) == self._marks(before) + self._marks(after):
            return ids
        return before + self.plain(text) + after

    def _marks(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._special]

    @cached_property
    def fingerprint(self) -> str:
        """Identity of how text becomes tokens: wording, frames, vocabulary."""
        vocabulary: dict[str, int] = getattr(self.tokenizer, "get_vocab", dict)()
        return digest(
            [
                self.wording.identity,
                dataclasses.astuple(self.frames),
                sorted(vocabulary.items()),
            ]
        )

    def alone(self, message: str) -> tuple[int, ...]:
        """Ids of a prompt whose only user message is ``message``."""
        return self._frame(self._opening, message, self.frames.reply)

    def note(self, text: str) -> tuple[int, ...]:
        """Ids of a note: the text, a line of its own, as somebody else's; none for ""."""
        if not text:
            return ()
        return self.plain(text if text.endswith("\n") else text + "\n")

    def note_at(self, ids: Sequence[int]) -> int:
        """Where a note belongs in a prompt or stream: right after the opening.

        Before the last token of the opening where the tokenizer joined it with the message.
        """
        opening = self.encode(self._opening)
        if tuple(ids[: len(opening)]) == opening:
            return len(opening)
        pairs = enumerate(zip(ids, opening, strict=False))
        return next((n for n, (one, other) in pairs if one != other), len(ids))

    def noted_at(self, ids: Sequence[int], note: Sequence[int]) -> int | None:
        """Where ``note`` was put into ``ids``; None where it was not.

        Not simply at :meth:`note_at`: a note may begin like the joined end of the opening.
        """
        size = len(note)
        for at in range(self.note_at(ids), -1, -1):
            if tuple(ids[at : at + size]) == tuple(note):
                before = [*ids[:at], *ids[at + size :]]
                if self.note_at(before) == at:
                    return at
        return None

    def context(self, message: str, *, first: bool, past: bool = False) -> tuple[int, ...]:
        """Ids between the previous response (or nothing) and the response to ``message``.

        ``past``: what follows is an earlier response. If its thought is to be dropped, none may be
        open.
        """
        reply = self.frames.reply
        if past and self.prompt.drop_reasoning:
            reply = reply.removesuffix(self.frames.opened)
        return self._framed(self._opening if first else self.frames.between, message, reply)

    def written(self, text: str, author: Author = Author.ACTOR, *, ended: bool = True) -> Reply:
        """A response that exists only as text, as tokens, with its end of turn if it ``ended``."""
        text = self._continued(text, ended)
        ids = (*self.plain(text), self.end) if ended else self.plain(text)
        return Reply(ids, self.kinds(ids, self.grammar(text)), author)

    def told(self, turn: Turn, author: Author) -> Reply:
        """What a turn said, as tokens."""
        return self.written(self.wording.answer(turn), author, ended=turn.stop != "length")

    def _continued(self, text: str, ended: bool) -> str:
        """``text`` as it goes on from this template's prompt, which may have opened a thought."""
        close, begin = text.find(actions.THOUGHT), text.find(actions.THINK)
        headless = close >= 0 and not 0 <= begin < close
        opened = self.frames.opened
        if not opened:
            return actions.THINK + text if headless else text
        if close < 0:
            return f"\n{actions.THOUGHT}\n\n{text}" if ended else text
        if headless:
            return text
        body = text[begin + len(actions.THINK) :]
        return text[:begin] + body.removeprefix(opened.removeprefix(actions.THINK))

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
        if self.text(ids[:end])[last] != self.text(ids[:body])[last]:
            end += 1  # this token holds the end of the span and the beginning of what follows
        return start, end

    def _token_at(self, ids: Sequence[int], char: int, body: int) -> int:
        """Number of the token in which character ``char`` begins; ``body`` beyond the text."""
        low, high = 0, body + 1
        while low < high:
            middle = (low + high) // 2
            longer = len(self.text(ids[:middle])) > char
            low, high = (low, middle) if longer else (middle + 1, high)
        return low - 1

    def text(self, ids: Sequence[int]) -> str:
        """As the engines decode, or character positions would not fit their texts."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(list(ids), **options)


class Conversation:
    """One episode as one model reads it; grows by observations and replies."""

    def __init__(self, renderer: Renderer, goal: str = "", note: str = "") -> None:
        """Start empty; ``goal`` is the task in words, ``note`` what every prompt also says."""
        self._renderer, self._wording, self._goal = renderer, renderer.wording, goal
        self._note = renderer.note(note)
        self._shown: list[str] = []
        """Each earlier turn as a later prompt writes it."""
        self._replies: list[Reply] = []
        # With the whole history a prompt begins with all that was joined before: kept, not redone.
        self._ids: list[int] = []
        self._authors: list[int] = []
        self._joined = 0

    def __len__(self) -> int:
        """Number of turns with a reply."""
        return len(self._replies)

    def add(
        self,
        observation: str,
        reply: Reply,
        *,
        chosen: Sequence[str] = (),
        admissible: Sequence[str] = (),
    ) -> None:
        """Append one finished turn: what was shown, what was answered, the actions in it."""
        if self._renderer.prompt.history is None:
            shown = self._message(observation, admissible)
        else:
            shown = self._wording.entry(observation, chosen, step=len(self) + 1)
        self._shown.append(shown)
        self._replies.append(reply)

    def ask(
        self,
        observation: str,
        admissible: Sequence[str] = (),
        *,
        hint: str = "",
        noted: bool = True,
    ) -> tuple[list[int], list[int]]:
        """The prompt for ``observation``: ids and authors, of equal length.

        Args:
            observation: what is seen now.
            admissible: actions that the environment lists now.
            hint: what this prompt alone says before the observation.
            noted: whether the reader has the note.
        """
        ids, authors = self._plain(observation, admissible, hint)
        note = self._note if noted else ()
        at = self._renderer.note_at(ids) if note else 0
        ids[at:at] = note
        authors[at:at] = [int(Author.CONTEXT)] * len(note)
        return ids, authors

    def last(
        self, observation: str, admissible: Sequence[str] = (), *, hint: str = ""
    ) -> tuple[int, ...]:
        """The part of a prompt that its last message is, with what stands around it, unnoted."""
        first = self._wording.first(len(self))
        if self._renderer.prompt.history is not None:
            history = "".join(self._shown[first:])
            return self._renderer.alone(self._message(observation, admissible, history, hint))
        message = self._message(observation, admissible, hint=hint)
        return self._renderer.context(message, first=first == len(self))

    def _plain(
        self, observation: str, admissible: Sequence[str], hint: str
    ) -> tuple[list[int], list[int]]:
        """The prompt without the note."""
        prompt, first = self._renderer.prompt, self._wording.first(len(self))
        last = self.last(observation, admissible, hint=hint)
        if prompt.history is not None:
            return list(last), [int(Author.CONTEXT)] * len(last)
        if prompt.window is not None:
            self._ids, self._authors, self._joined = [], [], first
        for index in range(self._joined, len(self)):
            piece = self._renderer.context(self._shown[index], first=index == first, past=True)
            self._context(self._ids, self._authors, piece)
            self._reply(self._ids, self._authors, self._replies[index])
        self._joined = len(self)
        ids, authors = list(self._ids), list(self._authors)
        self._context(ids, authors, last)
        return ids, authors

    def _message(
        self, observation: str, admissible: Sequence[str], history: str = "", hint: str = ""
    ) -> str:
        return self._wording.message(
            observation,
            step=len(self) + 1,
            goal=self._goal,
            admissible=admissible,
            history=history,
            hint=hint,
        )

    def _context(self, ids: list[int], authors: list[int], piece: Sequence[int]) -> None:
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
    replaced: another tokenizer or another preset reads the same episode differently. Where the
    actor read a note (``provenance["note"]``) or hints, so does whoever reads these streams.
    """
    note = str(trajectory.provenance.get("note", ""))
    conversation, builder = Conversation(renderer, trajectory.goal, note), StreamBuilder()
    turns: list[Turn] = []
    for turn in trajectory.turns:
        replay = turn.author is Author.REPLAY
        # A later prompt shows a response again: there it is context (a row is there only once).
        shown_as = Author.REPLAY if replay else Author.CONTEXT
        reply = renderer.told(turn, shown_as)
        span = None
        if not replay:
            ids, authors = conversation.ask(
                turn.observation, turn.admissible, hint=turn.shown, noted=turn.informed
            )
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
        conversation.add(turn.observation, reply, chosen=turn.actions, admissible=turn.admissible)
    provenance = {**trajectory.provenance, "renderer": renderer.fingerprint}
    return dataclasses.replace(
        trajectory, turns=tuple(turns), streams=builder.finish(), provenance=provenance
    )
