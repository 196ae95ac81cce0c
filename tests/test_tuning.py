"""Settings of a cascade side by side: which are played, what is between the curves, the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agentdistill import api, tuning
from agentdistill.config import CascadeConfig, load
from agentdistill.evaluation import Result
from agentdistill.metrics import Interval
from agentdistill.report.charts import curve_chart
from agentdistill.tuning import Point, between, curves, effective, settings, sweep
from tests.cli_calls import call
from tests.test_cascade_run import MIX, config

BASE = CascadeConfig.model_validate(MIX)


def said(**changes: Any) -> CascadeConfig:
    return BASE.model_copy(update=changes)


def test_settings_that_are_the_same_policy_are_one() -> None:
    alone = effective(said(samples=1))
    assert alone.rule == "never"
    assert effective(said(samples=1, rule="majority")) == alone
    assert effective(said(samples=1, rule="threshold", threshold=0.4)) == alone
    assert effective(said(samples=1, execute=True, equivalence="code")) == alone
    teacher = effective(said(rule="always", k=6))
    assert teacher == effective(said(rule="always", k=0, samples=1))
    assert effective(said(rule="random", threshold=1.0, samples=1)) == teacher
    assert effective(said(rule="always", k=6, teacher_demos=True)).k == 6
    assert effective(said(rule="confidence", threshold=-1.0)).samples == 1
    for other in (said(), said(rule="majority"), said(samples=2), said(rule="never")):
        assert effective(other) == other


def test_a_sweep_plays_each_policy_once() -> None:
    found = settings(BASE, (1, 2, 3), (0, 2), [("unanimous", None), ("majority", None)], (0.5,))
    what = [(s.rule, s.samples, s.k) for s in found]
    assert len(set(what)) == len(what)
    for k in (0, 2):
        assert {w for w in what if w[2] == k and w[0] != "always"} == {
            ("never", 1, k), ("unanimous", 2, k), ("unanimous", 3, k), ("majority", 2, k),
            ("majority", 3, k), ("random", 1, k),
        }  # fmt: skip
    assert [w for w in what if w[0] == "always"] == [("always", 1, 0)]


# -- curves ---------------------------------------------------------------------------------------


def point(rule: str, share: float, success: float, k: int = 2, n: int = 3) -> Point:
    threshold = share if rule == "random" else None
    result = Result(
        "mix", "sampled", 10, success, Interval(0, 1), None, 1.0, 0.0, 0.0, 0, "", (), (),
        asked=share,
    )  # fmt: skip
    return Point(said(rule=rule, threshold=threshold, samples=n, k=k), result)


def test_the_area_is_that_above_random_escalation() -> None:
    points = [
        point("never", 0.0, 0.2, n=1),
        point("unanimous", 0.2, 0.6),
        point("random", 0.5, 0.5, n=1),
        point("always", 1.0, 0.8, k=0, n=1),
    ]
    chance, own = curves(points)
    assert chance.points == ((0.0, 0.2), (0.5, 0.5), (1.0, 0.8)) and chance.area is None
    assert own.points == ((0.0, 0.2), (0.2, 0.6))
    # Random escalation has 0.32 at 0.2: a triangle of that width and height.
    assert own.area == pytest.approx(0.2 * (0.6 - 0.32) / 2)
    assert own.gain == pytest.approx((0.6 - 0.32) / 2)
    assert [c.label for c in curves(points)] == ["random, k=2", "unanimous, k=2"]


def test_confidence_is_one_curve_along_its_thresholds() -> None:
    points = [point("never", 0.0, 0.4, n=1), point("always", 1.0, 0.8, n=1)]
    for least, share, success in ((-0.1, 0.5, 0.7), (-1.0, 0.2, 0.5)):
        sure = said(rule="confidence", threshold=least, samples=1, k=2)
        points.append(replace(point("unanimous", share, success), said=sure))
    _, own = curves(points)
    assert own.label == "confidence, k=2" and own.points == ((0.0, 0.4), (0.2, 0.5), (0.5, 0.7))


def test_equal_shares_are_one_place() -> None:
    points = [point("never", 0.0, 0.2, n=1), point("unanimous", 0.0, 0.4)]
    _, own = curves(points)
    assert own.points == ((0.0, pytest.approx(0.3)),) and own.area == 0 and own.gain is None


lines = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=6)
broken = lines.map(lambda some: tuple(sorted({x / 8: y / 8 for x, y in some}.items())))


@given(broken, broken)
def test_areas_are_sums_of_small_ones(one: Any, other: Any) -> None:
    area = between(one, other)
    assert area == pytest.approx(-between(other, one)) and between(one, one) == 0
    low, high = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
    steps = 4000
    places = [low + (high - low) * (k + 0.5) / steps for k in range(steps)] if high > low else []
    gaps = [tuning._at(one, x) - tuning._at(other, x) for x in places]
    assert area == pytest.approx(sum(gaps) * (high - low) / steps, abs=2e-3)


def test_a_chart_goes_through_its_points() -> None:
    chart = curve_chart("t", {"a": [(0.0, 0.5), (0.4, 1.0)], "b": []}, x_label="share")
    assert chart is not None and [line.path for line in chart.lines] == ["M0 50L100 0"]
    assert chart.table == (("0.00", "50.0%"), ("0.40", "100.0%"))
    assert curve_chart("t", {"a": []}, x_label="x") is None
    dot = curve_chart("t", {"a": [(0.0, 0.5)]}, x_label="x", x_unit="rate")
    assert dot is not None and dot.lines[0].path == "M0 50H1"


# -- the command ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page asks for, and its charts."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = 0
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.paths += tag == "path"
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    values = config(folder, evaluate={"tasks": 3})
    values["stages"][1]["iterations"] = 4
    api.train(values, "taught")
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder


ARGS = ["--policy", "mix", "--samples", "1,2", "--k", "0,1", "--chance", "0.5"]


def test_a_sweep_from_the_command_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = call("tune", "cascade", str(trained / "c.yaml"), *ARGS, "--json")
    found = json.loads(told.stdout)
    assert told.exit_code == 0 and "7/7" in told.stderr
    tried = [point["setting"] for point in found["points"]]
    what = [(each["rule"], each["samples"], each["k"]) for each in tried]
    by = dict(zip(what, found["points"], strict=True))
    assert set(by) == {
        ("never", 1, 0), ("unanimous", 2, 0), ("random", 1, 0), ("always", 1, 0),
        ("never", 1, 1), ("unanimous", 2, 1), ("random", 1, 1),
    }  # fmt: skip
    assert by["never", 1, 0]["share"] == 0 and by["always", 1, 0]["share"] == 1
    assert 0 < by["random", 1, 0]["share"] < 1
    teacher, cheap = by["always", 1, 0], by["never", 1, 1]
    wanted = found["demonstrations"] * teacher["result"]["cost"]["cached"]
    saved = teacher["result"]["cost"]["cached"] - cheap["result"]["cost"]["cached"]
    even = cheap["break_even"]["cached"]
    assert even == (pytest.approx(wanted / saved) if saved > 0 else None)
    assert by["never", 1, 0]["break_even"]["cached"] in (0, None)  # it needs no demonstrations
    assert teacher["break_even"] is None
    labels = ["random, k=0", "unanimous, k=0", "random, k=1", "unanimous, k=1"]
    assert [curve["label"] for curve in found["curves"]] == labels
    page = Page()
    page.feed(Path(found["file"]).read_text())
    assert page.paths > 8 and not page.outside

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("played again")

    monkeypatch.setattr(tuning, "play", never)
    again = call("tune", "cascade", str(trained / "c.yaml"), *ARGS)
    assert again.exit_code == 0 and "known" in again.stderr and "above random" in again.stdout
    assert "| rule" in again.stdout


def test_a_sweep_goes_on_where_it_stopped(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = load(trained / "c.yaml")
    true, played = tuning.play, list[Any]()

    def once(*args: Any, **options: Any) -> Any:
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(args)
        return true(*args, **options)

    monkeypatch.setattr(tuning, "play", once)
    options: Any = {"samples": (3,), "ks": (2,), "chances": (0.4,)}
    with pytest.raises(KeyboardInterrupt):
        sweep(loaded, "mix", **options)
    monkeypatch.setattr(tuning, "play", lambda *a, **o: played.append(a) or true(*a, **o))
    found = sweep(loaded, "mix", **options)
    once_each = [(policy.rule.name, policy.shown.k) for _, policy, *_ in played]
    wanted = {(p.said.rule, p.said.k) for p in found.points}
    # The teacher alone may be known from another sweep: it is the same policy there.
    assert wanted - {("always", 0)} <= set(once_each) <= wanted and len(wanted) == 4
    assert len(set(once_each)) == len(once_each)
    assert found.tasks == 3 and all(len(p.result.keys) == 3 for p in found.points)
    report = load(trained / "c.yaml").evaluate
    assert found.panel != api.evaluate(loaded, "expert").panel and report.tasks == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policy", "gone"], "policy"),
        (["--policy", "mix", "--samples", "0"], "samples"),
        (["--policy", "mix", "--k", "two"], "k="),
        (["--policy", "mix", "--rule", "most"], "rule"),
        (["--policy", "mix", "--rule", "threshold"], "threshold"),
        (["--policy", "mix", "--chance", "2"], "threshold"),
    ],
)
def test_what_is_no_sweep_is_refused(trained: Path, args: list[str], said: str) -> None:
    told = call("tune", "cascade", str(trained / "c.yaml"), *args)
    assert told.exit_code == 2 and said in told.stderr and told.stderr.count("\n") == 1


def test_numbers_for_people_are_no_infinity() -> None:
    never = Point(said(), point("unanimous", 0.1, 0.5).result, {"cached": math.inf})
    assert never.to_json()["break_even"] == {"cached": None}
    json.dumps(never.to_json(), allow_nan=False)
