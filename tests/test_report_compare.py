"""The page of several runs side by side, from made-up run folders: differences by hand, other reward models, unfinished and damaged runs."""

import json
import random
import re
from html import unescape

import pytest
from test_posttrain_report import HOSTILE, Page, ci, evaluation, figures_of, holes, make_run, put, reward_results, rows_under, sft_metrics
from typer.testing import CliRunner

from posttrain import config as cfg
from posttrain import plots, report, report_compare
from posttrain.__main__ import app
from posttrain.errors import PosttrainError
from posttrain.report_compare import ABSENT, differences, of_words, one_of, paired, points_of, run_at, sides_of, tokens_of
from posttrain.report_views import is_unsafe
from posttrain.runs import Run

STAGES = {"sft": {"stage": "sft"}, "rm": {"stage": "reward", "model": "@sft"}, "eval": {"stage": "evaluate"}}
JUDGES = {"stages.eval.helpfulness": "@rm", "stages.eval.safety": "@rm"}


def sample(prompt: str, merged: float, safety: float = 1.0, model: str = "chat", **more) -> dict:
    return {"model": model, "prompt": [{"role": "user", "content": prompt}], "key": prompt, "answer": f"{model} says {merged}", "merged": merged,
            "helpfulness": merged, "safety": safety, "tokens": 10, **more}


def small_run(folder, name: str, samples: list[dict] = (), judge: str = "same", rate: float = 1e-4, scores=(0.5, 0.9), shift: float = 0.0) -> Run:
    """sft, one reward model, an evaluation of sft and chat. judge: the reward model's fingerprint. scores: chat's, of helpfulness and safety."""
    run = make_run(folder, STAGES, name=name)
    told = {"inputs": {"run.seed": 0, "stages.sft.learning_rate": rate, "section sft": "x"}, "machine": {"processor": "x86_64", "cores": 2}}
    put(run, "sft", {"steps": 40, "train_tokens": 5000, "held_out_loss_before": 2.4, "held_out_loss_after": 1.8 + shift},
        list(sft_metrics(random.Random(0), 40, last=1.7 + shift)), **told)
    put(run, "rm", reward_results("helpfulness", 0.66 - shift), inputs={"run.seed": 0, "stages.rm.own[0]": "pairs", "data.pairs: rows held out": "d1"})
    models = {"sft": {"helpfulness": ci(0.1), "safety": ci(0.4)}, "chat": {"helpfulness": ci(scores[0]), "safety": ci(scores[1]), "tokens": 50}}
    put(run, "eval", {"models": models, "unsafe_threshold": 0.5, "prompts": 4, "samples_per_prompt": 2}, samples=samples,
        inputs={"run.seed": 0, **JUDGES}, parents={"rm": judge})
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[list[Run], Page]:
    """b's answers score 1 more on two of three common prompts; one prompt is asked by a alone."""
    folder = tmp_path_factory.mktemp("two")
    a = [sample(p, x) for p, xs in (("p1", (0, 1)), ("p2", (2, 2)), ("p3", (1, 1)), ("alone", (9, 9))) for x in xs]
    b = [sample(p, x, safety=s) for p, xs, s in (("p1", (1, 2), 1.0), ("p2", (3, 3), -2.0), ("p3", (1, 1), 1.0)) for x in xs]
    kinds = [r | {"kind": "borderline", "refuses": i % 2 == 0} for i, r in enumerate(a)]
    runs = [small_run(folder, "one", kinds), small_run(folder, "two", [r | {"kind": "borderline", "refuses": False} for r in b], rate=3e-4, shift=0.1)]
    return runs, Page(report_compare.write(runs))


