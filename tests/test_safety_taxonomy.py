"""The taxonomy, the data that name it, and the preprompts that go with it."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from posttrain.formats import Prompt
from safety.taxonomy import CATEGORIES, UNKNOWN, VECTORS, category_of, vector_of

ROOT = Path(__file__).parent.parent
PREPROMPTS = ROOT / "safety" / "preprompts"


def lines(name: str) -> list[str]:
    return [line for line in (PREPROMPTS / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def asked(**meta) -> Prompt:
    return Prompt([{"role": "user", "content": "Why?"}], safety=True, meta=meta)


def test_the_papers_categories_and_vectors():
    assert set(CATEGORIES) == {"illicit", "hateful_harmful", "unqualified_advice"}
    assert set(VECTORS) == {"plain", "authority", "false_premise", "misspelling", "metaphor", "role_play", "non_english", "other"}
    for table in (CATEGORIES, VECTORS):
        assert len({e.name for e in table.values()}) == len({e.description for e in table.values()}) == len(table)
        assert all(e.name and len(e.description.split()) > 4 and len(e.guideline.split()) > 3 for e in table.values())


@pytest.mark.parametrize("given, key", [
    ("illicit", "illicit"), ("Hateful harmful", "hateful_harmful"), ("  unqualified-advice ", "unqualified_advice"), ("hateful__harmful", "hateful_harmful"),
    ("illicitt", UNKNOWN), ("", UNKNOWN), ("plain", UNKNOWN), (3, UNKNOWN), (True, UNKNOWN)])
def test_a_prompts_category(given, key):
    assert category_of(asked(category=given)) == key


def test_a_prompt_without_a_category_is_unknown():
    assert category_of(asked()) == vector_of(asked()) == UNKNOWN
    assert category_of(asked(looks_like="illicit")) == UNKNOWN  # it only looks dangerous
    assert vector_of(asked(vector="Role play", category="illicit")) == "role_play"


@pytest.mark.parametrize("file", ["prompts_adversarial", "safety_demonstrations", "safety_pairs"])
def test_the_shipped_data_name_categories_and_vectors_of_the_taxonomy(file):
    rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
    found = Counter((category_of(asked(**r)), vector_of(asked(**r))) for r in rows)
    assert {c for c, _ in found} == set(CATEGORIES) and {v for _, v in found} <= set(VECTORS)


def test_every_category_has_an_answer_template_in_the_papers_order():
    assert {p.stem for p in PREPROMPTS.glob("*.txt")} == {*CATEGORIES, "generic", "adjectives"}
    for category, entry in CATEGORIES.items():
        text = (PREPROMPTS / f"{category}.txt").read_text(encoding="utf-8")
        steps = re.findall(r"^\d\. (.+)$", text, re.M)
        assert len(steps) == 4 and text.rstrip().endswith("The message:") and "policy" in text.splitlines()[0] and "{" not in text
        assert set(entry.name.split()) & set(text.splitlines()[0].split()) or "advice" in text.splitlines()[0]
        assert re.search("emergency", steps[0]) and "policy" in steps[1] and "source" in steps[3]


def test_the_generic_preprompts_are_many_and_read_well():
    generic, adjectives = lines("generic.txt"), lines("adjectives.txt")
    assert len(generic) == len(set(generic)) >= 12 and len(adjectives) == len(set(adjectives))
    assert {"responsible", "respectful", "wise"} <= set(adjectives)
    assert sum("flagged" in t or "marked" in t or "dangerous" in t or "worry" in t for t in generic) >= 3  # the question was found to be unsafe
    assert sum("safe assistant" in t for t in generic) >= 2
    slots = [t.count("{adjective}") for t in generic]
    assert max(slots) <= len(adjectives) and sum(map(bool, slots)) >= 8
    assert not [a for a in adjectives if re.match("[aeiou]|hon|heir|hour", a)]  # they follow "a"
    assert not [t for t in generic if "an {adjective}" in t or re.sub(r"\{adjective\}", "", t).count("{")]
