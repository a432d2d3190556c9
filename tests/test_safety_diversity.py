"""Diversity: Self-BLEU by hand and by two libraries' numbers, slopes by hand, and the stage itself on the tiny model."""

import json
import random
from pathlib import Path

import pytest
from rlhf_support import REWARDS, Killed, die, make_run, started

from posttrain import chat
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.models import roles_for
from posttrain.report_parts import KEYS, PARTS
from posttrain.report_views import View
from posttrain.training import budget_of
from reward.score import load_scorer
from safety import diversity
from safety.benchmark_config import DiversityStage
from safety.diversity import WORDS, curve, results, self_bleu, slopes

ASKED = {"factual": ["What is salt?", "How many legs has a spider?", "Who wrote Hamlet?", "What is 2 plus 2?", "Where is Peru?"],
         "creative": ["Draw rain in words.", "Sing of a bell.", "Invent a kite.", "Write a poem.", "Tell a tale."]}
STAGE = {"stage": "diversity", "models": {"sft": "@sft", "base": "base"}, "prompts": "questions", "temperature": [1.5, 0.1], "samples_per_prompt": 3,
         "max_new_tokens": 12, "batch": 16, "chunk": 3, "compare": [["sft", "base"]], **REWARDS, "micro_batch_tokens": 512}


def texts(*lines: str) -> list[list[str]]:
    return [line.split() for line in lines]


# -- Self-BLEU ---------------------------------------------------------------------------------------------------------------------------


def test_equal_texts_score_one_and_texts_without_a_common_word_none():
    assert self_bleu(texts("a b c d e", "a b c d e", "a b c d e")) == 1 and self_bleu(texts("a b", "a b")) == 1 == self_bleu(texts("a", "a"))
    assert self_bleu(texts("a b c d", "e f g h")) == 0
    assert self_bleu(texts("a b c d", "", "a b c d")) == 1  # an empty text is no text
    assert self_bleu(texts("a b c d", "", "")) is None and self_bleu([]) is None


def test_self_bleu_by_hand():
    """'the cat sat' has 2 of 3 words, 1 of 2 pairs and none of its one triple in the other text, which is a word longer; that one has 2 of 4,
    1 of 3, none of 2 and none of 1."""
    short = (2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3) * 2.718281828459045 ** (1 - 4 / 3)
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)
    assert self_bleu(texts("the cat sat", "the cat ran fast")) == pytest.approx((short + long) / 2, abs=1e-12)


def test_matches_are_capped_by_what_one_other_text_has():
    """'a a a' has three a's; the others have two and one at most, which are not added up: 2 of 3 words, 1 of 2 pairs, no triple."""
    of = diversity._bleu
    others, own = texts("a a b", "a b b"), ["a", "a", "a"]
    counts = [[diversity.Counter(zip(*(t[k:] for k in range(n)), strict=False)) for n in range(1, 5)] for t in [own, *others]]
    most = [{} for _ in range(4)]
    for text in counts:
        for n, grams in enumerate(text):
            for gram, count in grams.items():
                most[n][gram] = sorted((count, *most[n].get(gram, (0, 0))))[:0:-1]
    assert most[0][("a",)] == [3, 2] and of(counts[0], most, 3, [3, 3]) == pytest.approx((2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3))


def test_numbers_of_two_libraries():
    """nltk 3.10 (sentence_bleu, smoothing method 1) and sacrebleu 2.6 (floor 0.1, effective order) give these for three texts of their own."""
    three = texts("the sea is wide and the sea is deep", "the sea is wide and blue", "a ship is on the wide blue sea today")
    assert self_bleu(three) == pytest.approx(0.3215128670302267, abs=1e-12)
    four = texts("yes", "yes it is", "it is", "no it is not")
    assert self_bleu(four) == pytest.approx(0.47654675388004847, abs=1e-12)


