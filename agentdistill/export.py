"""Trajectories as Hugging Face datasets: one row per trajectory, JSON Lines or Parquet.

Invariants
----------
* The file appears complete or not at all; rows keep the order of the source.
* Every row has every column of :data:`PROVENANCE` and, unless left out, of :data:`TOKENS`; strings
  are valid Unicode (a lone surrogate becomes ``?``), numbers are finite or null.
* ``messages`` is what trl's ``SFTTrainer`` reads: at most one system message, then user and
  assistant in turn. Replayed turns are in it; tokens, with their authors, tell them apart.
* ``ids`` are the tokens that the model saw: to train on them, do not tokenize ``messages`` again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from agentdistill.errors import ConfigError, MissingExtraError
from agentdistill.files import refusing, replacing
from agentdistill.records import FloatArray, Json, Trajectory, Turn
from agentdistill.store import Store

PROVENANCE = {
    "id": "string",
    "task_id": "string",
    "env": "string",
    "split": "string",
    "group": "string",
    "attempt": "int64",
    "success": "bool_",
    "score": "float64",
    "reward": "float64",
    "reward_valid": "bool_",
    "end": "string",
    "source_run": "string",
    "policy": "string",
    "derived_from": "string",
    "n_turns": "int64",
    "goal": "string",
}
"""Columns that say where a row comes from, with their Arrow types.

``id`` is the trajectory's, which ``derived_from`` of another row may name; ``task_id`` is the key
of the task, ``attempt`` the number of the sample within its group; ``reward_valid`` is false where
a curriculum's window or a fault ended the episode, which is no failure of the agent; ``goal`` is
the task in words, where the environment gave it.
"""

TOKENS = {"ids": "int32", "authors": "uint8", "kinds": "uint8", "logps": "float32"}
"""Columns over tokens, as one list per stream, with the Arrow types of their items.

