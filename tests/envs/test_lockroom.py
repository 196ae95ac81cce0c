"""Locked rooms: the rule is the room's, past episodes reveal it, and nothing else does."""

from __future__ import annotations

import json
import math
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.envs.check import check_env
from agentdistill.envs.lockroom import (
    CONTAINERS,
    ID,
    LEVERS,
    SPLITS,
    LockroomEnv,
    Rule,
    names,
    rule_of,
    split_of,
)
from agentdistill.errors import ConfigError
from agentdistill.policy import (
    Episode,
    ExpertPolicy,
    Policy,
    RandomPolicy,
    ScriptedPolicy,
    derive_seed,
)
from agentdistill.records import Task, Trajectory
from agentdistill.rollout import Request, rollout, run
from agentdistill.skills import Grounded
from agentdistill.tasks import draw

ROOM = "calm fox"


def task(room: str = ROOM, **size: int) -> Task:
    return Task(ID, "train", {"room": room, "containers": 4, "levers": 3, **size})


def started(room: str = ROOM, **options: Any) -> LockroomEnv:
    env = LockroomEnv(**options)
    assert env.reset(options={"task": task(room)})[0] == f"{room}\nno key"
    return env


def rule(room: str = ROOM) -> Rule:
    return rule_of(room, 4, 3)


def play(policy: Policy, tasks: list[Task], **options: Any) -> list[Trajectory]:
    requests = [Request(t, seed=derive_seed(7, t.key)) for t in tasks]
    return run(rollout(policy, lambda: LockroomEnv(**options), requests))


def success(trajectories: list[Trajectory]) -> float:
    return sum(t.success for t in trajectories) / len(trajectories)


# -- rules ----------------------------------------------------------------------------------------


def test_the_rule_of_a_room_never_changes() -> None:
    """Pinned: numbers on these rooms stay comparable."""
    assert rule_of("calm fox", 4, 3) == Rule("desk", ("red", "blue", "green"))
    assert rule_of("brisk owl", 6, 3) == Rule("vase", ("green", "red", "blue"))


def test_the_rules_are_spread_over_all_there_are() -> None:
    found = [rule_of(name, 4, 3) for name in names("train")]
    counts = {(k, o): 0 for k in CONTAINERS[:4] for o in permutations(LEVERS[:3])}
    for each in found:
        counts[each.key, each.order] += 1
    expected = len(found) / len(counts)
    distance = sum((n - expected) ** 2 / expected for n in counts.values())
    assert distance < 45  # chi-squared, 23 degrees of freedom: p = .004


def test_the_way_out() -> None:
    env, order = started(), rule().order
    assert env.expert_action() == rule().actions[0]
    results = env.replay(rule().actions)
    assert [r.observation.partition("\n")[2] for r in results] == [
        "key, 0 of 3",
        "key, 1 of 3",
        "key, 2 of 3",
        "open",
    ]
    assert [r.score for r in results] == [0.25, 0.5, 0.75, 1.0]
    assert [r.reward for r in results] == [0.25] * 4
    assert all(r.valid and r.optimal for r in results)
    assert [r.success for r in results] == [r.terminated for r in results] == [False] * 3 + [True]
    assert env.expert_action() is None and env.optimal_actions() is None
    assert env.act(f"pull {order[0]}").score == 1.0


def test_a_wrong_lever_brings_all_up() -> None:
    env, (first, second, third) = started(), rule().order
    *_, down, wrong = env.replay([f"open {rule().key}", f"pull {first}", f"pull {third}"])
    assert (down.score, wrong.score, wrong.reward, wrong.optimal) == (0.5, 0.25, -0.25, False)
    assert wrong.observation == f"{ROOM}\nkey, 0 of 3"
    assert env.expert_action() == f"pull {first}"
    again = env.replay([f"pull {first}", f"pull {first}", f"pull {second}", f"pull {third}"])
    assert [r.score for r in again] == [0.5, 0.5, 0.75, 1.0]


