"""The invented catalogue: WebShop's formats, the same bytes everywhere, goals worth searching for.

One checker reads both our catalogue and, where it is there, the official one, so that it can only
ask for what is true of both.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.webshop import generate as module
from agentdistill.envs.webshop import vocabulary
from agentdistill.envs.webshop.generate import ATTRIBUTES_FILE, FAMILY, PRODUCTS_FILE, generate
from agentdistill.errors import ConfigError, StoreError

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ROOT.parent / "shared" / "data" / "webshop"

Catalogue = tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]

FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "full_description": (str,),
    "pricing": (str,),
    "images": (list,),
    "product_category": (str,),
    "average_rating": (str, int, float),
    "small_description": (list, str),
    "customization_options": (dict, str),
    "asin": (str,),
    "category": (str,),
    "query": (str,),
    "page": (int,),
}
MAY_BE = {"model": (str,), "instructions": (list,)}
VALUES: tuple[dict[str, tuple[type, ...]], ...] = (
    {
        "is_selected": (bool,),
        "url": (str, type(None)),
        "value": (str,),
        "price_string": (str,),
        "price": (int, float),
        "image": (str, type(None)),
    },
    {"is_selected": (bool,), "is_available": (bool,), "value": (str,), "asin": (str,)},
)
PRICE = re.compile(r"(\$\d+\.\d{1,2}( \$\d+\.\d{1,2})?)?")
CATEGORIES = {"beauty", "electronics", "fashion", "garden", "grocery"}


def read(folder: Path, suffix: str = "") -> Catalogue:
    items, notes = (
        json.loads((folder / name.replace(".json", f"{suffix}.json")).read_text())
        for name in (PRODUCTS_FILE, ATTRIBUTES_FILE)
    )
    return items, notes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("catalogue") / "new" / "folder"
    generate(folder)
    assert sorted(path.name for path in folder.iterdir()) == [ATTRIBUTES_FILE, PRODUCTS_FILE]
    return read(folder)


def of_types(record: dict[str, Any], types: dict[str, tuple[type, ...]]) -> bool:
    return list(record) != [] and all(type(record[key]) in types[key] for key in record)


def check_format(items: list[dict[str, Any]], notes: dict[str, dict[str, Any]]) -> None:
    assert list(notes) and len({item["asin"] for item in items}) == len(items)
    assert set(notes) == {item["asin"] for item in items}
    for item in items:
        assert set(item) - set(MAY_BE) == set(FIELDS)
        assert of_types(item, {**FIELDS, **MAY_BE}), item
        assert re.fullmatch(r"B0[0-9A-Z]{8}", item["asin"])
        assert PRICE.fullmatch(item["pricing"]) and item["category"] in CATEGORIES
        assert item["images"] and item["query"] == item["query"].lower() != ""
        assert item["average_rating"] == "" or 0 < item["average_rating"] <= 5
        bullets = item["small_description"]
        assert isinstance(bullets, str) or all(type(line) is str for line in bullets)
        check_options(item["customization_options"])
    for note in notes.values():
        check_note(note)


def check_options(options: Any) -> None:
    if not isinstance(options, dict):
        assert options == ""
        return
    for name, values in options.items():
        assert name == name.title().replace("Of", "of") and (values is None or values)
        for value in values or ():
            assert any(set(value) == set(shape) and of_types(value, shape) for shape in VALUES)


def check_note(note: dict[str, Any]) -> None:
    assert list(note) in (["attributes"], ["attributes", "instruction", "instruction_attributes"])
    assert all(text == text.lower() and " " in text for text in note["attributes"])
    if "instruction" in note:
        assert note["instruction"].startswith("Find me ")
        assert 0 < len(note["instruction_attributes"]) <= len(note["attributes"])
        assert set(note["instruction_attributes"]) <= set(note["attributes"])
        assert all(text in note["instruction"] for text in note["instruction_attributes"])


def text_of(item: dict[str, Any]) -> str:
    bullets = item["small_description"]
    lines = [bullets] if isinstance(bullets, str) else bullets
    return " ".join([item["name"], item["full_description"], *lines]).lower()


def group_of(item: dict[str, Any]) -> vocabulary.Group:
    (group,) = [g for g in vocabulary.GROUPS if item["query"] in {line.query for line in g.lines}]
    return group


def special(group: vocabulary.Group) -> tuple[str, ...]:
    return (*group.traits, *group.parts, *group.uses)


# -- the format ------------------------------------------------------------------------------------


def test_the_files_have_webshops_format(made: Catalogue) -> None:
    assert len(made[0]) == 1000
    check_format(*made)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"needs the official sample in {OFFICIAL}")
def test_the_official_files_pass_the_same_checks() -> None:
    check_format(*read(OFFICIAL, "_1000"))


def test_every_oddity_of_the_official_files_occurs(made: Catalogue) -> None:
    items, notes = made
    options = [item["customization_options"] for item in items]
    values = [v for o in options if o for axis in o.values() for v in axis or ()]
    pictured = [value for value in values if "url" in value]
    seen = {
        "no price": any(item["pricing"] == "" for item in items),
        "price range": any(" " in item["pricing"] for item in items),
        "no options": "" in options,
        "axis without values": any(None in o.values() for o in options if o),
        "bullets in one string": any(isinstance(i["small_description"], str) for i in items),
        "no description": any(item["full_description"] == "" for item in items),
        "model": any("model" in item for item in items),
        "no attributes": any(note["attributes"] == [] for note in notes.values()),
        "no instruction": any(n["attributes"] and "instruction" not in n for n in notes.values()),
        "every type of rating": {type(i["average_rating"]) for i in items} == {str, int, float},
        "value without link": any(value["url"] is None for value in pictured),
        "value without picture": any(value["image"] is None for value in pictured),
        "own price": {type(value["price"]) for value in pictured} == {int, float},
        "sold out": any(not value.get("is_available", True) for value in values),
    }
    assert [name for name, found in seen.items() if not found] == []


# -- goals that must be searched for ---------------------------------------------------------------


def test_a_text_names_its_own_attributes_and_no_others(made: Catalogue) -> None:
    items, notes = made
    for item in items:
        found = {name for name in special(group_of(item)) if name in text_of(item)}
        noun = {text for text in notes[item["asin"]]["attributes"] if text not in found}
        assert len(found) == 3 and all(text in text_of(item) for text in noun)
        if notes[item["asin"]]["attributes"]:
            assert found < set(notes[item["asin"]]["attributes"])


def test_attributes_and_kinds_are_shared_by_several_products(made: Catalogue) -> None:
    items, notes = made
    counts = Counter(text for note in notes.values() for text in note["attributes"])
    assert min(counts.values()) >= 3
    kinds = Counter(item["query"] for item in items)
    assert len(kinds) == sum(len(group.lines) for group in vocabulary.GROUPS)
    assert min(kinds.values()) >= 3 * FAMILY


def test_families_differ_in_attributes_then_options_then_price(made: Catalogue) -> None:
    items, _ = made
    families: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        brand, series = item["name"].split()[0], re.search(r"- (\w+) Col", item["name"])[1]
        families[brand, series, item["query"]].append(item)
    assert {len(family) % FAMILY for family in families.values()} == {0}
    for family in families.values():
        sets = [
            tuple(name for name in special(group_of(item)) if name in text_of(item))
            for item in family
        ]
        assert len(set(sets)) == len(sets) * (FAMILY - 1) // FAMILY
        rest = {(i["pricing"], json.dumps(i["customization_options"])) for i in family}
        assert len(rest) == len(family)


def test_most_goals_are_met_by_few_products(made: Catalogue) -> None:
    items, notes = made
    goals = Counter(
        (item["query"], *sorted(notes[item["asin"]]["instruction_attributes"]))
        for item in items
        if "instruction" in notes[item["asin"]]
    )
    assert max(goals.values()) <= 6
    assert sum(goals.values()) > 800


def test_attributes_and_options_can_be_told_apart_by_a_fuzzy_match() -> None:
    fuzz = pytest.importorskip("rapidfuzz.fuzz")
    for group in vocabulary.GROUPS:
        for pool in (special(group), *(values for _, values in group.axes)):
            assert len(set(pool)) == len(pool)
            for one, other in combinations([text.lower() for text in pool], 2):
                assert fuzz.token_set_ratio(one, other) <= 85, (one, other)
                assert one not in other and other not in one


def test_names_of_brands_and_plain_sentences_hold_no_attribute() -> None:
    plain = " ".join(
        [
            *vocabulary.PLAIN_LINES,
            *vocabulary.SERIES,
            *vocabulary.TRAIT_LINES,
            *vocabulary.PART_LINES,
            *vocabulary.USE_LINES,
            *(line.noun for group in vocabulary.GROUPS for line in group.lines),
        ]
    ).lower()
    assert [name for group in vocabulary.GROUPS for name in special(group) if name in plain] == []


# -- the same everywhere ---------------------------------------------------------------------------


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    generate(tmp_path / "here", 130, seed=3)
    code = (
        "from pathlib import Path; from agentdistill.envs.webshop.generate import generate;"
        f"generate(Path({str(tmp_path / 'there')!r}), 130, seed=3)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    for name in (PRODUCTS_FILE, ATTRIBUTES_FILE):
        here, there = ((tmp_path / place / name).read_bytes() for place in ("here", "there"))
        assert here == there


def test_seed_size_and_version_change_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(folder: str, products: int = 40, seed: int = 0) -> list[str]:
        generate(tmp_path / folder, products, seed)
        return [item["name"] for item in read(tmp_path / folder)[0]]

    first = names("a")
    assert names("a") == first and len(first) == 40
    assert set(names("b", seed=1)).isdisjoint(first)
    assert len(names("c", products=7)) == 7
    monkeypatch.setattr(module, "VERSION", "another")
    assert names("d") != first


def test_asins_stay_distinct_in_a_large_catalogue() -> None:
    numbers = range(0, 30_000_000, 997)
    assert len({module._asin(5, number) for number in numbers}) == len(numbers)


# -- files -----------------------------------------------------------------------------------------


def test_a_crash_leaves_the_old_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, 20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = module._product

    def dies(seed: int, number: int) -> Any:
        if number == 7:
            raise KeyboardInterrupt
        return real(seed, number)

    monkeypatch.setattr(module, "_product", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, 20, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="products=0: must be at least 1"):
        generate(tmp_path, 0)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/below"):
        generate(tmp_path / "file" / "below", 5)