``authors`` and ``kinds`` are the numbers of :class:`~agentdistill.records.Author` and
:class:`~agentdistill.records.Kind`; ``logps`` is null where nobody sampled.
"""

_ROWS_AT_ONCE = 256
"""Rows in memory, and in one row group of a Parquet file."""


def export(
    source: Store | Iterable[Trajectory],
    path: str | Path,
    format: str = "jsonl",
    *,
    tokens: bool = True,
) -> int:
    """Write the trajectories of ``source`` to the file ``path``.

    Args:
        source: a store (its committed trajectories) or any trajectories.
        path: the file; its folder is made if need be, an older file is replaced.
        format: ``jsonl`` or ``parquet``. Load with ``datasets.load_dataset("json" or "parquet",
            data_files=path)``; give ``features=features()`` for JSON Lines whose first megabytes
            leave a column null or empty, because types are otherwise guessed from those.
        tokens: whether to write the columns of :data:`TOKENS`.

    Returns:
        The number of rows.

    Raises:
        ConfigError: an unknown format.
        MissingExtraError: Parquet without pyarrow.
        StoreError: the disk refuses, or the store is damaged.
    """
    if format not in _WRITERS:
        raise ConfigError(f"use one of {sorted(_WRITERS)}", key="format", value=format)
    if format == "parquet":
        _arrow("Parquet export")
    path = Path(path)
    trajectories = source.trajectories() if isinstance(source, Store) else source
    rows = (row(trajectory, tokens=tokens) for trajectory in trajectories)
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "export") as file:
        return _WRITERS[format](rows, file, tokens)


def row(trajectory: Trajectory, *, tokens: bool = True) -> dict[str, Json]:
    """One trajectory as a row; see :data:`PROVENANCE` and :data:`TOKENS` for its columns."""
    streams = trajectory.streams
    columns = {
        "ids": [stream.ids.tolist() for stream in streams],
        "authors": [stream.author.tolist() for stream in streams],
        "kinds": [stream.kind.tolist() for stream in streams],
        "logps": [_finite(stream.logp) for stream in streams],
    }
    return {"messages": messages(trajectory), **(columns if tokens else {}), **_facts(trajectory)}


def messages(trajectory: Trajectory) -> list[dict[str, str]]:
    """The episode as chat messages.

    The instruction, if provenance has it, is the system message; observations are the user's, as
    the environment gave them (the prompt's own words around them are not recorded). A response
    without text is written as its actions, one a line; one with native tool calls as its text and
    then its actions. What the environment showed after the last response is left out.
    """
    instruction = trajectory.provenance.get("instruction")
    found = [_message("system", instruction)] if instruction else []
    for turn in trajectory.turns:
        found.append(_message("user", turn.observation))
        said = [turn.text] if turn.text else []
        if turn.tool_calls or not said:
            said += turn.actions
        found.append(_message("assistant", "\n".join(said)))
    return found


def features(*, tokens: bool = True) -> Any:
    """The columns as ``datasets.Features``, so that loading never guesses a type.

    Raises:
        MissingExtraError: datasets is not installed.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise MissingExtraError("Typed loading", "train") from error
    return datasets.Features.from_arrow_schema(_schema(tokens))


def _facts(trajectory: Trajectory) -> dict[str, Json]:
    task, provenance = trajectory.task, trajectory.provenance
    return {
        "id": trajectory.id,
        "task_id": task.key,
        "env": _text(task.env),
        "split": _text(task.split),
        "group": _text(trajectory.group),
        "attempt": trajectory.sample,
        "success": trajectory.success,
        "score": _number(trajectory.score),
        "reward": _number(trajectory.reward),
        "reward_valid": trajectory.reward_valid,
        "end": _text(trajectory.end),
        "source_run": _text(provenance.get("run")),
        "policy": _text(provenance.get("policy", _actor(trajectory.acted))),
        "derived_from": _text(trajectory.derived_from),
        "n_turns": len(trajectory.turns),
        "goal": _text(trajectory.goal),
    }


def _actor(turns: tuple[Turn, ...]) -> str | None:
    return turns[-1].actor.name if turns else None


def _message(role: str, content: Json) -> dict[str, str]:
    return {"role": role, "content": _text(content) or ""}


def _text(value: Json) -> str | None:
    """Valid Unicode: other JSON than strings as JSON, a lone surrogate as ``?``."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode(errors="replace").decode()


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(logp: FloatArray) -> list[float | None]:
    # By way of text: the shortest digits that give the same float32 again, half the bytes.
    values = logp.astype("U32").astype(np.float64).astype(object)
    values[~np.isfinite(logp)] = None
    return list(values)


def _write_jsonl(rows: Iterator[Mapping[str, Json]], file: BinaryIO, tokens: bool) -> int:
    number = 0
    for one in rows:
        file.write(json.dumps(one, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        number += 1
    return number


def _write_parquet(rows: Iterator[Mapping[str, Json]], file: BinaryIO, tokens: bool) -> int:
    arrow, parquet = _arrow("Parquet export")
    schema, number = _schema(tokens), 0
    with parquet.ParquetWriter(file, schema) as writer:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(arrow.Table.from_pylist(some, schema=schema))
            number += len(some)
    return number


_WRITERS = {"jsonl": _write_jsonl, "parquet": _write_parquet}


def _schema(tokens: bool) -> Any:
    """The columns of a row as an Arrow schema."""
    arrow, _ = _arrow("Parquet export")
    message = arrow.struct([("role", arrow.string()), ("content", arrow.string())])
    columns = [("messages", arrow.list_(message))]
    for name, item in TOKENS.items() if tokens else ():
        columns.append((name, arrow.list_(arrow.list_(getattr(arrow, item)()))))
    columns += [(name, getattr(arrow, kind)()) for name, kind in PROVENANCE.items()]
    return arrow.schema(columns)


def _arrow(feature: str) -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(feature, "train") from error
