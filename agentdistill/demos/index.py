"""Which of many texts are like a given one: by their words (BM25), or by embeddings.

Invariants
----------
* ``similarity(text)`` is one number per text: 0 where nothing is shared, about 1 for a text like
  the query; the words of a text count by how rare they are here, so no list of stop words.
* What an index knows is arrays, found by 64-bit hashes of terms: a process that searches keeps no
  vocabulary, and maps what others have mapped.
* The result depends on the texts and the query only; sums run in the order of the hashes.

BM25: Robertson & Zaragoza, "The Probabilistic Relevance Framework", 2009; k1 and b as usual. The
package bm25s computes the same; here terms that many texts hold are whole rows, which add up faster
than lists, and everything is one file. Observations of agents are long and made of few words: over
100,000 of 60 words (of 100 different ones), a query of 60 words takes 1 ms here and 7 ms there.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agentdistill.errors import ConfigError, MissingExtraError
from agentdistill.records import FloatArray

K1, B = 1.5, 0.75

_WORD = re.compile(r"\w+|[^\w\s]+")

_COMMON = 8
"""A term that one text in so many holds is kept as a whole row, which adds up much faster."""

_AT_ONCE = 1024

Arrays = dict[str, npt.NDArray[Any]]


def terms(text: str) -> list[str]:
    """Words, runs of symbols and whole lines: a map drawn in symbols is known by its rows."""
    lines = [line for raw in text.lower().splitlines() if (line := " ".join(raw.split()))]
    return [term for line in lines for term in (*_WORD.findall(line), f"\n{line}")]


def code(text: str) -> np.uint64:
    """64-bit hash of a text, the same in every process."""
    whole = blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(whole, "little"))


class Texts:
    """Texts, each a slice of one array of bytes."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """From what :meth:`pack` gave."""
        self._bytes, self._cuts = arrays["bytes"], arrays["cuts"]

    @staticmethod
    def pack(texts: Sequence[str]) -> Arrays:
        """``texts`` as arrays."""
        parts = [text.encode(errors="surrogatepass") for text in texts]
        cuts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return {"bytes": np.frombuffer(b"".join(parts), np.uint8), "cuts": cuts}

    def __getitem__(self, number: int) -> str:
        """Text ``number``."""
        part = self._bytes[self._cuts[number] : self._cuts[number + 1]]
        return part.tobytes().decode(errors="surrogatepass")


class Index(Protocol):
    """What ranks texts."""

    def similarity(self, text: str) -> FloatArray | None:
        """One number per text, float32; None where nothing here can be compared with ``text``."""


class Lexical:
    """BM25, as a share of what the query itself would score."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """From what :meth:`pack` gave; nothing is read yet."""
        self._codes, self._starts, self._idf = arrays["codes"], arrays["starts"], arrays["idf"]
        self._texts, self._weights = arrays["texts"], arrays["weights"]
        self._rows, self._row_of = arrays["rows"], arrays["row_of"]
        self._unknown, self._mean = (float(value) for value in arrays["unknown"])
        self._size = int(arrays["size"][0])

    @staticmethod
    def pack(texts: Sequence[str]) -> Arrays:
        """The index of ``texts`` as arrays."""
        numbers: dict[str, int] = {}
        term, count, distinct, lengths = (array("q") for _ in range(4))
        for text in texts:
            found = Counter(terms(text))
            term.extend(numbers.setdefault(word, len(numbers)) for word in found)
            count.extend(found.values())
            distinct.append(len(found))
            lengths.append(found.total())
        codes = np.array([code(word) for word in numbers], np.uint64)
        order = np.argsort(codes)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        length = np.asarray(lengths, np.int64)
        return {
            "codes": codes[order],
            "size": np.array([len(texts)]),
            **_weights(
                rank[np.asarray(term, np.int64)],
                np.repeat(np.arange(len(texts)), np.asarray(distinct, np.int64)),
                np.asarray(count, np.float64),
                length,
                len(codes),
            ),
        }

    def similarity(self, text: str) -> FloatArray | None:
        """Score of each text by the distinct terms of ``text``; None without any term."""
        asked = Counter(terms(text))
        if not asked or not len(self._codes):
            return None
        found = np.zeros(self._size, np.float32)
        norm, own = _norm(asked.total(), self._mean), 0.0
        for term_code, count in sorted((code(word), number) for word, number in asked.items()):
            place = int(np.searchsorted(self._codes, term_code))
            known = place < len(self._codes) and self._codes[place] == term_code
            idf = float(self._idf[place]) if known else self._unknown
            own += idf * count * (K1 + 1) / (count + norm)
            if known:
                self._add(place, found)
        found /= np.float32(own)
        return found

    def _add(self, place: int, to: FloatArray) -> None:
        row = int(self._row_of[place])
        if row >= 0:
            to += self._rows[row]
        else:
            part = slice(int(self._starts[place]), int(self._starts[place + 1]))
            to[self._texts[part]] += self._weights[part]


def _norm(length: Any, mean: float) -> Any:
    return K1 * (1 - B + B * length / mean)


def _weights(
    term: npt.NDArray[Any],
    text: npt.NDArray[Any],
    count: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    number: int,
) -> Arrays:
    """What each term adds to each text that holds it: as lists, or as rows where it is common."""
    mean = float(lengths.mean()) if len(lengths) else 0.0
    mean = mean or 1.0
    holding = np.bincount(term, minlength=number)
    idf = np.log1p((len(lengths) - holding + 0.5) / (holding + 0.5))
    weight = idf[term] * count * (K1 + 1) / (count + _norm(lengths[text], mean))
    common = np.flatnonzero(holding * _COMMON >= len(lengths))
    row_of = np.full(number, -1, np.int32)
    row_of[common] = np.arange(len(common))
    rows = np.zeros((len(common), len(lengths)), np.float32)
    dense = row_of[term] >= 0
    rows[row_of[term[dense]], text[dense]] = weight[dense]
    order = np.argsort(term[~dense], kind="stable")
    counts = np.where(row_of >= 0, 0, holding)
    return {
        "idf": idf,
        "unknown": np.array([np.log1p((len(lengths) + 0.5) / 0.5), mean]),
        "starts": np.cumsum([0, *counts], dtype=np.int64),
        "texts": text[~dense][order].astype(np.int32),
        "weights": weight[~dense][order].astype(np.float32),
        "rows": rows,
        "row_of": row_of,
    }


class Embedder(Protocol):
    """Texts as vectors of length one."""

    name: str
    """Says which model; a store is searched with the one that it was built with."""

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Vectors [len(texts), D], float32."""


