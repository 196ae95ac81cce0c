"""Exported rows say what the trajectories say, and the usual tools can read them."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.crash import POINTS, VARIABLE
from agentdistill.errors import ConfigError, MissingExtraError, StoreError
from agentdistill.export import PROVENANCE, TOKENS, export, features, messages, row
from agentdistill.records import Actor, Author, Trajectory, Turn
from agentdistill.store import Store
from tests.store_worker import ROOT, batch
from tests.test_codec import trajectories


def text_only() -> Trajectory:
    """An expert's episode: no streams, one response without text, nothing in provenance."""
    turn = batch(0)[0].turns[0]
    silent = replace(turn, index=1, text="", actions=("up", "down"), span=None)
    return replace(batch(0)[0], streams=(), turns=(turn, silent), provenance={}, end="horizon")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_a_row_by_hand(run_dir: Path) -> None:
    source = batch(4, turns=2)[1]
    edit = replace(source, derived_from=source.id, score=math.nan)
    assert export([source, edit], run_dir / "deep" / "out.jsonl") == 2
    first, second = read_jsonl(run_dir / "deep" / "out.jsonl")
    response = "<think>right</think><action>right</action>"
    assert first["messages"] == [
        {"role": "system", "content": "Push the boxes."},
        {"role": "user", "content": "#####\n#@$.#\n#####\nturn 0"},
        {"role": "assistant", "content": response},
        {"role": "user", "content": "#####\n#@$.#\n#####\nturn 1"},
        {"role": "assistant", "content": response},
    ]
    stream = source.streams[0]
    assert first["ids"] == [stream.ids.tolist()]
    assert first["authors"] == [[*[0] * 48, *[1] * 48] * 2]
    assert first["kinds"] == [[*[0] * 48, *[2] * 48] * 2]
    assert first["logps"] == [[*[None] * 48, *[-0.1] * 48] * 2]
    assert {name: first[name] for name in PROVENANCE} == {
        "id": source.id,
        "task_id": source.task.key,
        "env": "agentdistill/Sokoban-v0",
        "split": "train",
        "group": "g4",
        "attempt": 1,
        "success": True,
        "score": 1.0,
        "reward": -0.2,
        "reward_valid": True,
        "end": "success",
        "source_run": "r",
        "policy": "student",
        "derived_from": None,
        "n_turns": 2,
        "goal": "",
    }
    assert (second["derived_from"], second["score"]) == (first["id"], None)
    assert list(first) == ["messages", *TOKENS, *PROVENANCE]


def test_expert_rows() -> None:
    found = row(text_only(), tokens=False)
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] * 2
    assert found["messages"][-1]["content"] == "up\ndown"
    assert (found["source_run"], found["reward_valid"]) == (None, False)
    assert list(found) == ["messages", *PROVENANCE]


def test_lone_surrogates_become_question_marks() -> None:
    turn = Turn(0, "a\ud83d\ude00b", Actor("x\udcff"), text="😀\n√")
    found = row(replace(text_only(), turns=(turn,)))
    assert [message["content"] for message in found["messages"]] == ["a??b", "😀\n√"]
    assert found["policy"] == "x?"


def test_policy_comes_from_provenance_first() -> None:
    source = batch(0)[0]
    assert row(replace(source, provenance={"policy": {"name": "x"}}))["policy"] == '{"name": "x"}'
    replayed = replace(source.turns[0], author=Author.REPLAY, actor=Actor("expert"))
    assert row(replace(source, turns=(source.turns[0], replayed)))["policy"] == "student"
    assert row(replace(source, turns=(replayed,)))["policy"] is None


def test_a_store_exports_what_is_committed(run_dir: Path) -> None:
    with Store(run_dir) as store:
        store.commit("train", 0, [store.write("train", 0, batch(0))], {})
        store.write("train", 1, batch(1))
        assert export(store, run_dir / "out.jsonl") == 2
        assert export(store.trajectories(committed=None), run_dir / "all.jsonl") == 4
    assert [found["group"] for found in read_jsonl(run_dir / "all.jsonl")] == ["g0"] * 2 + [
        "g1"
    ] * 2


