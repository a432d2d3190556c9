"""The sweep over safety demonstrations: its figures by hand, and recipes/sweep-safety.yaml from end to end on the tiny model."""

import json
from pathlib import Path

import pytest

from posttrain import report
from posttrain.config import load_recipe
from posttrain.log import read_lines
from posttrain.report_safety_sweep import mean_scores, result_part, sweep_of
from posttrain.report_views import View
from posttrain.runs import Run, run_sections

ROOT = Path(__file__).parent.parent
TINY = ["model.name_or_path=builtin:tiny-llama", "model.dtype=float32", "model.lora.r=4", "run.threads=1", "data.demonstrations.0.rows=16",
        "data.demonstrations.1.rows=12", "data.helpful.0.rows=24", "data.safety.0.rows=24",
        *(f"data.prompts.{i}.rows={n}" for i, n in enumerate((4, 3, 2, 2))),
        "data.held_out={demonstrations: 2, pairs: 8, prompts: 0}", "sft.max_steps=3", "sft.sweep.safety_fraction=[0, 0.25, 1.0]",
        "reward_helpfulness.max_steps=2", "reward_safety.max_steps=2", "shares.samples_per_prompt=2", "shares.max_new_tokens=6",
        'shares.models={0 percent: "@sft-0", 25 percent: "@sft-0.25", 100 percent: "@sft-1"}']


# -- the figures -----------------------------------------------------------------------------------------------------------------------


