"""A reward model's scores survive every way of loading it: the `score` command, save and reload, merging, quantized bases, and transformers
with peft alone. And what the command says of rows and folders it cannot use."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posttrain import builtin, merge
from posttrain.__main__ import app
from posttrain.config import load_recipe
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.runs import Run
from reward import score_command, train

STAGE = {"stage": "reward", "model": "base", "own": "own", "batch_size": 8, "max_steps": 10, "epochs": 50, "learning_rate": 1e-2, "warmup_ratio": 0,
         "safety_loss_weight": 1.0, "max_length": 1024}
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def rows(n: int = 48) -> list[dict]:
    """Pairs a tiny model can learn but for some that say the opposite, of every rating and several lengths; every fourth has earlier turns."""
    out = []
    for i in range(n):
        answers = "yes, " * (i % 5 + 1) + "sure", "no, " * (i % 3 + 1) + "never"
        chosen, rejected = answers[::-1] if i % 7 == 6 else answers
        out.append({"prompt": [*(ASKED if i % 4 == 3 else []), {"role": "user", "content": f"question {i}"}], "chosen": chosen, "rejected": rejected,
                    "rating": i % 4, "chosen_safe": None if i % 6 == 5 else True, "rejected_safe": i % 8 == 7})
    return out


class Trained:
    """A reward section that learned something, its held-out pairs and the scores it gave them itself."""

    def __init__(self, folder: Path, stage: dict | None = None, **model):
        base = {"name_or_path": "builtin:tiny-llama", "dtype": "float32", "chat_template": "chatml", "lora": {"r": 4, "alpha": 8}}
        recipe = {"run": {"name": "t", "dir": str(folder / "runs"), "threads": 2}, "model": base | model,
                  "data": {"own": [{"path": "pairs.jsonl", "format": "preference"}], "held_out": {"pairs": 16}},
                  "stages": {"reward": STAGE | (stage or {})}}
        write(folder / "pairs.jsonl", rows())
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        run = Run(load_recipe(folder / "recipe.yaml"))
        self.section = run.section("reward")
        run.start(self.section)
        judged, real = [], train.judge
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "judge", lambda *args: judged.append(real(*args)) or judged[-1])
            train.run(self.section)
        self.raw = judged[-1][1]
        self.pairs = run.data_of("own").held_out
        self.model = self.section.folder / "model"
        self.data = write(folder / "held.jsonl", [{k: getattr(p, k) for k in rows(1)[0]} for p in self.pairs])

    @property
    def flat(self) -> list[float]:
        return [x for s in self.raw for x in s]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("full"), {"learning_rate": 1e-3}, lora=None)


@pytest.fixture
def score(tmp_path):
    """score(folder, data, '--format', ...) -> (what it prints, the lines it writes). Our errors are raised, as `guarded` sees them."""

    def go(model, data, *words):
        result = CliRunner().invoke(app, ["score", *map(str, ["--model", model, "--data", data, "--output", tmp_path / "out.jsonl", *words])])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output, read_lines(tmp_path / "out.jsonl")

    return go


def scores_of(lines) -> list[float]:
    return [x for line in lines for x in line["scores"]]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


# -- the command -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_the_scores_are_those_of_the_section(form, request, score):
    trained = request.getfixturevalue(form)
    text, lines = score(trained.section.folder, trained.data)
    assert torch.tensor(trained.flat).std() > 0.3  # answers have different scores, so that the tolerances here mean something
    assert scores_of(lines) == pytest.approx(trained.flat, abs=1e-6)
    assert [line["row"] for line in lines] == list(range(1, 17))
    assert [x for line in lines for x in line["sigma"]] == pytest.approx(torch.tensor(trained.flat).double().sigmoid().tolist(), abs=1e-6)
    own = trained.section.results()["held_out"]["own"]
    accuracy, unsafe = own["accuracy"], own["unsafe_recall_interval"]
    assert f"accuracy {accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}] of 16 pairs, length-balanced" in text
    assert f"unsafe answers with sigma below 0.5: {unsafe['mean']:.1%}" in text and "32 answers in 16 of 16 rows" in text
    for row in own["by_rating"]:
        assert re.search(rf"  {row['rating']}: {row['accuracy']['mean']:.1%} .*of {row['pairs']}\n", text)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_the_model_folder_and_a_copy_outside_of_the_run_give_the_same(form, request, score, tmp_path):
    trained = request.getfixturevalue(form)
    outside = shutil.copytree(trained.model, tmp_path / "elsewhere")
    _, expected = score(trained.section.folder, trained.data)
    for folder in (trained.model, outside):
        assert score(folder, trained.data)[1] == expected


def test_demonstrations_and_samples_are_scored_at_their_last_answer(adapter, score, tmp_path):
    _, pairs = score(adapter.model, adapter.data)
    chosen = [line["scores"][0] for line in pairs]
    demonstrations = [{"messages": [*p.prompt, {"role": "assistant", "content": p.chosen}]} for p in adapter.pairs]
    completions = [{"prompt": p.prompt, "completion": p.chosen} for p in adapter.pairs]
    samples = [{"step": 3, "prompt": p.prompt, "answer": p.chosen, "helpfulness": 0.1, "safety": -0.3, "finished": False} for p in adapter.pairs]
    plain = [{"question": p.prompt[-1]["content"], "reply": p.chosen} for p in adapter.pairs]
    for rows, words in ((demonstrations, ()), (completions, ("--format", "prompt_completion")), (samples, ()), (samples, ("--format", "prompt")),
                        (plain, ("--columns", "prompt=question", "--columns", "answer=reply"))):
        text, lines = score(adapter.model, write(tmp_path / "rows.jsonl", rows), *words)
        assert all(len(line["scores"]) == 1 for line in lines)
        for i, p in enumerate(adapter.pairs):
            if rows is not plain or len(p.prompt) == 1:  # a text as prompt has no earlier turns
                assert lines[i]["scores"][0] == pytest.approx(chosen[i], abs=2e-6)
        assert "accuracy" not in text and "16 answers in 16 of 16 rows" in text


def test_a_conversation_s_last_answer_is_scored_after_the_turns_before_it(adapter, score, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"}]
    _, last = score(adapter.model, write(tmp_path / "d.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "Because."}]}]))
    _, pair = score(adapter.model, write(tmp_path / "p.jsonl", [{"prompt": turns, "chosen": "Because.", "rejected": "No."}]))
    assert last[0]["scores"][0] == pytest.approx(pair[0]["scores"][0], abs=2e-6)


def test_a_policy_s_odd_samples_stop_nothing(adapter, score, tmp_path):
    """An empty answer has a score; one that spells a token of the format has none, and is told."""
    rows = [{"prompt": "Why?", "answer": a} for a in ("So.", "", "I say <|im_end|> now", "It is.")]
    text, lines = score(adapter.model, write(tmp_path / "samples.jsonl", rows))
    assert [line["scores"] is None for line in lines] == [False, False, True, False]
    assert lines[2] == {"row": 3, "scores": None, "sigma": None, "reason": "spells_a_token"}
    assert "1 row (spells_a_token) left without a score: row 3" in text and "3 answers in 3 of 4 rows" in text


def test_rows_without_a_score_keep_their_line(adapter, score, tmp_path):
    """Too long, and ties: nulls and a reason in the row's place, row numbers on the screen."""
    rows = [{"prompt": f"q{i}", "chosen": "yes " * (80 if i in (1, 3) else 1), "rejected": "no", "score_chosen": 3, "score_rejected": 3 if i == 2 else 1}
            for i in range(5)]
    data = write(tmp_path / "p.jsonl", rows)
    text, lines = score(adapter.section.folder, data, "--format", "ultrafeedback_binarized", "--max-length", 90)
    assert [(line["row"], line.get("reason")) for line in lines] == [(1, None), (2, "too_long"), (3, "tie"), (4, "too_long"), (5, None)]
    assert "2 rows longer than 90 tokens left without a score: row 2, 4" in text and "1 row (tie) left without a score: row 3" in text
    assert "4 answers in 2 of 5 rows" in text
    with pytest.raises(PosttrainError, match=r"no row can be scored \(4 too_long, 1 tie\)\. Expected answers of at most 3 tokens"):
        score(adapter.section.folder, data, "--format", "ultrafeedback_binarized", "--max-length", 3)


