"""Porter's stemmer as its author published it last, and as Lucene's PorterStemFilter has it.

Invariants: words of one or two characters stay; every character but a, e, i, o, u (and y after a
consonant) is a consonant, digits included. Three departures from the article of 1980 are in it, as
in the author's own later programs: "bli" becomes "ble", "logi" becomes "log", and any doubled
consonant but l, s and z is halved. (Snowball's "porter" has none of them, so that it cannot stand
in for Lucene: "possibly", "technology" and "trekking" come out differently.)

Source: M. F. Porter, An algorithm for suffix stripping, Program 14(3), 1980, and the notes at
tartarus.org/martin/PorterStemmer.
"""

from __future__ import annotations

_STEP2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"),
    ("bli", "ble"), ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"),
    ("ization", "ize"), ("ation", "ate"), ("ator", "ate"), ("alism", "al"), ("iveness", "ive"),
    ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"),
    ("logi", "log"),
)  # fmt: skip
_STEP3 = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""),
    ("ness", ""),
)  # fmt: skip
_ENDINGS = "al ance ence er ic able ible ant ement ment ent sion tion ou ism ate iti ous ive ize"
_STEP4 = tuple(_ENDINGS.split())
"""Endings in the order in which they are tried; "ion" goes only after s or t, which stay."""


def stem(word: str) -> str:
    """The stem of one lower-case word."""
    if len(word) <= 2:
        return word
    word = _past(_plural(word))
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(_replaced(word, _STEP2), _STEP3)
    return _tidied(_stripped(word))


def _shape(word: str) -> str:
    """A letter per letter: v for a vowel, c for a consonant."""
    shape, last = [], ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and last == "c")
        last = "v" if vowel else "c"
        shape.append(last)
    return "".join(shape)


def _measure(word: str) -> int:
    """How often consonants follow vowels: Porter's m."""
    return _shape(word).count("vc")


def _doubled(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c"


def _short(word: str) -> bool:
    """Whether it ends consonant, vowel, consonant other than w, x and y: Porter's *o."""
    return _shape(word).endswith("cvc") and word[-1] not in "wxy"


def _plural(word: str) -> str:
    """Step 1a."""
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    """Step 1b."""
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        if word.endswith(ending):
            rest = word[: -len(ending)]
            return _mended(rest) if "v" in _shape(rest) else word
    return word


def _mended(word: str) -> str:
    """What is left of a word without -ed or -ing, made to end like a word again."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if _doubled(word):
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _short(word) else word


def _replaced(word: str, endings: tuple[tuple[str, str], ...]) -> str:
    """Steps 2 and 3: the first ending that fits decides, whether it is replaced or not."""
    for ending, other in endings:
        if word.endswith(ending):
            rest = word[: -len(ending)]
            return rest + other if _measure(rest) > 0 else word
    return word


def _stripped(word: str) -> str:
    """Step 4."""
    for ending in _STEP4:
        if word.endswith(ending):
            rest = word[: -len("ion" if ending.endswith("ion") else ending)]
            return rest if _measure(rest) > 1 else word
    return word


def _tidied(word: str) -> str:
    """Step 5."""
    if word.endswith("e"):
        measure = _measure(word)
        if measure > 1 or (measure == 1 and not _short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
