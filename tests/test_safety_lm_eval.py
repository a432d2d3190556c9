"""lm-evaluation-harness: what it is asked for and what is kept of its results, with a stand-in; the harness itself where it is installed."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rlhf_support import THINGS, Killed, die, make_run, started

from posttrain import export
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.models import roles_for, source_of
from posttrain.report_parts import KEYS, PARTS
from posttrain.report_views import View
from safety import lm_eval as stage
from safety.lm_eval import measures

STAGE = {"stage": "lm_eval", "models": {"base": "base", "sft": "@sft"}, "tasks": ["truthfulqa_mc2", "toxigen"], "batch": 4, "limit": 5}
STAND_IN = '''
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__version__, SEEN, PROBE = "stand-in", [], [5, 6, 7, 8]

def simple_evaluate(model, model_args, tasks, **settings):
    net = AutoModelForCausalLM.from_pretrained(model_args["pretrained"], use_safetensors=True)
    template = AutoTokenizer.from_pretrained(model_args["pretrained"]).chat_template
    with torch.inference_mode():
        logprobs = torch.log_softmax(net(input_ids=torch.tensor([PROBE])).logits[0].float(), -1)
    SEEN.append({"model": model, "args": dict(model_args), "tasks": tasks, "template": template, "logprobs": logprobs, "dtype": net.dtype,
                 **settings})
    name = tasks[0].rpartition("/")[2].removesuffix(".yaml")
    return {"results": {name: {"alias": name, "acc,none": 0.25, "acc_stderr,none": 0.125, "em,strict": 1, "em_stderr,strict": 0.5, "f1,none": 0.75,
                               "f1_stderr,none": "N/A"}},
            "n-samples": {name: {"original": 9, "effective": 5}}, "higher_is_better": {name: {"acc": True, "em": None}},
            "samples": {name: [{"doc_id": i, "acc": 1.0, "odd": torch.float32} for i in range(2)]}}
'''
TASKS = '''
class TaskManager:
    def load(self, specs):
        for spec in specs:
            if spec not in ("truthfulqa_mc2", "toxigen") and not spec.endswith("mine.yaml"):
                raise KeyError(f"Spec {spec} is not a registered task")
        return {"tasks": {}}
'''


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A module that takes the harness's place."""
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "standin" / "lm_eval").mkdir(parents=True)
    (tmp_path / "standin" / "lm_eval" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "standin" / "lm_eval" / "tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path / "standin")
    import lm_eval

    yield lm_eval
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def run_of(factory, folder, **changed):
    return make_run(factory, folder, {"s": STAGE | changed})


def test_every_model_is_merged_and_measured_on_every_task(tmp_path_factory, tmp_path, harness):
    section = started(run_of(tmp_path_factory, tmp_path), "s")
    stage.run(section)
    seen = harness.SEEN
    assert [(s["model"], s["tasks"]) for s in seen] == [("hf", [t]) for _ in STAGE["models"] for t in STAGE["tasks"]]
    assert all((s["batch_size"], s["limit"], s["apply_chat_template"], s["device"], s["random_seed"]) == (4, 5, False, "cpu", 0) for s in seen)
    assert all(s["args"]["trust_remote_code"] is False and s["args"]["dtype"] == "float32" and s["dtype"] == torch.float32 for s in seen)
    roles = roles_for(section)
    for s, ref in zip(seen, ("base", "base", "@sft", "@sft"), strict=True):  # the folder says what the adapter over its base says
        roles.add("policy", source_of(section, ref))
        assert s["template"] == roles.tokenizer.chat_template
        assert torch.allclose(export.unmerged(roles, [harness.PROBE])[0], s["logprobs"], atol=1e-4)
    assert not torch.allclose(seen[0]["logprobs"], seen[2]["logprobs"], atol=1e-2)
    assert not (section.folder / "merged.tmp").exists() and section.state() == "done"


def test_results_samples_and_standard_errors_are_kept(tmp_path_factory, tmp_path, harness):
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    section = started(run_of(tmp_path_factory, tmp_path, tasks=["toxigen"], task_files=["mine.yaml"], chat=True, limit=None), "s")
    stage.run(section)
    told = section.results()
    assert (told["harness"], told["chat"], told["limit"], list(told["models"])) == ("stand-in", True, None, ["base", "sft"])
    assert list(told["models"]["sft"]) == [f"{t}: {m}" for t in ("toxigen", "mine") for m in ("acc", "em (strict)", "f1")]
    assert told["models"]["sft"]["mine: acc"] == {"mean": 0.25, "stderr": 0.125, "low": pytest.approx(0.25 - 1.96 * 0.125),
                                                  "high": pytest.approx(0.25 + 1.96 * 0.125), "n": 5, "higher_is_better": True}
    assert told["models"]["sft"]["mine: f1"] == {"mean": 0.75, "stderr": None, "low": None, "high": None, "n": 5, "higher_is_better": None}
    assert told["models"]["sft"]["mine: em (strict)"]["stderr"] == 0.5
    assert [(r["model"], r["task"], r["of"], r["doc_id"]) for r in read_lines(section.folder / "samples.jsonl")] == [
        (m, t, t, i) for m in ("base", "sft") for t in ("toxigen", "mine") for i in range(2)]
    assert harness.SEEN[1]["tasks"] == [str(tmp_path / "mine.yaml")] and all(s["apply_chat_template"] for s in harness.SEEN)
    assert any("files" in key for key in section.inputs())  # a changed task file runs it again


def test_a_cut_run_goes_on_with_the_task_that_is_missing(tmp_path_factory, tmp_path, harness, monkeypatch):
    section = started(run_of(tmp_path_factory, tmp_path), "s")
    with monkeypatch.context() as patch:
        die(patch, harness, "simple_evaluate", 2)
        with pytest.raises(Killed):
            stage.run(section)
    assert [p.name for p in (section.folder / "chunks").iterdir()] == ["base-truthfulqa_mc2.json"]
    assert not (section.folder / "merged.tmp").exists()
    (section.folder / "merged.tmp").mkdir()  # as after a kill that nothing could catch
    harness.SEEN.clear()
    stage.run(section)
    assert [s["tasks"] for s in harness.SEEN] == [["toxigen"], ["truthfulqa_mc2"], ["toxigen"]]
    assert list(section.results()["models"]) == ["base", "sft"] and not (section.folder / "merged.tmp").exists()


def test_a_group_comes_beside_its_tasks_and_words_are_no_measures():
    told = {"all": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "all", "sample_len": 3}, "one": {"acc,none": 1, "ppl,none": float("nan")}}
    found = measures({"results": told})
    assert list(found) == ["all: acc", "one: acc"] and found["all: acc"]["n"] is None and found["one: acc"]["stderr"] is None


