"""Recipes: the shipped ones are sound; faults in a user's stop early, named in four parts, within two seconds."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.config import ancestors, load_recipe, order
from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = ROOT / "recipes" / "tiny.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_sound(path):
    recipe = load_recipe(path)
    assert order(recipe)
    assert path.read_text().startswith("# "), "a recipe's header says what it is, its command, hardware and time"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_new_versions_start_from_the_base(path):
    """Paper 3.2.3: fine-tuning on kept answers begins at the base model again, with the demonstrations beside them."""
    stages = load_recipe(path).stages
    for config in stages.values():
        if config.stage == "sft" and any(name.startswith("@") for name in config.data):
            assert config.model == "base" and any(not name.startswith("@") for name in config.data)


FAMILIES = [p for p in SHIPPED if p.stem.startswith(("llama", "qwen", "mistral"))]


@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_recipes_of_the_families_dry_run_on_the_meta_device(path, tmp_path, capsys):
    """In this process: what differs between them is the model's shape."""
    from posttrain.__main__ import _dry_run

    _dry_run(load_recipe(path, [f"run.dir={tmp_path}"]))
    assert "parameters, as planned" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", [p for p in SHIPPED if p not in FAMILIES or p.stem == "llama2-7b-qlora"], ids=lambda p: p.stem)
def test_shipped_recipes_dry_run_without_a_network(path, tmp_path):
    out = subprocess.run([sys.executable, "-m", "posttrain", "run", str(path), "--dry-run", f"run.dir={tmp_path}"], cwd=ROOT,
                         capture_output=True, text=True, timeout=120, env={**__import__("os").environ, "HF_HUB_OFFLINE": "1"})
    assert out.returncode == 0, out.stdout + out.stderr


