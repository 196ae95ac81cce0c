"""The charts of a report and the numbers beside them, from what the stages logged.

Invariants: a rate that describes recorded episodes or a teacher's is not drawn as the student's;
where a curriculum's window ended more than a tenth of an iteration's episodes before they had an
outcome, the others are the easy ones, and their success is not drawn. A stage has one colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentdistill.report.bins import Track, Tracks
from agentdistill.report.charts import Chart, heat_maps, line_chart
from agentdistill.report.read import RunData, StageData
from agentdistill.report.sample import Facts
from agentdistill.report.words import duration

STEPS, ITERATIONS = "environment steps", "iteration"
DIVERGENCE = "divergence_by_turn"
DEPTHS = (
    ("Curriculum: turns allowed", "allowed", "Turns the student had at most, per episode."),
    ("Curriculum: turns replayed", "replayed", "Turns of a demonstration before the hand-over."),
)
LEVELS = {
    "token": "Token weights",
    "step": "Step weights",
    "trajectory": "Trajectory weights",
    "signal": "Weights of the signal",
}
SPREAD = {"mean": "mean", "min": "least", "max": "most", "later_mean": "mean of later steps"}
"""What a stage logs of the weights of each of :data:`LEVELS`, in words."""
COUNTS = {
    "masked_contexts": "streams without the scorer's context",
    "without_note": "episodes without a note",
    "used_skills": "skills used",
    "weight/step/zero_first": "episodes whose first step had no divergence",
}
"""What is counted per iteration."""
PHASES = ("generate", "score", "update", "other")

Rows = Mapping[str, Sequence[StageData]]
"""The same stage of every run, by name, in the order of the recipe."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Where the time of one stage went: seconds of each of :data:`PHASES`, mean over seeds."""

    stage: str
    seconds: tuple[float, ...]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.seconds)

    def cells(self) -> list[str]:
        """As text: stage, phases, total."""
        return [self.stage, *(duration(s or None) for s in self.seconds), duration(self.total)]


def stages(runs: Sequence[RunData]) -> Rows:
    """Stages by name."""
    return {
        stage.name: [run.stages[place] for run in runs]
        for place, stage in enumerate(runs[0].stages)
    }


def _logged(rows: Rows) -> list[str]:
    """Everything that some stage logged, by name."""
    lines = (line for row in rows.values() for stage in row for line in stage.metrics)
    return list(dict.fromkeys(key for line in lines for key in line))


def curves(rows: Rows) -> list[Chart]:
    """Success, optimal actions, divergence and, where nobody acts, the loss."""
    acting = {name: row for name, row in rows.items() if _student_acts(row[0])}
    window = any(_curriculum(stage) for (stage, *_) in acting.values())
    note = "Episodes of the student while it trains."
    if window:
        note += (
            " No rate where a curriculum's window ended more than a tenth of them early; a "
            "backward curriculum begins near the goal, where success is easy."
        )
    tones = _tones(rows)
    found = [
        _chart("Success", "success", acting, "rate", note, tones),
        _chart("Optimal actions", "optimal", acting, "rate", "Of the same episodes.", tones),
        _chart(
            "Divergence from the teacher",
            "divergence",
            rows,
            "nats",
            "Nats per token: the method's own divergence where it compares whole distributions, "
            "else the sampled estimate of the KL from student to teacher, which can be negative.",
            tones,
        ),
    ]
    for key, words in _tuning(rows).items():
        found.append(_chart(words, key, rows, "rate", "On the tune split.", tones))
    silent = {name: row for name, row in rows.items() if name not in acting}
    found.append(_losses(silent, tones))
    return [chart for chart in found if chart]


def _tuning(rows: Rows) -> dict[str, str]:
    """Keys of the evaluations during training, with titles."""
    chosen = [k for k in _logged(rows) if k.startswith("tune/") and not k.endswith("invalid")]
    return {key: f"{key.split('/')[2].capitalize()}, {key.split('/')[1]}" for key in chosen}