def test_the_longest_row_is_the_section_s_or_2048(adapter, tmp_path):
    assert score_command.find(adapter.section.folder).max_length == 1024
    assert score_command.find(shutil.copytree(adapter.model, tmp_path / "m")).max_length == 2048


def test_every_stages_samples_get_a_file_of_their_own(tmp_path):
    for section in ("ppo", "eval"):
        (tmp_path / section).mkdir()
        (tmp_path / section / "manifest.json").touch()
    names = {score_command.default_output(tmp_path / m / "model", tmp_path / s / "samples.jsonl").name for m in ("rm_a", "rm_b") for s in ("ppo", "eval")}
    assert names == {f"{s}-samples.{m}.scores.jsonl" for m in ("rm_a", "rm_b") for s in ("ppo", "eval")}


def test_scores_lie_in_the_working_folder_unless_told_otherwise(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["score", "--model", str(adapter.model), "--data", str(adapter.data)])
    name = f"held.{adapter.section.name}.scores.jsonl"
    assert result.exit_code == 0 and f"Scores: {name}" in result.output
    assert [p.name for p in tmp_path.iterdir()] == [name] and len(read_lines(tmp_path / name)) == 16
    assert not list(adapter.data.parent.glob("*.scores*"))


# -- every way of loading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_saved_again_the_scores_are_the_same_to_the_last_bit(form, request, score, tmp_path):
    trained = request.getfixturevalue(form)
    _, expected = score(trained.model, trained.data)
    found = score_command.find(trained.section.folder)
    roles, _ = score_command.load(found, score_command.load_tokenizer(found))
    roles.save("reward", tmp_path / "again")
    _, lines = score(tmp_path / "again", trained.data)
    assert lines == expected


