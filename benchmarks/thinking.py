"""Sokoban in which an answer is three lines: two observations about the level, then the move.

Invariants: the first line says where the box lies as seen from the player, the second where its
target lies as seen from the box; the expert writes both truthfully. The environment reads the last
of exactly three lines and judges nothing else: what is thought is free.
"""

from __future__ import annotations

from agentdistill.envs.base import Moved
from agentdistill.envs.sokoban.env import SokobanEnv


class ThinkingSokoban(SokobanEnv):
    """See the module docstring; options are Sokoban's, with one box."""

    def _advance(self, action: str) -> Moved:
        lines = action.split("\n")
        return super()._advance(lines[2] if len(lines) == 3 else "")

    def expert_action(self) -> str | None:
        """Two true thoughts, and the move."""
        move = super().expert_action()
        return None if move is None else self._thoughts() + move

    def admissible(self) -> list[str]:
        """The moves that change the state, after the thoughts of the expert."""
        return [self._thoughts() + move for move in super().admissible()]

    def _thoughts(self) -> str:
        places = {
            symbol: (y, x)
            for y, row in enumerate(self._observation.split("\n"))
            for x, symbol in enumerate(row)
        }
        player = places.get("P") or places["S"]
        box = places.get("X") or places["√"]
        target = places.get("O") or (player if "S" in places else box)
        return f"box {_way(player, box)}\ntarget {_way(box, target)}\n"


def _way(start: tuple[int, int], end: tuple[int, int]) -> str:
    """The direction from ``start`` to ``end``, such as ``up left``."""
    down, right = end[0] - start[0], end[1] - start[1]
    words = ["down" if down > 0 else "up"] * bool(down)
    words += ["right" if right > 0 else "left"] * bool(right)
    return " ".join(words) or "here"
