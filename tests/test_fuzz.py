"""Recipes and data rows by lot (Hypothesis): whatever is wrong with them is one of our own errors, never a traceback.

Bounded by examples, and the same ones every time (derandomize), so that a failure is everybody's.
"""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from posttrain import config, data, lint, plan
from posttrain.config import DataEntry, load_recipe
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS
from posttrain.stages import STAGES, load_config_class

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: run `make install`")
given, st = hypothesis.given, hypothesis.strategies
LIMITED = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None,
                              suppress_health_check=list(hypothesis.HealthCheck))
ROOT = Path(__file__).parent.parent

WORDS = st.sampled_from(["base", "@sft", "@rm", "@", "@nobody", "demos", "pairs", "asked", "builtin:tiny-llama", "builtin:", "nf4", "auto", "../x",
                         "a b", "0.5", "-1", "nan", "1e999", "true", "null", "$data_dir/x.jsonl", "d.jsonl", "messages",
                         "preference", "\x00", "\ud800", "é日😀", "x" * 300, ""])
NUMBERS = st.one_of(st.integers(-5, 100), st.sampled_from([
    0, -1, 2**63, 10**400, 1e308, -0.0, float("inf"), float("-inf"), float("nan"), 0.5, 1.5]))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8))
VALUES = st.recursive(PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORDS, st.text(max_size=6)), inner, max_size=3)),
                      max_leaves=6)


KEYS = ["run.name", "model.lora.r", "sft.epochs", "stages.sft", "data.demos.0.path", "data", ".", "stages..x", "data.demos.x", "model.lora.r.s"]


def sound() -> dict:
    return {"run": {"name": "x"}, "model": {"name_or_path": "builtin:tiny-llama", "chat_template": "chatml", "lora": {}},
            "data": {"demos": [{"path": "d.jsonl", "format": "messages"}], "pairs": [{"path": "c.jsonl", "format": "preference"}],
                     "asked": [{"path": "p.jsonl", "format": "prompt"}], "held_out": {"pairs": 1}},
            "stages": {"sft": {"data": "demos"}, "rm": {"stage": "reward", "model": "@sft", "own": "pairs"},
                       "best": {"stage": "rejection", "prompts": "asked", "policy": "@sft", "helpfulness": "@rm", "safety": "@rm"},
                       "ppo": {"prompts": "asked", "policy": "@sft", "helpfulness": "@rm", "safety": "@rm"},
                       "eval": {"stage": "evaluate", "models": {"a": "base", "b": "@ppo"}, "prompts": "asked", "helpfulness": "@rm", "safety": "@rm"},
                       "out": {"stage": "export", "model": "@ppo"}}}


def places(value, at=()):
    """Every path into nested mappings and lists."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def put(value, at, new):
    if not at:
        return new
    value = dict(value) if isinstance(value, dict) else list(value)
    value[at[0]] = put(value[at[0]], at[1:], new)
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe's folder with sound data beside it."""
    home = tmp_path_factory.mktemp("fuzz")
    rows = [{"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(9)]
    (home / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (home / "c.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(9)))
    (home / "p.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(9)))
    return home


def walk(path: Path, overrides=()) -> None:
    """All that happens to a recipe before a model is loaded: read, checked, planned, printed. Our own errors are fine."""
    with suppress(PosttrainError):
        recipe = load_recipe(path, list(overrides))
        if not all(data._local(e, path.parent, "x") for entries in recipe.data_sets.values() for e in entries):
            return  # a hub data set: no network here
        plan.render(plan.plan(recipe, gpu="24GB"))
        config.dump_yaml({k: v.model_dump() for k, v in recipe.stages.items()})


def test_the_sound_recipe_is_sound(folder):
    path = folder / "sound.yaml"
    path.write_text(json.dumps(sound()))
    assert plan.plan(load_recipe(path), gpu="24GB")


@LIMITED
@given(st.data())
def test_a_recipe_with_anything_anywhere(folder, draws):
    value = sound()
    for _ in range(draws.draw(st.integers(1, 2))):
        at = draws.draw(st.sampled_from(list(places(value))))
        value = put(value, at, draws.draw(VALUES))
    _written(folder / "fuzzed.yaml", value)


@LIMITED
@given(st.sampled_from(sorted(STAGES)), st.data())
def test_every_key_of_every_stage(folder, kind, draws):
    keys = sorted({*load_config_class(kind).model_fields, "sweep", "odd"} - {"stage"})
    value = sound()
    value["stages"]["fuzzed"] = {"stage": kind, **draws.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=6))}
    _written(folder / "fuzzed.yaml", value)


def _written(path: Path, value) -> None:
    path.write_text(yaml.safe_dump(value, allow_unicode=False), encoding="utf-8", errors="surrogatepass")
    walk(path)


@LIMITED
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60), st.sampled_from([
    "a: &x [*x]", "&a [*a]", "? {a: b}\n: c", "!!python/object/apply:os.system ['true']", "- 1\n- 2", "a: 1\na: 2", "<<: 3", "extends: fuzzed.yaml",
    "extends: [1]", "run: !!binary x", "2020-01-01: x", "a: 12:30:45", "run: {name: x}\nstages: {1: {stage: sft}}", "[" * 500])))
def test_a_file_that_holds_anything(folder, text):
    path = folder / "fuzzed.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    walk(path)


@LIMITED
@given(st.lists(st.one_of(st.text(max_size=20), st.tuples(st.sampled_from(KEYS), st.text(max_size=12)).map("=".join)), max_size=2))
def test_overrides(folder, overrides):
    (folder / "sound.yaml").write_text(json.dumps(sound()))
    walk(folder / "sound.yaml", overrides)


TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["user", "assistant", "system", "human", "\n\nHuman: a\n\nAssistant: b", "<|im_end|>", "1", "\ud800"]))
TURNS = st.lists(st.fixed_dictionaries({}, optional={k: st.one_of(TEXTS, VALUES) for k in ("role", "content", "from", "value")}), max_size=4)


@LIMITED
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_rows_of_every_format(folder, name, draws):
    """Columns that some format knows, each with anything in it: a row is read, skipped, or named as bad."""
    columns = ["prompt", "chosen", "rejected", "messages", "completion", "instruction", "output", "input", "context", "response", "rating", "margin", "loss",
               "chosen_safe", "rejected_safe", "category", "response1", "response2", "overall_preference", "response_0", "response_1", "better_response_id",
               "is_response_0_safe", "is_response_1_safe", "safer_response_id", "conversations", "question", "text", "source", "domain", "label", "safety"]
    rows = draws.draw(st.lists(st.dictionaries(st.sampled_from(columns), st.one_of(TEXTS, TURNS, VALUES), max_size=5), min_size=1, max_size=3))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8", errors="surrogatepass")
    with suppress(PosttrainError):
        loaded = data.load_entry(DataEntry(path=str(path), format=name), folder, 0, "x")
        assert all(f.detail and f.reason for f in loaded.findings)
        assert len(loaded.items) == len(loaded.row_numbers)


@LIMITED
@given(st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]), st.one_of(
    st.binary(max_size=80), st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")), VALUES.map(lambda v: json.dumps(v).encode())))
def test_a_data_file_that_holds_anything(folder, suffix, content):
    path = folder / f"anything{suffix}"
    path.write_bytes(content)
    with suppress(PosttrainError):
        lint.render(lint.check_file(path, "messages", {}))
    with suppress(PosttrainError):
        lint.check_file(path, None, {})
