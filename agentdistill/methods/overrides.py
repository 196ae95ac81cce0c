"""How nested overrides change a point of the space, as plain mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def apart(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``changes`` without their schedules, and the schedules by dotted key."""
    plain: dict[str, Any] = {}
    schedules: dict[str, Any] = {}
    for key, value in changes.items():
        if key == "schedules" or not isinstance(value, Mapping):
            plain[key] = value
        elif {"from", "to"} <= set(value):
            schedules[key] = dict(value)
        else:
            plain[key], inner = apart(value)
            schedules |= {f"{key}.{name}": each for name, each in inner.items()}
    return plain, schedules


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, section by section; a rule is changed or replaced as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if not isinstance(old, dict) or not isinstance(value, Mapping):
            merged[key] = value
        elif "parameters" in old and value.get("name", old["name"]) != old["name"]:
            merged[key] = value  # another rule: the parameters of the old one mean nothing to it
        else:
            merged[key] = merge(old, value)
    return merged
