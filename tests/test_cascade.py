"""A student, its demonstrations and its teacher in an environment: who answers, on what record."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.agreement import Rule
from agentdistill.cascade import AFTER, BEFORE, CascadePolicy, Shown
from agentdistill.chat import ChatPolicy
from agentdistill.config import PROMPTS
from agentdistill.demos import Demos
from agentdistill.engines.base import Engine, Message, Sample, Sampling
from agentdistill.errors import ConfigError
from agentdistill.policy import ExpertPolicy, ModelPolicy, Policy
from agentdistill.records import Actor, Alternative, Task, Trajectory, Turn, Usage
from agentdistill.render import Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.wording import Wording
from tests.doubles import Offered, TextEngine
from tests.test_informed import Says, reader
from tests.test_tool_calls import Tools, walk
from tests.toy import Corridor

INSTRUCTION = "Walk to the goal with left and right."
TASK = Task("tests/Corridor-v0", "train", {"at": 0, "goal": 3})


class Asked(TextEngine):
    """Answers by a function of the turn and the sample; keeps what it was asked."""

    def __init__(self, name: str, *script: Sequence[str | Sample], cost: Usage | None = None):
        self.name, self._script = name, script
        self._cost = Usage(input=10, output=2) if cost is None else cost
        self.asked: list[list[Message]] = []
        self.drawn = 0

    async def draw(
        self, messages: Sequence[Message], sampling: Sampling, n: int, tools: Offered, seed: int
    ) -> list[Sample]:
        said = self._script[min(len(self.asked), len(self._script) - 1)]
        self.asked.append(list(messages))
        self.drawn += n
        some = [said[k % len(said)] for k in range(n)]
        return [
            one if isinstance(one, Sample) else Sample((), (), one, "stop", usage=self._cost)
            for one in some
        ]


TEACHER_COST = Usage(input=100, cache_read=7, output=30)


def actor(engine: Engine, preset: str = "chat", **options: Any) -> ChatPolicy:
    wording = Wording(PROMPTS[preset], INSTRUCTION)
    return ChatPolicy(engine.name, engine, wording, Sampling(), **options)


def play(
    student: Engine,
    teacher: Engine | Policy | None,
    env: Any = Corridor,
    turns: int = 6,
    **more: Any,
) -> Trajectory:
    native = {"native_tools": more.pop("native_tools", False)}
    asked = actor(teacher, **native) if isinstance(teacher, Engine) else teacher
    preset = more.pop("preset", "chat")
    policy = CascadePolicy("mix", actor(student, preset, **native), asked, **more)
    (found,) = run(rollout(policy, env, [Request(TASK, 0)], max_turns=turns))
    return found


def test_agreement_needs_no_teacher() -> None:
    student, teacher = Asked("student", ["right"]), Asked("teacher", ["left"])
    found = play(student, teacher)
    assert found.success and teacher.drawn == 0 and student.drawn == 9
    for turn in found.turns:
        assert turn.actor.name == "student" and turn.informed and turn.hint == ""
        assert turn.usage == Usage(input=30, output=6)
        other = Alternative("right", ("right",), Usage(input=10, output=2), "student")
        assert turn.alternatives == (other, other)


def test_disagreement_asks_it_for_this_step_only() -> None:
    student = Asked("student", ["right"], ["right", "left", "right"], ["right"])
    teacher = Asked("teacher", ["right"], cost=TEACHER_COST)
    found = play(student, teacher)
    assert [turn.actor.name for turn in found.turns] == ["student", "teacher", "student"]
    turn = found.turns[1]
    assert turn.usage == Usage(input=130, cache_read=7, output=36)  # all samples, and the teacher
    assert [one.text for one in turn.alternatives] == ["right", "left", "right"]
    assert all(one.actor == "student" for one in turn.alternatives)
    # Both go on from the same turns.
    assert [m.content for m in teacher.asked[0]] == [m.content for m in student.asked[1]]
    assert [m.role for m in student.asked[2]].count("assistant") == 2


def test_one_sample_is_the_student_alone() -> None:
    student, teacher = Asked("student", ["right"]), Asked("teacher", ["left"])
    found = play(student, teacher, rule=Rule(samples=1))
    alone = run(rollout(actor(student), Corridor, [Request(TASK, 0)], max_turns=6))[0]
    assert found.turns == alone.turns and teacher.drawn == 0


def test_the_expert_may_teach(tmp_path: Path) -> None:
    student = Asked("student", ["right", "left"])
    for isolation in ("inline", "thread"):
        found = play(student, ExpertPolicy(), lambda: Corridor(isolation=isolation))  # noqa: B023
        assert found.success and {turn.actor.name for turn in found.turns} == {"expert"}
        assert found.turns[0].usage == Usage(input=30, output=6)


def test_unreadable_samples_ask_the_teacher() -> None:
    student, teacher = Asked("student", [""]), Asked("teacher", ["right"])
    assert play(student, teacher).success
    assert teacher.drawn == 3 and student.drawn == 9
    kept = play(Asked("student", ["", "right", "right"]), None)
    assert kept.success and {turn.actor.name for turn in kept.turns} == {"student"}


def test_never_agreeing_is_the_teacher_itself() -> None:
    words = iter(range(1000))

    class Fickle(Asked):
        async def chat(self, *args: Any, n: int = 1, **options: Any) -> list[Sample]:
            return [Sample((), (), f"{next(words)}", "stop", usage=self._cost) for _ in range(n)]

    teacher = Asked("teacher", ["left"], ["right"])
    found = play(Fickle("student", [""]), teacher)
    other = Asked("teacher", ["left"], ["right"])
    alone = run(rollout(actor(other), Corridor, [Request(TASK, 0)], max_turns=6))[0]
    assert [t.text for t in found.turns] == [t.text for t in alone.turns]
    assert [t.results for t in found.turns] == [t.results for t in alone.turns]
    assert teacher.asked == other.asked


chances = st.lists(st.lists(st.sampled_from(["left", "right", ""]), min_size=3, max_size=3))


@given(chances.filter(bool), st.sampled_from(["unanimous", "majority", "never", "always"]))
def test_nothing_that_was_spent_is_lost(script: list[list[str]], rule: str) -> None:
    student, teacher = Asked("student", *script), Asked("teacher", ["right"], cost=TEACHER_COST)
    found = play(student, teacher, rule=Rule(rule))
    total = [sum(getattr(turn.usage, name) for turn in found.turns) for name in _CLASSES]
    calls = len(teacher.asked)
    assert total == [10 * student.drawn + 100 * calls, 7 * calls, 2 * student.drawn + 30 * calls]
    assert calls == sum(turn.actor.name == "teacher" for turn in found.turns)
    drawn = sum(len(t.alternatives) + (t.actor.name == "student") for t in found.turns)
    assert drawn == student.drawn
    if rule == "never":
        assert not calls
    if rule == "always":
        assert not student.drawn


_CLASSES = ("input", "cache_read", "output")


def test_calls_are_compared_by_what_they_ask_for() -> None:
    def call(arguments: str) -> Sample:
        one = {"id": arguments, "function": {"name": "walk", "arguments": arguments}}
        return Sample((), (), arguments, "stop", tool_calls=(one,))

    same = [call('{"way": "right"}'), call('{"way":"right"}'), call('{ "way" : "right" }')]
    student, teacher = Asked("student", same), Asked("teacher", ["right"])
    assert play(student, teacher, Tools, native_tools=True).success and not teacher.drawn
    other = Asked("student", [*same[:2], call('{"way": "left"}')])
    found = play(other, teacher, Tools, native_tools=True)
    assert teacher.drawn == 3 and found.success
    torn = Asked("student", [*same[:2], call('{"way": "ri')])
    assert {t.actor.name for t in play(torn, teacher, Tools, native_tools=True).turns} == {
        "teacher"
    }


def test_what_an_action_means_is_the_environments_to_say() -> None:
    class Loose(Corridor):
        def meaning(self, action: str) -> str:
            return action.lower()

        def _advance(self, action: str) -> Any:
            return super()._advance(action.lower())

    for env, asked in ((Loose, 0), (Corridor, 6)):
        student, teacher = Asked("student", ["right", "RIGHT"]), Asked("teacher", ["left"])
        play(student, teacher, env)
        assert teacher.drawn == asked
    teacher = Asked("teacher", ["left"])
    play(Asked("student", ["right", "RIGHT"]), teacher, Loose, equivalence="text")
    assert teacher.drawn == 6
    same = ["right", " right  # on"]
    play(Asked("student", same), fresh := Asked("teacher", ["left"]), equivalence="code", turns=1)
    assert fresh.drawn == 0


# -- demonstrations -------------------------------------------------------------------------------


def demonstration(payload: dict[str, Any], seen: str, done: str = "right") -> Trajectory:
    turns = tuple(Turn(k, f"{seen}\nstart", Actor("teacher"), actions=(done,)) for k in (0, 1))
    task = Task(TASK.env, "train", payload)
    return Trajectory(task, "g", 0, turns, (), "success", True, 1.0)


def shown(tmp_path: Path, **more: Any) -> Shown:
    found = [
        demonstration({"at": 1, "goal": 3}, ".P.G.."),
        demonstration(dict(TASK.payload), "P..G..", "leak"),
    ]
    return Shown(Demos.build(found, tmp_path / str(len(more))), **more)


def test_an_empty_store_is_the_plain_prompt(tmp_path: Path) -> None:
    plain = Asked("student", ["right"])
    run(rollout(actor(plain), Corridor, [Request(TASK, 0)], max_turns=6))
    empty = Demos.build([], tmp_path)
    for some in (Shown(), Shown(empty), Shown(empty, place="before"), shown(tmp_path, k=0)):
        student = Asked("student", ["right"])
        found = play(student, None, shown=some)
        assert student.asked == plain.asked
        assert "note" not in found.provenance and not any(turn.hint for turn in found.turns)


def test_demonstrations_come_after_the_history(tmp_path: Path) -> None:
    student = Asked("student", ["right"], ["right", "left"], ["right"])
    teacher = Asked("teacher", ["right"])
    found = play(student, teacher, shown=shown(tmp_path))
    for messages, turn in zip(student.asked, found.turns, strict=True):
        last = messages[-1]
        assert last.role == "user" and last.content.count(BEFORE) == 1
        assert last.content.startswith(turn.hint) and turn.hint.endswith(AFTER)
        assert not any(BEFORE in message.content for message in messages[:-1])
    assert not any(BEFORE in message.content for message in teacher.asked[0])
    assert [turn.informed for turn in found.turns] == [True, False, True]
    assert "note" not in found.provenance


def test_or_before_it_once_and_for_all(tmp_path: Path) -> None:
    student = Asked("student", ["right"], ["right", "left"], ["right"])
    teacher = Asked("teacher", ["right"])
    found = play(student, teacher, shown=shown(tmp_path, place="before"))
    note = found.provenance["note"]
    assert note.startswith(BEFORE) and not any(turn.hint for turn in found.turns)
    firsts = [messages[1] for messages in student.asked]
    assert all(first == firsts[0] and first.content.startswith(note) for first in firsts)
    assert not any(BEFORE in message.content for message in teacher.asked[0])
    assert [turn.informed for turn in found.turns] == [True, False, True]
    policy = CascadePolicy("mix", actor(student), None, shown=shown(tmp_path, place="before"))
    with pytest.raises(ConfigError, match="place"):
        run(rollout(policy, Corridor, [Request(TASK, 0, note="Mine.")]))


@pytest.mark.parametrize("place", ["after", "before"])
def test_the_teacher_may_read_them_too(tmp_path: Path, place: Any) -> None:
    student, teacher = Asked("student", ["left", "right"]), Asked("teacher", ["right"])
    for rule in (Rule(), Rule("always")):
        found = play(student, teacher, shown=shown(tmp_path, place=place, teacher=True), rule=rule)
        for messages in teacher.asked:
            assert sum(BEFORE in message.content for message in messages) == 1
        assert all(turn.informed for turn in found.turns)


@pytest.mark.parametrize("place", ["after", "before"])
def test_no_task_is_shown_its_own_solution(tmp_path: Path, place: Any) -> None:
    student = Asked("student", ["right"])
    some = shown(tmp_path, place=place)
    assert some.demos is not None
    assert some.demos.search(observation="P..G..", task=None, k=1)[0].steps[0].actions == ("leak",)
    found = play(student, None, shown=some)
    said = " ".join(message.content for messages in student.asked for message in messages)
    assert BEFORE in said and "leak" not in said
    assert "leak" not in str(found)


@given(st.integers(0, 5), st.integers(0, 3))
def test_whatever_is_searched(k: int, window: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        student = Asked("student", ["right"])
        play(student, None, shown=shown(Path(folder), k=k, window=window), turns=2)
    said = " ".join(message.content for messages in student.asked for message in messages)
    assert "leak" not in said and (BEFORE in said) is (k > 0)


def test_after_the_results_of_calls_they_are_a_message(tmp_path: Path) -> None:
    student = Asked("student", [Sample((), (), "", "stop", tool_calls=(walk("right"),))])
    play(student, None, Tools, native_tools=True, shown=shown(tmp_path))
    roles = [message.role for message in student.asked[1]]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    assert student.asked[1][-1].content.startswith(BEFORE)
    assert BEFORE not in student.asked[1][-2].content


# -- tokens ---------------------------------------------------------------------------------------


def tokens(mine: Renderer, theirs: Renderer, demos: Shown) -> list[Trajectory]:
    student = ModelPolicy("student", Says(mine.tokenizer), mine, Sampling())
    teacher = ModelPolicy("teacher", Says(theirs.tokenizer), theirs, Sampling())
    policy = CascadePolicy("mix", student, teacher, Rule(samples=2), demos)
    tasks = list(Corridor().tasks("train"))[:4]
    fact = {"renderer": policy.fingerprint} if policy.fingerprint else {}
    wanted = [Request(task, n, provenance=fact) for n, task in enumerate(tasks)]
    found = run(rollout(policy, Corridor, wanted, max_turns=6, grammar="action"))
    assert {turn.actor.name for t in found for turn in t.turns} == {"student", "teacher"}
    return found


def test_tokens_of_one_vocabulary_are_one_record(tmp_path: Path) -> None:
    mine = reader("full")
    for place in ("after", "before"):
        for one in tokens(mine, mine, shown(tmp_path, place=place)):  # type: ignore[arg-type]
            assert one.provenance["renderer"] == mine.fingerprint
            again = materialise(one, mine)
            for stream, other in zip(one.streams, again.streams, strict=True):
                assert stream.ids.tolist() == other.ids.tolist()
                assert stream.author.tolist() == other.author.tolist()
            for turn in one.turns:
                assert turn.span is not None
                prompt = mine.text(one.streams[turn.span.stream].ids[: turn.span.start].tolist())
                assert (BEFORE in prompt) is (turn.actor.name == "student")


def test_tokens_of_two_vocabularies_do_not_meet(tmp_path: Path) -> None:
    mine, theirs = reader("full"), reader("full", "qwen")
    for one in tokens(mine, theirs, shown(tmp_path)):
        assert "renderer" not in one.provenance
        for turn in one.turns:
            assert (turn.span is None) is (turn.actor.name == "teacher")
        made = materialise(one, mine)
        assert all(turn.span is not None for turn in made.turns)


def test_confidence_is_the_mean_of_the_sampled_tokens() -> None:
    mine = reader("full")
    task = next(Corridor().tasks("train"))

    def teachers(least: float) -> tuple[int, int]:
        student = ModelPolicy("student", Says(mine.tokenizer), mine, Sampling())
        rule = Rule("confidence", threshold=least)
        policy = CascadePolicy("mix", student, ExpertPolicy("action"), rule)
        (found,) = run(rollout(policy, Corridor, [Request(task, 1)], max_turns=5))
        return sum(turn.actor.name == "expert" for turn in found.turns), len(found.turns)

    assert teachers(-1e6)[0] == 0
    asked, turns = teachers(0.0)
    assert asked == turns > 0


# -- refused --------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused() -> None:
    student, teacher = actor(Asked("student", ["right"])), actor(Asked("teacher", ["right"]))
    made = [
        ({"equivalence": "judge"}, "equivalence"),
        ({"rule": Rule("confidence", threshold=-1.0)}, "rule"),
    ]
    for options, key in made:
        with pytest.raises(ConfigError, match=f"policies.mix.{key}"):
            CascadePolicy("mix", student, teacher, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"mix\.teacher"):
        CascadePolicy("mix", student, student)
    for rule in (Rule("always"), Rule("random", threshold=0.5)):
        with pytest.raises(ConfigError, match=r"mix\.rule"):
            CascadePolicy("mix", student, None, rule)


def test_a_cascade_is_repeated_by_its_seed(tmp_path: Path) -> None:
    def once(seed: int) -> list[str]:
        student, teacher = Asked("student", ["left"]), Asked("teacher", ["right"])
        policy = CascadePolicy("mix", actor(student), actor(teacher), Rule("random", 1, 0.5))
        (found,) = run(rollout(policy, Corridor, [Request(TASK, seed)], max_turns=9))
        return [turn.actor.name for turn in found.turns]

    seeds = random.Random(0).sample(range(10_000), 8)
    assert [once(seed) for seed in seeds] == [once(seed) for seed in seeds]
    assert {name for seed in seeds for name in once(seed)} == {"student", "teacher"}
