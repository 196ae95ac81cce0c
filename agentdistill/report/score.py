"""What student and teacher said about the tokens of the shown trajectories. Needs torch to load.

A run stores the sampler's log-probabilities with every token, but not the teacher's: they are
computed again from the run's own models. Invariants: a teacher is frozen, so what it says now is
what it said in training; a model that reads other token ids than the trajectory holds says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from agentdistill.config import ApiModel, TrainStage, VllmModel
from agentdistill.report.read import RunData, StageData
from agentdistill.report.sample import Shown
from agentdistill.report.tokens import NAN, Token, Turns
from agentdistill.run import Loaded, Run

if TYPE_CHECKING:
    from agentdistill.table import Table


@dataclass(slots=True)
class Scorer:
    """The models of one run; see :meth:`score`. Loaded when they are needed, each once."""

    run: RunData
    _context: Run = field(init=False)
    _models: dict[str, Loaded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is loaded yet."""
        self._context = Run(self.run.config)
        self._context.path = self.run.path  # the folder may have been moved

    def close(self) -> None:
        """Free the models and the environment."""
        self._models.clear()
        self._context.close()

    def score(self, stage: StageData, items: Sequence[Shown]) -> None:
        """Give ``tokens`` to each of ``items`` whose ids a model of the run can read."""
        from agentdistill.diagnostics.episodes import reader as reader_of
        from agentdistill.diagnostics.episodes import reads, table_of

        name = reader_of(self._context, stage.config) if items else None
        reader = self._load(name) if name else None
        fits = [item for item in items if reader and reads(reader, item.trajectory)]
        if reader is None or not fits:
            return
        table, _ = table_of([item.trajectory for item in fits], reader)
        columns = dict(self._columns(stage, reader, table))
        texts = _pieces(reader.tokenizer, table)
        for item, turns in zip(fits, _turns(table, texts, columns), strict=True):
            item.tokens = turns

    def _here(self, name: str) -> bool:
        """Whether the weights of the model or stage ``name`` are in this process."""
        config = self._context.config.models.get(name)
        return not isinstance(config, ApiModel | VllmModel)

    def _load(self, name: str) -> Loaded:
        if name not in self._models:
            self._models[name] = self._context.model(name)
        return self._models[name]

    def _columns(
        self, stage: StageData, reader: Loaded, table: Table
    ) -> Iterator[tuple[str, list[float]]]:
        """One value per row of ``table``, by the name of the :class:`Token`'s field."""
        config, sampled = stage.config, table["logp/sampler"].tolist()
        axes = stage.axes
        if axes is None or axes.actor == "student":
            yield "student", sampled
        if not isinstance(config, TrainStage):
            return
        name = config.teacher
        teacher = self._load(name) if name is not None and self._here(name) else None
        if teacher and teacher.renderer.fingerprint == reader.renderer.fingerprint:
            yield "teacher", _log_probs(teacher, table)
        if reader.name == stage.name:
            yield "final", _log_probs(reader, table)


def _log_probs(loaded: Loaded, table: Table) -> list[float]:
    from agentdistill.teachers.scorer import LocalScorer

    LocalScorer("report", loaded.model).score(table, micro_tokens=8192)
    values: list[float] = table.columns.pop("logp/report").tolist()
    return values


def _pieces(tokenizer: Any, table: Table) -> list[str]:
    """The text that each row adds, in the order of the rows."""
    tokens, steps = table.index["token"].tolist(), table.index["step"].tolist()
    numbers = table.index["trajectory"].tolist()
    keys = list(zip(numbers, steps, strict=True))
    starts = [place for place, key in enumerate(keys) if not place or key != keys[place - 1]]
    found: list[str] = []
    for start, end in pairwise([*starts, len(tokens)]):
        found += pieces(tokenizer, tokens[start:end])
    return found


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each of ``ids`` adds to those before it; together they are the whole text.

    A character may be spread over several tokens: the last of them adds it, the others nothing.
    """

    def text(start: int, end: int) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(list(ids[start:end]), **options))

    found, before, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        whole = text(before, end)
        if whole.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(whole[len(text(before, done)) :])
        before, done = done, end
    return found


def _turns(
    table: Table, texts: Sequence[str], columns: Mapping[str, Sequence[float]]
) -> list[Turns]:
    """The tokens of each trajectory of ``table``, by turn."""
    found: list[dict[int, list[Token]]] = [{} for _ in table.trajectories]
    nobody = [NAN] * len(table)
    parts = [columns.get(name, nobody) for name in ("student", "teacher", "final")]
    places = zip(table.index["trajectory"].tolist(), table.index["turn"].tolist(), strict=True)
    for (number, turn), text, *values in zip(places, texts, *parts, strict=True):
        found[number].setdefault(turn, []).append(Token(text, *values))
    return list(found)
