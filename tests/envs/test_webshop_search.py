"""The analysis and the scores are Lucene's: published examples, and the definition written out."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from agentdistill.envs.webshop.analysis import MAX_LENGTH, analyse
from agentdistill.envs.webshop.porter import stem
from agentdistill.envs.webshop.search import FOUND, Indexer, Searcher, rounded_lengths

_STEMS = """
caresses caress ponies poni ties ti caress caress cats cat feed feed agreed agre plastered plaster
bled bled motoring motor sing sing conflated conflat troubled troubl sized size hopping hop tanned
tan falling fall hissing hiss fizzed fizz failing fail filing file happy happi sky sky relational
relat conditional condit valenci valenc hesitanci hesit digitizer digit radicalli radic differentli
differ vileli vile analogousli analog vietnamization vietnam predication predic operator oper
feudalism feudal decisiveness decis hopefulness hope callousness callous formaliti formal
sensitiviti sensit sensibiliti sensibl triplicate triplic formative form formalize formal
electriciti electr electrical electr hopeful hope goodness good revival reviv allowance allow
inference infer airliner airlin gyroscopic gyroscop adjustable adjust defensible defens irritant
irrit replacement replac adjustment adjust dependent depend adoption adopt homologou homolog
communism commun activate activ angulariti angular homologous homolog effective effect bowdlerize
bowdler probate probat rate rate cease ceas controll control roll roll possibly possibl assemblies
assembl technology technolog trekking trek is is as as oed o 5xl 5xl
"""
STEMS = _STEMS.split()
"""Word, stem: the examples of Porter's article, then his three departures and short words."""


@pytest.mark.parametrize(("word", "expected"), list(zip(STEMS[::2], STEMS[1::2], strict=True)))
def test_stems(word: str, expected: str) -> None:
    assert stem(word) == expected


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Men's shirts, and the T-Shirt", ["men", "shirt", "t", "shirt"]),
        ('6.6ft 1,000 a,b 52"w x 84"l', ["6.6ft", "1,000", "b", "52", "w", "x", "84", "l"]),
        ("material:wood foo_bar _ -- 3x-large", ["material:wood", "foo_bar", "3x", "larg"]),
        ("★gift★ ½ cup©", ["★", "gift", "★", "cup", "©"]),
        ("日本 カメラ ひも café", ["日", "本", "カメラ", "ひ", "も", "café"]),
        ("cafe\u0301s don\u2019t O\u2019s", ["cafe\u0301", "don\u2019t", "o"]),
        ("", []),
    ],
)
def test_terms(text: str, terms: list[str]) -> None:
    assert analyse(text) == terms


def test_long_words_are_cut() -> None:
    assert [len(term) for term in analyse("z" * (2 * MAX_LENGTH + 1))] == [255, 255, 1]


def test_lengths_have_four_significant_bits() -> None:
    lengths = np.array([0, 1, 23, 24, 39, 40, 41, 42, 57, 100, 1000, 2_000_000_000])
    kept = [0, 1, 23, 24, 39, 40, 40, 42, 56, 96, 984, 1879048216]
    assert rounded_lengths(lengths).tolist() == kept


DOCUMENTS = {
    "B3": "red shoe " * 30,
    "B1": "red shoe",
    "B2": "blue shoe with a red sole",
    "B0": "red shoe",
    "B9": "lamp",
}


@pytest.fixture
def searcher(tmp_path: Path) -> Searcher:
    indexer = Indexer()
    for text in DOCUMENTS.values():
        indexer.add(text)
    indexer.save(tmp_path, list(DOCUMENTS))
    return Searcher(tmp_path)


def _score(query: str, document: str) -> float:
    """Lucene's formula, written out."""
    counts = [Counter(analyse(text)) for text in DOCUMENTS.values()]
    mean = sum(c.total() for c in counts) / len(counts)
    here = Counter(analyse(document))
    length = int(rounded_lengths(np.array([here.total()]))[0])
    total = 0.0
    for term in analyse(query):
        holding = sum(term in c for c in counts)
        idf = math.log(1 + (len(counts) - holding + 0.5) / (holding + 0.5))
        norm = 0.9 * (1 - 0.4 + 0.4 * length / mean)
        total += idf * here[term] / (here[term] + norm)
    return total


@pytest.mark.parametrize("query", ["red", "shoe red red", "blue sole", "lamps", "RED lamp"])
def test_order_is_by_score_then_id(searcher: Searcher, query: str) -> None:
    ids = list(DOCUMENTS)
    scores = {name: _score(query, text) for name, text in DOCUMENTS.items()}
    expected = sorted((-score, name) for name, score in scores.items() if score > 0)
    assert [ids[row] for row in searcher(query)] == [name for _, name in expected]


@pytest.mark.parametrize("query", ["", "the", "unheard", "\ud800", "''"])
def test_nothing_found(searcher: Searcher, query: str) -> None:
    assert searcher(query) == ()


def test_no_more_than_fifty(tmp_path: Path) -> None:
    indexer = Indexer()
    for number in range(2 * FOUND):
        indexer.add("cup " * (1 + number % 3))
    indexer.save(tmp_path, [f"B{number:03}" for number in range(2 * FOUND)])
    found = Searcher(tmp_path)("cup")
    best = [number for number in range(2 * FOUND) if number % 3 == 2]
    assert len(found) == FOUND
    assert list(found[: len(best)]) == best
