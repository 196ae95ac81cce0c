"""From text to the terms that are indexed and searched, as Lucene's EnglishAnalyzer finds them.

Invariants: documents and queries go through the same function; no state. The chain is Lucene's:
StandardTokenizer (the word boundaries of Unicode Standard Annex 29), possessive 's removed, lower
case, 33 stop words removed, Porter's stemmer. South-East Asian scripts are not segmented the way
Lucene does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from agentdistill.envs.webshop.porter import stem

_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Lucene's default English stop words."""

MAX_LENGTH = 255
"""Lucene cuts longer words into pieces of this many characters."""

_NUMBERS = (
    "²³¹¼-¾\u09f4-\u09f9\u2070-\u2079\u2080-\u2089\u2150-\u2189\u2460-\u249b\u24ea-\u24ff"
    "\u2776-\u2793"
)
"""Numbers that are no decimal digits: no word characters in Annex 29, though they are for re."""
_IDEOGRAPHS = (
    "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003fffd"
)
_HIRAGANA = "\u3041-\u3096\u309d-\u309f"
_KATAKANA = "\u3031-\u3035\u309b\u309c\u30a0-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_MARKS = "\u0300-\u036f\u00ad\u200c-\u200f\u2060\u20d0-\u20f0\ufe00-\ufe0f\ufeff"
"""What attaches to the character before it (WB4)."""
_INSIDE_WORDS = (
    ":.'\u00b7\u0387\u055f\u05f4\u2018\u2019\u2024\u2027\ufe13\ufe52\ufe55\uff07\uff0e\uff1a"
)
_INSIDE_NUMBERS = (
    ",;.'\u037e\u0589\u060c\u060d\u066c\u07f8\u2018\u2019\u2024\u2044\ufe10\ufe14\ufe50\ufe52\ufe54"
    "\uff07\uff0c\uff0e\uff1b"
)
_PICTURES = (
    "©®\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u2388\u23cf\u23e9-\u23f3"
    "\u23f8-\u23fa\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612"
    "\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733\u2734\u2744\u2747"
    "\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0\u27bf\u2934\u2935"
    "\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)
"""Unicode 11's Extended_Pictographic, each a word of its own for Lucene (★ as well as ©)."""

_LETTER = rf"[^\W\d_{_NUMBERS}{_IDEOGRAPHS}{_HIRAGANA}{_KATAKANA}]"
_LETTERS = rf"(?:{_LETTER}+[{_MARKS}]*)+"
_DIGITS = rf"(?:\d+[{_MARKS}]*)+"
_RUN = (
    rf"(?:{_LETTERS}(?:[{_INSIDE_WORDS}]{_LETTERS})*"
    rf"|{_DIGITS}(?:[{_INSIDE_NUMBERS}]{_DIGITS})*)"
)
_WORD = re.compile(
    rf"_*{_RUN}(?:_*{_RUN})*_*|[{_IDEOGRAPHS}{_HIRAGANA}]|[{_KATAKANA}]+"
    rf"|[{_PICTURES}][{_MARKS}]*(?:\u200d[{_PICTURES}][{_MARKS}]*)*"
)
_PIECE = re.compile(
    rf"[\w{_MARKS}{_PICTURES}]+(?:[{_INSIDE_WORDS}{_INSIDE_NUMBERS}][\w{_MARKS}{_PICTURES}]+)*"
)
"""Holds whole words only; nearly all are one plain word, which the slower _WORD need not see."""
_POSSESSIVE = ("'s", "'S", "\u2019s", "\u2019S", "\uff07s", "\uff07S")

_stem = lru_cache(maxsize=1 << 16)(stem)


def analyse(text: str) -> list[str]:
    """The terms of ``text``, in order, repeated where they repeat."""
    terms = []
    for word in _words(text):
        if word.endswith(_POSSESSIVE):
            word = word[:-2]
        word = word.lower()
        if word not in STOP_WORDS:
            terms.append(_stem(word))
    return terms


def _words(text: str) -> Iterator[str]:
    for piece in _PIECE.findall(text):
        words = (piece,) if piece.isascii() and piece.isalnum() else _WORD.findall(piece)
        for word in words:
            if len(word) <= MAX_LENGTH:
                yield word
            else:
                yield from (word[at : at + MAX_LENGTH] for at in range(0, len(word), MAX_LENGTH))