class SentenceEmbedder:
    """A model of the package sentence-transformers, loaded when it is first used."""

    PREFIX = "sentence-transformers:"

    def __init__(self, model: str = "sentence-transformers/all-MiniLM-L6-v2") -> None:
        """``model``: its name on the hub, or a folder; the default is the paper's (2512.02543)."""
        self.name, self._model_name = f"{self.PREFIX}{model}", model

    @cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError("Search by sentence embeddings", "embeddings") from error
        return SentenceTransformer(self._model_name)

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Vectors [len(texts), D], float32."""
        found: FloatArray = self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(found, np.float32)


class Dense:
    """Cosine of embeddings, negative ones as 0."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], embedder: Embedder) -> None:
        """From what :meth:`pack` gave, with the same embedder."""
        self._vectors, self._embedder = arrays["vectors"], embedder

    @staticmethod
    def pack(texts: Sequence[str], embedder: Embedder) -> Arrays:
        """The vectors of ``texts``; zeros for one without any word."""
        blocks = [texts[at : at + _AT_ONCE] for at in range(0, len(texts), _AT_ONCE)]
        found = [np.asarray(embedder(block), np.float32) for block in blocks]
        vectors = np.concatenate(found) if found else np.zeros((0, 1), np.float32)
        if vectors.shape[0] != len(texts) or vectors.ndim != 2:
            remedy = f"gave {vectors.shape} for {len(texts)} texts, not one vector for each"
            raise ConfigError(remedy, key="embedder", value=embedder.name)
        vectors[[not text.strip() for text in texts]] = 0
        return {"vectors": vectors}

    def similarity(self, text: str) -> FloatArray | None:
        """Cosine with each text; None where the query is blank or there is no text."""
        if not text.strip() or not self._vectors.size:
            return None
        query = np.asarray(self._embedder([text]), np.float32)[0]
        found: FloatArray = np.maximum(self._vectors @ query, np.float32(0))
        return found
