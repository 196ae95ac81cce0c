"""Demonstrations: windows of successful episodes, found by goal, plan and observation.

    demos = Demos.build(Store("runs/teacher", readonly=True).trajectories(), "demos")
    found = demos.search(goal=goal, observation=observation, task=task)
    prompt += block(found)

``build`` picks what is kept, ``files`` lays arrays into one file, ``index`` ranks texts, ``store``
is the collection, ``window`` what is shown of it.
"""

from agentdistill.demos.build import KEYS, Skipped
from agentdistill.demos.index import Embedder, SentenceEmbedder
from agentdistill.demos.stage import named, of_stage
from agentdistill.demos.store import Demos
from agentdistill.demos.window import Match, Step, block

__all__ = [
    "KEYS", "Demos", "Embedder", "Match", "SentenceEmbedder", "Skipped", "Step", "block",
    "named",
    "of_stage",
]  # fmt: skip