def test_what_is_pointless_is_valid_and_shows_nothing() -> None:
    env = started()
    others = [name for name in CONTAINERS[:4] if name != rule().key]
    for action in (f"open {others[0]}", f"open {others[0]}", f"pull {rule().order[0]}"):
        result = env.act(action)
        assert (result.observation, result.valid, result.reward) == (f"{ROOM}\nno key", True, 0)
        assert result.optimal is False


@pytest.mark.parametrize("action", ["", "open", "open drum", "pull white", "open jar now", "jar"])
def test_other_texts_are_invalid_and_cost_a_step(action: str) -> None:
    env = started(max_steps=1)
    result = env.act(action)
    assert (result.observation, result.valid, result.truncated) == (f"{ROOM}\nno key", False, True)
    assert result.optimal is False


def test_case_and_spaces_do_not_matter() -> None:
    assert started().act(f"  OPEN   {rule().key.title()}\n").score == 0.25


def test_the_listing_of_actions_is_no_hint() -> None:
    rooms = names("train")[:100]
    assert len({tuple(started(room).admissible()) for room in rooms}) == 1
    env = started()
    env.act(f"open {rule().key}")
    assert env.admissible() == [f"pull {name}" for name in LEVERS[:3]]
    env.act(f"pull {rule().order[0]}")
    assert set(env.admissible()) == {f"pull {name}" for name in rule().order[1:]}
    other = started()
    other.act(f"open {next(n for n in CONTAINERS[:4] if n != rule().key)}")
    assert len(other.admissible()) == 3


def test_the_task_and_the_prompt_do_not_hold_the_rule() -> None:
    assert set(task().payload) == {"room", "containers", "levers"}
    envs = [started(room) for room in names("train")[:30]]
    assert len({rule(env.task.payload["room"]) for env in envs}) > 10
    assert len({json.dumps([env.instruction, env.goal, env.tools]) for env in envs}) == 1


def test_tools_are_the_actions() -> None:
    env = started()
    assert env.tool_action("open", {"name": "jar"}) == "open jar"
    assert env.tool_action("pull", {"name": "red"}) == "pull red"
    for name, arguments in (("fly", {"name": "jar"}), ("open", {}), ("open", {"name": 3})):
        assert not env.act(env.tool_action(name, arguments)).valid
    said = [t["function"]["parameters"]["properties"]["name"]["enum"] for t in env.tools]
    assert said == [list(CONTAINERS[:4]), list(LEVERS[:3])]


@given(
    st.lists(st.sampled_from(LockroomEnv().action_space.examples), max_size=6),
    st.lists(st.sampled_from(LockroomEnv().action_space.examples), max_size=6),
)
def test_snapshots_return_to_the_same_future(before: list[str], after: list[str]) -> None:
    env, other = started(max_steps=20), LockroomEnv(max_steps=20)
    env.replay(before)
    saved = env.snapshot()
    expected, listed = env.replay(after), env.admissible()
    other.restore(saved)
    env.restore(saved)
    assert env.replay(after) == other.replay(after) == expected
    assert env.admissible() == other.admissible() == listed


# -- tasks ----------------------------------------------------------------------------------------


def test_splits_follow_from_names_alone() -> None:
    env = LockroomEnv(rooms=40)
    found = {split: [t.payload["room"] for t in env.tasks(split)] for split in SPLITS}
    assert {split: len(rooms) for split, rooms in found.items()} == {
        "train": 40,
        "tune": len(names("tune")),
        "report": len(names("report")),
    }
    for split, rooms in found.items():
        assert len(set(rooms)) == len(rooms) and {split_of(room) for room in rooms} == {split}
        assert all(env.held_out(f"{room}\nno key") == (split != "train") for room in rooms)
    assert min(map(len, found.values())) >= 40


def test_few_rooms_are_a_part_of_many_and_seeds_only_order_them() -> None:
    few = {t.payload["room"] for t in LockroomEnv(rooms=8).tasks("train", seed=1)}
    many = [t.payload["room"] for t in LockroomEnv(rooms=64).tasks("train", seed=1)]
    assert few < set(many)
    again = [t.payload["room"] for t in LockroomEnv(rooms=64).tasks("train", seed=2)]
    assert sorted(many) == sorted(again) and many != again


