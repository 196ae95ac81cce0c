"""What a student and a teacher say about the same episodes: divergence, steps, entropy, agreement.

    from agentdistill.diagnostics import of_run
    found = of_run("runs/quickstart", "distilled", teacher="taught")

:func:`diagnose` is a pure function of a scored table, :func:`score` adds the columns that it reads,
and :func:`of_run` does both for a stage on disk. Nothing in a run folder is changed.
"""

from agentdistill.diagnostics.episodes import of_run, score
from agentdistill.diagnostics.measures import Diagnosis, Means, Part, Steps, StepWeights, diagnose

__all__ = ["Diagnosis", "Means", "Part", "StepWeights", "Steps", "diagnose", "of_run", "score"]
