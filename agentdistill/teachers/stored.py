"""Scores kept on disk, so that recorded episodes are scored once (Lightning OPD).

Invariants
----------
* What was read decides: scores are found by the ids up to the last scored token, the positions,
  the scorer's identity and the temperature (1 everywhere). Nothing depends on names, on the order
  of trajectories or on the run that wrote them.
* A file is complete or not there, and carries its own digest; one that is damaged is not believed,
  but counted (``torn``), and its scores are computed again.
* Only scorers whose weights stay are kept. Values agree with a new scoring up to rounding, which
  depends on what else is in the forward pass, and bit for bit with what was scored at first.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agentdistill.errors import ConfigError, EngineError
from agentdistill.files import refusing, replacing
from agentdistill.records import FloatArray, IntArray
from agentdistill.table import Table, column
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.teachers.selves import SelfScorer
from agentdistill.views import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = ("logp", "entropy")
"""What is kept of a row, always both: they cost one forward pass together."""

_DIGEST = 32
"""Bytes of a SHA-256."""

_PIECE = 1 << 26
"""Numbers that are brought to the CPU at once, to be hashed."""

_INCIDENTAL = ("architectures", "dtype", "transformers_version")
"""Keys of a model's configuration that come with the first save; weights say their own dtype."""


class StoredScorer(LocalScorer):
    """A scorer that remembers on disk what it has said about a stream."""

    def __init__(self, scorer: LocalScorer, folder: str | Path, identity: str) -> None:
        """Read what ``folder`` has of this scorer.

        Args:
            scorer: asked about what is not known yet.
            folder: may be shared by any scorers and any processes.
            identity: of the scorer's weights, such as :func:`weights_identity`; of a frozen self
                that of the student when the scorer was built.

        Raises:
            ConfigError: the scorer's weights move.
            StoreError: the disk refuses.
        """
        if isinstance(scorer, SelfScorer) and scorer.update != "frozen":
            remedy = f"a scorer that is updated ({scorer.update}) says something else each time"
            raise ConfigError(f"{remedy}; use frozen weights", key="scorer.stored", value=True)
        super().__init__(scorer.name, scorer.model)
        self.scorer, self.identity, self.torn = scorer, identity, 0
        self._known: dict[bytes, FloatArray] = {}
        self._folder = Path(folder) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        with refusing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("*.scores")):
                self._read_file(path)

    @property
    def present(self) -> bool:
        """As of the scorer."""
        return self.scorer.present

    def state_dict(self) -> dict[str, Any]:
        """That of the scorer, and whose scores are kept."""
        return {"identity": self.identity, "scorer": self.scorer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            EngineError: the scores that are kept would be those of other weights.
        """
        if state["identity"] != self.identity:
            raise EngineError(
                f"the checkpoint's scorer {self.name} has other weights than the one whose scores "
                "are stored: go on with the models that it was saved with"
            )
        self.scorer.load_state_dict(state["scorer"])

    def score(
        self,
        table: Table,
        want: Iterable[str] = ("logp",),
        *,
        view: str = PLAIN,
        rows: Tensor | None = None,
        micro_tokens: int = 16384,
    ) -> int:
        """As :meth:`LocalScorer.score`, but only streams that are not known are really scored.

        Returns:
            The number of ids that were really scored.

        Raises:
            ConfigError: ``want`` holds more than log-probabilities and entropies.
            StoreError: the disk refuses.
        """
        want = tuple(want)
        if not set(want) <= set(KEPT):
            remedy = "hidden states are not kept: choose a divergence of log-probabilities"
            raise ConfigError(remedy, key="scorer.stored", value=True)
        needed = table.valid(view) if rows is None else rows & table.valid(view)
        places = {s: _places(table, s, needed) for s in range(len(table.streams))}
        keys = {s: self._key(table, view, s, at) for s, at in places.items() if len(at)}
        fresh = {key: s for s, key in keys.items() if key not in self._known}
        tokens = self._ask(table, view, fresh, places, micro_tokens) if fresh else 0
        found = {what: torch.full((len(table),), float("nan")) for what in want}
        for stream, key in keys.items():
            for what, column_N in found.items():
                kept = self._known[key][KEPT.index(what)]
                column_N[places[stream]] = torch.from_numpy(kept.copy())
        for what, column_N in found.items():
            table[column(what, self.name, view)] = column_N
        return tokens

    def _key(self, table: Table, view: str, stream: int, places: Tensor) -> bytes:
        """What is asked about the rows ``places`` of one stream."""
        shown = table.views[view][stream]
        assert shown is not None  # no row of a stream without the view is needed
        positions: IntArray = shown.positions[places.numpy() - table.rows(stream).start]
        ids = shown.ids[: int(positions[-1]) + 1]
        asked = hashlib.sha256(json.dumps([self.identity, {"temperature": 1}, len(ids)]).encode())
        for values in (ids, positions):
            asked.update(np.ascontiguousarray(values, np.int32).tobytes())
        return asked.digest()

    def _ask(
        self,
        table: Table,
        view: str,
        fresh: Mapping[bytes, int],
        places: Mapping[int, Tensor],
        micro_tokens: int,
    ) -> int:
        """Score the streams ``fresh`` and keep what comes; the table itself gets no column."""
        own = replace(table, columns={})
        rows = torch.zeros(len(table), dtype=torch.bool)
        rows[torch.cat([places[stream] for stream in fresh.values()])] = True
        tokens = self.scorer.score(own, KEPT, view=view, rows=rows, micro_tokens=micro_tokens)
        both = np.stack([own[column(what, self.name, view)].numpy() for what in KEPT])
        scores = {key: both[:, places[stream].numpy()] for key, stream in fresh.items()}
        self._write_file(scores)
        self._known.update(scores)
        return tokens

    def _write_file(self, scores: Mapping[bytes, FloatArray]) -> None:
        """Keep ``scores`` in one file, named after what it answers."""
        keys = b"".join(scores)
        body = io.BytesIO()
        np.savez(
            body,
            keys=np.frombuffer(keys, np.uint8).reshape(-1, _DIGEST),
            ends=np.cumsum([values.shape[1] for values in scores.values()]),
            values=np.concatenate(list(scores.values()), axis=1).astype(np.float32),
        )
        path = self._folder / f"{hashlib.sha256(keys).hexdigest()[:32]}.scores"
        with replacing(path, "file") as file:
            file.write(hashlib.sha256(body.getbuffer()).digest())
            file.write(body.getbuffer())

    def _read_file(self, path: Path) -> None:
        """Remember the scores in ``path``, unless it is not what was written."""
        whole = path.read_bytes()
        body = memoryview(whole)[_DIGEST:]
        if hashlib.sha256(body).digest() != whole[:_DIGEST]:
            self.torn += 1
            return
        with np.load(io.BytesIO(body), allow_pickle=False) as held:
            keys, ends, values = held["keys"], held["ends"], held["values"]
        parts = np.split(values, ends[:-1], axis=1)
        self._known.update(zip(map(bytes, keys), parts, strict=True))


def _places(table: Table, stream: int, needed: Tensor) -> Tensor:
    """Numbers of the needed rows of one stream."""
    span = table.rows(stream)
    places: Tensor = needed[span].nonzero().squeeze(1) + span.start
    return places


def weights_identity(model: PreTrainedModel) -> str:
    """SHA-256 of all weights and of what else decides what they say; 1 to 2 s per GB.

    Copies of a folder have one identity, whatever they are called. Another dtype is another one.
    """
    scales = {n: m.scaling for n, m in model.named_modules() if hasattr(m, "scaling")}
    stated = model.config.to_dict()
    config = {k: v for k, v in stated.items() if not k.startswith("_") and k not in _INCIDENTAL}
    total = hashlib.sha256(json.dumps([config, scales], sort_keys=True, default=str).encode())
    seen: set[tuple[int, torch.Size]] = set()
    for name, values in sorted(model.state_dict().items()):
        total.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        place = values.data_ptr(), values.shape
        if place in seen:
            continue  # tied to another
        seen.add(place)
        for piece in values.detach().flatten().split(_PIECE):
            total.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