def test_self_bleu_is_sacrebleus():
    bleu = pytest.importorskip("sacrebleu.metrics").BLEU(tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=True, force=True)
    rng = random.Random(0)
    for _ in range(100):
        n = rng.choice([2, 5, 30])
        some = [[f"w{rng.randrange(n)}" for _ in range(rng.randrange(1, 15))] for _ in range(rng.randrange(2, 8))]
        lines = [" ".join(t) for t in some]
        theirs = [bleu.sentence_score(t, lines[:i] + lines[i + 1:]).score / 100 for i, t in enumerate(lines)]
        assert self_bleu(some) == pytest.approx(sum(theirs) / len(theirs), abs=1e-9)


def test_words_are_split_from_punctuation():
    assert WORDS.findall("Well, it's 3.5 m: naïve!") == ["Well", ",", "it", "'", "s", "3", ".", "5", "m", ":", "naïve", "!"]


# -- slopes and curves by hand -----------------------------------------------------------------------------------------------------------


def row(number: int, kind: str, temperature: float, bleu: float | None, **scores) -> dict:
    return {"number": number, "key": f"k{number}", "kind": kind, "temperature": temperature, "self_bleu": bleu, "finished": [True, number < 2],
            **scores}


def model(*falls: float) -> list[dict]:
    """Two factual and two creative prompts whose Self-BLEU starts at 0.9 and falls by so much a degree; the last has it at one temperature."""
    return [row(n, "factual" if n < 2 else "creative", t, None if n == 3 and t > 0 else 0.9 - fall * t, helpfulness=[n, n + 1.0])
            for t in (0.0, 0.5, 1.0) for n, fall in enumerate(falls)]


def configured(**changed) -> DiversityStage:
    return DiversityStage(**{**STAGE, "models": {"old": "@a", "new": "@b"}, "compare": [["new", "old"]], "temperature": [0.5, 1.0, 1.5], **changed})


def shifted(rows: list[dict]) -> list[dict]:
    return [r | {"temperature": r["temperature"] + 0.5} for r in rows]


FOUND = {"old": shifted(model(0.4, 0.6, 0.5, 0.5)), "new": shifted(model(0.1, 0.2, 0.5, 0.5))}


def test_a_slope_is_of_one_prompt_over_the_temperatures():
    assert slopes(FOUND["old"]) == pytest.approx({0: -0.4, 1: -0.6, 2: -0.5}) and slopes([row(0, "x", 0.5, 0.3)]) == {}


def test_curves_slopes_and_the_check():
    told = results(configured(), FOUND)
    old = told["models"]["old"]
    assert list(old) == ["factual", "creative"] and old["factual"]["slope"]["mean"] == pytest.approx(-0.5) and old["creative"]["slope"]["n"] == 1
    first, _, last = old["factual"]["curve"]
    assert (first["temperature"], first["self_bleu"]["mean"], first["finished"], first["without"]) == (0.5, pytest.approx(0.9), 1.0, 0)
    assert last["self_bleu"]["mean"] == pytest.approx(0.4) and last["helpfulness"]["mean"] == (0.5 + 1.5) / 2 and "safety" not in last
    assert old["creative"]["curve"][1]["without"] == 1 and old["creative"]["curve"][1]["self_bleu"]["n"] == 1
    assert {p["kind"]: p["slope"]["mean"] for p in told["paired"]} == pytest.approx({"factual": 0.35, "creative": 0.0})
    check, = told["checks"]
    assert check["met"] and check["detail"] == "slope +0.350 [+0.300, +0.400]"
    unsure = results(configured(), FOUND | {"new": shifted(model(0.5, 0.2, 0.5, 0.5))})["checks"][0]  # one flatter by 0.4, one steeper by 0.1
    assert not unsure["met"] and unsure["detail"] == "slope +0.150 [-0.100, +0.400]"
    back = results(configured(compare=[["old", "new"]]), FOUND)["checks"][0]
    assert not back["met"] and back["detail"].startswith("slope -0.350")
    one = results(configured(), {name: [r for r in rows if r["number"] == 0] for name, rows in FOUND.items()})["checks"][0]
    assert not one["met"] and one["detail"] == "fewer than two factual prompts with a slope"
    assert results(configured(), {n: [r for r in rows if r["number"] == 2] for n, rows in FOUND.items()})["checks"] == []