def test_the_page_is_whole_and_loads_nothing(two):
    page = two[1]
    assert page.problems == [] and len(page.ids) == len(set(page.ids)) and "can't be shown" not in page.text
    links = [a["href"] for _, a in page.tags if "href" in a]
    assert links and all(link[:1] == "#" and link[1:] in page.ids for link in links)
    assert not [a for _, a in page.tags if "src" in a] and len(page.scripts) == 1 and "default-src 'none'" in page.source
    for title in ("The runs", "What differs", "Key figures", "Differences on the same prompts", "Safety against helpfulness", "Training curves",
                  "Reward models", "Answers side by side", "Cost"):
        assert title in page.text, title
    for figure in re.findall(r"<figure.*?</figure>", page.source, flags=re.S):
        assert re.search(r'class="takeaway">[^<]*\d', figure) and len(re.search(r'role="img" aria-label="([^"]+)"', figure)[1]) > 40


def test_differences_are_paired_by_prompt(two):
    """By hand: p1 and p2 gain 1, p3 nothing: 2/3 on three prompts; one of three is unsafe; half of the refusals are gone."""
    runs, page = two
    a, b = (side.sections["eval"] for side in sides_of(runs))
    found = paired(a, b, "chat")
    assert found["prompts"] == 3 and found["merged"].mean == pytest.approx(2 / 3) and found["helpfulness"].mean == pytest.approx(2 / 3)
    assert found["unsafe"].mean == pytest.approx(1 / 3) and found["refusals"].mean == pytest.approx(-1 / 2) and found["tokens"].mean == 0
    assert 0 <= found["merged"].low < found["merged"].mean < found["merged"].high <= 1
    assert paired(b, a, "chat")["merged"].mean == pytest.approx(-2 / 3)
    head, row = rows_under(page, "Differences, paired by prompt")
    assert head == ["model, run", "prompts", "merged", "helpfulness", "safety", "unsafe answers", "false refusals", "tokens"]
    assert row == ["chat of eval: two − one", "3", "+0.67", "+0.67", "−1.00", "+33.3 pts", "−50.0 pts", "0"]
    assert "two can't be told from one in merged reward, +0.67" in page.text.replace("\u00a0", " ")


def test_what_differs_is_told_and_nothing_else(two):
    assert rows_under(two[1], "Settings that differ") == [["key", "one", "two"], ["stages.sft.learning_rate", "0.0001", "0.0003"]]
    settings = [{"run.seed": 0, "stages.a.x": 1, "stages.a.y": [], "data.p[0].path": "f", "model.lora": None},
                {"run.seed": 0, "stages.a.x": 2, "stages.a.y": [], "model.lora.r": 4}]
    assert differences(settings) == [("stages.a.x", [1, 2]), ("data.p", [True, ABSENT]), ("model.lora", [None, ABSENT]), ("model.lora.r", [ABSENT, 4])]
    assert differences([{"stages.a.x": 1}, {"stages.a.x": True}]) == [("stages.a.x", [1, True])] and differences(settings[:1] * 2) == []


def test_figures_of_sections_of_one_name_stand_on_one_line(two):
    page = two[1]
    rows = {tuple(r[:1]): r[1:] for r in rows_under(page, "Key figures by section")}
    assert rows[("rm",)] and "held-out loss" in page.text
    reward = rows_under(page, "Reward models, run by run")
    assert [r[0] for r in reward[1:]] == ["rm, one", "rm, two"] and reward[1][3:5] == ["66 %", "64 %"] and reward[2][3:5] == ["56 %", "54 %"]
    figures = {t: w.replace("\u00a0", " ") for t, w in figures_of(page).items()}
    assert "Rm is highest in one, 64 %." in figures["Length-balanced accuracy by run"]
    assert {"Held-out loss (sft)", "Training loss (sft)"} <= set(figures) and "one" in figures["Held-out loss (sft)"].split("two.")[1]
    cost = rows_under(page, "Time, tokens and memory by section")
    assert cost[1] == ["sft", "1 min 00 s", "1 min 00 s"] and "5,000 tokens read in training; at most 3.2" in page.text and cost[-1][1] == "x86_64, 2 cores"
    assert tokens_of(sides_of(two[0])[0].sections["eval"]) == (50 * 2 * 4, "generated")


