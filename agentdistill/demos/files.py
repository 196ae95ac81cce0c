"""Named arrays in one file that many processes map at once.

Invariants
----------
* A file appears complete or not at all, and is never changed afterwards: a new one takes its name,
  and whoever has mapped the old one goes on with that.
* The same arrays and facts give the same bytes; their SHA-256 is in the header.

Layout: ``MAGIC``; the length of the header, uint64; the header as JSON (``facts``, ``sha256``,
``size`` of everything after the header, and for each array its type, shape and offset there); then
the arrays, little-endian, each on a multiple of 64 bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentdistill.errors import StoreError
from agentdistill.files import refusing, replacing
from agentdistill.records import Json

MAGIC = b"agentdistill demonstrations\n\0\0\0\0"
_ALIGN = 64

Arrays = Mapping[str, npt.NDArray[Any]]


def save(path: Path, arrays: Arrays, facts: Mapping[str, Json]) -> None:
    """Write ``arrays`` and ``facts`` to ``path``; StoreError where the disk refuses."""
    plain = {name: _plain(values) for name, values in arrays.items()}
    places, size = {}, 0
    for name, values in plain.items():
        places[name] = [values.dtype.str, list(values.shape), size]
        size += -(-values.nbytes // _ALIGN) * _ALIGN
    sha256 = _sha256(facts, plain)
    header = {"facts": dict(facts), "sha256": sha256, "size": size, "arrays": places}
    text = json.dumps(header).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % _ALIGN)
    with replacing(path, "file") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for values in plain.values():
            file.write(values.data.cast("B") if values.size else b"")
            file.write(bytes(-values.nbytes % _ALIGN))


def load(path: Path, *, verify: bool = False) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The arrays of ``path``, mapped and read-only, and its facts with ``sha256``.

    Args:
        path: a file of :func:`save`.
        verify: read everything and compare it with the hash.

    Raises:
        StoreError: there is no such file, it is another one, or it is damaged.
    """
    with refusing(path):
        whole = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else None
    if whole is None or whole[: len(MAGIC)].tobytes() != MAGIC:
        raise StoreError(f"{path} holds no demonstrations: build them again")
    begin = len(MAGIC) + 8
    end = begin + int.from_bytes(whole[len(MAGIC) : begin].tobytes(), "little")
    try:
        header = json.loads(whole[begin:end].tobytes())
        body = whole[end:]
        if len(body) != header["size"]:
            raise ValueError(f"{len(body)} bytes in place of {header['size']}")
        arrays = {name: _array(body, *place) for name, place in header["arrays"].items()}
        if verify and _sha256(header["facts"], arrays) != header["sha256"]:
            raise ValueError("its content is not what was written")
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is damaged ({error}): build it again") from error
    return arrays, {**header["facts"], "sha256": header["sha256"]}


def _plain(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))


def _array(body: npt.NDArray[Any], kind: str, shape: list[int], at: int) -> npt.NDArray[Any]:
    dtype = np.dtype(kind)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    found: npt.NDArray[Any] = body[at : at + size].view(dtype).reshape(shape)
    return found


def _sha256(facts: Mapping[str, Json], arrays: Arrays) -> str:
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in arrays:
        values = arrays[name]
        found.update(f"{name} {values.dtype.str} {values.shape}".encode())
        found.update(values.data.cast("B") if values.size else b"")
    return found.hexdigest()