def fault(tmp_path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(PosttrainError) as e:
        load_recipe(path)
    return str(e.value)


BASE = """
run: {name: x}
model: {name_or_path: "builtin:tiny-llama", chat_template: chatml, lora: {}}
data: {demos: [{path: d.jsonl, format: messages}]}
stages:
  sft: {data: demos}
"""


@pytest.mark.parametrize("old, new, said", [
    ("{data: demos}", "{data: demos, learnin_rate: 1}", ["stages.sft.learnin_rate: unknown key", "Did you mean 'learning_rate'?"]),
    ("lora: {}", "lora: {rank: 3}", ["model.lora.rank: unknown key"]),
    ("lora: {}", "lora: {alpa: 3}", ["Did you mean 'alpha'?"]),
    ("format: messages", "format: message", ["data.demos[0].format", "Did you mean 'messages'?"]),
    ("path: d.jsonl", "pathh: d.jsonl", ["data.demos[0].pathh: unknown key", "Did you mean 'path'?"]),
    ("{data: demos}", "{data: demo}", ["stages.sft.data: no data set 'demo'", "Did you mean 'demos'?"]),
    ("{data: demos}", "{data: demos, model: '@sf'}", ["'@sf' names no section"]),
    ("sft: {data: demos}", "a: {stage: sft, data: demos, model: '@b'}\n  b: {stage: sft, data: demos, model: '@a'}", ["wait for each other: a -> b -> a"]),
    ("sft:", "sfft:", ["no stage kind 'sfft'", "Did you mean 'sft'?"]),
    ("{data: demos}", "{data: demos, epochs: many}", ["stages.sft.epochs: got 'many'"]),
    ("{data: demos}", "{data: demos, epochs: -1}", ["stages.sft.epochs: got -1", "greater than 0"]),
    ("run: {name: x}", "run: {name: x}\nrun: {name: y}", ["key 'run' is given twice"]),
    ("run: {name: x}", "run: {name: ../x}", ["run.name"]),
    ("run: {name: x}", "rum: {name: x}", ["Did you mean 'run'?"]),
    ("stages:", "stages: [", ["not valid YAML", "line"]),
])
def test_faults_are_named(tmp_path, old, new, said):
    text = fault(tmp_path, BASE.replace(old, new, 1))
    for words in [*said, "mine.yaml"]:
        assert words in text, text


def test_numbers_and_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(BASE.replace("{data: demos}", "{data: demos, learning_rate: 1e-5}"))
    assert load_recipe(path).stages["sft"].learning_rate == 1e-5
    recipe = load_recipe(path, ["sft.learning_rate=3e-4", "stages.sft.epochs=3", "model.lora.r=8", "data.demos.0.rows=5", "run.seed=7"])
    assert (recipe.stages["sft"].learning_rate, recipe.stages["sft"].epochs, recipe.model.lora.r) == (3e-4, 3, 8)
    assert recipe.data["demos"][0].rows == 5 and recipe.run.seed == 7
    with pytest.raises(PosttrainError, match="no '='"):
        load_recipe(path, ["oops"])
    with pytest.raises(PosttrainError, match="is not an index"):
        load_recipe(path, ["data.demos.9.rows=5"])
    with pytest.raises(PosttrainError, match="Did you mean 'rows'"):
        load_recipe(path, ["data.demos.0.row=5"])


def test_extends_merges_deeply_and_never_circles(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nrun: {name: child}\nstages: {sft: {epochs: 5}}\n")
    recipe = load_recipe(child)
    assert recipe.run.name == "child" and recipe.stages["sft"].epochs == 5 and recipe.stages["sft"].data == ["demos"]
    (tmp_path / "base.yaml").write_text("extends: child.yaml\n" + BASE)
    with pytest.raises(PosttrainError, match="extends"):
        load_recipe(child)


@pytest.mark.parametrize("args, code", [(["--help"], 0), (["run", "recipes/tinny.yaml"], 1), (["run", "recipes/tiny.yaml", "ppo.oops=1"], 1),
                                        (["check-data", "recipes/tiny.yaml"], 0)])
def test_light_commands_answer_within_two_seconds(args, code, tmp_path):
    times = []
    for _ in range(3):  # the best of three: other work may run beside the tests
        began = time.time()
        out = subprocess.run([sys.executable, "-m", "posttrain", *args, *([f"run.dir={tmp_path}"] if args[0] != "--help" else [])], cwd=ROOT,
                             capture_output=True, text=True)
        times.append(time.time() - began)
        assert out.returncode == code, out.stdout + out.stderr
        assert "Traceback" not in out.stderr
    assert min(times) < 2


@pytest.mark.parametrize("row, said", [
    ('{"prompt": "a", "chosen": "b"}', ["no 'rejected'", "row 1", "columns"]),
    ('{"prompt": "a", "chosen": "", "rejected": "c"}', ["row 1", "empty"]),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', ["row 1"]),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "rating": "great"}', ["row 1", "rating"]),
    ('{broken', ["row 1"]),
])
def test_bad_rows_stop_before_a_model_loads(tmp_path, row, said):
    (tmp_path / "pairs.jsonl").write_text(row + "\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(BASE.replace("demos: [{path: d.jsonl, format: messages}]", "pairs: [{path: pairs.jsonl, format: preference}]")
                      .replace("sft: {data: demos}", "reward: {own: pairs, model: base}"))
    out = subprocess.run([sys.executable, "-X", "importtime", "-m", "posttrain", "run", str(recipe), f"run.dir={tmp_path}"], cwd=ROOT,
                         capture_output=True, text=True)
    assert out.returncode == 1
    flat = " ".join(out.stdout.split())
    for words in [*said, "pairs.jsonl", "data.pairs[0]"]:
        assert words in flat, out.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in out.stderr.splitlines())


