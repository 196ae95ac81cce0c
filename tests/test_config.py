"""One configuration, however it is written down; what cannot work is refused in one line."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentdistill.config import (
    PROMPTS,
    CollectStage,
    EnvConfig,
    LocalModel,
    PromptConfig,
    RunConfig,
    TinyModel,
    TrainStage,
    load,
)
from agentdistill.errors import ConfigError
from agentdistill.methods.constraints import (
    CONSTRAINTS,
    REMARKS,
    Constraint,
    check,
    remarks,
)
from agentdistill.methods.index import METHODS, get
from agentdistill.methods.schedule import Schedule
from agentdistill.methods.space import Axes, Choice, Method
from agentdistill.quickstart import configure, recipe
from agentdistill.recipe import validate
from tests.toy import micro

BASE: dict[str, Any] = {
    "name": "base",
    "prompt": "bare",
    "models": {"student": {}, "big": {"hidden": 128}},
    "stages": [
        {"name": "demos", "do": "collect"},
        {"name": "taught", "model": "big", "method": "sft", "data": "demos", "iterations": 3},
        {"name": "distilled", "teacher": "taught", "iterations": 5, "lr": 0.001},
        {"name": "own", "do": "collect", "policy": "student"},
    ],
}


def base(*overrides: str, **changes: Any) -> RunConfig:
    return load({**BASE, **changes}, overrides)


# -- ways to write it ------------------------------------------------------------------------------


def test_file_mapping_overrides_and_object_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    wanted = load(BASE)
    assert load(path) == load(str(path)) == load(wanted) == wanted
    later = copy.deepcopy(BASE)
    later["stages"][2]["lr"] = 1.0
    del later["models"]["big"]["hidden"]
    later["prompt"] = "window"
    overrides = ["stages.distilled.lr=1e-3", "models.big.hidden=128", "prompt=bare"]
    assert load(later, overrides) == wanted
    path.write_text(yaml.safe_dump(later))
    assert load(path, overrides) == wanted
    assert load(load(later), overrides) == wanted
    assert load() == load({}) == RunConfig()


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """As a run writes it: every default spelt out."""
    for values in (BASE, recipe(), micro(tmp_path)):
        config = load(values)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert load(path) == config
        assert load(path).fingerprint == config.fingerprint


def test_overrides_change_what_they_name() -> None:
    config = base(
        "seed=7",
        "env.options.max_steps=9",
        "limits.seconds=1.5",
        "stages.distilled.axes.signal.coef=2",
        "stages.distilled.betas=[0.8, 0.9]",
        "models.third.layers=3",
        "evaluate.policies=[expert, distilled]",
        "prompt.window=3",
        "stages.demos.only_success=false",
        "stages.taught.limit=null",
        "stages.distilled.sampling.max_tokens=5",
    )
    assert config.seed == 7 and config.env.options == {"max_steps": 9}
    assert config.limits.seconds == 1.5
    distilled, taught, demos = (config.stage(n) for n in ("distilled", "taught", "demos"))
    assert isinstance(distilled, TrainStage) and isinstance(taught, TrainStage)
    assert distilled.axes == {"signal": {"coef": 2}} and distilled.betas == (0.8, 0.9)
    assert distilled.sampling is not None and distilled.sampling.max_tokens == 5
    assert taught.limit is None
    assert isinstance(demos, CollectStage) and not demos.only_success
    assert config.models["third"] == TinyModel(layers=3)
    assert config.evaluate.policies == ["expert", "distilled"]
    assert config.prompt == PROMPTS["bare"].model_copy(update={"window": 3})


def test_overrides_do_not_reach_into_the_callers_mapping() -> None:
    mine = copy.deepcopy(BASE)
    load(mine, ["models.big.hidden=64", "stages.taught.lr=1e-2", "env.id=x"])
    assert mine == BASE


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", "+1e-3", "1.0e-3"])
def test_exponents_are_numbers(text: str) -> None:
    stage = base(f"stages.distilled.lr={text}").stage("distilled")
    assert isinstance(stage, TrainStage) and stage.lr == 1e-3


# -- defaults and presets --------------------------------------------------------------------------


def test_kinds_have_defaults() -> None:
    config = load(
        {
            "models": {
                "student": {},
                "other": {"kind": "tiny"},
                "mine": {"kind": "local", "path": "x"},
            },
            "stages": [
                {"name": "a", "iterations": 1},
                {"name": "b", "do": "train", "iterations": 1},
                {"name": "c", "do": "collect"},
            ],
        }
    )
    assert [type(model) for model in config.models.values()] == [TinyModel, TinyModel, LocalModel]
    assert [type(stage) for stage in config.stages] == [TrainStage, TrainStage, CollectStage]
    assert load({}).models == {"student": TinyModel()}
    built = RunConfig(models={"student": TinyModel()}, stages=[CollectStage(name="c")])
    assert built == load({"stages": [{"name": "c", "do": "collect"}]})


def test_presets_of_prompts() -> None:
    for name, prompt in PROMPTS.items():
        assert load({"prompt": name}).prompt == load({"prompt": {"preset": name}}).prompt == prompt
    assert len({prompt.model_dump_json() for prompt in PROMPTS.values()}) == len(PROMPTS)
    assert load({}).prompt == PROMPTS["chat"] == PromptConfig()
    changed = load({"prompt": {"preset": "react-drop", "window": 1}}).prompt
    assert changed == PROMPTS["react-drop"].model_copy(update={"window": 1})
    assert load({"prompt": {"grammar": "answer"}}).prompt == PromptConfig(grammar="answer")
    assert load({"prompt": "ragen"}, ["prompt.window=1"]).prompt.max_actions == 5


# -- identity --------------------------------------------------------------------------------------


def test_fingerprint_is_of_what_is_computed() -> None:
    mine = base().fingerprint
    for same in (["output=elsewhere"], ["name=other"], ["workers=4"], ["env.options={}"]):
        assert base(*same).fingerprint == mine
    for other in (
        ["seed=1"],
        ["env.id=x"],
        ["env.max_turns=3"],
        ["prompt=chat"],
        ["sampling.temperature=0.5"],
        ["models.big.layers=3"],
        ["stages.distilled.lr=2"],
        ["stages.distilled.axes.over=turn"],
        ["evaluate.seed=1"],
        ["limits.tokens=9"],
        ["threads=2"],
    ):
        assert base(*other).fingerprint != mine


def test_the_folder_of_a_run() -> None:
    assert base("output=x/y", "name=z").path == Path("x/y/z")


# -- refusals --------------------------------------------------------------------------------------


REFUSED: list[tuple[list[str], str]] = [
    # unknown keys, at every depth
    (["sed=1"], "sed=1: unknown key; did you mean seed?"),
    (["env.optoins.x=1"], "env.optoins={'x': 1}: unknown key; did you mean options?"),
    (["stages.distilled.lrr=2"], "stages.distilled.lrr=2: unknown key; did you mean lr?"),
    (["stages.demos.epsodes=2"], "stages.demos.epsodes=2: unknown key; did you mean episodes?"),
    (
        ["stages.distilled.sampling.temprature=2"],
        "stages.distilled.sampling.temprature=2: unknown key; did you mean temperature?",
    ),
    (["models.big.knid=tiny"], "models.big.knid='tiny': unknown key; did you mean kind?"),
    (
        ["models.big.tokenizer.size=9"],
        "models.big.tokenizer.size=9: unknown key; known: vocabulary, episodes, pieces",
    ),
    (
        ["models.local={kind: local, path: x, lora: {rnk: 3}}"],
        "models.local.lora.rnk=3: unknown key; did you mean rank?",
    ),
    (["prompt.gramar=x"], "prompt.gramar='x': unknown key; did you mean grammar?"),
    # values
    (["seed=abc"], "seed='abc': "),
    (["seed=-1"], "seed=-1: Input should be greater than or equal to 0"),
    (["stages.distilled.lr=-1"], "stages.distilled.lr=-1: Input should be greater than 0"),
    (["stages.distilled.betas=[2, 0.9]"], "stages.distilled.betas.0=2: "),
    (["stages.distilled.iterations=null"], "stages.distilled: give iterations, env_steps, or both"),
    (["stages.distilled.axes=3"], "stages.distilled.axes=3: must hold keys and values"),
    (["sampling.top_p=0"], "sampling.top_p=0: Input should be greater than 0"),
    (["prompt.observation=look"], "prompt.observation='look': "),
    (
        ["prompt.observation='{observation} {goals}'"],
        "prompt.observation='{observation} {goals}': {goals} is no place here; known: instruction,",
    ),
    (["prompt.instruction='{goal}'"], "prompt.instruction='{goal}': {goal} is no place here"),
    (["prompt.history='{history}'"], "prompt.history='{history}': {history} is no place here"),
    (["prompt.history='{action}'"], "prompt: history says how an earlier turn is written"),
    (["prompt.observation='{history}{observation}'"], "prompt: history says how an earlier turn"),
    (["prompt={preset: tcod, history: null}"], "prompt: history says how an earlier turn"),
    (["prompt.admissible=list"], "prompt.admissible='list': Input should be 'lines' or 'quoted'"),
    (["models.big.hidden=33"], "models.big: hidden=33, heads=2: "),
    (["models.big.kind=huge"], "models.big.kind='huge': one of tiny, local"),
    (["models.big=3"], "models.big=3: must hold keys and values"),
    (["models.tiny.hidden=9"], "models.tiny: hidden=9, heads=2: "),
    (["models.tiny.hidden=0"], "models.tiny.hidden=0: "),
    (["models.new.kind=local"], "models.new.path: Field required"),
    (["stages.distilled.do=play"], "stages.distilled.do='play': one of collect, train"),
    (["stages=[1]"], "stages.0=1: must hold keys and values"),
    (["stages=[{do: collect}]"], "stages.0.name: Field required"),
    (["env=foo"], "env='foo': must hold keys and values"),
    (["evaluate.modes=[best]"], "evaluate.modes.0='best': Input should be 'sampled' or 'greedy'"),
    # names
    (["name=../elsewhere"], "name='../elsewhere': "),
    (["name=''"], "name='': "),
    (["stages.distilled.name=a b"], "stages.a b.name='a b': "),
    (["stages.distilled.name=demos"], "stages.demos: this name is taken; choose another one"),
    (["stages.distilled.name=expert"], "stages.expert: this name is taken"),
    (["models.expert.layers=1"], "models.expert: this name is taken"),
    (["prompt=foo"], "prompt='foo': unknown preset; known: chat, bare, "),
    (["prompt={preset: [x]}"], "prompt=['x']: unknown preset; known: chat, bare, "),
    # references
    (
        ["stages.taught.data=demo"],
        "stages.taught.data='demo' names nothing before it; known: demos",
    ),
    (["stages.distilled.teacher=distilled"], "known: student, big, taught"),
    (["stages.distilled.teacher=expert"], "stages.distilled.teacher='expert' names nothing"),
    (["stages.demos.policy=taught"], "stages.demos.policy='taught' names nothing before it"),
    (["stages.distilled.init=demos"], "stages.distilled.init='demos' names nothing before it"),
    (["stages.distilled.init=taught"], "stages.distilled.model='student': taught trains 'big'"),
    (["stages.distilled.model=taught"], "stages.distilled.model='taught' names nothing"),
    (
        ["evaluate.policies=[who]"],
        "evaluate.policies='who' names nothing before it; known: student",
    ),
    # overrides themselves
    (["noequals"], "override='noequals': write key.path=value"),
    (["=3"], "override='=3': write key.path=value"),
    (["stages.nobody.lr=2"], "stages.nobody.lr='nobody': no stage of this name; known: demos, "),
    (["stages.distilled=3"], "stages.distilled=3: needs a key below the stage"),
    (["name.x=3"], "name.x='base': name is a value, not a section"),
    (["stages.distilled.lr=[1"], "stages.distilled.lr='[1': is not YAML: "),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[r[0][0] for r in REFUSED])
def test_refusals_name_key_value_and_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        base(*overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"a: [1\nb: {", "is not YAML: "),
        (b"- 1\n", "must hold keys and values"),
        (b"\xff\xfe\x00", "cannot be read (not UTF-8)"),
        (b"seed: x", "seed='x': "),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_stage() -> None:
    with pytest.raises(ConfigError, match="stage='x': no such stage; known: demos, taught"):
        base().stage("x")


# -- methods ---------------------------------------------------------------------------------------


def stage(**fields: Any) -> TrainStage:
    return TrainStage(**{"name": "one", "iterations": 1, "teacher": "big", **fields})


def verdict(chosen: TrainStage, *overrides: str) -> str | None:
    """Name of the constraint that the stage breaks, None when it breaks none."""
    config = base(*overrides)
    try:
        check(config, chosen, get(chosen.method).resolve(chosen.axes))
    except ConfigError as error:
        message = str(error)
        assert message.startswith("stages.one: ") and "\n" not in message
        return message[message.index("(") + 1 : message.index("): ")]
    return None


SFT: dict[str, Any] = {"method": "sft", "teacher": None, "data": "demos"}
GRPO: dict[str, Any] = {"method": "grpo", "teacher": None, "samples": 4}
B2F: dict[str, Any] = {"method": "tcod-b2f", "guide": "demos"}
LOSS: dict[str, Any] = {"coupling": "loss"}

SELF: dict[str, Any] = {"source": "self"}
LIVE: dict[str, Any] = {"source": "self", "update": "live"}
HINT: dict[str, Any] = {"kind": "gold", "reader": "actor"}
OWN: dict[str, Any] = {"method": "lightning-opd", "data": "own"}

BROKEN: dict[str, list[dict[str, Any]]] = {
    "teacher": [
        {"teacher": None},
        {"method": "kd-sft", "teacher": None},
        {"method": "kd", "teacher": None, "axes": {"scorer": SELF}},
    ],
    "no teacher": [
        {**GRPO, "teacher": "big"},
        {**SFT, "teacher": "big"},
        {"method": "skill-sd", "samples": 2},
    ],
    "base": [{"base": "taught"}, {**SFT, "base": "taught"}],
    "data": [
        {**SFT, "data": None},
        {"data": "demos"},
        {"method": "gkd"},
        {"method": "lightning-opd"},
    ],
    "cached": [{**OWN, "data": "demos"}, {**OWN, "init": "taught", "model": "big"}],
    "turns": [{**SFT, "turns": 100}, {**OWN, "turns": 100}],
    "fixed": [{"axes": {"start": {"kind": "fixed"}}}],
    "K3": [
        {**GRPO, "axes": {"start": {"kind": "f2b"}}},
        {**GRPO, "axes": {"start": {"kind": "fixed", "turns": 2}}},
    ],
    "K4": [
        {"method": "tcod-b2f"},
        {"guide": "demos"},
        {"method": "tcod-f2b", "guide": "demos"},
        {"method": "opsd", "teacher": None},
        {"method": "pi-opsd", "teacher": None, "samples": 2},
        {"axes": {"context": {"kind": "demonstrations"}}},
        {"method": "skill-sd", "teacher": None, "samples": 2, "guide": "demos"},
    ],
    "start": [
        {"method": "kd", "axes": {"start": {"kind": "f2b"}}},
        {**SFT, "axes": {"start": {"kind": "fixed", "turns": 1}}},
        {"method": "gkd", "data": "demos", "axes": {"start": {"kind": "f2b"}}},
    ],
    "K5": [
        {**GRPO, "samples": 1},
        {"method": "sdpo", "teacher": None},
        {"method": "uni-opd"},
        {"guide": "demos", "axes": {"context": HINT, "group": {"edit": "hint"}}},
    ],
    "K6": [
        {"axes": {"also": [{}]}},
        {"samples": 2, "axes": {"reward": {"kind": "grpo"}, "also": [{"coupling": "anchor"}]}},
        {"axes": {"also": [{}], "signal": {"route": "failure"}}},
    ],
    "K7": [
        {"axes": {"signal": {"coupling": "reward"}}},
        {"axes": {"signal": {"coupling": "anchor"}}},
        {"axes": {"signal": {"coupling": "magnitude"}}},
    ],
    "K8": [
        {"method": "kd", "axes": {"signal": {"divergence": "k1", "coupling": "advantage"}}},
        {"data": "demos", "axes": {"actor": "mixed"}},
        {**SFT, "samples": 2, "axes": {"reward": {"kind": "grpo"}}},
    ],
    "K10": [{"axes": {"signal": LOSS}}, {"axes": {"also": [LOSS]}}],
    "coupling": [
        {"axes": {"signal": {"divergence": "jsd"}}},
        {"axes": {"signal": {"divergence": "k2"}}},
        {"method": "rlad", "samples": 2, "axes": {"signal": {"divergence": "k3"}}},
        {"method": "pi-opsd", "teacher": None, "samples": 2, "guide": "demos",
         "axes": {"signal": {"divergence": "k2"}}},
    ],
    "target": [
        {"axes": {"signal": {"share": 0.5, "rest": "student"}}},
        {"axes": {"signal": {"share": {"from": 1, "to": 0.5}, "rest": "student"}}},
    ],
    "K11": [
        {"sampling": {"temperature": 0.7}},
        {"sampling": {"top_p": 0.9}},
        {"sampling": {"top_k": 5}},
        {**GRPO, "sampling": {"temperature": 0.0}},
        {"method": "gkd", "data": "demos", "sampling": {"temperature": 0.9}},
    ],
    "K12": [
        {"teacher": None, "axes": {"scorer": LIVE}},
        {"teacher": None, "axes": {"scorer": {"source": "self", "update": "sync"}}},
        {**SFT, "axes": {"scorer": LIVE, "signal": {"divergence": "tvd"}}},
        {"teacher": None, "axes": {
            "scorer": LIVE,
            "signal": {"divergence": "jsd", "coupling": "loss", "share": 0.5, "rest": "student"},
        }},
    ],
    "context": [
        {"guide": "demos", "axes": {"context": HINT}},
        {**GRPO, "guide": "demos", "axes": {"context": {"kind": "gold"}}},
        {"guide": "demos", "axes": {"actor": "informed", "context": {"kind": "gold"}}},
    ],
    "informed": [
        {"axes": {"actor": "informed"}},
        {"samples": 2, "axes": {"group": {"edit": "hint"}}},
        {"samples": 2, "axes": {
            "actor": "informed", "context": {"kind": "sibling", "reader": "actor"},
        }},
    ],
    "episodes": [
        {"method": "kd", "samples": 2, "axes": {"context": {"kind": "sibling"}}},
        {**OWN, "axes": {"context": {"kind": "feedback"}}},
        {"method": "gkd", "data": "demos", "axes": {"context": {"kind": "skill"}}},
    ],
    "edit": [
        {**OWN, "samples": 2, "guide": "demos",
         "axes": {"scorer": {"stored": False}, "context": HINT, "group": {"edit": "hint"}}},
        {"method": "pi-distill", "teacher": None, "samples": 2, "guide": "demos",
         "axes": {"group": {"edit": "hint"}}},
    ],
    "pass_rate": [
        {"method": "kd", "axes": {"task": {"weight": "pass_rate"}}},
        {**SFT, "axes": {"task": {"weight": "pass_rate"}}},
    ],
    "stored": [
        {"axes": {"scorer": {"stored": True}}},
        {**OWN, "axes": {"also": [{"divergence": "jsd", "coupling": "loss"}]}},
        {**OWN, "teacher": None, "axes": {"scorer": SELF}},
    ],
    "analyser": [{"analyser": "grounded"}, {**SFT, "analyser": "big"}],
    "rules": [
        {**GRPO, "axes": {"weight": {"step": "sod"}}},
        {**SFT, "axes": {"weight": {"token": "entropy"}}},
    ],
    "weights": [
        {**GRPO, "axes": {"task": {"weight": "pass_rate"}}},
        {**GRPO, "axes": {"weight": {"trajectory": "signed"}}},
        {"method": "rlad", "samples": 2, "axes": {"weight": {"step": "sod"}}},
        {"method": "rlad", "samples": 2, "axes": {"weight": {"normalise": "mean1"}}},
    ],
    "shift": [{"method": "opd-exact", "samples": 2, "axes": {"weight": {"shift": "margin"}}}],
    "nothing": [{"teacher": None, "axes": {"signal": {"divergence": "none"}}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields"), [(name, case) for name, cases in BROKEN.items() for case in cases]
)
def test_constraints_refuse(name: str, fields: dict[str, Any]) -> None:
    assert verdict(stage(**fields)) == name


def test_every_constraint_has_a_case() -> None:
    assert [constraint.name for constraint in CONSTRAINTS] == list(BROKEN) == list(ACCEPTED)
    assert len({constraint.name for constraint in CONSTRAINTS}) == len(CONSTRAINTS)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda one: one.name)
def test_a_refusal_names_keys_values_and_remedy(constraint: Constraint) -> None:
    chosen = stage(**BROKEN[constraint.name][0])
    with pytest.raises(ConfigError) as refused:
        check(base(), chosen, get(chosen.method).resolve(chosen.axes))
    before, _, after = str(refused.value).partition(f" ({constraint.name}): ")
    assert after == constraint.remedy
    parts = before.removeprefix("stages.one: ")
    for key in constraint.keys.split(", "):
        value = {"teacher": chosen.teacher, "data": chosen.data, "turns": chosen.turns,
                 "samples": chosen.samples, "guide": chosen.guide}.get(key)  # fmt: skip
        assert f"{key}={value!r}" in parts if value is not None else key in parts
    assert "object at" not in before and "<" not in before


REWARDED: dict[str, Any] = {"samples": 2, "axes": {"reward": {"kind": "grpo"}}}
ACCEPTED: dict[str, list[dict[str, Any]]] = {
    "teacher": [{}, {"method": "kd", "axes": {"scorer": SELF}}],
    "no teacher": [SFT, GRPO, {**SFT, "teacher": "big", "axes": {"signal": {"divergence": "tvd"}}}],
    "base": [
        {"base": "taught", "axes": {"signal": {"share": 1.25}}},
        {"base": "taught", "axes": {"signal": {"share": {"from": 1, "to": 1.25}}}},
        {"method": "exopd"},
    ],
    "data": [{"method": "gkd", "data": "demos"}, {**SFT, "method": "redi", "data": "own"}],
    "cached": [OWN, {**OWN, "data": "demos", "method": "kd", "axes": {"actor": "data"}}],
    "turns": [{"turns": 100}, {"method": "kd", "turns": 100}],
    "fixed": [{"axes": {"start": {"kind": "fixed", "turns": 3}}}],
    "K3": [{**REWARDED, **B2F}, {**REWARDED, "method": "tcod-f2b"}],
    "K4": [B2F, {"method": "opsd", "teacher": None, "guide": "demos"}],
    "start": [{"method": "pi-distill", "teacher": None, "guide": "demos", "samples": 2,
               "axes": {"start": {"kind": "f2b"}}}],
    "K5": [{"method": "sdpo", "teacher": None, "samples": 2}, {"method": "uni-opd", "samples": 2}],
    "K6": [
        {"axes": {"signal": {"route": "failure"}, "also": [{"route": "success"}]}},
        {"axes": {"also": [{"divergence": "k2", "coupling": "loss"}]}},
    ],
    "K7": [{"method": "rlad", "samples": 2}, {"method": "rlsd", "teacher": None, "samples": 2,
                                              "guide": "demos"}],
    "K8": [OWN, {"method": "pi-distill", "teacher": None, "samples": 2, "guide": "demos"}],
    "K10": [{"axes": {"signal": {"divergence": d, **LOSS}}} for d in ("k2", "k3", "rho_k3")],
    "coupling": [
        {**REWARDED, "axes": {"reward": {"kind": "grpo"}, "signal": {"coupling": "reward"}}},
        {"axes": {"signal": {"divergence": "jsd", **LOSS}}},
    ],
    "target": [
        {"axes": {"signal": {"share": 0.5, "rest": "student", "divergence": "tvd", **LOSS}}},
        {"method": "taid"},
    ],
    "K11": [
        {**SFT, "sampling": {"temperature": 0.5}},
        {"method": "kd", "sampling": {"temperature": 0.5}},
        {**OWN, "sampling": {"top_k": 5}},
    ],
    "K12": [
        {"teacher": None, "axes": {"scorer": SELF}},
        {"teacher": None, "axes": {"scorer": {**SELF, "update": "sync", "every": 2}}},
        {"teacher": None, "guide": "demos", "axes": {"scorer": LIVE, "context": {"kind": "gold"}}},
        {"teacher": None, "axes": {"scorer": LIVE, "signal": {"share": 1.5}}},
    ],
    "context": [
        {"guide": "demos", "axes": {"context": {"kind": "gold"}}},
        {"guide": "demos", "axes": {"actor": "informed", "context": HINT}},
        {**SFT, "guide": "demos", "axes": {"context": HINT}},
    ],
    "informed": [
        {"axes": {"actor": "informed", "context": {"kind": "skill", "reader": "actor"}}},
        {"method": "kepo", "samples": 2, "guide": "demos"},
    ],
    "episodes": [
        {"samples": 2, "axes": {"context": {"kind": "sibling"}}},
        {"method": "skill-sd", "teacher": None, "samples": 2},
        {"axes": {"context": {"kind": "feedback"}}},
    ],
    "edit": [
        {"samples": 2, "guide": "demos", "axes": {"context": HINT, "group": {"edit": "hint"}}},
    ],
    "pass_rate": [{"method": "paced"}, {**OWN, "axes": {"task": {"weight": "pass_rate"}}}],
    "stored": [{**OWN, "axes": {"also": [{"divergence": "nll", **LOSS}]}}],
    "analyser": [
        {"method": "skill-sd", "teacher": None, "samples": 2, "analyser": name}
        for name in ("grounded", "big", "taught")
    ],
    "rules": [{**SFT, "method": "redi"}, {"method": "sod", "samples": 2}],
    "weights": [
        {"axes": {"weight": {"step": "sod"}}},
        {"method": "opd-exact", "axes": {"task": {"weight": "pass_rate"}}},
        {"samples": 2, "method": "rlad", "axes": {"weight": {"shift": "margin"}}},
    ],
    "shift": [{**GRPO, "axes": {"weight": {"shift": "margin"}}}],
    "nothing": [GRPO, SFT],
}  # fmt: skip
"""What is nearest to the broken cases and can work."""


@pytest.mark.parametrize("fields", [case for cases in ACCEPTED.values() for case in cases])
def test_what_can_work_passes(fields: dict[str, Any]) -> None:
    assert verdict(stage(**fields)) is None


REMARKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "K10": (
        {"axes": {"signal": {"divergence": "k3", **LOSS}}},
        {"axes": {"signal": {"divergence": "rho_k3", **LOSS}}},
    ),
    "K3": ({**REWARDED, "method": "tcod-f2b"}, {**REWARDED, **B2F}),
    "pass_rate": ({"method": "paced"}, {"method": "paced", "samples": 2}),
}
"""What is remarked on, and its neighbour that is not."""


def test_every_remark_is_made_where_it_belongs() -> None:
    assert [remark.name for remark in REMARKS] == list(REMARKED)
    for remark in REMARKS:
        found = []
        for fields in REMARKED[remark.name]:
            chosen = stage(**fields)
            assert verdict(chosen) is None
            found.append(remarks(base(), chosen, get(chosen.method).resolve(chosen.axes)))
        (line,), none = found
        assert line.startswith("stages.one: ") and line.endswith(
            f"({remark.name}): {remark.remedy}"
        )
        assert none == []


def test_the_runs_sampling_counts_unless_the_stage_has_its_own() -> None:
    plain = {"temperature": 1.0}
    assert verdict(stage(), "sampling.temperature=0.5") == "K11"
    assert verdict(stage(sampling=plain), "sampling.temperature=0.5") is None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves_and_validates(name: str, tmp_path: Path) -> None:
    method = get(name)
    axes = method.resolve({})
    assert axes == method.axes and method.name == name
    assert Axes.model_validate(axes.model_dump(by_alias=True)) == axes
    assert method.resolve(axes.model_dump(by_alias=True)) == axes, "what is shown can be written"
    fields: dict[str, Any] = {"name": "one", "method": name, "iterations": 1, "samples": 2}
    if axes.needs_teacher:
        fields["teacher"] = "taught"
    if axes.actor in ("data", "mixed", "cached"):
        fields["data"] = "own" if axes.actor == "cached" else "demos"
    if axes.start.kind == "b2f" or axes.context.kind in ("gold", "actions"):
        fields["guide"] = "demos"
    values = micro(tmp_path)
    values["stages"] += [{"name": "own", "do": "collect", "policy": "student"}, fields]
    validate(load(values))
    assert configure(name).stage("distilled").do == "train"


def test_axes_are_overridden_one_by_one() -> None:
    axes = get("tcod-f2b").resolve({"start": {"eta": 6}, "over": "token"})
    assert axes.start.eta == 6 and axes.start.kind == "f2b" and axes.over == "token"
    assert axes.signal == get("tcod-f2b").axes.signal


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"ovr": "turn"}, "axes.ovr='turn': unknown key; did you mean over?"),
        ({"start": {"knd": "f2b"}}, "axes.start.knd='f2b': unknown key; did you mean kind?"),
        ({"signal": {"divergence": "kl"}}, "axes.signal.divergence='kl': Input should be 'none', "),
        ({"start": {"eta": 0}}, "axes.start.eta=0: Input should be greater than or equal to 1"),
        ({"reward": 3}, "axes.reward=3: "),
        (
            {"signal": {"support": "both"}},
            "axes.signal.support='both': Input should be 'student' or",
        ),
        ({"signal": {"share": "half"}}, "axes.signal.share='half': "),
        ({"also": [{"divergense": "k1"}]}, "axes.also.0.divergense='k1': unknown key"),
        ({"context": {"text": "no place"}}, "axes.context.text='no place': "),
        ({"weight": {"step": {"delta": "wide"}}}, "delta='wide': "),
        # schedules: wrong ends, wrong places, wrong shapes
        (
            {"signal": {"beta": {"from": 0, "to": 2}}},
            "axes.signal.beta=2.0: Input should be less than or equal to 1",
        ),
        (
            {"signal": {"temperature": {"from": 0, "to": 1}}},
            "axes.signal.temperature=0.0: Input should be greater than 0",
        ),
        ({"signal": {"cof": {"from": 0, "to": 1}}}, "axes.signal.cof=1.0: unknown key; did you"),
        ({"schedules": {"signal.cof": {"from": 0, "to": 1}}}, "axes.signal.cof=1.0: unknown key"),
        ({"sgnal": {"coef": {"from": 0, "to": 1}}}, "did you mean signal?"),
        ({"schedules": {"sgnal.coef": {"from": 0, "to": 1}}}, "axes.sgnal"),
        ({"schedules": {"also.0.coef": {"from": 0, "to": 1}}}, "axes.also"),
        ({"schedules": {"shared": {"from": 0, "to": 1}}}, "axes.shared"),
        ({"shared": {"from": 0, "to": 1}}, "axes.shared"),
        ({"scorer": {"stored": {"from": 0, "to": 1}}}, "axes.scorer.stored"),
        ({"over": {"from": 0, "to": 1}}, "axes.over"),
        ({"signal": {"coef": {"from": 0, "to": "x"}}}, "axes.schedules.signal.coef.to='x': "),
        ({"signal": {"coef": {"from": 0, "to": 1, "ovr": 1}}}, "ovr=1: unknown key"),
        (
            {"signal": {"coef": {"from": 0, "to": 1, "over": 0}}},
            "axes.schedules.signal.coef.over=0: Input should be greater than 0",
        ),
        (
            {"signal": {"coef": {"from": 0, "to": 1, "shape": "wave"}}},
            "axes.schedules.signal.coef.shape='wave': ",
        ),
    ],
)
def test_axes_refuse(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        get("opd").resolve(axes)
    assert message in str(refused.value) and "\n" not in str(refused.value)


RULES: list[tuple[dict[str, Any], str]] = [
    ({"weight": {"step": "sop"}}, "axes.weight.step='sop': one of none, sod"),
    ({"weight": {"token": "sod"}}, "axes.weight.token='sod': one of none, entropy"),
    (
        {"signal": {"route": "sucess"}},
        "axes.signal.route='sucess': one of none, success, failure, above",
    ),
    (
        {"weight": {"step": {"name": "sod", "dleta": 1}}},
        "axes.weight.step.dleta=1.0: no parameter of sod; known",
    ),
    (
        {"weight": {"step": {"name": "sod", "parameters": {"dleta": 1}}}},
        "axes.weight.step.dleta=1.0: no parameter of sod; known: delta, eps",
    ),
    (
        {"weight": {"step": {"name": "sod", "dleta": {"from": 0, "to": 1}}}},
        "axes.weight.step.dleta=0.0: no parameter of sod; known: delta, eps",
    ),
    (
        {"signal": {"route": {"name": "failure", "tau": 1}}},
        "axes.signal.route.tau=1.0: no parameter of failure; known: none",
    ),
]


@pytest.mark.parametrize(("axes", "message"), RULES)
def test_rules_refuse(axes: dict[str, Any], message: str) -> None:
    chosen = stage(axes=axes)
    with pytest.raises(ConfigError) as refused:
        check(base(), chosen, get("opd").resolve(axes))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_rules_can_be_written_in_three_ways() -> None:
    written = (
        {"name": "sod", "delta": 0.5},
        {"name": "sod", "parameters": {"delta": 0.5}},
    )
    found = [get("opd").resolve({"weight": {"step": value}}).weight.step for value in written]
    assert found[0] == found[1] == Choice(name="sod", parameters={"delta": 0.5})
    plain = get("opd").resolve({"weight": {"step": "sod"}}).weight.step
    assert plain == get("sod").axes.weight.step == Choice(name="sod")
    # On top of a preset: its rule's parameters one by one; another rule begins anew.
    assert get("sod").resolve({"weight": {"step": {"delta": 0.5}}}).weight.step == found[0]
    scope = Method("x", "", get("scope").resolve({"weight": {"trajectory": {"tau": 2}}}))
    kept = scope.resolve({"weight": {"trajectory": {"sign": -1}}}).weight.trajectory
    assert kept == Choice(name="perplexity", parameters={"tau": 2, "sign": -1})
    other = scope.resolve({"weight": {"trajectory": {"name": "signed"}}}).weight.trajectory
    assert other == Choice(name="signed")
    assert not get("sod").resolve({"weight": {"step": "none"}}).weight.step


def test_schedules_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump(BASE).replace(
        "lr: 0.001", "lr: 0.001\n  axes: {signal: {coef: {from: 0, to: 1, over: 0.5}}}"
    )
    path.write_text(text)
    key = "stages.distilled.axes.signal.coef"
    configs = [
        load(path),
        base(f"{key}={{from: 0, to: 1, over: 0.5}}"),
        base(f"{key}.from=0", f"{key}.to=1", f"{key}.over=0.5"),
        base("stages.distilled.axes.schedules={signal.coef: {from: 0, to: 1, over: 0.5}}"),
    ]
    wanted = Schedule.model_validate({"from": 0, "to": 1, "over": 0.5})
    for config in configs:
        distilled = config.stage("distilled")
        assert isinstance(distilled, TrainStage)
        axes = get("opd").resolve(distilled.axes)
        assert axes.schedules == {"signal.coef": wanted}
        assert axes.signal.coef == 0, "a stage begins where its schedule does"
        assert [axes.at({"signal.coef": wanted.value(p)}).signal.coef for p in (0.25, 1)] == [
            0.5,
            1,
        ]
        assert load(config.model_dump(mode="json")) == config
    assert len({config.fingerprint for config in configs[:3]}) == 1 != configs[0] != base()


def test_presets_are_overridden_key_by_key() -> None:
    taid, moving = get("taid"), {"from": 0.2, "to": 0.9}
    assert taid.resolve({"signal": {"share": 0.7}}).schedules == {}, "a number ends the schedule"
    assert taid.resolve({"signal": {"share": 0.7}}).signal.share == 0.7
    other = taid.resolve({"signal": {"share": moving}})
    assert other.schedules == {"signal.share": Schedule.model_validate(moving)}
    assert (other.signal.share, other.signal.rest) == (0.2, "student")
    both = taid.resolve({"signal": {"coef": moving}})
    assert set(both.schedules) == {"signal.share", "signal.coef"}
    assert taid.resolve({"signal": {"divergence": "jsd"}}).schedules == taid.axes.schedules
    sdpo = get("sdpo").resolve({"scorer": {"rate": 0.5}, "context": {"feedback": "never"}})
    assert sdpo.scorer == get("sdpo").axes.scorer.model_copy(update={"rate": 0.5})
    assert sdpo.context.kind == "sibling" and sdpo.signal == get("sdpo").axes.signal
    scope = get("scope").resolve({"also": []})
    assert scope.also == () and scope.signal == get("scope").axes.signal


def test_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"method='opdd': unknown method; did you mean opd\?"):
        get("opdd")


# -- what only the environment knows ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.demos.split=trian"],
            "stages.demos.split='trian': this environment has the splits",
        ),
        (["evaluate.split=test"], "evaluate.split='test': this environment has the splits train"),
        (["evaluate.tasks=99"], "evaluate.tasks=99: split report of this environment has only"),
        (["stages.distilled.axes.signal.coupling=loss"], "stages.distilled: axes.signal"),
        (["stages.distilled.method=opdd"], "method='opdd': unknown method; did you mean opd?"),
        (["env.id=tests.toy:Corridr"], "env"),
        (["env.id=agentdistill/Nowhere-v0"], "env"),
        (["env.options.lenght=3"], "lenght"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(load(micro(tmp_path), overrides))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not any(tmp_path.iterdir())


def test_a_tune_split_that_is_too_small_is_refused(tmp_path: Path) -> None:
    overrides = ["stages.distilled.evaluate_every=1", "evaluate.tasks=7"]
    validate(load(micro(tmp_path), overrides))
    with pytest.raises(ConfigError, match=r"evaluate\.tasks=9: split tune"):
        validate(load(micro(tmp_path), [overrides[0], "evaluate.policies=[]", "evaluate.tasks=9"]))


def test_defaults_are_checked_too() -> None:
    """A default that breaks its own rule would only be found by whoever relies on it."""
    for section in (RunConfig(), EnvConfig(), TinyModel(), LocalModel(path="x")):
        assert type(section).model_validate(section.model_dump()) == section


COMBINATIONS = tuple(
    itertools.product(
        ("student", "teacher", "data"),
        ("full", "f2b", "b2f", "fixed"),
        ("none", "nll", "k1", "k2", "k3", "rho_k3", "reverse_kl", "forward_kl", "jsd", "tvd"),
        ("advantage", "loss"),
        ("none", "grpo"),
    )
)
"""The axes that constraints are about."""


def test_every_combination_is_accepted_or_refused_by_name() -> None:
    """Those that are accepted run: see test_training.py."""
    verdicts = [verdict(combination(*point)) for point in COMBINATIONS]
    assert set(verdicts) <= {None, *BROKEN}
    assert None in verdicts


def combination(actor: str, start: str, divergence: str, coupling: str, reward: str) -> TrainStage:
    """A stage at this point of the space, with everything that the point asks for."""
    teacher = actor == "teacher" or divergence not in ("none", "nll")
    return stage(
        teacher="big" if teacher else None,
        data="demos" if actor == "data" else None,
        guide="demos" if start == "b2f" else None,
        samples=2,
        axes={
            "actor": actor,
            "start": {"kind": start, "turns": 2},
            "signal": {"divergence": divergence, "coupling": coupling},
            "reward": {"kind": reward},
        },
    )


def test_what_is_allowed_and_often_not_meant_is_said_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:

    changes = [
        "stages.distilled.axes.signal.divergence=k3",
        "stages.distilled.axes.signal.coupling=loss",
    ]
    with validate(load({**base().model_dump(mode="json"), "output": str(tmp_path)}, changes)):
        pass
    (record,) = caplog.records
    assert record.name == "agentdistill"
    assert "K10" in record.message and "rho_k3" in record.message
