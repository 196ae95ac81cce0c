"""Sokoban as a text environment, with generator, exact solver and gym-sokoban's rewards."""

from agentdistill.envs.sokoban.env import SokobanEnv
from agentdistill.envs.sokoban.generator import Rooms, generate
from agentdistill.envs.sokoban.levels import Board, Level, State, parse, split_of
from agentdistill.envs.sokoban.solver import search, solve, table

__all__ = [
    "Board",
    "Level",
    "Rooms",
    "SokobanEnv",
    "State",
    "generate",
    "parse",
    "search",
    "solve",
    "split_of",
    "table",
]
