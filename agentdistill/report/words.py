"""Words and numbers for people; texts of environments and models made safe to look at.

Invariants: whatever a text holds, what is shown is valid UTF-8, reads in one direction, and hides
nothing: control characters become visible signs. Escaping for HTML is the template's business.
What was not measured is a dash.
"""

from __future__ import annotations

import math

NOTHING = "–"  # noqa: RUF001  (a dash, as in printed tables)

_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"[U+{code:04X}]" for code in (*range(0x80, 0xA0), *_BIDI, 0xFEFF)},
}


def clean(text: str) -> str:
    """``text`` with signs for control characters and ``?`` for lone surrogates."""
    shown = text.replace("\r\n", "\n").translate(_VISIBLE)
    return shown.encode(errors="replace").decode()


def clip(text: str, limit: int) -> tuple[str, int]:
    """The beginning of ``text``, and how many characters were left out."""
    return (text, 0) if len(text) <= limit else (text[:limit], len(text) - limit)


def percent(rate: float | None) -> str:
    """A rate."""
    return NOTHING if rate is None else f"{rate:.1%}"


def number(value: float | None) -> str:
    """A number with as many digits as say something."""
    if value is None or math.isnan(value):
        return NOTHING
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or not size else 3
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def count(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None else f"{value:,.0f}"


def short(value: float) -> str:
    """A round number for an axis."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:,.10g}".replace("-", "\u2212")


def duration(seconds: float | None) -> str:
    """Seconds, or minutes and hours where there are many."""
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def seeds(numbers: list[int]) -> str:
    """Which seeds these are."""
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