def _tones(rows: Rows) -> dict[str, int]:
    """The colour of each stage that trains; the first ones for those in which the student acts."""
    trained = [name for name, (stage, *_) in rows.items() if stage.axes is not None]
    trained.sort(key=lambda name: not _student_acts(rows[name][0]))
    return {name: place for place, name in enumerate(trained)}


def _chart(
    title: str, key: str, rows: Rows, unit: str, note: str, tones: Mapping[str, int]
) -> Chart | None:
    """``key`` of every stage that logged it, against environment steps."""
    kept = {name: row for name, row in rows.items() if any(_track(s, key) for s in row)}
    axis = _axis(kept)
    tracks = {name: [_track(stage, key, axis) for stage in row] for name, row in kept.items()}
    return line_chart(title, tracks, x_label=axis, unit=unit, note=note, tones=tones)


def _losses(rows: Rows, tones: Mapping[str, int]) -> Chart | None:
    tracks: dict[str, Tracks] = {}
    kinds = set()
    for name, row in rows.items():
        logged = (key for stage in row for line in stage.metrics[:1] for key in line)
        key = next((key for key in logged if key.startswith("loss/")), None)
        if key:
            tracks[name] = [_track(stage, key) for stage in row]
            kinds.add(key.removeprefix("loss/").replace("_", " "))
    note = f"Of stages that learn from recorded or teacher's episodes: {', '.join(sorted(kinds))}."
    return line_chart("Loss", tracks, x_label=ITERATIONS, unit="", note=note, tones=tones)


def _axis(rows: Rows) -> str:
    """Environment steps where every stage takes some, else iterations."""
    taken = [
        any(line.get("total/env_steps") for s in row for line in s.metrics) for row in rows.values()
    ]
    return STEPS if taken and all(taken) else ITERATIONS


def _place(line: Mapping[str, Any], axis: str) -> float:
    return float(line["total/env_steps"] if axis == STEPS else line["iteration"] + 1)


def _track(stage: StageData, key: str, axis: str = ITERATIONS) -> Track:
    """(x, y) of one stage of one run."""
    return [
        (_place(line, axis), float(line[key]))
        for line in stage.metrics
        if _known(line.get(key)) and not (key == "success" and _censored(line))
    ]


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _censored(line: Mapping[str, Any]) -> bool:
    return bool(line.get("censored", 0) > line.get("episodes", 0) / 10)


def _student_acts(stage: StageData) -> bool:
    return stage.axes is not None and stage.axes.actor == "student"


def _curriculum(stage: StageData) -> bool:
    return stage.axes is not None and stage.axes.start.kind != "full"


def by_turn(rows: Rows) -> dict[str, list[Chart]]:
    """Heat maps of everything that is logged by turn, by the name of what it is.

    ``divergence_by_turn`` is TCOD's diagnostic; a method that weights turns logs its weights under
    another name that ends in ``_by_turn``.
    """
    found = {}
    for key in sorted(key for key in _logged(rows) if key.endswith("_by_turn")):
        axes = {name: _axis({name: row}) for name, row in rows.items()}
        values = {
            name: [
                [(_place(line, axes[name]), line[key]) for line in s.metrics if line.get(key)]
                for s in row
            ]
            for name, row in rows.items()
        }
        what = "nats" if key == DIVERGENCE else ""
        titles = {name: f"{name} ({row[0].what})" for name, row in rows.items()}
        found[key] = heat_maps(titles, values, x_labels=axes, what=what)
    return {key: charts for key, charts in found.items() if charts}


def weights(rows: Rows) -> list[Chart]:
    """How each method weighed what it learnt from, and what else moved while it trained."""
    found = [_weighed(name, row, level) for name, row in rows.items() for level in _levels(row)]
    logged, tones = _logged(rows), _tones(rows)
    for key in logged:
        what, _, rest = key.partition("/")
        level, _, last = rest.partition("/")
        if what == "weight" and last == "at_cap":
            note = "Share of the steps after the first whose weight is the largest allowed."
            title = f"{LEVELS.get(level, level)} at the cap"
            found.append(_chart(title, key, rows, "rate", note, tones))
        elif what == "schedule":
            found.append(_chart(f"Schedule of {rest}", key, rows, "", "", tones))
    if any(line.get("zero_signal") for row in rows.values() for s in row for line in s.metrics):
        note = "Share of tokens for which teacher and student say the same: they teach nothing."
        found.append(_chart("Tokens without signal", "zero_signal", rows, "rate", note, tones))
    note = "Sum over its tokens, which the reward pays for."
    found.append(_chart("Divergence of an episode", "kl_per_episode", rows, "nats", note, tones))
    return [chart for chart in found if chart]