def classifier(folder: Path, **more):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32, **more).eval()


@pytest.mark.parametrize("who", ["ours", "peft"])
def test_merged_into_the_base_the_scores_stay(adapter, score, tmp_path, who):
    """float32: within 1e-4. Our merge leaves the head out (it makes chat models), so it is put back as anyone would."""
    from peft import PeftModel

    if who == "ours":
        merge.merged(adapter.section.recipe.model, adapter.model, torch.float32, "test").save_pretrained(tmp_path / "body")
        net = classifier(tmp_path / "body", pad_token_id=0)
        net.score.weight.data = load_file(adapter.model / "adapter_model.safetensors")["base_model.model.score.weight"]
    else:
        net = PeftModel.from_pretrained(classifier(builtin.folder(builtin.TINY)), adapter.model).merge_and_unload()
    net.save_pretrained(tmp_path / "merged")
    for file in (f for f in adapter.model.iterdir() if "adapter" not in f.name):
        shutil.copy(file, tmp_path / "merged")
    _, lines = score(tmp_path / "merged", adapter.data)
    assert scores_of(lines) == pytest.approx(adapter.flat, abs=1e-4)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_transformers_and_peft_alone_give_our_scores(form, request, score):
    """As a stranger would: the classifier by its usual class, texts by the folder's own tokenizer and template, one right-padded batch.
    What the template writes after the end of the answer's turn is cut: the score stands at that token."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    trained = request.getfixturevalue(form)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    if form == "adapter":
        base = PeftConfig.from_pretrained(trained.model).base_model_name_or_path
        assert base == "builtin:tiny-llama"  # a name of this program; whoever stands outside needs the folder behind it
        net = PeftModel.from_pretrained(classifier(builtin.folder(base), pad_token_id=tokenizer.pad_token_id), trained.model).eval()
    else:
        net = classifier(trained.model)
    dialogues = [[*p.prompt, {"role": "assistant", "content": a}] for p in trained.pairs for a in (p.chosen, p.rejected)]
    texts = [tokenizer.apply_chat_template(d, tokenize=False).rstrip("\n") for d in dialogues]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "right" and (batch.attention_mask[:, -1] == 0).any() and all(t.endswith("<|im_end|>") for t in texts)
    with torch.no_grad():
        theirs = net(**batch).logits.squeeze(-1).tolist()
    assert scores_of(score(trained.model, trained.data)[1]) == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trained_over_a_quantized_base_it_is_scored_over_one(score, tmp_path, kind, quantized_or_skip):
    quantized_or_skip(kind)
    trained = Trained(tmp_path, quantization=kind)
    text, lines = score(trained.section.folder, trained.data)
    assert f"(float32 over {kind})" in text and torch.tensor(trained.flat).std() > 0.3
    assert scores_of(lines) == pytest.approx(trained.flat, abs=1e-5)


@pytest.mark.parametrize("kind, most", [("nf4", 0.3), ("int8", 0.03)])
def test_a_quantized_base_changes_the_scores_by_its_rounding_alone(adapter, score, tmp_path, kind, most, quantized_or_skip):
    """The same adapter over the rounded base. Measured on this model, whose scores deviate by 1.3: 0.15 at most with nf4, 0.012 with int8."""
    quantized_or_skip(kind)
    section = shutil.copytree(adapter.section.folder, tmp_path / kind)
    told = (section / "config.yaml").read_text(encoding="utf-8")
    (section / "config.yaml").write_text(told.replace("quantization: none", f"quantization: {kind}"), encoding="utf-8")
    text, lines = score(section, adapter.data)
    gaps = [abs(a - b) for a, b in zip(scores_of(lines), adapter.flat, strict=True)]
    assert f"(float32 over {kind})" in text and 1e-4 < max(gaps) < most
    assert torch.corrcoef(torch.tensor([scores_of(lines), adapter.flat]))[0, 1] > 0.99


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None], ids=["adapter", "full"])
def test_trained_rows_of_added_turn_tokens_are_read_back(score, tmp_path, lora):
    """A base without chatml's tokens. Outside of the run nothing but the folder says which rows were added."""
    base = shutil.copytree(builtin.folder(builtin.TINY), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / name).read_text(encoding="utf-8").replace("<|im_start|>", "<|bos|>").replace("<|im_end|>", "<|eos|>")
        (base / name).write_text(text, encoding="utf-8")
    trained = Trained(tmp_path, {"learning_rate": 1e-2 if lora else 1e-3}, name_or_path=str(base), add_tokens=True, lora=lora)
    for folder in (trained.section.folder, shutil.copytree(trained.model, tmp_path / "elsewhere")):
        assert scores_of(score(folder, trained.data)[1]) == pytest.approx(trained.flat, abs=2e-6)


