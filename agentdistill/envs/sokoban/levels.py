"""Sokoban levels: what a level is, how it is written, and which split it belongs to.

Invariants
----------
* A set of cells is one integer: bit ``row * width + column``. Every cell of the outermost ring is a
  wall, so that stepping in any direction from a floor cell stays on the grid.
* The text of a level is its identity. :meth:`Level.text` and :func:`parse` are inverses, and
  :func:`split_of` looks at nothing but the text, so that a level is in the same split wherever it
  comes from: this generator, another seed, a file.
* Text symbols are RAGEN's; files use the symbols of Boxoban and of most Sokoban collections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from agentdistill.errors import ConfigError

WALL, FLOOR, TARGET, BOX_ON_TARGET, BOX, PLAYER, PLAYER_ON_TARGET = "#_O√XPS"
"""RAGEN's symbols."""

BOXOBAN = str.maketrans(" .*$@+", "_O√XPS")
"""From the symbols of Boxoban files to RAGEN's; ``#`` is a wall in both."""

REPORT_SHARE = 0.06
"""Part of all levels that only final results are measured on."""

TUNE_SHARE = 0.06
"""Part of all levels for choosing settings; the rest is for training."""

SPLITS = ("train", "tune", "report")


@dataclass(frozen=True, slots=True)
class Board:
    """What does not move. ``walls`` and ``targets`` are sets of cells (module docstring)."""

    height: int
    width: int
    walls: int
    targets: int

    @property
    def cells(self) -> int:
        """Number of cells, walls included."""
        return self.height * self.width

    @property
    def floor(self) -> int:
        """The cells that are no walls."""
        return (1 << self.cells) - 1 ^ self.walls


class State(NamedTuple):
    """What moves: the player's cell and the set of the boxes' cells."""

    player: int
    boxes: int


@dataclass(frozen=True, slots=True)
class Level:
    """A board and the state that an episode starts in."""

    board: Board
    start: State

    @property
    def text(self) -> str:
        """The level in RAGEN's symbols, rows joined by newlines, no newline at the end."""
        return draw(self.board, self.start)


def bits(cells: int) -> Iterator[int]:
    """The members of a set of cells, in ascending order."""
    while cells:
        lowest = cells & -cells
        yield lowest.bit_length() - 1
        cells ^= lowest


@lru_cache(maxsize=1024)
def _canvas(board: Board) -> tuple[str, ...]:
    """The symbols of an empty board; each row but the last ends with its newline."""
    symbols = []
    for cell in range(board.cells):
        row_ends = cell % board.width == board.width - 1 and cell != board.cells - 1
        kind = board.walls >> cell & 1, board.targets >> cell & 1
        symbol = WALL if kind[0] else TARGET if kind[1] else FLOOR
        symbols.append(symbol + "\n" if row_ends else symbol)
    return tuple(symbols)


def draw(board: Board, state: State) -> str:
    """``state`` on ``board`` as text, in RAGEN's symbols."""
    canvas = list(_canvas(board))
    targets = board.targets
    for cell in bits(state.boxes):
        canvas[cell] = BOX_ON_TARGET if targets >> cell & 1 else BOX
    player = state.player
    canvas[player] = PLAYER_ON_TARGET if targets >> player & 1 else PLAYER
    return "".join(canvas)


def _set(text: str, symbols: str) -> int:
    return sum(1 << cell for cell, symbol in enumerate(text) if symbol in symbols)


def enclosure(height: int, width: int) -> int:
    """The outermost cells of a grid."""
    row = (1 << width) - 1
    sides = sum((1 | 1 << width - 1) << width * y for y in range(height))
    return row | row << width * (height - 1) | sides


