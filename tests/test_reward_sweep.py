"""Sweeps and drift: one section becomes several, subsets are nested, and the newest policy's pairs are measured and never trained on."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from posttrain import plan, report
from posttrain.config import load_recipe
from posttrain.data import prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Pair
from posttrain.runs import Run, run_sections
from reward.mix import mix

ROOT = Path(__file__).parent.parent
RECIPE = """
run: {name: x}
model: {name_or_path: "builtin:tiny-llama", chat_template: chatml, lora: {}}
data: {pairs: [{path: p.jsonl, format: preference}], demos: [{path: d.jsonl, format: messages}], more: [{path: m.jsonl, format: preference}]}
stages:
  sft: {data: demos}
  rm: {stage: reward, model: "@sft", own: pairs, SWEEP}
"""


def write(folder: Path, sweep: str, more: str = "") -> Path:
    path = folder / "mine.yaml"
    path.write_text(RECIPE.replace("SWEEP", sweep) + more)
    return path


# -- one section becomes several -------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_section_for_each_value(tmp_path):
    path = write(tmp_path, "epochs: 2, fraction: 0.5, sweep: {fraction: [0.125, 0.25, 1.0]}")
    recipe = load_recipe(path)
    assert list(recipe.stages) == ["sft", "rm-0.125", "rm-0.25", "rm-1"]
    assert [c.fraction for n, c in recipe.stages.items() if n != "sft"] == [0.125, 0.25, 1.0]  # the sweep's value stands above the section's
    assert {(c.stage, c.model, c.epochs, *c.own) for n, c in recipe.stages.items() if n != "sft"} == {("reward", "@sft", 2, "pairs")}
    changed = load_recipe(path, ["rm.epochs=3", "stages.rm.sweep.fraction=[0.5]"])  # an override reaches every member, or the values
    assert {n: c.epochs for n, c in changed.stages.items() if n != "sft"} == {"rm-0.5": 3}


def test_several_keys_make_a_grid(tmp_path):
    recipe = load_recipe(write(tmp_path, "sweep: {margin: [none, small], seed: [0, 1], own: [pairs, [pairs, more]]}"))
    assert [n for n in recipe.stages if n != "sft"] == [f"rm-{m}-{s}-{o}" for m in ("none", "small") for s in (0, 1) for o in ("pairs", "pairs-more")]
    last = recipe.stages["rm-small-1-pairs-more"]
    assert (last.margin, last.seed, last.own) == ("small", 1, ["pairs", "more"])


def test_any_stage_can_be_swept_and_members_can_be_referred_to(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.replace("sft: {data: demos}", "sft: {data: demos, sweep: {learning_rate: [1e-4, 5e-4]}}")
                    .replace('"@sft", own: pairs, SWEEP', '"@sft-0.0005", own: pairs'))
    recipe = load_recipe(path)
    assert list(recipe.stages) == ["sft-0.0001", "sft-0.0005", "rm"] and {c.stage for c in recipe.stages.values()} == {"sft", "reward"}
    assert recipe.stages["sft-0.0005"].learning_rate == 5e-4
    both = write(tmp_path, "sweep: {model: ['@sft', base]}")
    assert [(n, c.model) for n, c in load_recipe(both).stages.items() if n != "sft"] == [("rm-sft", "@sft"), ("rm-base", "base")]


@pytest.mark.parametrize("sweep, more, said", [
    ("sweep: {fractoin: [0.5]}", "", ["stages.rm.sweep.fractoin: unknown key", "Did you mean 'fraction'?"]),
    ("sweep: {stage: [sft]}", "", ["stages.rm.sweep.stage: unknown key"]),
    ("sweep: {fraction: 0.5}", "", ["stages.rm.sweep.fraction: got 0.5", "a list of values"]),
    ("sweep: {fraction: []}", "", ["stages.rm.sweep.fraction: got []"]),
    ("sweep: [0.5]", "", ["stages.rm.sweep: got [0.5]", "sweep: {fraction: [0.25, 0.5, 1.0]}"]),
    ("sweep: {}", "", ["stages.rm.sweep: got {}"]),
    ("sweep: {fraction: [0.5, 0.5]}", "", ["two sections would be called 'rm-0.5'"]),
    ("sweep: {fraction: [0.5]}", "  rm-0.5: {stage: sft, data: demos}\n", ["two sections would be called 'rm-0.5'"]),
    ("sweep: {fraction: [0.5, 2]}", "", ["stages.rm-2.fraction: got 2", "less than or equal to 1"]),
    ("sweeep: {fraction: [0.5]}", "", ["stages.rm.sweeep: unknown key", "Did you mean 'sweep'?"]),
    ("sweep: {fraction: [0.5, 1]}", "  chat: {stage: export, model: '@rm'}\n",
     ["stages.chat: '@rm' is swept and names 2 sections", "one of rm-0.5, rm-1", 'such as "@rm-1"']),
    ("sweep: {fraction: [0.5, 1]}", "  chat: {stage: export, model: '@rm-0.6'}\n", ["'@rm-0.6' names no section", "Did you mean 'rm-0.5'?"]),
])
def test_faults_of_a_sweep_are_named(tmp_path, sweep, more, said):
    with pytest.raises(PosttrainError) as e:
        load_recipe(write(tmp_path, sweep, more))
    for words in [*said, "mine.yaml"]:
        assert words in str(e.value), e.value


def test_a_swept_key_is_overridden_as_a_sweep(tmp_path):
    path = write(tmp_path, "sweep: {fraction: [0.25, 0.5]}")
    assert list(load_recipe(path, ["rm.sweep.fraction=[1.0]"]).stages) == ["sft", "rm-1"]
    with pytest.raises(PosttrainError, match=r"the recipe sweeps fraction over \[0.25, 0.5\].*Write stages\.rm\.sweep\.fraction=\[1.0\]"):
        load_recipe(path, ["rm.fraction=1.0"])  # it would change nothing


def test_a_sweep_takes_the_place_of_a_value_below_and_null_switches_it_off(tmp_path):
    below = write(tmp_path, "fraction: 0.3")
    mine = tmp_path / "sweep.yaml"
    mine.write_text(f"extends: {below.name}\nstages: {{rm: {{sweep: {{fraction: [0.25, 0.5]}}}}}}\n")
    assert [c.fraction for n, c in load_recipe(mine).stages.items() if n != "sft"] == [0.25, 0.5]
    off = tmp_path / "off.yaml"
    off.write_text("extends: sweep.yaml\nstages: {rm: {sweep: null, fraction: 0.75}}\n")
    assert load_recipe(off).stages["rm"].fraction == 0.75
    off.write_text("extends: sweep.yaml\nstages: {rm: {fraction: 0.75}}\n")
    with pytest.raises(PosttrainError, match=r"off\.yaml: stages\.rm\.fraction: 0\.75, while sweep\.yaml sweeps it over \[0\.25, 0\.5\]"):
        load_recipe(off)
    with pytest.raises(PosttrainError, match=r"one section of a sweep.*Write rm\.KEY=VALUE"):
        load_recipe(mine, ["stages.rm-0.25.batch_size=2"])


def test_a_section_left_out_stays_out_along_the_chain(tmp_path):
    write(tmp_path, "fraction: 0.3", "  chat: {stage: export, model: '@rm'}\n")
    (tmp_path / "middle.yaml").write_text("extends: mine.yaml\nstages: {chat: {model: '@sft'}}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: middle.yaml\nstages: {chat: null}\n")
    assert list(load_recipe(top).stages) == ["sft", "rm"]


def test_a_section_set_to_null_is_left_out_of_the_recipe_below(tmp_path):
    write(tmp_path, "fraction: 1.0")
    child = tmp_path / "child.yaml"
    child.write_text("extends: mine.yaml\nstages: {sft: null, rm: {model: base, sweep: {margin: [none, large]}}}\n")
    assert list(load_recipe(child).stages) == ["rm-none", "rm-large"]
    child.write_text("extends: mine.yaml\nstages: {sft: null}\n")
    with pytest.raises(PosttrainError, match="'@sft' names no section"):
        load_recipe(child)
    child.write_text("extends: mine.yaml\nstages: {ppo: null}\n")  # not below: a section without its keys, as anywhere else
    with pytest.raises(PosttrainError, match=r"stages.ppo.\w+: missing"):
        load_recipe(child)


def test_a_value_added_later_leaves_the_others_fingerprints(tmp_path):
    rows = [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    for name in ("p", "m"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    few, more = (Run(load_recipe(write(tmp_path, f"sweep: {{fraction: {values}}}"))) for values in ("[0.5, 1.0]", "[0.25, 0.5, 1.0]"))
    assert [few.section(n).fingerprint for n in ("rm-0.5", "rm-1")] == [more.section(n).fingerprint for n in ("rm-0.5", "rm-1")]
    assert len({more.section(n).fingerprint for n in ("rm-0.25", "rm-0.5", "rm-1")}) == 3


@pytest.mark.parametrize("recipe, names", [("sweep-data", ["0.125", "0.25", "0.5", "1"]), ("sweep-margin", ["none", "small", "large"])])
def test_the_shipped_sweeps_train_only_what_they_compare(recipe, names):
    assert list(load_recipe(ROOT / "recipes" / f"{recipe}.yaml").stages) == ["sft", *(f"reward_helpfulness-{n}" for n in names)]


# -- nested subsets --------------------------------------------------------------------------------------------------------------------


def pairs(n: int, source: str, each: int = 1) -> list[Pair]:
    return [Pair([{"role": "user", "content": f"{source} {i // each}"}], f"a {i}", "b", source=source) for i in range(n)]


FRACTIONS = (0.01, 0.125, 0.25, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("own, other, share", [(160, 200, 0.5), (90, 10, 0.9), (60, 0, 0.5)])
def test_a_smaller_fraction_is_part_of_a_larger_one(own, other, share):
    found = [mix(pairs(own, "own", 2), pairs(other, "other"), share, 0, f) for f in FRACTIONS]
    assert found[-1] == mix(pairs(own, "own", 2), pairs(other, "other"), share, 0)  # 1.0 is the mix itself
    for f, (rows, told) in zip(FRACTIONS, found, strict=True):
        assert (told["own"], told["other"]) == tuple(plan.fraction_rows(n, f) for n in plan.mixed_rows(own, other, share))
        assert told["own"] + told["other"] == len(rows) == sum(told["by_source"].values())
    for (small, _), (large, _) in pairwise(found):
        assert {(p.source, p.chosen) for p in small} < {(p.source, p.chosen) for p in large}


def test_fractions_go_by_prompt_in_an_order_of_the_seed():
    rows = pairs(60, "own", 3)
    half, again, another = (mix(rows, [], 1.0, seed, 0.5)[0] for seed in (0, 0, 1))
    assert half == again and {prompt_key(p) for p in half} != {prompt_key(p) for p in another}
    assert len(half) == 30 and len({prompt_key(p) for p in half}) == 10  # whole prompts
    moved = mix(rows[::-1], [], 1.0, 0, 0.5)[0]
    assert {p.chosen for p in moved} == {p.chosen for p in half}  # wherever they stand in the file
    places = [rows.index(p) for p in half]
    assert places == sorted(places) and max(places) >= 30


# -- training --------------------------------------------------------------------------------------------------------------------------


REWARD = {"stage": "reward", "model": "base", "own": "helpful", "batch_size": 4, "learning_rate": 1e-3, "warmup_ratio": 0, "max_steps": 3}


def told(run: Run, name: str) -> dict:
    return run.section(name).results()


def test_a_sweep_runs_is_skipped_and_draws_its_curve(make_run, capsys):
    run = make_run({"rm": {**REWARD, "other": "safety", "sweep": {"fraction": [0.25, 0.5, 1.0]}}}, pairs=32, safety=32, held_out={"pairs": 8})
    planned = {r["section"]: (r["rows"], r["steps"]) for r in plan.plan(run.recipe)}
    run_sections(run)
    names = ["rm-0.25", "rm-0.5", "rm-1"]
    found = [told(run, n) for n in names]
    assert [(r["fraction"], r["train_pairs"]) for r in found] == [(0.25, 12), (0.5, 24), (1.0, 48)]
    assert {n: (r["train_pairs"], r["steps"]) for n, r in zip(names, found, strict=True)} == planned
    assert {(r["held_out"]["own"]["pairs"], r["held_out"]["other"]["pairs"]) for r in found} == {(8, 8)}  # never a fraction of these
    assert {r["parameters"] for r in found} == {run_shape(run)} and {r["seed"] for r in found} == {0}
    low, high = found[0]["score_range_98"]
    assert low < found[0]["score_mean"] < high
    capsys.readouterr()
    run_sections(Run(run.recipe))
    assert capsys.readouterr().out.count("done already, skipped") == 3
    page = report.write(run).read_text()
    assert "Accuracy against the amount of data (rm-1 model)" in page and "can&#39;t be shown" not in page


def run_shape(run: Run) -> int:
    from posttrain.shape import read_shape

    return read_shape(run.recipe.model, "x").parameters


def test_seeds_of_a_sweep_train_differently_on_the_same_held_out_pairs(make_run):
    run = make_run({"rm": {**REWARD, "sweep": {"seed": [0, 1]}}, "plain": REWARD}, pairs=24, held_out={"pairs": 6})
    run_sections(run)
    a, b, plain = (told(run, n) for n in ("rm-0", "rm-1", "plain"))
    assert (a["seed"], b["seed"], plain["seed"]) == (0, 1, 0) and a["score_mean"] == plain["score_mean"] != b["score_mean"]
    assert a["held_out"]["own"]["by_rating"] is not None and a["train_pairs"] == b["train_pairs"]
    rows = [run.section(n).manifest["inputs"]["data.helpful: rows held out"] for n in ("rm-0", "rm-1")]
    assert rows[0] == rows[1]


def test_drift_pairs_are_measured_and_change_nothing_else(make_run, capsys):
    """The same model with and without them; pairs whose prompt is trained on are left out, and told."""
    rows = [{"prompt": f"question {i}", "chosen": "yes, yes", "rejected": "no"} for i in range(12)]
    newest = [*({"prompt": f"question {i}", "chosen": "new", "rejected": "old"} for i in range(5)),
              *({"prompt": f"later {i}", "chosen": "new", "rejected": "old"} for i in range(7))]
    run = make_run({"rm": {**REWARD, "drift": "safety"}, "plain": REWARD}, pairs=rows, safety=newest)
    run_sections(run)
    out = " ".join(capsys.readouterr().out.split())
    with_drift, without = told(run, "rm"), told(run, "plain")
    assert with_drift["held_out"]["drift"]["pairs"] == 7 and with_drift["held_out"]["drift"]["prompts"] == 7
    assert with_drift["drift_prompts_in_training"] == 5 and "5 pairs of drift left out: the training data has their prompts" in out
    assert "7 of the newest policy" in out and set(with_drift["held_out"]) == {"own", "other", "drift"}
    assert set(without["held_out"]) == {"own", "other"} and "drift_prompts_in_training" not in without
    a, b = ((run.folder / n / "model" / "adapter_model.safetensors").read_bytes() for n in ("rm", "plain"))
    assert a == b and with_drift["train_pairs"] == without["train_pairs"] == 12


def test_drift_must_be_pairs(make_run):
    run = make_run({"rm": {**REWARD, "drift": "demonstrations"}})
    with pytest.raises(PosttrainError, match=r"stages.rm.drift: 'demonstrations' holds demonstrations"):
        run_sections(run)