# -- what cannot be scored ---------------------------------------------------------------------------------------------------------------


def edit(folder: Path, **keys) -> Path:
    """A folder whose adapter_config.json says something else."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")
    return folder


def two_labels(folder: Path) -> Path:
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(builtin.folder(builtin.TINY), num_labels=2).save_pretrained(folder)
    return folder


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def kind(section: Path, name: str) -> Path:
    path = section / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"kind": "reward"', f'"kind": "{name}"'), encoding="utf-8")
    return section


def damaged(folder: Path, name: str, text: str = "{") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


FOLDERS = {  # what is made of a copy of a finished section, and what is said of it
    "nothing there": (lambda s: s / "nope", r"--model .*nope: no such folder\. Expected a reward section's folder"),
    "the run": (lambda s: s.parent, r"no model \(neither adapter_config\.json nor config\.json\).*Name .*reward"),
    "an sft section": (lambda s: kind(s, "sft"), r"a section of the kind 'sft'\. Expected a reward section\. Name one"),
    "its model": (lambda s: kind(s, "sft") / "model", r"a section of the kind 'sft'"),
    "unfinished": (lambda s: without(s, "DONE"), r"is not finished \(no DONE\)\. Expected a finished reward section\. Run its recipe"),
    "damaged": (lambda s: damaged(s, "config.yaml", "model: {name_or_path: x, colour: red}"), r"config\.yaml: damaged.*Delete the section's folder"),
    "no head": (lambda s: Path(builtin.folder(builtin.TINY)), r"has no scalar head \(score\.weight\)\. Expected a reward model"),
    "two labels": (lambda s: two_labels(s.parent / "two"), r"its head gives 2 numbers\. Expected .*one label"),
    "no weights": (lambda s: without(s, "model/adapter_model.safetensors"), r"holds no \.safetensors"),
    "damaged weights": (lambda s: damaged(s, "model/adapter_model.safetensors"), r"adapter_model\.safetensors: damaged"),
    "no base named": (lambda s: edit(s.rename(s.parent / "x") / "model", base_model_name_or_path=None), None),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_reward_model_is_refused_before_anything_is_read(adapter, score, tmp_path, monkeypatch, case):
    make, told = FOLDERS[case]
    monkeypatch.setattr(score_command, "read", lambda *_: pytest.fail("the data was read"))
    folder = make(shutil.copytree(adapter.section.folder, tmp_path / "run" / "reward"))
    if told is None:  # a bare adapter: no section around it
        folder, told = folder.rename(tmp_path / "bare"), r"adapter_config\.json: no base_model_name_or_path\. Expected the base .*Write its folder"
    with pytest.raises(PosttrainError, match=told) as e:
        score(folder, adapter.data)
    assert all((e.value.place, e.value.found, e.value.expected, e.value.do))


@pytest.mark.parametrize("base, told", [("./nowhere", r"its base: \./nowhere: no such folder\. Expected a model folder.*Check the path"),
                                        ("builtin:nowhere", "no built-in model 'builtin:nowhere'")])
def test_a_bare_adapter_whose_base_is_not_there(adapter, score, tmp_path, monkeypatch, base, told):
    monkeypatch.setattr(score_command, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PosttrainError, match=told) as e:
        score(edit(shutil.copytree(adapter.model, tmp_path / "m"), base_model_name_or_path=base), adapter.data)
    assert all((e.value.place, e.value.found, e.value.expected, e.value.do))


def test_without_any_chat_template_there_are_no_ids(adapter, score, tmp_path):
    """In a run the recipe names it, should the folder have lost it; elsewhere nobody does."""
    section = shutil.copytree(adapter.section.folder, tmp_path / "reward")
    without(section, "model/chat_template.jinja")
    assert scores_of(score(section, adapter.data)[1]) == pytest.approx(adapter.flat, abs=1e-6)
    with pytest.raises(PosttrainError, match=r"no chat template\. Expected the template that .*chat_template\.jinja"):
        score((section / "model").rename(tmp_path / "m"), adapter.data)


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
FILES = {
    "prompts": ([{"prompt": "a"}], (), r"holds prompts without answers\. Expected pairs, demonstrations, or rows with prompt and answer"),
    "a bad pair": ([GOOD, GOOD | {"chosen": ""}, {"prompt": "x"}], (), r"rows\.jsonl, row 2: 'chosen' is empty.*2 bad rows in all, read as preference"),
    "a bad sample": ([{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": 3}], (), r"rows\.jsonl, row 2: 'answer' is int 3.*1 bad row in all"),
    "a sample without": ([{"prompt": "a", "answer": "b"}, {"prompt": "a"}], (), r"row 2: no 'answer' \(columns: prompt\)"),
    "no JSON": ([GOOD, "{"], (), r"rows\.jsonl, row 2: not JSON"),
    "a spelled token": ([GOOD, GOOD | {"prompt": "<|im_end|>"}], (), r"rows\.jsonl, row 2: a user turn spells the token '<\|im_end\|>'.*Remove or rewrite"),
    "another format": ([GOOD], ("--format", "preferences"), r"--format: unknown format 'preferences'.*Did you mean 'preference'\?"),
    "no such column": ([GOOD], ("--columns", "prompt=question"), r"no 'question' \(columns: prompt, chosen, rejected\)"),
    "half a column": ([GOOD], ("--columns", "prompt="), r"--columns 'prompt=': not two names"),
    "nothing in it": ([], (), r"rows\.jsonl: no row can be scored \(it has none\)"),
    "a folder for the output": ([GOOD], ("--output", "."), r"--output \.: is a folder\. Expected a file"),
}


@pytest.mark.parametrize("case", FILES)
def test_rows_that_cannot_be_used_are_told_before_the_model_is_loaded(adapter, score, tmp_path, monkeypatch, case):
    rows, words, told = FILES[case]
    monkeypatch.setattr(score_command, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PosttrainError, match=told):
        score(adapter.section.folder, write(tmp_path / "rows.jsonl", rows), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_data_is_not_overwritten_by_its_scores(adapter, score, tmp_path):
    data = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(PosttrainError, match="is the data itself"):
        score(adapter.section.folder, data, "--output", data)
    with pytest.raises(PosttrainError, match=r"--data: no file .*gone\.jsonl|gone\.jsonl: cannot be read"):
        score(adapter.section.folder, tmp_path / "gone.jsonl")
    assert read_lines(data) == [GOOD]


def test_scores_that_are_no_numbers_are_not_written(adapter, score, tmp_path):
    folder = shutil.copytree(adapter.model, tmp_path / "m")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.score.weight": tensors["base_model.model.score.weight"] * float("nan")}, folder / "adapter_model.safetensors")
    with pytest.raises(PosttrainError, match=r"gives row 1 of .* a score that is not a finite number"):
        score(folder, adapter.data)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_is_one_of_our_errors(adapter, score, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_command, "write_atomic", full)
    with pytest.raises(PosttrainError, match=r"--output .*cannot be written \(No space left on device\)"):
        score(adapter.section.folder, adapter.data)