# -- faults ------------------------------------------------------------------------------------------------------------------------------


def test_without_the_harness_it_says_how_to_install_it(tmp_path_factory, tmp_path, monkeypatch):
    section = started(run_of(tmp_path_factory, tmp_path), "s")
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    monkeypatch.setattr(stage, "roles_for", lambda section: pytest.fail("a model loads"))
    said = "stages.s: lm_eval (lm-evaluation-harness) is not installed. Expected the extra [eval]. Install the extra (pip install posttrain[eval]"
    with pytest.raises(PosttrainError, match=re.escape(said)):
        stage.run(section)


@pytest.mark.parametrize("change, said", [
    ({"tasks": ["toxigen", "nonsense"]}, "s.tasks: 'nonsense' cannot be loaded ('Spec nonsense is not a registered task')"),
    ({"tasks": []}, "s.tasks: no task")])
def test_a_task_that_is_none_stops_before_a_model_loads(tmp_path_factory, tmp_path, harness, monkeypatch, change, said):
    section = started(run_of(tmp_path_factory, tmp_path, **change), "s")
    monkeypatch.setattr(stage, "roles_for", lambda section: pytest.fail("a model loads"))
    with pytest.raises(PosttrainError, match=re.escape(said)):
        stage.run(section)


def test_a_recipe_says_what_lm_eval_takes(tmp_path_factory, tmp_path):
    run = run_of(tmp_path_factory, tmp_path)
    for key, wrong, said in (("models", "{}", "models: got"), ("limit", "0", "limit: got 0"), ("tasks", "toxigen", "tasks: got 'toxigen'"),
                             ("models", "{a: '@nobody'}", "'@nobody' names no section")):
        with pytest.raises(PosttrainError, match=said):
            load_recipe(run.recipe.path, [f"stages.s.{key}={wrong}"])


