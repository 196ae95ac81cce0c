"""A plan before the first answer: asked for once, found by, on record, and paid for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from agentdistill.agreement import Rule
from agentdistill.cascade import BEFORE, QUESTION, CascadePolicy, Shown
from agentdistill.costs import calls
from agentdistill.demos import Demos
from agentdistill.engines.base import Sampling
from agentdistill.policy import FirstThought, ModelPolicy
from agentdistill.records import Alternative, Usage
from agentdistill.rollout import Request, rollout, run
from tests.test_cascade import TASK, Asked, demonstration, play
from tests.test_informed import Says, reader
from tests.toy import Corridor

SEEN = "somewhere else"
"""What demonstrations saw: nothing of it is seen here, so that only plans can find them."""


def planned(folder: Path, **more: Any) -> Shown:
    """One demonstration that goes east, one that goes west, and the task's own solution."""
    found = [
        replace(demonstration({"at": 1, "goal": 3}, SEEN, "right"), provenance={"plan": "go east"}),
        replace(demonstration({"at": 4, "goal": 3}, SEEN, "left"), provenance={"plan": "go west"}),
        replace(
            demonstration(dict(TASK.payload), SEEN, "leak"), provenance={"plan": "east by leak"}
        ),
    ]
    return Shown(Demos.build(found, folder), k=1, plan=True, **more)


def test_a_plan_is_asked_for_once_and_finds_demonstrations(tmp_path: Path) -> None:
    student = Asked("student", ["<think>I go east.</think>"], ["right"])
    teacher = Asked("teacher", ["left"])
    found = play(student, teacher, shown=planned(tmp_path))
    assert found.success and found.provenance["plan"] == "I go east."
    asked = [m.content for messages in student.asked for m in messages]
    assert sum(QUESTION in content for content in asked) == 1
    first = student.asked[0][-1].content
    assert found.turns[0].observation in first and first.endswith(QUESTION)
    assert student.asked[1][-1].content.startswith(BEFORE)
    hints = [turn.hint for turn in found.turns]
    assert all("Plan: go east" in hint and "leak" not in hint for hint in hints)
    assert not any(QUESTION in message.content for message in student.asked[1])


def test_it_is_paid_for_by_the_student(tmp_path: Path) -> None:
    student = Asked("student", ["I go east."], ["right", "left", "right"])
    teacher = Asked("teacher", ["right"], cost=Usage(input=100, output=30))
    found = play(student, teacher, shown=planned(tmp_path), rule=Rule())
    assert found.turns[0].actor.name == "teacher"
    assert found.turns[0].usage == Usage(input=140, output=38)
    said = Alternative("I go east.", (), Usage(input=10, output=2), "student")
    assert found.turns[0].alternatives[-1] == said and said not in found.turns[1].alternatives
    spent = [call.actor for call in calls(found) if call.turn == 0]
    assert spent.count("student") == 4 and spent.count("teacher") == 1


def test_plans_of_similar_tasks_are_shown_but_never_its_own(tmp_path: Path) -> None:
    made = []
    for n, done in ((1, "right"), (2, "left")):
        one = demonstration({"at": n, "goal": 3}, "P..G..", done)
        made.append(replace(one, provenance={"plan": f"plan {n}"}))
    own = replace(
        demonstration(dict(TASK.payload), "P..G..", "leak"), provenance={"plan": "leak it"}
    )
    student = Asked("student", ["so"], ["right"])
    play(student, None, shown=Shown(Demos.build([*made, own], tmp_path), plan=True))
    question = student.asked[0][-1].content
    assert "plan 1" in question and "plan 2" in question and "leak" not in question


def test_without_demonstrations_a_plan_is_still_a_record(tmp_path: Path) -> None:
    student = Asked("student", ["I go east."], ["right"])
    found = play(student, None, shown=Shown(plan=True))
    assert found.provenance["plan"] == "I go east." and not found.turns[0].hint
    demos = Demos.build([found], tmp_path)
    (match,) = demos.search(plan="to the east", task=None, k=1)
    assert match.plan == "I go east." and "plan" in match.scores


def test_the_teacher_alone_needs_no_plan(tmp_path: Path) -> None:
    student, teacher = Asked("student", ["plan"]), Asked("teacher", ["right"])
    found = play(student, teacher, rule=Rule("always"), shown=planned(tmp_path))
    assert student.drawn == 0 and "plan" not in found.provenance
    found = play(student, teacher, rule=Rule("always"), shown=planned(tmp_path, teacher=True))
    assert student.drawn == 1 and found.provenance["plan"] == "plan"


def test_models_with_tokens_are_asked_beside_their_sessions() -> None:
    mine = reader("full")
    for kind in (ModelPolicy, FirstThought):
        engine = Says(mine.tokenizer, "I walk east.\n\nAnd more.")
        policy: Any = kind("student", engine, mine, Sampling())
        mix = CascadePolicy("mix", policy, None, Rule(samples=2), Shown(plan=True))
        (found,) = run(rollout(mix, Corridor, [Request(TASK, 0)], max_turns=3))
        assert found.provenance["plan"] == "I walk east.\n\nAnd more."
        assert QUESTION in mine.text(engine.asked[0])
        assert not any(QUESTION in mine.text(ids) for ids in engine.prompts)