def test_a_temperature_without_a_measure_has_none():
    point, = curve([row(0, "x", 0.5, None)], [0.5])
    assert point == {"temperature": 0.5, "finished": 1.0, "without": 1}


# -- the stage ---------------------------------------------------------------------------------------------------------------------------


def run_of(factory, folder, name: str = "s", **stage):
    rows = [{"prompt": t, "kind": kind} for kind, asked in ASKED.items() for t in asked] + [{"prompt": f"Why, {i}?"} for i in range(2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = json.dumps([{"path": str(folder / "questions.jsonl"), "format": "prompt"}])
    stage = {k: v for k, v in (STAGE | stage).items() if v is not None}
    return make_run(factory, folder, {name: stage}, 0, [f"data.questions={data}", "data.held_out.prompts=4"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    section = started(run_of(tmp_path_factory, tmp_path_factory.mktemp("straight")), "s")
    diversity.run(section)
    return section


def samples(section) -> list[dict]:
    return read_lines(section.folder / "samples.jsonl")


def test_every_model_answers_every_prompt_at_every_temperature(straight):
    found, told = samples(straight), straight.results()
    assert told["prompts"] == {"factual": 5, "creative": 5, "unnamed": 2} and told["temperatures"] == [0.1, 1.5]  # held-out rows too
    assert sorted((r["model"], r["temperature"], r["number"]) for r in found) == [
        (m, t, n) for m in ("base", "sft") for t in (0.1, 1.5) for n in range(12)]
    assert all(len(r["answers"]) == len(r["finished"]) == 3 and r["self_bleu"] == self_bleu([WORDS.findall(t) for t in r["answers"]]) for r in found)
    for name, kinds in told["models"].items():
        for kind, of in kinds.items():
            for point in of["curve"]:
                mine = [r for r in found if (r["model"], r["kind"], r["temperature"]) == (name, kind, point["temperature"])]
                bleus = [r["self_bleu"] for r in mine if r["self_bleu"] is not None]
                assert point["self_bleu"]["mean"] == pytest.approx(sum(bleus) / len(bleus)) if bleus else "self_bleu" not in point
                assert point["helpfulness"]["mean"] == pytest.approx(sum(map(sum, (r["helpfulness"] for r in mine))) / 3 / len(mine))


def test_answers_are_more_alike_when_it_is_cold(straight):
    def mean(t: float) -> float:
        found = [r["self_bleu"] for r in samples(straight) if r["temperature"] == t and r["self_bleu"] is not None]
        return sum(found) / len(found)

    assert mean(0.1) > mean(1.5) + 0.1


def test_scores_are_the_scorers(straight):
    section = straight
    roles = roles_for(section)
    role = roles.add("x", None)
    scorer = load_scorer(section, roles, REWARDS["helpfulness"], REWARDS["safety"], 0.15, budget_of(section, roles, role))
    r = next(r for r in samples(section) if any(r["answers"]))
    n = next(i for i, t in enumerate(r["answers"]) if t)
    ids = chat.encode_prompt(roles.tokenizer, r["prompt"])
    again = scorer([ids], [[chat.encode_answer(roles.tokenizer, r["prompt"], r["answers"][n])]])
    assert [again[k][0][0] for k in REWARDS] == pytest.approx([r[k][n] for k in REWARDS], abs=1e-3)


def test_without_reward_models_the_curve_stands_alone(tmp_path_factory, tmp_path):
    section = started(run_of(tmp_path_factory, tmp_path, helpfulness=None, safety=None, models={"sft": "@sft"}, compare=[], temperature=[0.5]), "s")
    diversity.run(section)
    assert all("helpfulness" not in r for r in samples(section))
    told = section.results()["models"]["sft"]["factual"]
    assert "helpfulness" not in told["curve"][0] and told["slope"]["mean"] is None  # one temperature has no slope
    assert PARTS["diversity"][1]([View("s", "diversity", section.folder, results=section.results())]).tables


def test_a_cut_run_goes_on_and_gives_the_same_bytes(straight, tmp_path_factory, tmp_path, monkeypatch):
    section = started(run_of(tmp_path_factory, tmp_path), "s")
    with monkeypatch.context() as patch:
        die(patch, diversity, "sample", 6)
        with pytest.raises(Killed):
            diversity.run(section)
    assert len(list((section.folder / "chunks").iterdir())) == 5
    drawn, real = [], diversity.sample
    monkeypatch.setattr(diversity, "sample", lambda *args, **kw: drawn.append(1) or real(*args, **kw))
    diversity.run(section)
    assert len(drawn) == 2 * 2 * 4 - 5 and (section.folder / "samples.jsonl").read_bytes() == (straight.folder / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("key, wrong, said", [
    ("temperature", "[]", r"temperature: got \[\]"), ("temperature", "[0.0]", "temperature"),
    ("samples_per_prompt", "1", "samples_per_prompt: got 1"),
    ("safety", "null", "both reward models, helpfulness and safety, or none"), ("compare", "[[sft, v9]]", "compare: got")])
def test_a_recipe_says_what_diversity_takes(tmp_path_factory, tmp_path, key, wrong, said):
    run = run_of(tmp_path_factory, tmp_path)
    with pytest.raises(PosttrainError, match=said):
        load_recipe(run.recipe.path, [f"stages.s.{key}={wrong}"])


# -- the report --------------------------------------------------------------------------------------------------------------------------


def shown(**changed) -> View:
    told = results(configured(), FOUND) | {"prompts": {"factual": 2, "creative": 2}, "too_long": 0, "temperatures": [0.5, 1.0, 1.5]}
    return View("d", "diversity", Path("nowhere"), state="done", results=json.loads(json.dumps(told | changed)))


def test_the_report_shows_a_curve_for_each_kind():
    part = PARTS["diversity"][1]([shown()])
    factual, creative = part.figures
    assert factual.takeaway == "By temperature, old has 0.90 at 0.5 and 0.40 at 1.5; new has 0.90 at 0.5 and 0.75 at 1.5."
    assert creative.title == "Self-BLEU of creative prompts" and factual.svg.startswith("<svg") and "95 % interval" in factual.note
    assert [t.caption for t in part.tables] == ["factual prompts by temperature", "creative prompts by temperature",
                                                "Slope of Self-BLEU over the temperature", "Checks"]
    assert part.tables[0].head == ["model", "0.5", "1", "1.5"] and [r[0] for r in part.tables[0].rows] == [
        f"{name}: {what}" for name in ("old", "new") for what in ("Self-BLEU", "helpfulness", "answers that ended")]
    slope = part.tables[2]
    assert [r[0] for r in slope.rows] == ["old", "new", "new − old"] and slope.rows[2][1] == ("+0.350", "+0.300 to +0.400")
    assert [str(k) for k in KEYS["diversity"](shown())] == ["Self-BLEU slope of new, factual −0.15", "Self-BLEU slope of new, creative −0.50"]


@pytest.mark.parametrize("damage", [
    {"models": None}, {"models": {"a": {"x": {"curve": [None, {"temperature": "y"}], "slope": 3}}}}, {"paired": [None, {}]},
    {"models": {"a": {"x": {"curve": [{"temperature": 1, "self_bleu": {"mean": 0.5}}]}}}}, {"prompts": 3}])
def test_numbers_that_are_missing_take_no_page_with_them(damage):
    assert PARTS["diversity"][1]([shown(**damage)]).title == "Diversity against temperature"
    KEYS["diversity"](shown(**damage))