# -- the report --------------------------------------------------------------------------------------------------------------------------


def shown(**changed) -> View:
    def value(mean: float, **more) -> dict:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8, "higher_is_better": True} | more

    told = {"harness": "0.4", "chat": False, "limit": None, "models": {"old": {"t: acc": value(0.5), "t: ppl": value(12.0, higher_is_better=False)},
                                                                      "new": {"t: acc": value(0.75)}}}
    return View("l", "lm_eval", Path("nowhere"), state="done", results=told | changed)


def test_the_report_shows_every_task():
    part = PARTS["lm_eval"][1]([shown()])
    figure, = part.figures
    assert figure.takeaway == "T: acc: old 0.500 and new 0.750." and figure.svg.startswith("<svg")
    results, = part.tables
    assert results.head == ["task and metric", "old", "new", "rows", "better"]
    assert results.rows == [["t: acc", ("0.500", "0.400 to 0.600"), ("0.750", "0.650 to 0.850"), "8", "higher"],
                            ["t: ppl", ("12.000", "11.900 to 12.100"), "–", "8", "lower"]]
    assert [str(k) for k in KEYS["lm_eval"](shown())] == ["t: acc of new 0.750"]


@pytest.mark.parametrize("damage", [{"models": None}, {"models": {"a": {"t": {"mean": "x", "n": "y"}, "u": 3}}}, {"harness": 3}])
def test_numbers_that_are_missing_take_no_page_with_them(damage):
    assert PARTS["lm_eval"][1]([shown(**damage)]).title == "Tasks of lm-evaluation-harness"
    KEYS["lm_eval"](shown(**damage))


# -- the harness itself ------------------------------------------------------------------------------------------------------------------


def test_the_harness_measures_a_task_of_ones_own(tmp_path_factory, tmp_path):
    pytest.importorskip("lm_eval.tasks")
    rows = [{"question": f"Is {t} a thing?", "choices": ["no", "yes"], "answer": i % 2} for i, t in enumerate(THINGS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "things.yaml").write_text(
        f"task: things\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\noutput_type: multiple_choice\n"
        'test_split: test\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n", encoding="utf-8")
    section = started(run_of(tmp_path_factory, tmp_path, models={"sft": "@sft"}, tasks=[], task_files=["things.yaml"], limit=None), "s")
    stage.run(section)
    found = section.results()["models"]["sft"]["things: acc"]
    samples = read_lines(section.folder / "samples.jsonl")
    assert found["n"] == 16 == len(samples) and found["mean"] == pytest.approx(sum(r["acc"] for r in samples) / 16) and found["stderr"] is not None
    from posttrain import merge

    net, tokenizer = merge.merged(section.recipe.model, source_of(section, "@sft"), torch.float32, "test"), roles_for(section).tokenizer
    for r in samples[:3]:  # the log-probabilities of its answers are the merged model's
        for (text, choice), ((value, _),) in zip(r["arguments"], r["resps"], strict=True):
            a, whole = tokenizer(text)["input_ids"], tokenizer(text + choice)["input_ids"]
            assert whole[:len(a)] == a
            logits = net(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            assert sum(logits[i - 1, whole[i]].item() for i in range(len(a), len(whole))) == pytest.approx(value, abs=1e-3)