def test_answers_stand_side_by_side_by_run(two):
    found = report_compare.answers(sides_of(two[0]))
    assert [c["turns"][-1]["text"] for c in found["cards"]] == ["p1", "p2", "p3"], "a prompt that one run alone was asked is left out"
    assert [[n for n, _ in c["columns"]] for c in found["cards"]] == [["one", "two"]] * 3 and [c["gain"] for c in found["cards"]] == [1.0, 1.0, 0.0]
    assert [c["unsafe"] for c in found["cards"]] == [False, True, False]


@pytest.mark.parametrize("safety, threshold, unsafe", [
    (0.0, 0.5, False), (-1e-9, 0.5, True), (-2.0, 0.15, True), (-1.0, 0.15, False), (-1e6, 1e-9, True), (1e6, 0.999, False),
    (None, 0.5, None), ("low", 0.5, None), (0.0, None, None), (0.0, "half", None), (0.0, 1.0, None), (0.0, 0, None)])
def test_what_is_unsafe(safety, threshold, unsafe):
    assert is_unsafe(safety, threshold) is unsafe


def test_scores_of_other_reward_models_are_not_compared(tmp_path):
    """Held-out mean 0.3 and deviation 1.1: a helpfulness of 1.4 is one deviation up."""
    runs = [small_run(tmp_path, n, [sample("p", x, kind="helpful", refuses=n == "b") for x in (0.0, 1.0)], judge=n, scores=(1.4, 0.3)) for n in "ab"]
    page, sides = Page(report_compare.write(runs)), sides_of(runs)
    found = paired(*(s.sections["eval"] for s in sides), "chat")
    assert set(found) == {"prompts", "refusals", "tokens"} and found["refusals"].mean == 1.0
    assert "were scored by different reward models: their scores are not compared" in page.text and "Difference in merged reward" not in page.text
    _, h, s = points_of(sides[0], sides[0].evaluation, raw=False)[-1]
    assert h.value == pytest.approx(1.0) and s.value == pytest.approx(0.0) and h.low == pytest.approx((1.36 - 0.3) / 1.1)
    assert "measured with two rulers" in page.text and "deviations of the run" in page.text and '"merged +' not in page.text
    assert all(c["gain"] is None for c in report_compare.answers(sides)["cards"])
    raw = Page(report_compare.write([small_run(tmp_path, n, scores=(1.4, 0.3)) for n in "cd"]))
    assert "helpfulness (raw score)" in raw.text and "two rulers" not in raw.text


def test_unfinished_and_damaged_runs_are_shown_as_such(tmp_path, two):
    started, empty = make_run(tmp_path, STAGES, name="started"), make_run(tmp_path, STAGES, name="empty")
    put(started, "sft", metrics=[{"step": s, "sft/loss": 2.0 - s / 10} for s in range(1, 8)], done=False, seconds=30)
    (put(started, "rm", {}) / "results.json").write_text("{cut")
    (put(started, "eval", {}) / "manifest.json").write_text("[]")
    page = Page(report_compare.write([two[0][0], started, empty]))
    assert page.problems == [] and "can't be shown" not in page.text
    assert "started and empty are not finished, and shown as far as it goes" in page.text and "empty: nothing has run yet" in page.text
    for words in ("started, rm: results.json can't be read", "started, eval: manifest.json can't be read", "◐ unfinished at step 7", "○ not run"):
        assert words in page.text, words
    assert rows_under(page, "Sections")[1] == ["sft", "✓ done", "◐ unfinished", "○ not run"]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_may_be_missing_anywhere(tmp_path, seed):
    rng = random.Random(seed)
    runs = [small_run(tmp_path, n, [sample(p, rng.random(), kind="helpful", refuses=False) for p in "pqrs"]) for n in "abc"]
    for path in sorted(tmp_path.glob("*/*/*.json*")):
        rows = [json.dumps(holes(json.loads(x), rng, path.suffix == ".jsonl")) for x in path.read_text().splitlines()]
        path.write_text("\n".join(rows))
    page = Page(report_compare.write(runs))
    assert page.problems == [] and len(page.ids) == len(set(page.ids)) and "can't be shown" not in page.text
    assert not re.search(r"(?<![A-Za-z])(nan|inf|None)(?![A-Za-z])", page.text)