def _levels(row: Sequence[StageData]) -> list[str]:
    """The levels on which a stage weighed; their product only where it says something new."""
    lines = [line for stage in row for line in stage.metrics]
    known = [level for level in LEVELS if any(f"weight/{level}/mean" in line for line in lines)]
    if len(known) == 2 and known[1] == "signal":
        one, both = (f"weight/{level}/mean" for level in known)
        if all(line.get(one) == line.get(both) for line in lines):
            return known[:1]
    return known


def _weighed(name: str, row: Sequence[StageData], level: str) -> Chart | None:
    axis = _axis({name: row})
    tracks = {
        words: [_track(stage, f"weight/{level}/{key}", axis) for stage in row]
        for key, words in SPREAD.items()
    }
    note = "Over the tokens that carry the signal; those of later steps over the steps."
    title = f"{LEVELS[level]}, {name} ({row[0].what})"
    return line_chart(title, tracks, x_label=axis, unit="", note=note)


def counted(rows: Rows) -> list[tuple[str, str]]:
    """What stages counted besides episodes, over all iterations and seeds: stage, and in words."""
    found = []
    for name, row in rows.items():
        lines = [line for stage in row for line in stage.metrics]
        sums = {words: sum(line.get(key, 0) for line in lines) for key, words in COUNTS.items()}
        last = (stage.metrics[-1] for stage in row if stage.metrics)
        sums["skills in the end"] = sum(line.get("skills", 0) for line in last)
        said = [f"{words}: {number:,.0f}" for words, number in sums.items() if number]
        if said:
            found.append((name, ", ".join(said)))
    return found


def depth(rows: Rows, facts: Mapping[str, Sequence[Facts]]) -> list[Chart]:
    """How many turns curricula replayed, and how many they then allowed."""
    chosen = {name: row for name, row in rows.items() if _curriculum(row[0])}
    axis, found = _axis(chosen), []
    for title, field, note in DEPTHS:
        tracks: dict[str, Tracks] = {}
        for name, row in chosen.items():
            depths = [_depths(*pair, field, axis) for pair in zip(row, facts[name], strict=True)]
            if any(y for track in depths for _, y in track):
                tracks[name] = depths
        tones = _tones(rows)
        found.append(line_chart(title, tracks, x_label=axis, unit="turns", note=note, tones=tones))
    return [chart for chart in found if chart]


def _depths(stage: StageData, facts: Facts, field: str, axis: str) -> Track:
    places = {line["iteration"]: _place(line, axis) for line in stage.metrics}
    found = ((places.get(n), getattr(depth, field)) for n, depth in facts.depth.items())
    return [(x, float(y)) for x, y in found if x is not None and y is not None]


def spent(rows: Rows) -> list[Spent]:
    """Where time went, stage by stage; what no phase accounts for is ``other``.

    A collect stage only generates.
    """
    found = [Spent(name, _seconds(row)) for name, row in rows.items()]
    return [item for item in found if item.total]


def _seconds(row: Sequence[StageData]) -> tuple[float, ...]:
    totals = [0.0] * len(PHASES)
    started = [stage for stage in row if stage.metrics]
    for stage in started:
        known = [
            sum(line.get(f"seconds/{phase}", 0.0) for line in stage.metrics)
            for phase in PHASES[:-1]
        ]
        # A stage that was interrupted knows only how long its last part took.
        rest = max(0.0, (stage.done or {}).get("seconds", 0.0) - sum(known))
        mine = [*known, rest] if stage.axes else [rest, 0.0, 0.0, 0.0]
        totals = [a + b for a, b in zip(totals, mine, strict=True)]
    return tuple(total / max(len(started), 1) for total in totals)
