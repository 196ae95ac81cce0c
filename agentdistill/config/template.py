"""Texts with places to be filled in.

Invariants: filling in is one pass, so that what an environment says is never read as a template;
a line of the template whose places are all empty vanishes with its other words; braces around
anything but a known name are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_PLACE = re.compile(r"\{([a-z_]+)\}")


def places(template: str) -> set[str]:
    """Names in single braces."""
    return set(_PLACE.findall(template))


def fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with ``values`` in their places, without the lines that have nothing to say."""
    lines = []
    for line in template.split("\n"):
        found = [values[name] for name in _PLACE.findall(line) if name in values]
        if any(found) or not found:
            lines.append(_PLACE.sub(lambda place: values.get(place[1], place[0]), line))
    return "\n".join(lines)


def listing(actions: Sequence[str], style: str, limit: int | None = None) -> str:
    """``actions`` one a line (style ``lines``) or in quotes with commas between (``quoted``).

    Beyond the first ``limit`` only their number is said.
    """
    shown = [repr(a) if style == "quoted" else a for a in actions[:limit]]
    if len(actions) > len(shown):
        shown.append(f"… and {len(actions) - len(shown)} more")
    return (", " if style == "quoted" else "\n").join(shown)
