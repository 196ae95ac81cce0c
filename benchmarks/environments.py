"""Environments: what a reset, a step and a worker cost, beside the package underneath on its own.

For each environment that runs on this machine: start-up, later resets, steps, the listing of
admissible actions, memory per worker, and how often expert and random play succeed.

Invariants
----------
* Each contender runs in fresh processes, one at a time, in turns (ours, upstream, ours, …): the
  machine may be busy, and a slow minute then hits both. Ratios compare neighbours.
* Both play the same tasks with the same actions, those of our expert or, without one, of random
  play. Where upstream lists the admissible actions in each step and cannot be told not to, its step
  is to be compared with our step and listing together: the ratio ``turn``.
* "ours" begins with an empty cache, as on a new machine; "ours, again" finds what the same tasks
  left there. (Only ALFWorld keeps any.) Ratios are those of "ours".
* Memory is that of the process and all processes below it. "One more" is a second worker: another
  instance, or another process where a package must not be used twice in one.
* An environment that cannot run here is named with the reason, and so is an upstream loop.

ALFWorld and AppWorld find their data as always (``ALFWORLD_DATA``, ``APPWORLD_ROOT``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import command, facts, finished, in_turns, results_file, save, show, spread
from players import OURS, RIVALS, Ours, Player, Rival, first, plan

PACKAGES = ("alfworld", "textworld", "scienceworld", "rapidfuzz", "psutil")


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        tasks: whose episodes are played, in each process.
        steps: actions per episode, at most.
        listings: how often admissible actions are listed, about.
        repeats: processes per contender.
        sample: tasks that expert and random play.
        panel: take the built-in panel for that, where there is one, and all of it.
    """

    tasks: int = 6
    steps: int = 15
    listings: int = 20
    repeats: int = 3
    sample: int = 12
    panel: bool = False


SMALL = Size(tasks=2, steps=4, listings=3, repeats=1, sample=2)
FULL = Size()


# -- what a worker does ----------------------------------------------------------------------------


def prepare(env: str, size: Size) -> dict[str, Any]:
    """The plan, or why there is none: the environment cannot start or has no task."""
    from agentdistill.errors import AgentDistillError

    try:
        return plan(env, size.tasks, size.steps)
    except AgentDistillError as error:
        return {"unavailable": str(error)}


