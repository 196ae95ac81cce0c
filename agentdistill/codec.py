"""Trajectories as flat token columns and JSON lines, packed into the bytes of one ``.npz`` file.

Invariants
----------
* The round trip is exact: NaN log-probabilities, floats to the last bit, tuples, enums and any
  Python string, lone surrogates included. Mappings hold JSON, so a tuple inside one reads back as
  a list. A column of another dtype and a value that is not JSON raise TypeError.
* The same trajectories give the same bytes, so the hash of the bytes is their identity.
* A field that a later version adds to a record needs a default; older shards then still load.

Layout: ``ids`` int32 [N], ``author`` uint8 [N], ``kind`` uint8 [N], ``logp`` float32 [N] over the
N tokens of all streams in order; ``offsets`` int64 [S + 1], where the S streams begin and end;
``streams`` int64 [T], how many of them belong to each of the T trajectories; ``records`` uint8,
everything else as T lines of JSON; ``format`` int64, the number of this layout.
"""

from __future__ import annotations

import io
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from agentdistill.records import Json, Stream, Trajectory

FORMAT = 1

_COLUMNS: dict[str, type[np.generic]] = {
    "ids": np.int32,
    "author": np.uint8,
    "kind": np.uint8,
    "logp": np.float32,
}

Reader = Callable[[Json], Any]


def pack(trajectories: Sequence[Trajectory]) -> bytes:
    """The bytes of an uncompressed ``.npz`` file that :func:`unpack` reads.

    Raises:
        TypeError: a stream column has another dtype than its record says, or a record holds a
            value that is not JSON.
    """
    streams = [stream for trajectory in trajectories for stream in trajectory.streams]
    columns: dict[str, Any] = {
        name: _flat(streams, name, dtype) for name, dtype in _COLUMNS.items()
    }
    lines = "".join(_dump(trajectory) + "\n" for trajectory in trajectories)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        format=np.array([FORMAT]),
        offsets=np.cumsum([0, *map(len, streams)], dtype=np.int64),
        streams=np.array([len(trajectory.streams) for trajectory in trajectories], np.int64),
        records=np.frombuffer(lines.encode(errors="surrogatepass"), np.uint8),
        **columns,
    )
    return buffer.getvalue()


def unpack(data: bytes) -> list[Trajectory]:
    """What :func:`pack` packed; the streams' columns are slices of the shard's columns.

    Raises:
        ValueError: the layout is one that this version does not know.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        found = int(arrays["format"][0])
        if found != FORMAT:
            raise ValueError(f"layout {found}; this version of agentdistill reads {FORMAT}")
        streams = _cut(arrays["offsets"], [arrays[name] for name in _COLUMNS])
        counts = np.cumsum([0, *arrays["streams"]]).tolist()
        lines = arrays["records"].tobytes().decode(errors="surrogatepass").split("\n")[:-1]
    read = _reader(Trajectory)
    return [
        read(json.loads(line) | {"streams": streams[start:end]})
        for line, (start, end) in zip(lines, pairwise(counts), strict=True)
    ]


def count(data: bytes) -> int:
    """How many trajectories :func:`pack` packed, without decoding them."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return len(arrays["streams"])


def _dump(trajectory: Trajectory) -> str:
    """Everything but the streams as one line of JSON."""
    # Not ensure_ascii: escapes would merge two lone surrogates that form a pair into one character.
    return json.dumps(trajectory, default=_plain, ensure_ascii=False, separators=(",", ":"))


def _flat(streams: Sequence[Stream], name: str, dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    parts = [np.empty(0, dtype), *(getattr(stream, name) for stream in streams)]
    return np.concatenate(parts, dtype=dtype, casting="safe")


def _cut(offsets: np.ndarray[Any, Any], columns: list[np.ndarray[Any, Any]]) -> tuple[Stream, ...]:
    bounds = offsets.tolist()
    return tuple(
        Stream(*(column[start:end] for column in columns)) for start, end in pairwise(bounds)
    )


def _plain(value: Any) -> Json:
    """One level of a record as JSON; the encoder calls this again for what lies below."""
    if hasattr(value, "__dataclass_fields__"):
        kind: Any = type(value)
        return {name: getattr(value, name) for name in _names(kind)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) is not JSON")


@cache
def _names(kind: Any) -> tuple[str, ...]:
    left_out = "streams" if kind is Trajectory else None
    return tuple(f.name for f in fields(kind) if f.init and f.name != left_out)


@cache
def _reader(kind: Any) -> Reader:
    """The function that turns parsed JSON back into a value annotated as ``kind``."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Stream:
        return _as_is
    if hasattr(kind, "__dataclass_fields__"):
        return _record_reader(kind)
    if origin is tuple:
        inner = _reader(args[0])
        return lambda value: tuple(map(inner, value))
    if origin in (Union, types.UnionType):
        some = _reader(next(arg for arg in args if arg is not types.NoneType))
        return lambda value: None if value is None else some(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    return _as_is


def _record_reader(kind: type[Any]) -> Reader:
    hints = get_type_hints(kind)
    readers = {f.name: _reader(hints[f.name]) for f in fields(kind) if f.init}
    nested = [(name, read) for name, read in readers.items() if read is not _as_is]

    def read(value: dict[str, Json]) -> Any:
        value |= {name: inner(value[name]) for name, inner in nested if name in value}
        return kind(**value)

    return read


def _as_is(value: Json) -> Json:
    return value
