"""Methods: one file per paper, each a named point in one space of independent choices."""

from agentdistill.methods.index import METHODS, get
from agentdistill.methods.space import Axes, Method

__all__ = ["METHODS", "Axes", "Method", "get"]