def _fault(rows: list[str]) -> str | None:
    """What makes ``rows`` no level, or None."""
    text = "".join(rows)
    strange = sorted(set(text) - set("#_O√XPS"))
    if len({len(row) for row in rows}) != 1 or len(rows) < 3 or len(rows[0]) < 3:
        return "needs at least 3 rows of at least 3 symbols, all rows of the same length"
    if strange:
        return f"has unknown symbols {strange}; known: # _ O √ X P S"
    if enclosure(len(rows), len(rows[0])) & ~_set(text, WALL):
        return "must be enclosed by walls (#)"
    if _set(text, "PS").bit_count() != 1:
        return "needs exactly one player (P, or S on a target)"
    boxes, targets = _set(text, "√X").bit_count(), _set(text, "O√S").bit_count()
    if boxes != targets or not boxes:
        return f"needs as many boxes as targets, and at least one; has {boxes} and {targets}"
    return None


@lru_cache(maxsize=1024)
def parse(text: str) -> Level:
    """The level that ``text`` shows, in RAGEN's symbols; ConfigError says what is wrong with it."""
    rows = text.split("\n")
    fault = _fault(rows)
    if fault:
        raise ConfigError(f"a level {fault}", key="level", value=text)
    flat = "".join(rows)
    board = Board(len(rows), len(rows[0]), _set(flat, WALL), _set(flat, "O√S"))
    player = _set(flat, "PS").bit_length() - 1
    return Level(board, State(player, _set(flat, "√X")))


def split_of(level_text: str) -> str:
    """The split of a level: ``report`` for 6 % of all texts, ``tune`` for 6 %, else ``train``.

    The first 8 bytes (big endian) of the text's SHA-256 as a fraction u of 2**64 decide:
    u < 0.06 is report, u < 0.12 is tune.
    """
    fraction = int.from_bytes(hashlib.sha256(level_text.encode()).digest()[:8], "big") / 2**64
    if fraction < REPORT_SHARE:
        return "report"
    return "tune" if fraction < REPORT_SHARE + TUNE_SHARE else "train"


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that begin with a wall, whatever separates them (titles, blank lines)."""
    block: list[str] = []
    for line in lines:
        if line.lstrip(" ").startswith(WALL):
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _enclose(rows: list[str]) -> str:
    """Ragged rows as a rectangle in RAGEN's symbols: what is outside becomes wall."""
    width = max(len(row.rstrip()) for row in rows)
    filled = []
    for row in rows:
        inner = row.strip()
        left = len(row) - len(row.lstrip(" "))
        filled.append((WALL * left + inner).ljust(width, WALL).translate(BOXOBAN))
    return "\n".join(filled)


@lru_cache(maxsize=8)
def read_boxoban(path: Path) -> tuple[str, ...]:
    """All levels of a file in Boxoban's format, as texts in RAGEN's symbols.

    The format: per level a line ``; number`` and rows of ``#`` wall, space floor, ``.`` target,
    ``$`` box, ``*`` box on target, ``@`` player, ``+`` player on target (Guez et al., "An
    investigation of model-free planning", 2019). Ragged rows are filled with walls.
    Raises ConfigError for a file without levels or with a broken one.
    """
    texts = [_enclose(rows) for rows in _blocks(path.read_text(encoding="utf-8").splitlines())]
    if not texts:
        raise ConfigError("no level in this file", key="levels", value=str(path))
    for number, text in enumerate(texts):
        fault = _fault(text.split("\n"))
        if fault:
            raise ConfigError(f"level {number} {fault}", key="levels", value=str(path))
    return tuple(texts)


def boxoban_files(path: str | Path) -> tuple[Path, ...]:
    """``path`` itself, or all ``*.txt`` files below it, sorted; ConfigError if there are none."""
    place = Path(path).expanduser()
    files = (place,) if place.is_file() else tuple(sorted(place.rglob("*.txt")))
    if not files:
        source = "levels are at github.com/google-deepmind/boxoban-levels"
        remedy = f"no such file, or a folder without *.txt files; {source}"
        raise ConfigError(remedy, key="levels", value=str(path))
    return files
