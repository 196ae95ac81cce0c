"""From a name to an environment: the one place where environments are constructed."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium

from agentdistill.envs.base import TextEnv
from agentdistill.errors import AgentDistillError, ConfigError


def make(target: str | TextEnv, options: Mapping[str, Any] | None = None) -> TextEnv:
    """The bare environment behind ``target``, without gymnasium's wrappers.

    Args:
        target: a gymnasium id (``agentdistill/Sokoban-v0``, ``module:namespace/Name-v0``),
            ``module:Class``, or an instance.
        options: arguments for its constructor.

    Raises:
        ConfigError: unknown id, class or option, or not a TextEnv.
    """
    if not isinstance(target, str):
        return _text_env(target, str(target))
    try:
        create, defaults = _creator(target)
    except (ImportError, AttributeError, ValueError, gymnasium.error.Error) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"is no environment ({line})", key="env.id", value=target) from error
    chosen = {**defaults, **(options or {})}
    try:
        return _text_env(create(**chosen), target)
    except AgentDistillError:
        raise
    except TypeError as error:
        known = ", ".join(_parameters(create)) or "none"
        remedy = f"{error}; options of {target}: {known}"
        raise ConfigError(remedy, key="env.options", value=dict(options or {})) from error


def _creator(target: str) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """What constructs ``target``, and its registered arguments."""
    module, _, name = target.rpartition(":")
    if re.fullmatch(r"[A-Za-z_][\w.]*", name) and module:
        return getattr(importlib.import_module(module), name), {}
    importlib.import_module(module or "agentdistill.envs")  # registers its ids
    spec = gymnasium.spec(name)
    entry = spec.entry_point
    if isinstance(entry, str):
        return gymnasium.envs.registration.load_env_creator(entry), spec.kwargs
    if entry is None:
        raise ValueError("its registration names no entry point")
    return entry, spec.kwargs


def _parameters(create: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(create).parameters if name != "self"]


def _text_env(env: Any, name: str) -> TextEnv:
    bare = env.unwrapped if isinstance(env, gymnasium.Env) else env
    if not isinstance(bare, TextEnv):
        remedy = f"is a {type(bare).__name__}; derive it from agentdistill.envs.base.TextEnv"
        raise ConfigError(remedy, key="env", value=name)
    return bare