def measure(start: Callable[[], Player], plan: Sequence[Mapping[str, Any]], size: Size) -> Any:
    """Seconds of everything that a player does, and MiB of what it holds."""
    notes: dict[str, Any] = {"resets": [], "steps": [], "listings": []}
    before = _memory()
    actions = sum(len(episode["actions"]) for episode in plan)
    every = max(1, actions // size.listings)  # in all episodes: lists differ in length
    with _timed(notes, "start"):
        player = start()
        player.reset(plan[0])
    notes["first"] = _grown(before)
    for number, episode in enumerate([*plan, *plan[: len(plan) == 1]]):  # one later reset at least
        if number:
            with _timed(notes["resets"]):
                player.reset(episode)
        for action in episode["actions"]:
            with _timed(notes["steps"]):
                ended = player.step(action)
            if player.listing is not None and not len(notes["steps"]) % every and not ended:
                with _timed(notes["listings"]):
                    listed = player.listing()
                if listed is None:  # the environment has none
                    player.listing = None
                    notes["listings"].clear()
            if ended:
                break
    notes["in_step"] = player.in_step
    notes["played"] = _grown(before)
    before = _memory()
    if player.alone:
        notes["another"] = before
    else:
        with closing(start()) as another:
            another.reset(plan[-1])
            notes["another"] = _grown(before)
    player.close()
    return notes


@contextmanager
def _timed(notes: Any, name: str = "") -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if name:
        notes[name] = seconds
    else:
        notes.append(seconds)


def _memory() -> dict[str, float]:
    """MiB of this process and all below it: resident, and what would be free without them."""
    import psutil

    own = psutil.Process()
    found = {"rss": 0.0, "uss": 0.0}
    for process in (own, *own.children(recursive=True)):
        try:
            full = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        for kind in found:
            found[kind] += getattr(full, kind) / (1 << 20)
    return found


def _grown(before: Mapping[str, float]) -> dict[str, float]:
    return {kind: value - before[kind] for kind, value in _memory().items()}


def succeed(env: str, split: str, size: Size) -> dict[str, Any]:
    """How expert and random do: on the first tasks of the built-in panel, or on a sample."""
    from agentdistill import panel
    from agentdistill.envs.make import make

    known = [found for name in panel.names() if (found := panel.load(name)).env == env]
    if known:
        chosen, number = known[0], len(known[0].tasks) if size.panel else size.sample
    else:
        with closing(make(env)) as made:
            number = len(first(made, split, size.sample))
            chosen = panel.make(made, split, number, 0)
    found: dict[str, Any] = {"panel": chosen.name, "split": chosen.split, "tasks": number}
    for policy in panel.POLICIES:
        score = panel.score(chosen, policy, tasks=number, repeat=0)
        found[policy] = score.model_dump(include={*_SCORES})
    return found


_SCORES = ("episodes", "faults", "success", "interval", "score", "turns", "seconds")


def worker(job: Mapping[str, Any]) -> None:
    """Do one part of the work; leave the notes."""
    size, env = Size(**job["size"]), job["env"]
    if "AppWorld" not in env:  # which keeps no cache, and its virtual environment in our folder
        own = job["contender"] == "ours"
        _home(Path(f"{job['result']}.home" if own else f"{job['folder']}/home"))
    notes: Any
    if job["contender"] == "plan":
        notes = prepare(env, size)
    elif job["contender"] == "success":
        notes = succeed(env, job["split"], size)
    elif job["contender"] in OURS:
        notes = measure(lambda: Ours(env, job["split"]), job["plan"], size)
    else:
        player = RIVALS[env].player
        assert player is not None
        notes = measure(player, job["plan"], size)
    Path(job["result"]).write_text(json.dumps(notes))


def _home(place: Path) -> None:
    """Keep caches in ``place``, and find data where they were found before."""
    from agentdistill.envs.sources import DATASETS

    for dataset in DATASETS.values():
        if dataset.variable and dataset.folder.exists():
            os.environ[dataset.variable] = str(dataset.folder.absolute())
    place.mkdir(exist_ok=True)
    os.environ["AGENTDISTILL_HOME"] = str(place)


# -- the comparison --------------------------------------------------------------------------------


def unavailable(env: str) -> str:
    """Why ``env`` cannot run here, "" where it can."""
    from agentdistill.envs.make import make
    from agentdistill.errors import AgentDistillError

    try:
        with closing(make(env)) as made:
            return "; ".join(made.availability().needs)
    except AgentDistillError as error:
        return str(error)


def compare(env: str, size: Size, folder: Path) -> dict[str, Any]:
    """Everything about one environment."""
    if reason := unavailable(env):
        return {"env": env, "unavailable": reason}
    job: dict[str, Any] = {"size": dataclasses.asdict(size), "env": env, "folder": str(folder)}
    (told,) = in_turns(__file__, job, ["plan"], folder, env)["plan"]
    if "unavailable" in told:
        return {"env": env, **told}
    job.update(split=told["split"], plan=told["plan"])
    rival = RIVALS.get(env, Rival("", absent="nobody said what to compare with"))
    absent = rival.absent or _absent(env, told["plan"])
    contenders = [*OURS] if absent else [*OURS, rival.name]
    runs = in_turns(__file__, job, contenders * size.repeats, folder, env)
    (success,) = in_turns(__file__, job, ["success"], folder, env)["success"]
    found = {
        "env": env,
        "split": told["split"],
        "slots": told["slots"],
        "tasks": len(told["plan"]),
        "cost": {name: cost(notes) for name, notes in runs.items()},
        "success": {k: v for k, v in success.items() if k not in ("result", "weights")},
    }
    if absent:
        return {**found, "upstream": absent}
    return {**found, "upstream": rival.name, "ratio": ratio(runs["ours"], runs[rival.name])}


def _absent(env: str, plan: Sequence[Mapping[str, Any]]) -> str:
    """Why upstream cannot play this plan here."""
    if "ALFWorld" in env and not all(Path(task["file"]).is_file() for task in plan):
        return "its games are generated here, and upstream plays files"
    return ""


def cost(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and MiB over the processes of one contender."""
    found: dict[str, Any] = {"start": spread([run["start"] for run in runs])}
    for name in ("resets", "steps", "listings"):
        values = [value for run in runs for value in run[name]]
        found[name] = quantiles(values) if values else None
    for name in ("first", "played", "another"):
        found[name] = {kind: median(run[name][kind] for run in runs) for kind in ("rss", "uss")}
    return {**found, "listing_in_step": runs[0]["in_step"]}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile (the least value that nine tenths do not exceed), and how many."""
    place = math.ceil(0.9 * len(values)) - 1
    return {"median": median(values), "p90": sorted(values)[place], "n": len(values)}


def ratio(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Upstream over ours, process by process; above 1 where ours is quicker or smaller."""
    pairs = list(zip(ours, theirs, strict=True))
    found = {
        "start": spread([b["start"] / a["start"] for a, b in pairs]),
        "another_rss": spread([b["another"]["rss"] / a["another"]["rss"] for a, b in pairs]),
    }
    for name, seconds in (("resets", _resets), ("steps", _steps), ("turn", _turn)):
        if all(seconds(run) for pair in pairs for run in pair):
            found[name] = spread([seconds(b) / seconds(a) for a, b in pairs])
    return found


def _resets(run: Mapping[str, Any]) -> float:
    return median(run["resets"]) if run["resets"] else 0.0


def _steps(run: Mapping[str, Any]) -> float:
    return median(run["steps"])


def _turn(run: Mapping[str, Any]) -> float:
    """A step and the listing after it."""
    return _steps(run) + (median(run["listings"]) if run["listings"] else 0.0)


# -- output ----------------------------------------------------------------------------------------


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """The tables: cost, ratios, success, and what could not be measured."""
    header = (
        "",
        "start s",
        "reset ms",
        "p90",
        "step ms",
        "p90",
        "list ms",
        "p90",
        "MiB",
        "one more",
    )
    rows = [
        [f"{_short(each['env'])}, {name}", *_cells(spent)]
        for each in found
        for name, spent in each.get("cost", {}).items()
    ]
    names = ("start", "resets", "steps", "turn", "another_rss")
    apart = [
        [_short(each["env"]), *(_times(each["ratio"].get(name)) for name in names)]
        for each in found
        if "ratio" in each
    ]
    played = [_success(each) for each in found if "success" in each]
    parts = [
        show(header, rows),
        show(("upstream / ours", "start", "reset", "step", "step and list", "memory"), apart),
        show(("success", "tasks", "expert", "random", "turns: expert", "random"), played),
    ]
    lines = [
        f"{_short(each['env'])}: {each['unavailable']}" for each in found if "unavailable" in each
    ] + [
        f"{_short(each['env'])}: compared with nothing: {each['upstream']}"
        for each in found
        if "upstream" in each and "ratio" not in each
    ]
    return "\n\n".join([*parts, "\n".join(lines)])


def _short(env: str) -> str:
    return env.partition("/")[2].rpartition("-")[0] or env


def _cells(spent: Mapping[str, Any]) -> list[str]:
    cells = [f"{spent['start']['median']:.2f}"]
    for name in ("resets", "steps", "listings"):
        values = spent[name]
        if values is None:
            words = "in step" if name == "listings" and spent["listing_in_step"] else "-"
            cells += [words, "-"]
        else:
            cells += [f"{1000 * values[kind]:.3g}" for kind in ("median", "p90")]
    return [*cells, *(f"{spent[name]['rss']:.0f}" for name in ("played", "another"))]


def _times(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f}"


def _success(each: Mapping[str, Any]) -> list[str]:
    played = each["success"]
    where = played["panel"] or played["split"]
    rates = [f"{played[policy]['success']:.0%}" for policy in ("expert", "random")]
    turns = [f"{played[policy]['turns']:.1f}" for policy in ("expert", "random")]
    return [f"{_short(each['env'])} ({where})", str(played["tasks"]), *rates, *turns]


def main() -> None:
    """Read the command line, run, print, write."""
    parser = command("environments", __doc__, "shows that it works")
    parser.add_argument("--panels", action="store_true", help="play whole panels (long)")
    parser.add_argument("--env", action="append", help="only this environment; repeatable")
    given = parser.parse_args()
    if given.job:
        worker(json.loads(given.job))
        return
    from agentdistill.envs import ENTRY_POINTS

    size = dataclasses.replace(SMALL if given.small else FULL, panel=given.panels)
    known, found = facts(*PACKAGES), []
    for env in given.env or ENTRY_POINTS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(env, size, Path(folder)))
    print(f"\n{report(found)}")
    file = results_file(given)
    if file is not None:
        settings = dataclasses.asdict(size)
        save(file, {"machine": finished(known), "settings": settings, "environments": found})


if __name__ == "__main__":
    main()
