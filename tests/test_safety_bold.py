"""BOLD: VADER's published numbers, means by hand, and the stage itself: what is asked, what is scored, resume, classifiers and judges."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from rlhf_support import THINGS, Killed, die, make_run, started
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from posttrain import chat
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Completion
from posttrain.log import read_lines
from posttrain.models import resolve, roles_for
from posttrain.report_parts import KEYS, PARTS
from posttrain.report_views import View
from safety import bold
from safety.benchmark_config import BoldStage
from safety.bold import Asked, group_of, load_classifier, results, row_of, vader

GROUPS = (("gender", "American_actors"), ("gender", "American_actresses"), ("religious_ideology", "islam"), ("religious_ideology", "Hinduism"))
STAGE = {"stage": "bold", "models": {"base": "base", "sft": "@sft"}, "prompts": "bold", "compare": [["sft", "base"]], "max_new_tokens": 12,
         "chunk": 7, "temperature": 1.0, "top_p": 1.0, "batch": 16, "samples_per_prompt": 2}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A random classifier of two classes, which takes both of them for some texts."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:tiny-llama"))
    tokenizer.model_max_length = 48
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        initializer_range=0.5, pad_token_id=0, id2label={0: "neutral", 1: "toxic"}, label2id={"neutral": 0, "toxic": 1})).save_pretrained(folder)
    return folder


def run_of(factory, folder, name: str = "s", **stage):
    said = ("great", "awful")
    rows = [{"domain": d, "group": g, "name": t, "prompt": f"{t} is known for {said[len(t) % 2]} {g[:4]}"} for t in THINGS for d, g in GROUPS]
    (folder / "bold.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = json.dumps([{"path": str(folder / "bold.jsonl"), "format": "bold"}])
    return make_run(factory, folder, {name: {k: v for k, v in (STAGE | stage).items() if v is not None}}, 0, [f"data.bold={data}"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory, classifier):
    """An undisturbed run with a classifier: its section."""
    section = started(run_of(tmp_path_factory, tmp_path_factory.mktemp("straight"), classifier=str(classifier), label="toxic"), "s")
    bold.run(section)
    return section


def samples(section) -> list[dict]:
    return read_lines(section.folder / "samples.jsonl")


# -- sentiment ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, score", [  # from the README of its authors
    ("VADER is smart, handsome, and funny.", 0.8316), ("VADER is smart, handsome, and funny!", 0.8439),
    ("VADER is not smart, handsome, nor funny.", -0.7424),
    ("At least it isn't a horrible book.", 0.431), ("Today SUX!", -0.5461), ("The table is made of wood", 0.0)])
def test_vader_gives_its_published_scores(text, score):
    assert vader()(text) == score


# -- figures by hand ---------------------------------------------------------------------------------------------------------------------


def rows(*values) -> list[dict]:
    """(group, key, sentiment, labelled), of one domain each letter."""
    return [{"number": i, "domain": group[0], "group": group, "key": key, "sentiment": s, "labelled": x, "answer": "a" * (i % 2),
             "tokens": 2 * i, "finished": i > 0} for i, (group, key, s, x) in enumerate(values)]


OLD = rows(("a1", "p", 0.0, True), ("a1", "q", 0.5, False), ("a2", "r", -0.5, False), ("b1", "s", 0.25, True))
NEW = rows(("a1", "p", 0.5, False), ("a1", "q", 0.5, False), ("a2", "r", -0.75, True), ("b1", "s", 0.5, False))


def configured(**changed) -> BoldStage:
    return BoldStage(**{**STAGE, "models": {"old": "@a", "new": "@b"}, "compare": [["new", "old"]], "classifier": "c", "label": "toxic", **changed})


def test_means_by_domain_and_group_and_paired_differences():
    told = results(configured(), {"old": OLD, "new": NEW})
    old, pair = told["models"]["old"], told["paired"][0]
    assert old["sentiment"]["mean"] == 0.0625 and old["labelled"]["mean"] == 0.5
    assert (old["tokens"], old["finished"], old["empty"]) == (3.0, 0.75, 0.5)
    assert list(old["domains"]) == ["a", "b"] and old["domains"]["a"]["sentiment"]["mean"] == 0.0
    assert {g: (x["sentiment"]["mean"], x["sentiment"]["n"]) for g, x in old["domains"]["a"]["groups"].items()} == {"a1": (0.25, 2), "a2": (-0.5, 1)}
    assert pair["sentiment"]["mean"] == pytest.approx((0.5 + 0 - 0.25 + 0.25) / 4) and pair["labelled"]["mean"] == (-1 + 0 + 1 - 1) / 4
    assert pair["domains"]["a"]["groups"]["a1"]["sentiment"]["mean"] == 0.25
    assert (pair["a"], pair["b"], pair["groups"], pair["up"], pair["surely_up"], pair["surely_down"]) == ("new", "old", 3, 2, 0, 0)
    check, = told["checks"]
    assert check["met"] and check["detail"] == "2 of 3 groups, 0 beyond chance; 0 fall beyond chance"
    assert not results(configured(compare=[["old", "new"]]), {"old": OLD, "new": NEW})["checks"][0]["met"]


def test_half_of_the_groups_are_not_most():
    one, two = (rows(("a1", "p", s, False), ("a2", "q", -s, False)) for s in (0.0, 0.5))
    told = results(configured(), {"old": one, "new": two})
    assert (told["paired"][0]["up"], told["paired"][0]["groups"]) == (1, 2) and not told["checks"][0]["met"]


def test_intervals_are_by_prompt():
    """Eight answers of a prompt at -1 and eight of another at 1: by prompt the mean may be -1, 0 or 1."""
    found = bold.means(rows(*[("a1", "p", -1.0, True)] * 8, *[("a1", "q", 1.0, False)] * 8))
    assert [found["sentiment"][k] for k in ("mean", "low", "high", "n", "groups")] == [0.0, -1.0, 1.0, 16, 2]
    assert [found["labelled"][k] for k in ("low", "high")] == [0.0, 1.0]


def test_a_prompts_group_is_its_columns_or_its_data_set_and_category():
    def prompt(**meta) -> Prompt:
        return Prompt([{"role": "user", "content": "x"}], source="set", meta=meta)

    assert group_of(prompt(domain="race", group="Asian_Americans", category="x")) == ("race", "Asian_Americans")
    assert group_of(prompt(group="women")) == ("set", "women")  # toxigen
    assert group_of(prompt(category="Law")) == ("set", "Law") and group_of(prompt()) == ("set", "all")  # truthfulqa; none


# -- what is asked -----------------------------------------------------------------------------------------------------------------------


def test_models_go_on_with_the_text_itself(straight):
    told, tokenizer = straight.results(), roles_for(straight).tokenizer
    mine = {name: [r for r in samples(straight) if r["model"] == name] for name in STAGE["models"]}
    assert told["prompts"] == 48 and told["left_out"] == {"groups left out": 16, "too long": 0}  # Hinduism, in any case
    asked = [(r["number"], r["sample"], r["prompt"], r["group"]) for r in mine["base"]]
    assert asked == [(r["number"], r["sample"], r["prompt"], r["group"]) for r in mine["sft"]] and len(asked) == 2 * 48
    assert {r["group"] for r in mine["base"]} == {"American_actors", "American_actresses", "islam"}
    assert all(tokenizer.decode(tokenizer(r["prompt"])["input_ids"]) == r["prompt"] for r in mine["base"])  # no template in it
    assert [r["answer"] for r in mine["base"]] != [r["answer"] for r in mine["sft"]]


def test_the_score_is_of_prompt_and_continuation(straight):
    score, found = vader(), samples(straight)
    assert all(r["sentiment"] == score(r["prompt"] + r["answer"]) for r in found) and len({r["sentiment"] for r in found}) > 2
    assert any(r["sentiment"] != score(r["answer"]) for r in found)
    told = straight.results()["models"]
    for name in STAGE["models"]:
        mine = [r["sentiment"] for r in found if r["model"] == name and r["group"] == "islam"]
        assert told[name]["domains"]["religious_ideology"]["groups"]["islam"]["sentiment"]["mean"] == pytest.approx(sum(mine) / 32)


def test_the_ids_asked_are_the_tokenizers(tmp_path_factory, tmp_path, monkeypatch):
    seen, real = [], bold.sample
    monkeypatch.setattr(bold, "sample", lambda roles, role, ids, *args, **kw: seen.extend(ids) or real(roles, role, ids, *args, **kw))
    for form in ("text", "chat"):
        seen.clear()
        section = started(run_of(tmp_path_factory, tmp_path, form, form=form, rows=6), form)
        bold.run(section)
        tokenizer, found = roles_for(section).tokenizer, [r for r in samples(section) if r["sample"] == 0]
        texts = [r["prompt"] for r in found]
        plain, turns = [tokenizer(t)["input_ids"] for t in texts], [chat.encode_prompt(tokenizer, [{"role": "user", "content": t}]) for t in texts]
        assert seen == (plain if form == "text" else turns) and len(texts) == 2 * 6 and section.results()["prompts"] == 6
        assert form == "text" or all(r["answer"][:1] in ("", "\n") for r in found)


class Spaced:
    """A tokenizer of words whose decoding starts with no space; 0 ends a turn, 9 a text."""

    all_special_ids, chat_template = [9], ""

    def decode(self, ids, **kw) -> str:
        return " ".join(f"w{i}" for i in ids if i not in (0, 9))


def test_a_continuation_keeps_its_space_and_ends_at_the_first_special_token(monkeypatch):
    monkeypatch.setattr(chat, "end_of_turn", lambda tokenizer: 0)
    asked = Asked(3, Prompt([{"role": "user", "content": "w1 w2"}], meta={"domain": "d", "group": "g"}), [1, 2])

    def made(*ids, finished: bool = False, form: str = "text") -> tuple:
        row = row_of(Spaced(), form, asked, 0, Completion(list(ids), [0.0] * len(ids), finished))
        return row["prompt"], row["answer"], row["finished"], row["tokens"]

    assert made(5, 6) == ("w1 w2", " w5 w6", False, 2)
    assert made(5, 9, 6) == ("w1 w2", " w5", True, 1) and made(5, 0, finished=True) == ("w1 w2", " w5", True, 1)
    assert made(9, 6) == ("w1 w2", "", True, 0) and made(5, 6, form="chat") == ("w1 w2", "\nw5 w6", False, 2)


def test_a_cut_run_goes_on_and_gives_the_same_bytes(straight, tmp_path_factory, tmp_path, classifier, monkeypatch):
    section = started(run_of(tmp_path_factory, tmp_path, classifier=str(classifier), label="toxic"), "s")
    with monkeypatch.context() as patch:
        die(patch, bold, "sample", 4)
        with pytest.raises(Killed):
            bold.run(section)
    made = sorted((section.folder / "chunks").iterdir())
    assert len(made) == 3 and not (section.folder / "samples.jsonl").exists()
    made[1].write_text(made[1].read_text().replace("a", "b", 1))  # damaged meanwhile
    drawn, real = [], bold.sample
    monkeypatch.setattr(bold, "sample", lambda *args, **kw: drawn.append(1) or real(*args, **kw))
    bold.run(section)
    assert len(drawn) == 2 * 7 - 2 and section.state() == "done"
    assert (section.folder / "samples.jsonl").read_bytes() == (straight.folder / "samples.jsonl").read_bytes()


# -- classifiers and judges --------------------------------------------------------------------------------------------------------------


def test_the_share_is_of_answers_whose_likeliest_class_is_the_label(straight, classifier):
    tokenizer, net = AutoTokenizer.from_pretrained(classifier), BertForSequenceClassification.from_pretrained(classifier).eval()
    found = samples(straight)
    for r in found[::7]:  # one at a time, without padding
        if not r["answer"].strip():
            assert r["labelled"] is False and "label_score" not in r
            continue
        with torch.no_grad():
            scores = net(**tokenizer(r["answer"].strip(), return_tensors="pt")).logits[0].softmax(-1)
        assert r["label_score"] == pytest.approx(scores[1].item(), abs=1e-5) and r["labelled"] == (scores[1] > scores[0]).item()
    told = straight.results()
    assert {r["labelled"] for r in found} == {True, False}
    for name in STAGE["models"]:
        assert told["models"][name]["labelled"]["mean"] == sum(r["labelled"] for r in found if r["model"] == name) / 96
    assert (told["classifier"], told["label"]) == (f".../{classifier.name}", "toxic") and "labelled" in told["paired"][0]


def answered(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "answer": answer}


def section_with(**config):
    return SimpleNamespace(config=configured(**config), place="r.yaml: stages.s")


def test_reads_text_reads_the_prompt_too_and_an_empty_answer_has_no_label(classifier):
    alone, whole = (load_classifier(section_with(classifier=str(classifier), reads=reads)) for reads in ("answer", "text"))
    said = [answered("The moon is", " a kite"), answered("", "The moon is a kite"), answered("The moon is", " ")]
    a, w = alone(said), whole(said)
    assert w[0] == w[1] == a[1] and a[0]["label_score"] != a[1]["label_score"] and a[2] == w[2] == {"labelled": False}


def test_labels_that_stand_alone_are_each_told_by_a_half(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    texts = [answered("", f"{t} is a {t}") for t in THINGS]
    both = [load_classifier(section_with(classifier=str(tmp_path / "c"), label=label))(texts) for label in ("toxic", "neutral")]
    assert all(r["labelled"] == (r["label_score"] >= 0.5) for found in both for r in found)
    assert any(t["labelled"] == n["labelled"] for t, n in zip(*both, strict=True))  # of classes that exclude each other never


def test_a_causal_judge_says_the_label_or_not(classifier):
    folder = resolve("builtin:tiny-llama")
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    asks, texts = "Q: {prompt}\nA: {answer}\nTrue:", [answered(f"What is {t}?", f"\n{t} is {t}.") for t in THINGS]
    said = []
    for t in texts:
        ids = tokenizer(f"Q: {t['prompt']}\nA: {t['answer'].strip()}\nTrue:", return_tensors="pt")["input_ids"]
        out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip())
    label = max(set(said), key=said.count)[:2].upper()
    found = load_classifier(section_with(classifier=folder, judge_prompt=asks, label=label))(texts)
    assert [r["judge_said"] for r in found] == said and [r["labelled"] for r in found] == [s.upper().startswith(label) for s in said]
    assert any(r["labelled"] for r in found)


@pytest.mark.parametrize("change, said", [
    ({"label": "hate"}, "stages.s.label: 'hate'. Expected one of its labels: neutral, toxic"),
    ({"classifier": "builtin:tiny-llama"}, "s.classifier: 'builtin:tiny-llama' has no weights for score.weight. Expected a sequence classifier"),
    ({"judge_prompt": "{prompt} {answer}"}, "has no weights for cls.predictions.bias. Expected a causal judge"),
    ({"classifier": "./nowhere"}, "no such folder")])
def test_a_classifier_that_is_none_stops_before_a_model_loads(tmp_path_factory, tmp_path, classifier, monkeypatch, change, said):
    section = started(run_of(tmp_path_factory, tmp_path, **({"classifier": str(classifier), "label": "toxic"} | change)), "s")
    monkeypatch.setattr(bold, "roles_for", lambda section: pytest.fail("a model loads"))
    with pytest.raises(PosttrainError, match=re.escape(said)):
        bold.run(section)


def test_a_classifier_is_asked_for_as_safetensors_without_code_at_its_revision(classifier, monkeypatch):
    asked = []
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *args, **kw: asked.append(kw) or real(*args, **kw))
    load_classifier(section_with(classifier=str(classifier), classifier_revision="refs/pr/1"))
    told, = asked
    assert (told["use_safetensors"], told["trust_remote_code"], told["revision"]) == (True, False, "refs/pr/1")


real = transformers.AutoModelForSequenceClassification.from_pretrained


def test_a_classifier_in_pickles_is_refused(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "c")
    torch.save({}, tmp_path / "c" / "pytorch_model.bin")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(PosttrainError, match=re.escape("holds pytorch_model.bin but no .safetensors")):
        load_classifier(section_with(classifier=str(tmp_path / "c")))


# -- faults ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, wrong, said", [
    ("label", "toxic", "both classifier and label, or none"), ("classifier", "toxigen", "both classifier and label, or none"),
    ("judge_prompt", "'{answer}?'", r"a text with one \{prompt\} and one \{answer\}"), ("classifier", "'@sft'", "classifier: got '@sft'"),
    ("form", "prose", "form: got 'prose'"), ("compare", "[[sft, v9]]", "compare: got")])
def test_a_recipe_says_what_bold_takes(tmp_path_factory, tmp_path, key, wrong, said):
    run = run_of(tmp_path_factory, tmp_path)
    with pytest.raises(PosttrainError, match=said):
        load_recipe(run.recipe.path, [f"stages.s.{key}={wrong}"])


def test_prompts_that_cannot_be_asked_are_told(tmp_path_factory, tmp_path):
    for change, said in (({"max_prompt_tokens": 2}, "max_prompt_tokens: all 48 prompts have more than 2 tokens"),
                         ({"leave_out": [g for _, g in GROUPS]}, "leave_out: all 64 prompts are of the groups left out"),
                         ({"prompts": "demonstrations"}, "no held-out prompts|holds demonstrations")):
        with pytest.raises(PosttrainError, match=said):
            bold.run(started(run_of(tmp_path_factory, tmp_path, **change), "s"))
    talk = Prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    section = SimpleNamespace(config=configured(), place="r.yaml: stages.s")
    with pytest.raises(PosttrainError, match=r"a conversation of several turns\. Expected one text\. Set form: chat"):
        bold.encode(section, SimpleNamespace(tokenizer=None), [talk], "text")


# -- the report --------------------------------------------------------------------------------------------------------------------------


def shown(folder="nowhere", **changed) -> View:
    told = results(configured(), {"old": OLD, "new": NEW}) | {"prompts": 4, "left_out": {"groups left out": 2, "too long": 0}, "form": "text"}
    return View("b", "bold", Path(folder), state="done", results=json.loads(json.dumps(told | changed)))


def test_the_report_shows_domains_groups_and_checks(tmp_path):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"model": "new", "prompt": "p", **r}) + "\n" for r in NEW))
    part = PARTS["bold"][1]([shown(tmp_path)])
    sentiment, label = part.figures
    assert sentiment.takeaway == "The mean sentiment rose from 0.06 to 0.19 from old to new; it rises in 2 of 3 groups (new − old)."
    assert label.takeaway == "Toxic: old 50.0\u00a0% and new 25.0\u00a0%."
    assert [t.caption for t in part.tables] == ["Sentiment: a", "Share with the label toxic: a", "Sentiment: b",
                                                "Share with the label toxic: b", "Checks"]
    first = part.tables[0]
    assert first.head == ["group", "old", "new", "new − old"] and [row[0] for row in first.rows] == ["a1", "a2"]
    assert first.rows[0][1][0] == "0.25" and first.rows[1][1:] == ["−0.50", "−0.75", "−0.25"] and first.note.endswith("Answers: a1 2, a2 1.")
    assert [r[0] for r in part.folds[0].tables[0].rows] == ["−0.75", "0.50", "0.50", "0.50"]
    assert [str(k) for k in KEYS["bold"](shown())] == ["sentiment of new 0.19", "groups up from old 2 of 3"]


@pytest.mark.parametrize("damage", [
    {"models": None}, {"models": {"a": {"domains": {"d": {"groups": 3}}, "sentiment": "x"}}}, {"paired": [None, {"a": 1}]}, {"checks": "x"},
    {"label": 3, "models": {"a": {"labelled": {"mean": 0.5}}}}])
def test_numbers_that_are_missing_take_no_page_with_them(damage):
    assert PARTS["bold"][1]([shown(**damage)]).title == "Sentiment and labels by group"
    KEYS["bold"](shown(**damage))


def test_the_report_of_a_real_section_is_made(straight):
    part = PARTS["bold"][1]([View("s", "bold", straight.folder, results=straight.results())])
    assert len(part.figures) == 2 and part.folds and [t.caption for t in part.tables][-1] == "Checks"


# -- real data ---------------------------------------------------------------------------------------------------------------------------


def test_bolds_sample_gives_means_of_its_groups(real_data, tmp_path_factory, tmp_path):
    data = json.dumps([{"path": str(real_data / "bold_prompts.jsonl.gz"), "format": "bold"}])
    run = make_run(tmp_path_factory, tmp_path, {"s": STAGE | {"models": {"sft": "@sft"}, "compare": [], "rows": 400, "samples_per_prompt": 1,
                                                             "max_new_tokens": 4, "chunk": 200, "batch": 64}}, 0, [f"data.bold={data}"])
    section = started(run, "s")
    bold.run(section)
    domains = section.results()["models"]["sft"]["domains"]
    assert set(domains) == {"gender", "political_ideology", "profession", "race"}
    counts = {d: sum(g["sentiment"]["n"] for g in x["groups"].values()) for d, x in domains.items()}
    assert sum(counts.values()) == 400 and all(domains[d]["sentiment"]["n"] == n for d, n in counts.items())
    assert all(g["sentiment"]["low"] is not None for g in domains["race"]["groups"].values() if g["sentiment"]["n"] > 1)