def test_seen_is_another_name_of_the_training_rooms() -> None:
    env = LockroomEnv(rooms=8)
    assert draw(env, "seen", 8, 3) == draw(env, "train", 8, 3)
    with pytest.raises(ConfigError, match="train, tune, report"):
        env.tasks("rooms")


@pytest.mark.parametrize(
    "options", [{"containers": 0}, {"containers": 9}, {"levers": 6}, {"rooms": 10_000}]
)
def test_sizes_have_bounds(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.*must be from 1 to"):
        LockroomEnv(**options)


@pytest.mark.parametrize(
    ("wrong", "key"), [(task(levers=2), "levers"), (task(containers=8), "containers")]
)
def test_rooms_of_another_size_are_refused(wrong: Task, key: str) -> None:
    with pytest.raises(ConfigError, match=f"task.payload.{key}"):
        LockroomEnv().reset(options={"task": wrong})
    with pytest.raises(ConfigError, match=r"task.payload.room"):
        LockroomEnv().reset(options={"task": Task(ID, "train", {"containers": 4, "levers": 3})})


# -- what is promised and what was measured -------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"containers": 8, "levers": 5, "rooms": 5}, {"levers": 1}])
def test_the_checker_passes_it(options: dict[str, int]) -> None:
    report = check_env(ID, kwargs=options, seconds=0.05)
    assert {check.status for check in report.checks} == {"ok"}, str(report)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({}, 0.36, 0.49), ({"containers": 6}, 0.23, 0.36), ({"levers": 2}, 0.72, 0.84)],
)
def test_random_play_succeeds_sometimes_and_the_expert_always(
    options: dict[str, int], low: float, high: float
) -> None:
    options = {**options, "rooms": 500}
    tasks = draw(LockroomEnv(**options), "train", 500, 0)
    expert = play(ExpertPolicy(), tasks, **options)
    assert success(expert) == 1.0
    assert {t.env_steps for t in expert} == {1 + options.get("levers", 3)}
    assert low < success(play(RandomPolicy(), tasks, **options)) < high


class Follower(ScriptedPolicy):
    """Does what a skill says, in its order, then whatever the listing offers."""

    def __init__(self, skills: dict[str, str]) -> None:
        super().__init__("follower")
        self._skills, self._random = skills, RandomPolicy()

    def choose(self, episode: Episode) -> str:
        _, _, workflow = self._skills.get(episode.task.key, "").partition("Do this:\n")
        said = workflow.splitlines()[len(episode.turns) :]
        return said[0] if said else self._random.choose(episode)


def test_a_skill_helps_in_its_room_and_misleads_in_another() -> None:
    tasks = draw(LockroomEnv(rooms=300), "train", 300, 0)
    skills = {}
    for trajectory in play(RandomPolicy(), tasks, rooms=300, max_steps=50):
        text = run(Grounded().write(trajectory))
        assert trajectory.success and text is not None
        hidden = rule(trajectory.task.payload["room"])
        assert text.endswith("Do this:\n" + "\n".join(hidden.actions))
        skills[trajectory.task.key] = text
    texts = list(skills.values())
    others = dict(zip(skills, [*texts[1:], texts[0]], strict=True))
    own, none, wrong = (success(play(Follower(s), tasks)) for s in (skills, {}, others))
    assert own == 1.0
    assert wrong + 0.15 < none < 0.6


def test_an_observation_is_a_few_tokens() -> None:
    from agentdistill.config import TokenizerConfig
    from agentdistill.students.tiny import corpus, train_tokenizer

    env = LockroomEnv()
    tokenizer = train_tokenizer(corpus(env, "plain", 400, 0), TokenizerConfig())
    seen = [r.observation for t in env.tasks("train") for r in _solved(env, t)]
    lengths = [len(tokenizer.encode(text)) for text in seen]
    assert max(lengths) <= 4 and math.fsum(lengths) / len(lengths) < 2.5
    assert all(len(tokenizer.encode(a)) == 1 for a in env.action_space.examples)


def _solved(env: LockroomEnv, chosen: Task) -> list[Any]:
    env.reset(options={"task": chosen})
    return env.replay(rule_of(chosen.payload["room"], 4, 3).actions)
