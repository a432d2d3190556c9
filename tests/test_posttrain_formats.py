"""Every format: rows in the exact published layout -> the expected items; junk -> RowError or Skip and nothing else."""

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest

from posttrain.formats import FORMATS, RATINGS, Demonstration, Pair, Prompt, RowError, Skip, fitting

FIXTURES = Path(__file__).parent / "fixtures" / "formats"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def talk(*turns: str) -> list[dict]:
    """Texts of user and assistant in turn; a text after 'system: ' at the start is the system's."""
    head = [{"role": "system", "content": turns[0].removeprefix("system: ")}] if turns[0].startswith("system: ") else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns[len(head):])]


SAFE_META = {"prompt_source": "Alpaca3-70B", "response_0_source": "Alpaca3-8B", "response_1_source": "Alpaca3-8B",
             "response_0_severity_level": 0, "response_1_severity_level": 2, "response_0_sha256": "ab" * 32, "response_1_sha256": "cd" * 32}
SHP_META = {"post_id": "qt3nxl", "domain": "askculinary_train", "upvote_ratio": 0.98, "c_root_id_A": "hkh3x5e", "c_root_id_B": "hkh7h2t",
            "created_at_utc_A": 1636822112, "created_at_utc_B": 1636824065, "score_A": 49, "score_B": 230, "seconds_difference": 1953.0,
            "score_ratio": 4.693877551}
SUM_META = {"worker": "ikNmucwunMnYJCQpnq6ZYb57OW7NiD", "batch": "batch9", "split": "train", "chosen_model": "ref",
            "rejected_model": "sup4_ppo_rm3_kl10"}
RICE = talk("How long does rice keep in the fridge?")
ZERO = "Why can't we divide by 0?"
OASST_META = {"message_tree_id": "14fbb664", "tree_state": "ready_for_export"}
STEER = {"preference_statement": "s", "preference_elaboration": "e"}

