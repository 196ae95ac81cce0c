"""The whole loop on a small machine, as a configuration: see ``recipes/quickstart.yaml``."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from agentdistill.config import RunConfig, load, read
from agentdistill.methods.index import get

STUDENT = "distilled"
"""The stage that ``--method`` sets."""


def recipe() -> dict[str, Any]:
    """The quickstart's configuration as it lies in the package."""
    with as_file(files("agentdistill").joinpath("recipes/quickstart.yaml")) as path:
        return read(path)


def configure(
    method: str | None = None,
    *,
    seed: int | None = None,
    name: str | None = None,
    output: str | None = None,
    overrides: tuple[str, ...] = (),
) -> RunConfig:
    """The quickstart with another method, seed or folder.

    A backward curriculum gets demonstrations to replay (the teacher's own episodes), a method
    without a teacher gets none, one that compares samples of a task gets groups of eight.
    """
    values = recipe()
    stages = values["stages"]
    stage = next(stage for stage in stages if stage["name"] == STUDENT)
    if method is not None:
        axes = get(method).axes
        stage["method"] = method
        if axes.actor == "data":
            stage.pop("teacher")
            stage.update(data="demos", iterations=200)
        elif not axes.needs_teacher:
            stage.pop("teacher")
            stage.update(tasks=8, samples=8, lr=3e-4)
        if axes.start.kind == "b2f":
            stage["guide"] = "episodes"
            guide = {"name": "episodes", "do": "collect", "policy": "taught", "episodes": 1000}
            stages.insert(stages.index(stage), guide)
    parts = [values["name"], method, None if seed is None else f"seed{seed}"]
    given = {"seed": seed, "output": output, "name": name or "-".join(filter(None, parts))}
    values.update({key: value for key, value in given.items() if value is not None})
    return load(values, overrides)
