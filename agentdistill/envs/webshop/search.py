"""The search engine: BM25 as Lucene computes it, over arrays that processes share.

Invariants
----------
* Scores and order are Lucene's (k1 0.9, b 0.4): the length of a document counts as rounded to one
  byte (SmallFloat.intToByte4), sums are rounded to single precision, and equal scores are ordered
  by product id, as Anserini does. The recorded sessions of the original come out in its very order.
* Documents are numbered in the order of their ids, so that the order of equal scores is the order
  of numbers.
* Nothing is read at the start: terms are found by the 64-bit hashes in a memory-mapped array, so
  that a process that searches 1.2 million products holds no vocabulary of its own.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentdistill.envs.webshop.analysis import analyse

K1, B = 0.9, 0.4
FOUND = 50
"""How many products a search finds at most."""

SLOTS_KEPT = 4096

Ints = npt.NDArray[np.int64]


class Indexer:
    """Collects documents; :meth:`save` writes what :class:`Searcher` reads."""

    def __init__(self) -> None:
        """Start without any document."""
        self._numbers: dict[str, int] = {}
        self._terms, self._counts = array("I"), array("H")
        self._sizes, self._lengths = array("I"), array("I")

    def add(self, document: str) -> None:
        """Index one more document."""
        terms = Counter(analyse(document))
        for term, count in terms.items():
            self._terms.append(self._numbers.setdefault(term, len(self._numbers)))
            self._counts.append(min(count, 0xFFFF))
        self._sizes.append(len(terms))
        self._lengths.append(terms.total())

    def save(self, folder: Path, ids: Sequence[str]) -> None:
        """Write the arrays to ``folder``.

        Args:
            folder: where.
            ids: of the documents, in the order in which they were added.
        """
        rows = np.argsort(np.array([name.encode() for name in ids]), kind="stable")
        rank = np.empty(len(rows), np.int32)
        rank[rows] = np.arange(len(rows))
        hashes = np.array([_hash(term) for term in self._numbers], np.uint64)
        by_hash = np.argsort(hashes)
        place = np.empty(len(by_hash), np.uint32)
        place[by_hash] = np.arange(len(by_hash))
        terms = place[np.frombuffer(self._terms, np.uint32)]
        documents = np.repeat(np.arange(len(rows)), np.frombuffer(self._sizes, np.uint32))
        scores = self._scores(terms, documents)
        order = np.argsort(terms, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(terms, minlength=len(hashes)))])
        arrays = {
            "terms": hashes[by_hash],
            "starts": starts,
            "documents": rank[documents][order],
            "scores": scores[order],
            "rows": rows,
        }
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)

    def _scores(self, terms: npt.NDArray[np.uint32], documents: Ints) -> npt.NDArray[np.float32]:
        """What a term adds to a document that holds it, in single precision as in Lucene."""
        lengths = np.frombuffer(self._lengths, np.uint32)
        number = len(lengths)
        holding = np.bincount(terms, minlength=len(self._numbers))
        weight = np.log(1 + (number - holding + 0.5) / (holding + 0.5)).astype(np.float32)
        mean = np.float32(lengths.sum() / max(1, number))
        share = rounded_lengths(lengths).astype(np.float32) / mean
        norm = np.float32(K1) * (np.float32(1 - B) + np.float32(B) * share)
        counts = np.frombuffer(self._counts, np.uint16).astype(np.float32)
        scores: npt.NDArray[np.float32] = weight[terms] * (counts / (counts + norm[documents]))
        return scores


def rounded_lengths(lengths: npt.NDArray[Any]) -> Ints:
    """Lengths as Lucene remembers them: up to 24 exactly, above with four significant bits."""
    above = np.maximum(lengths.astype(np.int64) - 24, 0)
    bits = np.frexp(above.astype(np.float64))[1]
    shift = np.maximum(bits - 4, 0)
    return np.where(lengths < 24, lengths, 24 + ((above >> shift) << shift))


def _hash(term: str) -> int:
    return int.from_bytes(blake2b(term.encode(errors="replace"), digest_size=8).digest())


class Searcher:
    """Searches what an :class:`Indexer` wrote to ``folder``."""

    def __init__(self, folder: Path) -> None:
        """Map the arrays; reads nothing yet."""
        self._terms = mapped(folder / "terms.npy")
        self._starts = mapped(folder / "starts.npy")
        self._documents = mapped(folder / "documents.npy")
        self._scores = mapped(folder / "scores.npy")
        self._rows = mapped(folder / "rows.npy")
        self._slot = lru_cache(SLOTS_KEPT)(self._look_up)

    def __call__(self, query: str) -> tuple[int, ...]:
        """Rows of the best products for ``query``, at most :data:`FOUND`, best first."""
        sums = np.zeros(len(self._rows))
        for term in analyse(query):
            slot = self._slot(term)
            if slot is not None:
                sums[self._documents[slot]] += self._scores[slot]
        found = np.flatnonzero(sums)
        scores = sums[found].astype(np.float32)
        if len(found) > FOUND:
            least = np.partition(scores, len(found) - FOUND)[len(found) - FOUND]
            found, scores = found[scores >= least], scores[scores >= least]
        best = found[np.argsort(-scores, kind="stable")[:FOUND]]
        return tuple(self._rows[best].tolist())

    def _look_up(self, term: str) -> slice | None:
        """Where the documents that hold ``term`` are listed."""
        code = np.uint64(_hash(term))
        place = int(np.searchsorted(self._terms, code))
        if place == len(self._terms) or self._terms[place] != code:
            return None
        return slice(int(self._starts[place]), int(self._starts[place + 1]))


def mapped(path: Path) -> npt.NDArray[Any]:
    """The array in ``path``, read where it lies and shared with every process that does so."""
    values: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return values.view(np.ndarray)