def test_six_runs_differ_without_colour(tmp_path):
    assert len({(str(line), marker) for _, line, marker, _ in plots.STYLES}) == len(plots.STYLES) >= 6 and len(set(plots.HATCHES)) >= 6
    page = Page(report_compare.write([small_run(tmp_path, f"run-{i}", shift=i / 20) for i in range(6)]))
    assert page.problems == [] and all(f"run-{i}" in page.text for i in range(6)) and "6 runs: run-0, run-1" in page.text
    assert len(rows_under(page, "Sections")[0]) == 7


def test_hostile_text_stays_text(tmp_path):
    runs = [small_run(tmp_path, n, [sample(HOSTILE, x, kind=HOSTILE, refuses=True) for x in (0.0, 1.0)]) for n in "ab"]
    put(runs[1], "rm", {"which": HOSTILE, "held_out": {"own": evaluation(0.7) | {"by_rating": [{"rating": HOSTILE, "accuracy": ci(0.5)}]}}},
        inputs={f"model.{HOSTILE}": HOSTILE}, commit=HOSTILE)
    page = Page(report_compare.write(runs))
    assert page.problems == [] and len(page.scripts) == 1 and not page.all("img")
    assert not [a for _, a in page.tags if any(k.startswith("on") for k in a)] and page.text.count("{{ 7*7 }}") >= 5


def test_a_part_that_cannot_be_shown_says_so_and_leaves_the_rest(two, monkeypatch):
    monkeypatch.setattr(report_compare, "PARTS", (lambda sides: 1 / 0, report_compare.cost_part))
    monkeypatch.setattr(report, "answers_page", lambda *args: {}["gone"])
    text = unescape(report_compare.render(two[0]))
    assert "can't be shown (ZeroDivisionError" in text and "The sampled answers can't be shown (KeyError" in text and "Time by stage kind" in text


# -- what may be named -------------------------------------------------------------------------------------------------------------------


def test_recipes_and_folders_of_runs_may_be_named(two, tmp_path):
    recipe = tmp_path / "demo.yaml"
    recipe.write_text(json.dumps({"run": {"name": "one", "dir": str(two[0][0].folder.parent)}, "model": {"name_or_path": "builtin:tiny-llama"},
                                  "data": {"d": [{"path": "x.jsonl", "format": "messages"}]}, "stages": {"sft": {"data": "d"}}}))
    path = of_words([str(recipe), str(two[0][1].folder)], [])
    assert path == two[0][0].folder / "comparison.html" and "one and two" in Page(path).text
    out = CliRunner().invoke(app, ["report", str(two[0][1].folder)])
    assert out.exit_code == 0, out.output
    page = Page(two[0][1].folder / "report.html")
    assert page.problems == [] and page.text.count("✓ done") == 3 and "no longer has" not in page.text
    assert [v.name for v in report.views(run_at(str(two[0][1].folder), []))] == ["eval", "rm", "sft"], "all began at once: by name"


def test_what_cannot_be_compared_is_refused(two, tmp_path):
    one, other = (str(r.folder) for r in two[0])
    for words, beside, found in (([one, one], [], "named twice"), ([f"{one}/sft"], [], "the folder of one section"), ([str(tmp_path)], [], "neither a recipe"),
                                 ([str(tmp_path / "gone")], [], "not there"), ([one, "run.seed=3"], [], "a key of a recipe, and no recipe"),
                                 (["run.seed=3"], [], "no recipe and no run"),
                                 ([one, other], [tmp_path], "2 runs")):
        with pytest.raises(PosttrainError, match=found):
            of_words(words, beside)
    with pytest.raises(PosttrainError, match="2 runs"):
        one_of([one, other])


def test_runs_of_one_name_are_told_apart(tmp_path):
    recipes = [cfg.Recipe(run={"name": "t", "dir": str(tmp_path / d)}, model={"name_or_path": "m"}, stages={}) for d in "ab"]
    assert [s.name for s in sides_of([Run(r) for r in recipes])] == ["a/t", "b/t"]
