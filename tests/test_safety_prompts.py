"""safety/prompts/adversarial.jsonl and adversarial_multi.jsonl: what their README promises, no near-duplicates, nothing of the training data."""

import re
import unicodedata
from collections import Counter
from itertools import product

import pytest
from test_safety_prompts_benign import PROMPTS, RECIPES, near_duplicates, rows, user_turns

from posttrain.config import DataEntry
from posttrain.data import load_entry, prompt_key
from safety.evaluate import kind_of
from safety.taxonomy import CATEGORIES, VECTORS, category_of, vector_of

FILES = ("adversarial", "adversarial_multi")
TOPICS = {
    "illicit": {"corruption", "drugs", "extortion", "fraud", "hacking", "money_laundering", "obstruction", "sabotage", "terrorism", "theft",
                "trafficking", "weapons"},
    "hateful_harmful": {"abuse", "defamation", "discrimination", "eating_disorder", "harassment", "hate_speech", "self_harm", "violence"},
    "unqualified_advice": {"financial", "legal", "medical"},
}
CELLS = set(product(CATEGORIES, VECTORS))


@pytest.fixture(scope="module", params=FILES)
def name(request) -> str:
    return request.param


def readme(name: str) -> str:
    """The README's section on a file, on one line."""
    text = (PROMPTS / "README.md").read_text(encoding="utf-8").split(f"## {name}.jsonl\n", 1)[1].split("\n## ", 1)[0]
    return " ".join(text.split())


def test_files_are_read_as_adversarial_prompts(name):
    loaded = load_entry(DataEntry(path=f"{name}.jsonl", format="prompt", safety_prompt=True), PROMPTS, 0, "test")
    raw = rows(PROMPTS / f"{name}.jsonl")
    assert not loaded.findings and not loaded.skipped and loaded.kind == "prompt"
    assert len(loaded.items) == loaded.rows == len(raw)
    assert len({prompt_key(item) for item in loaded.items}) == len(raw), "two rows open alike: a split by prompt would join them"
    assert {kind_of(item) for item in loaded.items} == {"adversarial"}
    assert [(category_of(item), vector_of(item)) for item in loaded.items] == [(row["category"], row["vector"]) for row in raw]


def test_rows_hold_the_promised_keys_and_turns(name):
    for row in rows(PROMPTS / f"{name}.jsonl"):
        assert list(row) == ["prompt", "category", "vector", "topic"]
        assert row["vector"] in VECTORS and row["topic"] in TOPICS[row["category"]]
        if name == "adversarial":
            assert isinstance(row["prompt"], str) and row["prompt"] == row["prompt"].strip() != ""
        else:
            assert 2 <= len(user_turns(row)) <= 4 and all(turn.keys() == {"role", "content"} for turn in row["prompt"])


def test_counts_in_the_readme(name):
    raw, said = rows(PROMPTS / f"{name}.jsonl"), readme(name)
    assert len(raw) == int(re.search(r"(\d+) (?:single prompts|dialogues)", said)[1])
    counts = {value: int(count) for value, count in re.findall(r"`(\w+)` (\d+)", said)}
    assert counts == Counter(row[key] for row in raw for key in ("category", "vector", "topic"))
    assert int(re.search(r"every vector in (\d+) rows", said)[1]) * len(CELLS) == len(raw)
    if name == "adversarial_multi":
        turns = Counter(len(user_turns(row)) for row in raw)
        assert (turns[2], turns[3], turns[4]) == tuple(map(int, re.search(r"(\d+) rows have 2 user turns, (\d+) have 3 and (\d+) have 4", said).groups()))


def test_every_category_meets_every_vector_evenly_from_any_block_on(name):
    raw = rows(PROMPTS / f"{name}.jsonl")
    assert len(raw) >= (252 if name == "adversarial" else 63) and set(product(TOPICS, VECTORS)) == CELLS
    for start in range(0, len(raw), len(CELLS)):  # `rows: n` takes the first n
        assert {(row["category"], row["vector"]) for row in raw[start:start + len(CELLS)]} == CELLS


def test_non_english_rows_are_not_in_english():
    """In Latin script none has a common English word; four other scripts appear."""
    texts = [" ".join(user_turns(row)) for name in FILES for row in rows(PROMPTS / f"{name}.jsonl") if row["vector"] == "non_english"]
    english = {"the", "and", "how", "what", "you", "with", "is", "of"}
    assert not [text for text in texts if english & set(re.findall(r"\w+", text.lower()))]
    scripts = Counter(script for text in texts for script in {unicodedata.name(c).split()[0] for c in text if c.isalpha()})
    assert all(scripts[script] >= 2 for script in ("ARABIC", "CJK", "CYRILLIC", "DEVANAGARI"))


def test_no_near_duplicates_in_the_files_or_with_the_training_data():
    ours = [user_turns(row)[0] for name in FILES for row in rows(PROMPTS / f"{name}.jsonl")]
    theirs = [user_turns(row)[0] for path in sorted(RECIPES.glob("*.jsonl")) for row in rows(path)]
    assert len(theirs) > 1000
    assert near_duplicates(ours, theirs) == []