def test_a_model_without_a_template_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(BASE.replace("chat_template: chatml, ", ""))
    out = subprocess.run([sys.executable, "-m", "posttrain", "run", str(recipe), f"run.dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1 and "no chat template" in out.stdout and "llama-2" in out.stdout, out.stdout + out.stderr


def test_the_papers_recipe_walks_its_road_and_its_judges_stand_beside_it():
    """V1 to V4, Ghost Attention after V3, distillation, PPO on V4; every version in one evaluation, by reward models that trained none of them."""
    recipe = load_recipe(ROOT / "recipes" / "smollm2-135m-paper.yaml")
    stages = recipe.stages
    assert stages["ghost"].policy == "@v3" and stages["ppo"].policy == "@v4"
    assert stages["v4_samples"].policy == stages["distill"].policy == "@v3_ghost"
    assert {"@ghost", "@distill"} < {*stages["v4"].data} and {*stages["v4"].data} ^ {*stages["v4_ungated"].data} == {"@distill", "@distill_all"}
    assert list(stages["versions"].models.values()) == ["@sft", "@v1", "@v2", "@v3_ghost", "@v4", "@ppo"]
    for name in ("versions", "shares", "gated", "preprompts", "redteam"):
        judged = stages[name]
        assert (judged.helpfulness, judged.safety) == ("@judge_helpfulness", "@judge_safety")
        for model in getattr(judged, "models", {"policy": getattr(judged, "policy", "")}).values():
            assert not {"judge_helpfulness", "judge_safety"} & {*ancestors(recipe, stages[model[1:]])}
    trained = {n for c in stages.values() if c.stage == "sft" for n in c.data} | {*stages["ppo"].prompts, *stages["distill"].prompts}
    assert not trained & {"attacks", "questions"}  # what judges ask is seen by no training
    asked = {k for k in type(stages["directions"]).model_fields if k != "stage" and getattr(stages["directions"], k)}
    assert asked == {"rewards", "margins", "safety_loss", "amounts", "rounds", "judges", "versions", "ghost", "shares", "preprompts", "gated", "attacks"}


def test_data_dir_adds_the_files_that_a_folder_has(tmp_path):
    path, folder = tmp_path / "mine.yaml", tmp_path / "more"
    path.write_text(BASE.replace("demos: [{path: d.jsonl, format: messages}]",
                                 "demos: [{path: d.jsonl, format: messages}, {path: $data_dir/a.jsonl, format: alpaca, rows: 3}, "
                                 "{path: $data_dir/b.jsonl.gz, format: messages}], held_out: {demonstrations: 1}"))

    def entries(*given):
        recipe = load_recipe(path, list(given))
        return [(e.path, e.format, e.rows) for e in recipe.data_sets["demos"]], recipe.held_out.demonstrations

    own = ("d.jsonl", "messages", None)
    assert entries() == ([own], 1) == entries("data_dir=")  # without it the recipe does without them
    for given, said in ((folder, f"no folder '{folder}'"), (tmp_path, f"'{tmp_path}' has no file that the recipe names")):
        with pytest.raises(PosttrainError, match=r"data_dir: .*a\.jsonl, b\.jsonl\.gz") as e:
            entries(f"data_dir={given}")
        assert said in str(e.value)
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    assert entries(f"data_dir={folder}") == ([own, (f"{folder}/a.jsonl", "alpaca", 3)], 1)
    assert entries("data_dir=more") == ([own, ("more/a.jsonl", "alpaca", 3)], 1)  # from the recipe's folder, as the paths of entries
    assert entries("data_dir=more", "data.demos.1.rows=7")[0][1][2] == 7
    path.write_text(BASE)
    with pytest.raises(PosttrainError, match="data_dir: unknown key"):  # a recipe that reads nothing from there
        load_recipe(path, ["data_dir=more"])


SIBLINGS = {  # recipe -> (base, parameters as published, chat template, whether its turn tokens' rows are new)
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", 6_738_415_616, "llama-2", False), "llama3-8b": ("meta-llama/Llama-3.1-8B", 8_030_261_248, "llama-3", True),
    "llama3-3b": ("meta-llama/Llama-3.2-3B", 3_212_749_824, "llama-3", True), "qwen3-8b": ("Qwen/Qwen3-8B-Base", 8_190_735_360, "qwen-3", False),
    "qwen3-4b": ("Qwen/Qwen3-4B-Base", 4_022_468_096, "qwen-3", False), "mistral-7b": ("mistralai/Mistral-7B-v0.3", 7_248_023_552, "mistral", False)}


@pytest.mark.parametrize("name", SIBLINGS)
def test_the_whole_road_fits_one_card_of_24_gb(name):
    """Of every family: its own template, the size that is published, and PPO with both reward models beside policy, reference and critic."""
    from posttrain.plan import plan

    base, parameters, template, new_rows = SIBLINGS[name]
    recipe = load_recipe(ROOT / "recipes" / f"{name}-qlora.yaml")
    model = recipe.model
    assert (recipe.run.name, model.name_or_path, model.quantization) == (f"{name}-qlora", base, "nf4")
    assert (model.chat_template, model.add_tokens) == (template, new_rows)
    rows = {r["section"]: r for r in plan(recipe, gpu="24GB")}
    assert all(r["fits"] and r["parameters"] == parameters and r["labels"]["parameters"] == "counted" for r in rows.values())
    assert {r["role"] for r in rows["ppo"]["roles"]} == {"policy", "critic", "reference", "helpfulness", "safety"}
    assert {c.stage for c in recipe.stages.values()} == {c.stage for c in load_recipe(ROOT / "recipes" / "llama2-7b-qlora.yaml").stages.values()}
