"""Catalogues are read as the original reads them, built once, and refused when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.webshop import catalogue as catalogues
from agentdistill.envs.webshop import data, formats
from agentdistill.envs.webshop.catalogue import Catalogue, opened
from agentdistill.envs.webshop.goals import NO_CAP, mixed, places
from agentdistill.errors import ConfigError


def record(asin: str, **fields: Any) -> dict[str, Any]:
    """A product in the official format."""
    given = {
        "asin": asin,
        "name": f"Cup {asin}",
        "full_description": "A cup.",
        "small_description": ["Holds tea", "Blue"],
        "pricing": "$12.99",
        "category": "garden",
        "query": " Cups ",
        "product_category": "Home \u203a Cups",
        "customization_options": "",
        "images": ["x"],
    }
    return {**given, **fields}


SIZES = {"Size": [{"value": " 6/8 oz "}, {"value": "L"}], "Colour": [{"value": "RED"}], "Kit": None}
NOTES = {
    "B1": {"attributes": ["tea"], "instruction": "Find me cups", "instruction_attributes": ["tea"]},
    "B2": {"attributes": []},
}
PEOPLE = {
    "B2": [
        {"instruction": "a cup.", "instruction_attributes": ["x"], "instruction_options": ["L"]},
        {"instruction": "no", "instruction_attributes": [], "instruction_options": []},
    ],
    "B404": [{"instruction": "?", "instruction_attributes": ["x"], "instruction_options": []}],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTDISTILL_HOME", str(tmp_path / "cache"))
    opened.cache_clear()


def written(folder: Path, products: Any, notes: Any = NOTES, people: Any = None) -> data.Files:
    folder.mkdir(exist_ok=True)
    (folder / "items_shuffle.json").write_text(json.dumps(products))
    (folder / "items_ins_v2.json").write_text(json.dumps(notes))
    if people is not None:
        (folder / "items_human_ins.json").write_text(json.dumps(people))
    files = data.find(folder)
    assert files is not None
    return files


def test_fields(tmp_path: Path) -> None:
    products = [
        record("B1", customization_options=SIZES, pricing="$1,009.50 $12 $13"),
        record("B2", small_description="One text", pricing="", customization_options=None),
        record("B1", name="a repetition"),
        record("B12345678901"),
        record("nan"),
        record("B3", pricing="free", full_description=None),
    ]
    shop = opened(written(tmp_path / "data", products))
    assert [shop.product(row).asin for row in range(len(shop))] == ["B1", "B2", "B3"]
    one, two, three = (shop.product(row) for row in range(3))
    assert one.options == {"size": ["6 | 8 oz", "l"], "colour": ["red"]}
    assert (one.price_tag, two.price_tag, three.price_tag) == (
        "$1009.5 to $12.0",
        "$100.0",
        "$100.0",
    )
    assert one.query == "cups"
    assert one.document == "cup b1 a cup. holds tea size: 6 | 8 oz, l, and colour: red"
    assert two.bullets == ("One text",)
    assert (one.attributes, two.attributes, three.attributes) == (("tea",), (), formats.UNKNOWN)
    assert [shop.row(asin) for asin in ("B2", "B4", "", "\ud800")] == [1, None, None, None]


def test_goals(tmp_path: Path) -> None:
    twice = {"Size": [{"value": "S"}, {"value": "s"}, {"value": "M"}], "Hue": [{"value": "red"}]}
    shop = opened(written(tmp_path / "data", [record("B1", customization_options=twice)]))
    goals = shop.goals["synthetic"]
    made = [goals[place] for place in range(len(goals)) if not goals.repeats(place)]
    assert len(goals) == 3
    assert sorted(goal.options["size"] for goal in made) == ["m", "s"]
    cap = made[0].price_upper
    assert cap in (30.0, 40.0, 50.0)
    words = f"Find me cups with hue: red, and size: m, and price lower than {cap:.2f} dollars"
    assert words in [goal.instruction for goal in made]


def test_human_goals(tmp_path: Path) -> None:
    products = [record("B1"), record("B2", pricing="$985.00")]
    shop = opened(written(tmp_path / "data", products, people=PEOPLE))
    (goal,) = (shop.goals["human"][place] for place in range(len(shop.goals["human"])))
    assert (goal.asin, goal.instruction, goal.options) == ("B2", "a cup", ["L"])
    assert goal.price_upper == NO_CAP


def test_what_people_wrote_does_not_change_the_data(tmp_path: Path) -> None:
    without = written(tmp_path / "a", [record("B1")])
    with_people = written(tmp_path / "b", [record("B1")], people=PEOPLE)
    assert without.data == with_people.data
    assert without.key != with_people.key
    caps = [opened(files).goals["synthetic"][0].price_upper for files in (without, with_people)]
    assert caps[0] == caps[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "near character 0"),
        ('[{"asin": "B1"', "damaged"),
        ('[{"asin": "B1"}', "damaged"),
        ('{"B1": 1}', "damaged"),
        ("[nonsense]", "damaged"),
        ("[1, 2]", "no product"),
        ("[]", "no product"),
    ],
)
def test_damaged_products(tmp_path: Path, text: str, reason: str) -> None:
    files = written(tmp_path / "data", [])
    files.products.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        opened(data.Files(files.products, files.attributes))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "cache" / "webshop-index").glob("[!.]*")] == []


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({"customization_options": {"Size": ["S"]}}, NOTES),
        ({"customization_options": {"Size": 3}}, NOTES),
        ({}, {"B1": 3}),
        ({}, {"B1": {"attributes": 3}}),
    ],
)
def test_fields_of_impossible_types(tmp_path: Path, fields: dict[str, Any], notes: Any) -> None:
    files = written(tmp_path / "data", [record("B1", **fields)], notes)
    with pytest.raises(ConfigError, match="asin='B1'"):
        opened(files)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    files = written(tmp_path / "data", [record("B1")])
    files.attributes.write_bytes(b'{"B1": "\xff"}')
    with pytest.raises(ConfigError, match="damaged"):
        opened(files)


def test_pieces_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK", 7)
    files = written(tmp_path / "data", [record(f"B{n}", name="né" * n) for n in range(5)])
    names = [raw["name"] for raw in formats.read_products(files.products)]
    assert names == ["né" * n for n in range(5)]
    notes = formats.read_attributes(files.attributes)
    assert {key: json.loads(text) for key, text in notes.items()} == NOTES


def test_damaged_index(tmp_path: Path) -> None:
    files = written(tmp_path / "data", [record("B1")])
    folder = opened(files).folder
    opened.cache_clear()
    (folder / "terms.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match="delete it"):
        opened(files)


def test_what_a_killed_build_left_is_replaced(tmp_path: Path) -> None:
    files = written(tmp_path / "data", [record("B1")])
    left = tmp_path / "cache" / "webshop-index" / f".{files.key}-{catalogues.LAYOUT}.tmp"
    left.mkdir(parents=True)
    (left / "products.jsonl").write_text("half a li")
    assert len(opened(files)) == 1
    assert not left.exists()


_OPEN = (
    "import sys; from pathlib import Path; from agentdistill.envs.webshop import catalogue, data; "
    "built = []; real = catalogue.build; "
    "catalogue.build = lambda *a: (built.append(1), real(*a)); "
    "shop = catalogue.opened(data.find(Path(sys.argv[1]))); print(len(built), shop.search('cup'))"
)


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    written(tmp_path / "data", [record(f"B{number}") for number in range(200)])
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "data")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].split(maxsplit=1) for process in started]
    assert sorted(words[0] for words in said) == ["0", "0", "1"]
    assert len({words[1] for words in said}) == 1


def test_large_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    path.write_text("content")
    quick = data.hash_of(path)
    monkeypatch.setattr(data, "QUICK", 0)
    assert data.hash_of(path) == quick
    monkeypatch.setattr(data.hashlib, "file_digest", None)
    assert data.hash_of(path) == quick
    path.write_text("other content")
    with pytest.raises(TypeError):
        data.hash_of(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    files = written(tmp_path / "data", [record("B1")])
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="AGENTDISTILL_HOME"):
            opened(files)
    finally:
        tmp_path.chmod(0o700)


def test_cache_that_is_a_file(tmp_path: Path) -> None:
    files = written(tmp_path / "data", [record("B1")])
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="AGENTDISTILL_HOME"):
        opened(files)


def test_find(tmp_path: Path) -> None:
    assert data.find(tmp_path) is None
    assert data.find(tmp_path / "nowhere") is None
    (tmp_path / "items_shuffle_1000.json").write_text("[]")
    with pytest.raises(ConfigError, match="items_ins_v2"):
        data.find(tmp_path)
    (tmp_path / "items_ins_v2_1000.json").write_text("{}")
    for place in (tmp_path, tmp_path / "items_shuffle_1000.json"):
        files = data.find(place)
        assert files is not None
        assert files.attributes.name == "items_ins_v2_1000.json"


@pytest.mark.parametrize("number", [0, 1, 9, 100, 4999, 5000, 6910, 12087])
def test_splits_part_the_goals(number: int) -> None:
    parts = [places(split, number) for split in ("test", "dev", "train")]
    assert [place for part in parts for place in part] == list(range(number))
    if number >= 5000:
        assert [part.start for part in parts] == [0, 500, 1500]


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
def test_mixed_is_a_permutation(size: int) -> None:
    numbers = range(5, 5 + size)
    orders = [list(mixed(numbers, seed)) for seed in range(5)]
    assert all(sorted(order) == list(numbers) for order in orders)
    assert size < 7 or len(set(map(tuple, orders))) == 5


def test_products_are_read_where_they_lie(tmp_path: Path) -> None:
    shop = opened(written(tmp_path / "data", [record(f"B{n}") for n in range(500)]))
    assert isinstance(shop, Catalogue)
    for row in range(500):
        assert shop.product(row).asin == f"B{row}"
    assert shop.product.cache_info().currsize == catalogues.PRODUCTS_KEPT
