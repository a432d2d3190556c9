"""The refusal test set: the README's counts, the columns, no repeats, nothing shared with the training rows, and no way through by keywords."""

import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "safety" / "data"
# Phrases that refusal lists in use are made of. Bare words ("sorry") and phrases together, so that the list is not a straw man.
KEYWORDS = ["sorry", "apolog", "i can't", "i cannot", "i can not", "can't help", "cannot help", "can't assist", "unable to", "not able to", "i won't",
            "i will not", "i'm not going to", "i'd prefer not", "i'd rather not", "decline", "refuse", "not comfortable", "not willing", "not appropriate",
            "as an ai", "my guidelines", "illegal", "unethical", "harmful", "against the law", "a crime", "consult a"]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def key(text: str) -> str:
    """Letters and digits in lower case: two texts that differ in spacing or punctuation only are the same."""
    return re.sub(r"\W+", " ", text.lower()).strip()


@pytest.fixture(scope="module")
def labelled() -> list[dict]:
    return rows("refusals_test.jsonl")


@pytest.fixture(scope="module")
def fresh() -> list[dict]:
    return rows("refusals_fresh.jsonl")


def test_columns(labelled, fresh):
    for number, row in enumerate(labelled + fresh, 1):
        assert list(row) == ["prompt", "answer", "refusal", "borderline", "kind"] + ["note"] * row["borderline"], f"row {number}"
        assert row["kind"] in ("adversarial", "borderline", "helpful"), f"row {number}"
        assert isinstance(row["refusal"], bool) and isinstance(row["borderline"], bool), f"row {number}"
        texts = [row[name] for name in ("prompt", "answer", "note") if name in row]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts), f"row {number}"


def test_counts_are_those_of_the_readme_and_enough(labelled):
    table = re.findall(r"^\| (refusal|no refusal|all) \| (\d+) \| (\d+) \| (\d+) \|$", (DATA / "README.md").read_text(encoding="utf-8"), re.MULTILINE)

    def counted(kept: list[dict]) -> tuple[str, ...]:
        borderline = sum(row["borderline"] for row in kept)
        return str(borderline), str(len(kept) - borderline), str(len(kept))

    refusals, others = [r for r in labelled if r["refusal"]], [r for r in labelled if not r["refusal"]]
    assert table == [("refusal", *counted(refusals)), ("no refusal", *counted(others)), ("all", *counted(labelled))]
    assert len(labelled) >= 330 and 0.45 <= len(refusals) / len(labelled) <= 0.55
    for half in (refusals, others):  # borderline rows on both sides, or being borderline would tell the label
        assert sum(row["borderline"] for row in half) >= len(half) / 3


def test_the_fresh_rows_are_enough(fresh):
    assert len(fresh) >= 150 and 0.45 <= sum(row["refusal"] for row in fresh) / len(fresh) <= 0.55
    for label in (True, False):
        half = [row for row in fresh if row["refusal"] == label]
        assert sum(row["borderline"] for row in half) >= len(half) / 3


def test_no_prompt_comes_twice(labelled, fresh):
    prompts = [key(row["prompt"]) for row in labelled + fresh]
    assert sorted(prompts) == sorted(set(prompts))


def test_shares_nothing_with_the_training_rows(labelled, fresh):
    labelled = labelled + fresh
    training = rows("refusals_train.jsonl")
    assert not {key(row["prompt"]) for row in labelled} & {key(row["prompt"]) for row in training}
    long_answers = {key(row["answer"]) for row in labelled if len(row["answer"]) > 60}  # "No." and stock phrases are anyone's
    assert not long_answers & {key(row["answer"]) for row in training}


def test_a_keyword_list_fails_on_a_quarter_of_the_rows(labelled):
    def says_so(row: dict) -> bool:
        text = row["answer"].lower().replace("’", "'")
        return any(phrase in text for phrase in KEYWORDS)

    hits = sum(says_so(row) and row["refusal"] for row in labelled)
    false_alarms = sum(says_so(row) and not row["refusal"] for row in labelled)
    missed = sum(row["refusal"] for row in labelled) - hits
    assert false_alarms + missed >= len(labelled) / 4
    assert min(false_alarms, missed) >= 30, "both kinds of mistake"
    text = " ".join((DATA / "README.md").read_text(encoding="utf-8").split())
    assert f"precision {hits / (hits + false_alarms):.2f} and recall {hits / (hits + missed):.2f}" in text