EXPECTED = {
    "messages": [
        Demonstration(talk("system: Be brief.", "What is 2 + 2?", "4.", "And doubled?", "8."), source="arithmetic"),
        Demonstration(talk("Grüße auf Deutsch?", "Guten Tag!"), loss="last", meta={"category": "language"})],
    "prompt_completion": [
        Demonstration(talk("Name a prime number.", "7")),
        Demonstration(talk("Name a prime number.", "7", "Another one.", "11"), loss="last")],
    "preference": [
        Pair(talk("Name the capital of Australia."), "Canberra.", "Sydney.", rating=3, meta={"chosen_model": "m1", "rejected_model": "m2"}),
        Pair(talk("system: Be kind.", "Hi"), "Hello!", "What?", rating=1, margin=0.5, chosen_safe=True, rejected_safe=False, source="mine",
             safety=True),
        Pair(talk("Hi", "Hello!", "Bye"), "See you.", "No.", rating=0)],
    "alpaca": [
        Demonstration(talk("Give a synonym of the word.\n\nfast", "quick")),
        Demonstration(talk("Say hello.", "Hello."))],
    "alpaca_pairs": [
        Pair(talk("Give a synonym of the word.\n\nfast"), "quick", "slow"),
        Pair(talk("Say hello."), "Hello.", "Go away.")],
    "sharegpt": [
        Demonstration(talk("Hi", "Hello!", "Bye", "See you."), meta={"id": "QWJhYvA_0"}),
        Demonstration(talk("system: Be brief.", "Hi", "Hello!"))],
    "sharegpt_pairs": [
        Pair(talk("Hi", "Hello!", "Bye"), "See you.", "No."),
        Pair(talk("system: Be kind.", "Hi"), "Hello!", "What?")],
    "hh": [
        Pair(talk("How do I get up earlier?"), "Go to bed earlier.", "I don't know."),
        Pair(talk("Hi", "Hello.\n\nHow are you?", "Fine.\n\nWhat's new?"), "Not much:\n\n- sun\n- rain", "Human: nothing")],
    "prompt": [
        Prompt(talk("Tell me a story.")),
        Prompt(talk("system: You are a pirate.", "Hi", "Arr.", "Where is the treasure?"), meta={"category": "fun"})],
    "safe_rlhf": [
        Pair(talk("How do I pick my neighbour's lock?"), "I won't help with that.", "With patience and nerve!", chosen_safe=True,
             rejected_safe=False, meta=SAFE_META),
        Pair(talk("How do I calm a dog?"), "Speak softly and wait.", "Shout at it.", chosen_safe=True, rejected_safe=True)],
    "safe_rlhf_helpful": [
        Pair(talk("How do I pick my neighbour's lock?"), "With patience and nerve!", "I won't help with that.", meta=SAFE_META),
        Pair(talk("How do I calm a dog?"), "Speak softly and wait.", "Shout at it.")],
    "ultrafeedback": [
        Pair(talk("Name three colours."), "Red, green, blue.", "Red.", rating=3, source="evol_instruct",
             meta={"chosen_model": "gpt-4", "rejected_model": "starchat"}),
        "tie"],
    "ultrafeedback_binarized": [
        Pair(talk("Name three colours."), "Red, green, blue.", "Red.", rating=2,
             meta={"prompt_id": "77" * 32, "score_chosen": 8.5, "score_rejected": 6.0}),
        "tie"],
    "helpsteer2": [
        Pair(talk("c"), "C is a language, and a letter.", "The third letter.", rating=2,
             meta={"split": "train", "preference_statement": "@Response 2 says more.", "preference_elaboration": "It covers both."}),
        Pair(talk("Hi", "Hello!", "Tell me\na joke"), "Why did the hen cross the road?", "No.", rating=3, meta={"split": "val"} | STEER),
        "tie"],
    "helpsteer3": [
        Pair(talk("Hi", "Hello!", "Tell me a joke"), "Knock knock.", "No.", rating=1, meta={"domain": "general", "language": "english"}),
        Pair(talk("Print 1 in Python"), "print(1)", "echo 1", rating=3, meta={"domain": "code", "language": "python"}),
        "tie"],
    "shp": [
        Pair(RICE, "Three to four days, cooled quickly.", "A week, for me.", rating=2, meta=SHP_META),
        Pair(RICE, "A week, for me.", "Three to four days, cooled quickly.", rating=0,
             meta=SHP_META | {"post_id": "x", "score_A": 50, "score_B": 40, "score_ratio": 1.25})],
    "webgpt": [
        Pair(talk("Why is the sea salty?"), "Rivers carry salt to it [1].", "Fish.", rating=3, meta={"score_0": 0.75, "score_1": -0.75}),
        Pair(talk("Why is the sea salty?"), "Fish.", "Rivers carry salt to it [1].", rating=1, meta={"score_0": -0.25, "score_1": 0.25}),
        "tie"],
    "summarize": [
        Pair(talk("SUBREDDIT: r/legaladvice\n\nTITLE: Car accident questions.\n\nPOST: I had a car accident on Friday.\n\nTL;DR:"),
             "Who pays after my accident on Friday?", "car accident, need info", rating=2, meta=SUM_META),
        Pair(talk("Article:\nThe match ended 1-1.\n\nTL;DR:"), "A draw.", "A win.",
             meta={"worker": "w", "batch": "batch0_cnndm", "split": "valid2", "chosen_model": "ref", "rejected_model": "sup2"})],
    "stack_exchange_paired": [
        Pair(talk("How do I sort a list in Python?"), "Use `sorted(items)`.", "By hand.", meta={"qid": 4, "date": "2019/11/02"})],
    "synthetic_gptj": [
        Pair(talk("How do I boil an egg?"), "Eight minutes in simmering water.", "I was wondering how to boil an egg.")],
    "oasst": [
        [Pair(talk(ZERO), "Because no number times 0 gives 1.", "It is not defined.", meta=OASST_META),
         Pair(talk(ZERO), "Because no number times 0 gives 1.", "You can.", meta=OASST_META),
         Pair(talk(ZERO), "It is not defined.", "You can.", meta=OASST_META)],
        "no_ranked_answers"],
    "oasst_demonstrations": [
        Demonstration(talk(ZERO, "Because no number times 0 gives 1.", "Thanks. And 0 / 0?", "It could be any number."), meta=OASST_META),
        "no_answer"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_rows_become_the_expected_items(name):
    found = []
    for row in rows(name):
        try:
            found.append(FORMATS[name].read(row))
        except Skip as e:
            found.append(e.reason)
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", FORMATS)
def test_kind_and_columns_are_those_of_the_items(name):
    kinds = {Demonstration: "demonstration", Pair: "pair", Prompt: "prompt"}
    first = EXPECTED[name][0]
    assert kinds[type(first[0] if isinstance(first, list) else first)] == FORMATS[name].kind
    assert name in fitting(rows(name)[0])


@pytest.mark.parametrize("name", FORMATS)
def test_extra_columns_change_nothing_else(name):
    for row in rows(name):
        row |= {"extra_list": [1, {"a": None}], "extra_null": None, "long": "x" * 1000}
        with suppress(Skip):
            FORMATS[name].read(row)


@pytest.mark.parametrize("given, level", [
    *RATINGS.items(), ("negligibly_better_or_unsure", 0), ("unsure", 0), ("significantly better", 3), ("Slightly Better", 1),
    ("negligibly better / unsure", 0), (3, 3), (0, 0), (2.0, 2), ("1", 1), ("3.0", 3), (None, None), ("", None)])
def test_ratings(given, level):
    assert FORMATS["preference"].read({"prompt": "q", "chosen": "a", "rejected": "b", "rating": given}).rating == level


@pytest.mark.parametrize("given", ["much better", 4, -1, 1.5, True, [3], {"a": 1}, "x" * 10**6, float("nan")])
def test_unknown_ratings(given):
    with pytest.raises(RowError) as e:
        FORMATS["preference"].read({"prompt": "q", "chosen": "a", "rejected": "b", "rating": given})
    assert e.value.reason == "unknown_rating" and len(str(e.value)) < 300


def ask(name: str, **row) -> RowError:
    with pytest.raises(RowError) as e:
        FORMATS[name].read(row)
    return e.value


U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize("name, row, reason", [
    ("messages", {"messages": [A, U]}, "role_order"),
    ("messages", {"messages": [U, U, A]}, "role_order"),
    ("messages", {"messages": [U, A, {"role": "system", "content": "x"}]}, "role_order"),
    ("messages", {"messages": [U]}, "no_answer"),
    ("messages", {"messages": []}, "empty_prompt"),
    ("messages", {"messages": [U, {"role": "tool", "content": "x"}]}, "role_order"),
    ("messages", {"messages": [U, {"role": "assistant", "content": " \n "}]}, "empty_answer"),
    ("messages", {"messages": [U, {"role": "assistant", "content": None}]}, "wrong_type"),
    ("messages", {"messages": [U, A], "loss": "first"}, "wrong_type"),
    ("messages", {"messages": "hi"}, "wrong_type"),
    ("messages", {"messages": [U, {"role": "assistant", "content": "\ud83d"}]}, "unparsable"),
    ("prompt", {"prompt": [U, A]}, "role_order"),
    ("prompt", {"prompt": ""}, "empty_prompt"),
    ("prompt_completion", {"prompt": "q", "completion": []}, "empty_answer"),
    ("prompt_completion", {"prompt": "q", "completion": [U]}, "role_order"),
    ("preference", {"prompt": "q", "chosen": " a", "rejected": "a\n"}, "identical_pair"),
    ("preference", {"prompt": "q", "chosen": "a"}, "missing_column"),
    ("preference", {"chosen": "a", "rejected": "b"}, "missing_column"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": None}, "wrong_type"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": [A]}, "wrong_type"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "wide"}, "wrong_type"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_safe": "maybe"}, "wrong_type"),
    ("preference", {"chosen": [U, A, U, A], "rejected": [U, {"role": "assistant", "content": "no"}, U, {**A, "content": "z"}]}, "diverges_early"),
    ("preference", {"prompt": "other", "chosen": [U, A], "rejected": [U, {**A, "content": "z"}]}, "prompt_mismatch"),
    ("preference", {"chosen": [U], "rejected": [U]}, "no_answer"),
    ("alpaca_pairs", {"instruction": "q", "output": ["a"]}, "wrong_type"),
    ("hh", {"chosen": "hello", "rejected": "bye"}, "role_order"),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "diverges_early"),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: d"}, "empty_answer"),
    ("hh", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "no_answer"),
    ("ultrafeedback_binarized", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, "unknown_rating"),
    ("helpsteer2", {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -4}, "unknown_rating"),
    ("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "unknown_rating"),
    ("safe_rlhf_helpful", {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": -1}, "unknown_rating"),
    ("oasst", {"prompt": {"text": "q", "role": "assistant"}}, "role_order"),
])
def test_reasons(name, row, reason):
    assert ask(name, **row).reason == reason


def test_a_prompt_may_stand_before_dialogues_that_repeat_or_continue_it():
    longer = [U, A, {"role": "user", "content": "more"}]
    want = Pair(longer, "a", "b")
    a, b = {**A, "content": "a"}, {**A, "content": "b"}
    for row in ({"prompt": "hi", "chosen": [*longer, a], "rejected": [*longer, b]},
                {"prompt": longer, "chosen": [a], "rejected": [b]},
                {"prompt": "hi", "chosen": [*longer[1:], a], "rejected": [*longer[1:], b]}):
        assert FORMATS["preference"].read(row) == want


def test_datasets_sequences_of_records_are_read_like_records():
    columnar = {"role": ["user", "assistant"], "content": ["hi", "yo"]}
    assert FORMATS["messages"].read({"messages": columnar}) == FORMATS["messages"].read({"messages": [U, A]})


def test_missing_column_says_what_is_there_and_what_to_do():
    assert str(ask("preference", prompt="q", chosen="a")) == (
        "no 'rejected' (columns: prompt, chosen). Map it with columns: {rejected: NAME}")
    assert "or use format: messages" in str(ask("preference", messages=[]))
    many = ask("preference", **{f"c{i}": 1 for i in range(500)})
    assert "and 488 more" in str(many) and len(str(many)) < 400


JUNK = [None, True, 0, -7, 3.5, float("nan"), float("inf"), 10**400, "", " ", "x", "\ud800", "y" * 10**6, b"z", [], [None], [[]], [1, "a"],
        {}, {"a": None}, {"role": []}, [{"role": {}, "content": []}], [{"role": "user"}], [{"from": "gpt", "value": None}], {"text": [1], "b": [2]},
        [{"response": 5}], [{"response": "r", "overall_score": "n/a"}], {"full_text": None}, {"text": "q", "role": "prompter", "replies": 5},
        {"text": "q", "role": "prompter", "replies": [[]]}, {1: 2}, {"post": 1}, "\n\nHuman: \n\nAssistant: ", object()]


def deep(levels: int):
    value = "bottom"
    for i in range(levels):
        value = [value] if i % 2 else {"text": value, "role": "prompter", "replies": value}
    return value


@pytest.mark.parametrize("name", FORMATS)
def test_junk_raises_row_errors_only(name):
    rng = random.Random(name)
    junk = [*JUNK, deep(5000)]
    for row in junk:
        outcome(name, row)
    good = rows(name)
    for _ in range(1500):
        row = dict(rng.choice(good))
        for column in rng.sample(list(row), k=min(len(row), rng.randint(1, 3))):
            row[column] = rng.choice(junk)
        if rng.random() < 0.2:
            row[rng.choice([3, None, "\ud800", "z" * 1000])] = rng.choice(junk)
        if rng.random() < 0.2:
            row.pop(rng.choice(list(row)))
        outcome(name, row)


def outcome(name: str, row) -> None:
    """Read a row; a fault must be told in a few words that a terminal can print."""
    try:
        FORMATS[name].read(row)
    except Skip as e:
        assert e.reason.isidentifier()
    except RowError as e:
        assert e.reason.isidentifier() and 0 < len(str(e)) < 1000
        str(e).encode()


def test_text_inside_the_row_goes_in_and_comes_out_whole():
    text = "Zeile 1\n\n  eingerückt\t… 你好 \u2028 👩‍🚀 <|im_end|>"
    item = FORMATS["preference"].read({"prompt": text, "chosen": text + "a", "rejected": text + "b"})
    assert (item.prompt[0]["content"], item.chosen, item.rejected) == (text, text + "a", text + "b")


def test_meta_holds_only_what_json_can():
    item = FORMATS["prompt"].read({"prompt": "q", "bad": "\udc80", "nan": float("nan"), "huge": 10**400, "ok": 1, 5: "five"})
    assert item.meta == {"ok": 1}


@pytest.mark.parametrize("value, tag", [
    (True, True), (1, True), (1.0, True), ("1", True), ("true", True), ("TRUE", True), (" Yes ", True), ("y", True), ("on", True),
    (False, False), (0, False), (0.0, False), ("0", False), ("FALSE", False), ("no", False), ("N", False), ("off", False), ("", False), (None, False)])
def test_the_safety_tag_is_read_in_its_usual_spellings(value, tag):
    assert FORMATS["prompt"].read({"prompt": "q", "safety": value}).safety is tag


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan"), "maybe", "harmful", [True], {"is": True}])
def test_a_safety_tag_that_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(RowError, match=r"'safety' is .* Expected true or false") as e:
        FORMATS["prompt"].read({"prompt": "q", "safety": value})
    assert e.value.reason == "wrong_type"