@settings(max_examples=25, deadline=None)
@given(st.lists(trajectories, max_size=3))
def test_hostile_rows_are_valid(tmp_path_factory, items: list[Trajectory]) -> None:
    path = tmp_path_factory.mktemp("hostile") / "out"
    export(items, path)
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    export(items, path, "parquet")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    assert table.schema.names == ["messages", *TOKENS, *PROVENANCE]
    for one, other, item in zip(found, table.to_pylist(), items, strict=True):
        assert exact(one) == exact(other) == exact(row(item))
        system = bool(item.provenance.get("instruction"))
        assert len(one["messages"]) == system + 2 * len(item.turns)
        kept = [np.where(np.isfinite(s.logp), s.logp, np.nan).tobytes() for s in item.streams]
        assert [np.array(logp, np.float32).tobytes() for logp in one["logps"]] == kept


def exact(found: dict) -> dict:
    """A row with its log-probabilities as the float32 that they are."""
    logps = [np.array(logp, np.float32).tobytes() for logp in found["logps"]]
    return {**found, "logps": logps}


# -- the tools that read it ------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_datasets_loads_it(run_dir: Path, format: str) -> None:
    import datasets

    items = [text_only(), *batch(0), *batch(1, size=300)]
    path = run_dir / f"out.{format}"
    assert export(items, path, format) == 303
    kind = {"jsonl": "json", "parquet": "parquet"}[format]
    cache = str(run_dir / "cache")
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
    assert loaded.column_names == ["messages", *TOKENS, *PROVENANCE]
    typed = datasets.load_dataset(
        kind, data_files=str(path), split="train", features=features(), cache_dir=cache + "2"
    )
    assert typed.features == features()
    for place in (0, 1, 302):
        for dataset in (loaded, typed):
            assert exact(dataset[place]) == exact(row(items[place]))
    assert (format == "parquet") == (loaded.features == features())


def test_typed_loading_survives_columns_that_begin_empty(run_dir: Path) -> None:
    import datasets

    long = replace(text_only(), turns=(Turn(0, "x" * 200_000, Actor("expert"), text="y"),))
    export([long] * 60 + batch(0), run_dir / "out.jsonl")
    loaded = datasets.load_dataset(
        "json",
        data_files=str(run_dir / "out.jsonl"),
        split="train",
        features=features(),
        cache_dir=str(run_dir / "cache"),
    )
    assert loaded[60]["ids"] == row(batch(0)[0])["ids"]
    assert loaded[60]["source_run"] == "r"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # trl's own use of transformers
def test_trl_trains_on_messages(run_dir: Path) -> None:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    words = {word: number for number, word in enumerate(["<eos>", "<unk>", "user", "right"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role + ' ' + message.content }} <eos> {% endfor %}"
    )
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    export(batch(0, size=4), run_dir / "out.jsonl")
    dataset = datasets.load_dataset(
        "json", data_files=str(run_dir / "out.jsonl"), split="train", cache_dir=str(run_dir / "c")
    )
    config = SFTConfig(
        output_dir=str(run_dir / "sft"), max_steps=1, report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    assert math.isfinite(trainer.train().training_loss)


# -- refusals --------------------------------------------------------------------------------------


def test_unknown_format_names_the_known_ones(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"format='csv'.*jsonl.*parquet"):
        export([], run_dir / "out", "csv")
    assert os.listdir(run_dir) == []


def test_missing_packages_are_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"Parquet export needs .*agentdistill\[train\]"):
        export(batch(0), run_dir / "out", "parquet")
    with pytest.raises(MissingExtraError, match=r"agentdistill\[train\]"):
        features()
    assert export(batch(0), run_dir / "out.jsonl") == 2
    assert os.listdir(run_dir) == ["out.jsonl"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_full_disk_leaves_the_old_file(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    path = run_dir / "out"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="free space"):
            export(batch(0), path, format)
    assert (os.listdir(run_dir), path.read_text()) == (["out"], "old")


@pytest.mark.parametrize("point", [name for name in POINTS if name.startswith("export:")])
def test_killed_while_exporting(run_dir: Path, point: str) -> None:
    path = run_dir / "out.jsonl"
    path.write_text("old")
    code = (
        "from agentdistill.export import export; from tests.store_worker import batch;"
        f"export(batch(0), {str(path)!r})"
    )
    environment = {**os.environ, VARIABLE: f"{point}:1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert done.returncode == -signal.SIGKILL
    if point == "export:after-rename":
        assert [found["attempt"] for found in read_jsonl(path)] == [0, 1]
    else:
        assert path.read_text() == "old"


def test_messages_alternate() -> None:
    roles = [message["role"] for message in messages(batch(0, turns=3)[0])]
    assert roles == ["system", *["user", "assistant"] * 3]