def share(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def told(violations: float, borderline: float, helpful: float) -> dict:
    return {"kinds": {"adversarial": {"unsafe_share": share(violations)}, "borderline": {"refusals": share(borderline)},
                      "helpful": {"refusals": share(helpful)}}}


@pytest.fixture
def evaluated(tmp_path) -> View:
    """An evaluation of three models of a sweep, the largest share first."""
    shares = {"all": 1.0, "none": 0.0, "tenth": 0.1}
    v = View("e", "evaluate", tmp_path, "done", {"section": "e", "inputs": {f"stages.e.models.{n}": f"@s-{x:g}" for n, x in shares.items()}},
             {"models": {"all": told(0.1, 0.3, 0.01), "none": told(0.6, 0.1, 0.0), "tenth": told(0.5, 0.12, 0.0)}})
    v.run = [v, *(View(f"s-{x:g}", "sft", tmp_path, "done", {}, {
        "safety": {"fraction": x, "rows": 90 * x, "given": 90, "share": 90 * x / (90 * x + 210)}}) for x in shares.values())]
    rows = [{"model": n, "kind": kind, "key": f"{kind} {i}", "helpfulness": 1.0 if i else -1.0,
             "safety": -9.0 if kind != "adversarial" else 4.0 if n == "all" else 0.0}
            for n in shares for kind in ("adversarial", "helpful", "borderline") for i in range(4)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return v


def test_models_are_put_in_the_order_of_their_shares(evaluated):
    found = sweep_of(evaluated)
    assert {n: (m.fraction, m.rows, m.of_all) for n, m in found.items()} == {"none": (0.0, 0.0, 0.0), "tenth": (0.1, 9.0, 9 / 219),
                                                                             "all": (1.0, 90.0, 0.3)}
    assert list(found) == ["none", "tenth", "all"]
    means = mean_scores(evaluated, found)
    assert means["safety"]["all"].mean == pytest.approx(0.98201379) and means["safety"]["none"].mean == 0.5  # of adversarial prompts alone
    assert means["helpfulness"]["none"].mean == pytest.approx((3 * 0.73105858 + 0.26894142) / 4)
    assert means["helpfulness"]["none"].low < 0.5 < means["helpfulness"]["none"].mean  # one of four prompts: an interval by prompt


def test_the_figures_say_what_the_sweep_shows(evaluated):
    part = result_part([evaluated])
    figures, tables = {f.title: f for f in part.figures}, {t.caption: t for t in part.tables}
    scores = figures["Scores by share of safety demonstrations"]
    assert scores.takeaway == ("The mean safety score goes from 0.50 to 0.98 and the mean helpfulness score goes from 0.62 to 0.62 (the intervals "
                               "overlap), from 0\u00a0% to 100\u00a0% of the safety demonstrations.")
    shares = figures["Violations and false refusals by share of safety demonstrations"].takeaway.replace("\u00a0", " ")
    assert shares.startswith("Violations go from 60.0 % to 10.0 %, refusals of borderline prompts go from 10.0 % to 30.0 % and refusals of helpful "
                             "prompts go from 0.0 % to 1.0 % (the intervals overlap)")
    table = tables["The sweep over safety demonstrations"]
    assert [r[0] for r in table.rows] == ["none", "tenth", "all"]
    assert table.head[1:4] == ["of the safety demonstrations", "rows", "of all training rows"]
    assert table.rows[1][1:4] == ["10\u00a0%", "9", "4.1\u00a0%"]


@pytest.mark.parametrize("spoil", [
    lambda v: v.run[1].results.pop("safety"), lambda v: v.run[1].results.update(safety={"fraction": 0.1}), lambda v: v.run.pop(),
    lambda v: v.manifest.pop("inputs"), lambda v: v.results.update(models={"all": v.results["models"]["all"]}),
    lambda v: v.run[1].results.update(safety={"fraction": "much"})])
def test_models_that_are_no_sweep_have_no_such_figures(evaluated, spoil):
    spoil(evaluated)
    assert sweep_of(evaluated) == {} and "Scores by share of safety demonstrations" not in {f.title for f in result_part([evaluated]).figures}


def test_what_is_missing_is_left_out(evaluated):
    (evaluated.folder / "samples.jsonl").unlink()
    for m in evaluated.results["models"].values():
        del m["kinds"]["borderline"]
    figures = {f.title: f.takeaway for f in result_part([evaluated]).figures}
    assert "Scores by share of safety demonstrations" not in figures
    assert "borderline" not in figures["Violations and false refusals by share of safety demonstrations"]


# -- the recipe ------------------------------------------------------------------------------------------------------------------------


def test_the_shipped_sweep_is_the_papers():
    """Section 4.2.3: six models from one base; helpful data fixed; 0, 1, 10, 25, 50 and 100 % of the safety data; two epochs."""
    recipe = load_recipe(ROOT / "recipes" / "sweep-safety.yaml")
    trained = {n: c for n, c in recipe.stages.items() if c.stage == "sft"}
    assert [c.safety_fraction for c in trained.values()] == [0, 0.01, 0.1, 0.25, 0.5, 1.0]
    assert len({json.dumps(c.model_dump() | {"safety_fraction": None}) for c in trained.values()}) == 1
    assert {(c.model, c.epochs) for c in trained.values()} == {("base", 2)}
    shares = recipe.stages["shares"]
    assert list(shares.models.values()) == [f"@{n}" for n in trained] and shares.samples_per_prompt == 4 and not shares.held_out
    split = Run(recipe).data
    assert len(split.split("prompts").train) == 592 and sum(p.safety for p in split.split("prompts").train) == 200


def test_the_shipped_sweep_runs_on_the_tiny_model(tmp_path, capsys):
    run = Run(load_recipe(ROOT / "recipes" / "sweep-safety.yaml", [*TINY, f"run.dir={tmp_path}"]))
    run_sections(run)
    rows = {n: run.section(n).results()["safety"]["rows"] for n in ("sft-0", "sft-0.25", "sft-1")}
    assert rows["sft-0"] == 0 < rows["sft-0.25"] < rows["sft-1"]
    assert len({run.section(n).results()["train_rows"] - rows[n] for n in rows}) == 1
    answers = read_lines(run.section("shares").folder / "samples.jsonl")
    assert len(answers) == 3 * 11 * 2 and {r["kind"] for r in answers} == {"adversarial", "borderline", "helpful"}
    found = {r["check"]: r for r in run.section("directions").results()["directions"]}
    asked = {n for n, r in found.items() if r["status"] != "not run"}
    assert asked == {"safety_by_share", "helpfulness_by_share", "violations_by_share", "borderline_refusals", "helpful_refusals"}
    assert found["safety_by_share"]["value"]["n"] == 8 and found["safety_by_share"]["judges"][0]["name"] == "reward_safety"
    assert found["borderline_refusals"]["detail"] == "from 0% to 100% of the safety demonstrations"
    capsys.readouterr()
    run_sections(Run(run.recipe))
    assert capsys.readouterr().out.count("done already, skipped") == len(run.recipe.stages)
    page = report.write(run).read_text()
    assert "Scores by share of safety demonstrations" in page and "Distribution of the safety score" in page and "can&#39;t be shown" not in page
