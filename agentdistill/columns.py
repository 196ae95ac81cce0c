"""Columns of one token stream while it grows: plain lists, until they are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Columns:
    """Ids, authors, kinds and log-probabilities, of equal length."""

    def __init__(self) -> None:
        """Start empty."""
        self.ids: list[int] = []
        self.author: list[int] = []
        self.kind: list[int] = []
        self.logp: list[float] = []

    def add(
        self,
        ids: Sequence[int],
        author: Sequence[int],
        kind: Sequence[int] | None = None,
        logp: Sequence[float] | None = None,
    ) -> None:
        """Append; without ``kind`` it is context (0), without ``logp`` nobody sampled (NaN)."""
        self.ids += ids
        self.author += author
        self.kind += kind if kind is not None else [0] * len(ids)
        self.logp += logp if logp is not None else [float("nan")] * len(ids)

    def freeze(
        self,
    ) -> tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.uint8],
        npt.NDArray[np.uint8],
        npt.NDArray[np.float32],
    ]:
        """The columns as arrays [L], in the order of the constructor."""
        return (
            np.asarray(self.ids, np.int32),
            np.asarray(self.author, np.uint8),
            np.asarray(self.kind, np.uint8),
            np.asarray(self.logp, np.float32),
        )
