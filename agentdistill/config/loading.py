"""From a YAML file, a mapping and overrides to the one object, or to one line that says why not.

Invariants: the YAML file, dotted overrides and Python keywords build the same
:class:`~agentdistill.config.RunConfig`; unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from agentdistill.config.api import ApiModel
from agentdistill.config.models import LocalModel, TinyModel
from agentdistill.config.prompts import Section
from agentdistill.config.schema import (
    CollectStage,
    RunConfig,
    TrainStage,
)
from agentdistill.errors import ConfigError


def load(
    source: str | Path | Mapping[str, Any] | RunConfig | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Build the configuration from a YAML file or a mapping, plus ``key.path=value`` overrides.

    Stages are addressed by name: ``stages.distil.lr=1e-3``.

    Raises:
        ConfigError: with one line that names the key, the value and the remedy.
    """
    if isinstance(source, RunConfig):
        source = source.model_dump()
    values = read(source) if isinstance(source, (str, Path)) else copy.deepcopy(dict(source or {}))
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, values) from None


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked; ConfigError when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        remedy = f"cannot be read ({reason}); give the path of a YAML file"
        raise ConfigError(remedy, key="config", value=str(path)) from None
    values = _parse(text, "config", str(path))
    if not isinstance(values, dict):
        raise ConfigError("must hold keys and values", key="config", value=str(path))
    return values


def _parse(text: str, key: str, shown: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"is not YAML: {line}", key=key, value=shown) from None


class _Yaml(yaml.SafeLoader):
    """YAML in which ``1e-3`` is a number (YAML 1.1 wants ``1.0e-3``)."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError("write key.path=value", key="override", value=override)
    *parents, last = path.split(".")
    node: Any = values
    for part in parents:
        node = _child(node, part, path)
    value = _parse(text, path, text)
    if isinstance(node, list):
        raise ConfigError("needs a key below the stage", key=path, value=value)
    node[last] = value


def _child(node: Any, part: str, path: str) -> Any:
    if isinstance(node, list):
        for item in node:
            if isinstance(item, dict) and item.get("name") == part:
                return item
        known = ", ".join(str(item.get("name")) for item in node if isinstance(item, dict))
        raise ConfigError(f"no stage of this name; known: {known}", key=path, value=part)
    child = node.get(part)
    if isinstance(child, str) and part == "prompt":
        child = {"preset": child}
    if child is None:
        child = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"{part} is a value, not a section", key=path, value=child)
    node[part] = child
    return child


_UNIONS: dict[str, dict[str, type[Section]]] = {
    "models": {"tiny": TinyModel, "local": LocalModel, "api": ApiModel},
    "stages": {"collect": CollectStage, "train": TrainStage},
}
"""Sections whose members are of several kinds, which pydantic puts into its locations."""

_TAGS = {"models": "kind", "stages": "do"}


def _explain(error: ValidationError, values: Mapping[str, Any]) -> ConfigError:
    """The first error of pydantic's list as one line of ours."""
    first = error.errors()[0]
    location, value, kind = first["loc"], first.get("input"), first["type"]
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(_names(location, values)) or "config"
    if kind == "extra_forbidden":
        known = list(_section(location).model_fields)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return ConfigError(f"unknown key; {hint}", key=key, value=value)
    if kind == "union_tag_invalid" and isinstance(value, Mapping):
        union, tag = str(location[0]), _TAGS[str(location[0])]
        remedy = f"one of {', '.join(_UNIONS[union])}"
        return ConfigError(remedy, key=f"{key}.{tag}", value=value[tag])
    if kind in ("union_tag_not_found", "dict_type", "model_type"):
        message = "must hold keys and values"
    if isinstance(value, (dict, Section)):
        return ConfigError(message if key == "config" else f"{key}: {message}")
    return ConfigError(message, key=key, value=value)


def _names(location: tuple[int | str, ...], values: Mapping[str, Any]) -> list[str]:
    """``location`` as overrides write it: stages by name, and without pydantic's tags."""
    parts = [str(part) for part in location]
    if len(parts) > 2 and parts[2] in _UNIONS.get(parts[0], ()):
        del parts[2]
    if len(location) > 1 and location[0] == "stages" and isinstance(location[1], int):
        stage = values["stages"][location[1]]
        name = stage.get("name") if isinstance(stage, Mapping) else None
        parts[1] = str(name) if isinstance(name, str) else parts[1]
    return parts


def _section(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that holds the key at ``location``."""
    section: type[BaseModel] = RunConfig
    for place, part in enumerate(location[:-1]):
        field = section.model_fields.get(str(part))
        if place == 2 and str(part) in _UNIONS.get(str(location[0]), ()):
            section = _UNIONS[str(location[0])][str(part)]
        elif field is not None:
            kinds = get_args(field.annotation) or (field.annotation,)
            inside = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
            section = inside[0] if inside else section
    return section
