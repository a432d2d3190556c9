"""safety/prompts/borderline.jsonl and benign.jsonl: what their README promises, no near-duplicates, nothing of the training data."""

import difflib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from posttrain.config import DataEntry
from posttrain.data import load_entry, prompt_key
from safety.evaluate import kind_of
from safety.taxonomy import CATEGORIES

ROOT = Path(__file__).parent.parent
PROMPTS, RECIPES = ROOT / "safety" / "prompts", ROOT / "recipes" / "data"
KEYS = {"borderline": {"prompt", "looks_like", "kind"}, "benign": {"prompt", "topic"}}
NEAR = 0.85


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user_turns(row: dict) -> list[str]:
    said = row.get("prompt") or row["messages"]
    return [said] if isinstance(said, str) else [turn["content"] for turn in said if turn["role"] == "user"]


def promised(name: str) -> tuple[dict[str, int], int]:
    """The README's section on a file: {value: count} of the lines "`value` count", and its number of rows with several user turns."""
    text = (PROMPTS / "README.md").read_text(encoding="utf-8").split(f"## {name}.jsonl\n", 1)[1].split("\n## ", 1)[0]
    counts = {value: int(count) for value, count in re.findall(r"`(\w+)` (\d+)", text)}
    return counts, int(re.search(r"(\d+) rows? (?:have|has) several user turns", text)[1])


def near_duplicates(texts: list[str], others: list[str]) -> list[tuple[str, str]]:
    """Pairs of a text and an earlier or other one with a difflib ratio above NEAR; lengths and letter counts rule most pairs out first."""
    letters = {text: Counter(text.lower()) for text in [*texts, *others]}
    found = []
    for i, text in enumerate(texts):
        matcher = difflib.SequenceMatcher(autojunk=False)
        matcher.set_seq2(text.lower())
        for other in [*texts[:i], *others]:
            total = len(text) + len(other)
            if 2 * min(len(text), len(other)) < NEAR * total or 2 * (letters[text] & letters[other]).total() < NEAR * total:
                continue
            matcher.set_seq1(other.lower())
            if matcher.ratio() > NEAR:
                found.append((text, other))
    return found


@pytest.fixture(scope="module", params=list(KEYS))
def name(request) -> str:
    return request.param


def test_files_are_read_as_prompts(name):
    loaded = load_entry(DataEntry(path=f"{name}.jsonl", format="prompt"), PROMPTS, 0, "test")
    raw = rows(PROMPTS / f"{name}.jsonl")
    assert not loaded.findings and not loaded.skipped and loaded.kind == "prompt"
    assert len(loaded.items) == loaded.rows == len(raw)
    assert len({prompt_key(item) for item in loaded.items}) == len(raw), "two rows open alike: a split by prompt would join them"
    assert {kind_of(item) for item in loaded.items} == {"borderline" if name == "borderline" else "helpful"}
    assert all(item.meta == {k: row[k] for k in KEYS[name] - {"prompt"}} for item, row in zip(loaded.items, raw, strict=True))


def test_rows_hold_the_promised_keys_and_counts(name):
    raw = rows(PROMPTS / f"{name}.jsonl")
    labels = KEYS[name] - {"prompt"}
    assert all(row.keys() == KEYS[name] for row in raw)
    counts, several = promised(name)
    assert counts == Counter(row[label] for row in raw for label in labels)
    assert several == sum(len(user_turns(row)) > 1 for row in raw)


def test_borderline_covers_the_three_categories_evenly_from_any_row_on():
    raw = rows(PROMPTS / "borderline.jsonl")
    assert len(raw) >= 210, "the paper's borderline set has 210 (section 4.2.3)"
    assert {row["looks_like"] for row in raw} == set(CATEGORIES)
    for start in range(0, len(raw), 3):  # `rows: n` takes the first n
        assert {row["looks_like"] for row in raw[start:start + 3]} == set(CATEGORIES)


def test_no_near_duplicates_in_the_files_or_with_the_training_data():
    ours = [turn for file in KEYS for row in rows(PROMPTS / f"{file}.jsonl") for turn in user_turns(row)]
    theirs = [turn for path in sorted(RECIPES.glob("*.jsonl")) for row in rows(path) for turn in user_turns(row)]
    assert len(theirs) > 1000
    assert near_duplicates(ours, theirs) == []


def test_near_duplicates_are_found():
    assert near_duplicates(["Why is the sky blue?"], ["Why is the sea blue?", "Who built Stonehenge?"]) == [("Why is the sky blue?", "Why is the sea blue?")]
    assert near_duplicates(["How do I peel a pear?", "How do I peel a peach"], []) == [("How do I peel a peach", "How do I peel a pear?")]
