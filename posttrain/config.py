"""A recipe file -> typed configuration. Unknown keys are refused with a suggestion; `key=value` overrides any value.

A stage package keeps its stage configurations in `<package>/config.py` as subclasses of `StageConfig`, so that a recipe
is checked without importing torch.
"""

import difflib
import json
import re
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_serializer
from pydantic_core import PydanticCustomError

from posttrain import confidential
from posttrain.errors import PosttrainError
from posttrain.http_client import Address, Variable
from posttrain.stages import STAGES, load_config_class


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


def _as_list(value):
    return value if isinstance(value, list) else [value]


DataNames = Annotated[list[str], BeforeValidator(_as_list), Field(json_schema_extra={"refers_to": "data"})]
"""One or more names of the `data` section, or `@section` references whose output is a data set."""
ModelRef = Annotated[str, Field(json_schema_extra={"refers_to": "model"})]
"""`base` (the recipe's model), an `@section` reference, a local folder or a hub name."""
SectionRef = Annotated[str, Field(pattern=r"^@.")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")]  # names a file of answers


class RunConfig(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    dir: str = "runs"
    threads: int | None = Field(None, ge=1, description="CPU threads; default: every core the process may use")
    report_to: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], BeforeValidator(_as_list)] = Field(
        [], description="trackers that get every number too; no part of any result")


class LoraSettings(Strict):
    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class ModelConfig(Strict):
    name_or_path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "nf4", "int8"] = "none"
    lora: LoraSettings | None = None
    chat_template: str | None = None
    add_tokens: bool = False
    licence: str | None = None
    sharding: Literal["none", "full"] = Field("none", description="full: trained models are cut over the processes (FSDP2); no part of any result")


class Expected(Strict):
    rows: int = Field(gt=0)
    tokens: float = Field(gt=0, description="mean tokens of a row (prompt and answers)")


class DataEntry(Strict):
    path: str
    format: str
    split: str = "train"
    name: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    columns: dict[str, str] = {}
    rows: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    weight: float = Field(1.0, gt=0)
    bad_rows: Literal["stop", "drop"] = "stop"
    safety_prompt: bool = False
    expect: Expected | None = None


class HeldOut(Strict):
    """How many rows of every data set of a kind to keep from training. Chosen by prompt."""

    demonstrations: int = Field(0, ge=0)
    pairs: int = Field(0, ge=0)
    prompts: int = Field(0, ge=0)


class StageConfig(Strict):
    stage: str

    def idle(self) -> dict:
        """Keys that came later than the first recipes, with the values at which they change nothing."""
        return {}

    def resources(self) -> list[Path]:
        """Files of this program itself that the stage's result depends on: their content is part of its fingerprint."""
        return []

    def check(self, section, ready: bool) -> None:
        """Raise PosttrainError for what is wrong with the section and seen without a model. ready: the sections that it names are done; else the recipe
        and the data sets say what they can."""

    @model_serializer(mode="wrap")
    def _used_keys(self, dump):
        """Without idle keys: such a section keeps the fingerprint it had before they existed."""
        idle = self.idle()
        return {k: v for k, v in dump(self).items() if k not in idle or v != idle[k]}


class ServersConfig(Strict):
    """Servers that sample (posttrain/server_engine.py). Where they are is no part of the result (exclude): a section goes on with others."""

    base_urls: Annotated[list[Address], Field(min_length=1)] = Field(exclude=True, description="of each server, mostly ending in /v1: https anywhere, http on "
                                                                                           "this machine alone (an ssh tunnel brings a port here)")
    model: str | None = Field(None, min_length=1, description="the policy's name at servers that hold it already; null: adapters are sent to vLLM servers as "
                                                              "they change")
    api_key_env: Variable = Field(None, exclude=True, description="NAME of the environment variable that holds the key; never the key")
    timeout: float = Field(600, gt=0, exclude=True, description="seconds for one answer")

    @field_validator("base_urls")
    @classmethod
    def _once_each(cls, urls: list[str]) -> list[str]:
        if len(set(urls)) < len(urls):
            raise PydanticCustomError("base_urls", "Each server once")
        return urls


class AnsweringConfig(StageConfig):
    """What every stage that samples answers shares."""

    max_new_tokens: int = Field(512, ge=1)
    batch: int = Field(64, ge=1, description="samples decoded side by side")
    engine: Literal["ours", "vllm", "server"] = Field("ours", description="what samples: our own loop, vLLM where it is installed (extra [vllm]), or `servers`")
    servers: ServersConfig | None = Field(None, description="OpenAI-compatible servers that sample; with engine: server alone")

    def idle(self) -> dict:
        return super().idle() | {"engine": "ours", "servers": None}

    @field_validator("servers")
    @classmethod
    def _with_its_engine(cls, servers, info: ValidationInfo):
        if (info.data.get("engine") == "server") != (servers is not None):
            raise PydanticCustomError("servers", "Addresses with engine: server, none without")
        return servers


def both_models(safety: str | None, info: ValidationInfo) -> str | None:
    """A validator of `safety` where the two reward models may be left out."""
    if (safety is None) != (info.data.get("helpfulness") is None):
        raise PydanticCustomError("both", "Both reward models, helpfulness and safety, or none")
    return safety


class ComparisonConfig(AnsweringConfig):
    """What the stages share that put several models side by side (decoding as the paper's section 4.1)."""

    models: Annotated[dict[Label, str], Field(min_length=1, json_schema_extra={"refers_to": "model"})]
    compare: list[list[str]] = Field([], description="pairs [after, before] whose paired differences are reported")
    temperature: float = Field(0.1, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)

    @field_validator("compare")
    @classmethod
    def _of_these_models(cls, pairs: list[list[str]], info: ValidationInfo) -> list[list[str]]:
        known = info.data.get("models", {})
        if any(len(pair) != 2 or not set(pair) <= set(known) for pair in pairs):
            raise PydanticCustomError("compare", "Pairs [after, before] of the section's models: {known}", {"known": ", ".join(known)})
        return pairs


class TrainingConfig(StageConfig):
    """What supervised fine-tuning and reward training share (paper sections 2.2, 3.1, 3.2.2)."""

    epochs: float = Field(2, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0, description="None: the paper's for full training, ten times it for adapters")
    batch_size: int | None = Field(None, ge=1, description="global; None: the paper's, fewer where that leaves under 50 steps")
    max_length: int = Field(4096, ge=8)
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    micro_batch_tokens: int | None = Field(None, ge=16, description="None: decided from memory at the first start")
    save_steps: int = Field(20, ge=1)
    save_total_limit: int = Field(2, ge=1)
    activation_checkpointing: bool = False


class Recipe(Strict):
    run: RunConfig
    model: ModelConfig
    data: dict[str, list[DataEntry] | HeldOut] = {}
    stages: dict[str, Any]
    path: str = ""
    _below_data_dir: dict[tuple[str, int], str] = PrivateAttr({})  # data set and number of an entry -> its path as the recipe has it

    @field_validator("data", mode="before")
    @classmethod
    def _entries(cls, value):
        return {k: v if k == "held_out" else _as_list(v) for k, v in value.items()} if isinstance(value, dict) else {} if value is None else value

    @property
    def held_out(self) -> HeldOut:
        return self.data.get("held_out") or HeldOut()

    @property
    def data_sets(self) -> dict[str, list[DataEntry]]:
        return {k: v for k, v in self.data.items() if k != "held_out"}

    def entries_as_written(self, name: str) -> list[dict]:
        """A data set's entries with `$data_dir/FILE` where the recipe says so: where that folder lies, and how it is spelled, is no part of a result."""
        return [e.model_dump() | ({"path": self._below_data_dir[name, i]} if (name, i) in self._below_data_dir else {})
                for i, e in enumerate(self.data_sets[name])]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 wants 1.0e-5) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise PosttrainError(f"{self.name}, line {key_node.start_mark.line + 1}", f"the key {key!r} is not text", "a name", "Put it in quotes.")
            if key in seen:
                raise PosttrainError(f"{self.name}, line {key_node.start_mark.line + 1}", f"key '{key}' is given twice",
                                     "each key once", "Remove one of them.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
               r"|[0-9][0-9_]*\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise PosttrainError(str(path), "no such file", "a recipe file",
                             f"Did you mean {path.parent / near[0]}?" if near else "See recipes/ for the shipped ones.") from None
    except (OSError, UnicodeDecodeError) as e:
        raise PosttrainError(str(path), f"cannot be read ({e})", "a UTF-8 YAML file", "Check the path and its permissions.") from None
    loader = None
    try:
        loader = _Loader(text)
        loader.name = str(path)
        value = loader.get_single_data()
        json.dumps(value, default=str)  # fails for an anchor that holds itself
    except (ValueError, RecursionError) as e:  # ValueError: also a date that does not exist
        raise PosttrainError(str(path), f"holds a value that cannot be read ({str(e) or 'nested without end'})", "plain names, numbers and lists",
                             "Correct or remove it.") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise PosttrainError(where, f"not valid YAML ({getattr(e, 'problem', e)})", "a YAML mapping",
                             "Check the indentation and the colons there.") from None
    finally:
        if loader:
            loader.dispose()
    if not isinstance(value, dict):
        raise PosttrainError(str(path), f"holds {type(value).__name__}", "a mapping with run, model, data and stages",
                             "Start from a recipe in recipes/.")
    return value


def dump_yaml(value: dict) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)


def _merge(base: dict, over: dict) -> dict:
    out = deepcopy(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _apply_override(raw: dict, text: str) -> None:
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise PosttrainError(f"override '{text}'", "no '='", "key=value, for instance stages.sft.learning_rate=1e-4",
                             "Write it as one word without spaces.")
    parts = key.split(".")
    if parts[0] not in Recipe.model_fields and parts[0] in (raw.get("stages") or {}):
        parts.insert(0, "stages")
    path = ".".join(parts[1:])
    swept = next((n for n, s in _mappings(raw.get("stages")) if s.get("sweep") and path.startswith(f"{n}-")), None) if parts[0] == "stages" else None
    if swept and parts[1] not in raw["stages"]:
        raise PosttrainError(f"override '{text}'", "one section of a sweep", "a key of the swept section, which counts for all of its sections",
                             f"Write {swept}.KEY=VALUE, or {swept}.sweep.KEY=[VALUES].")
    node = raw
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise PosttrainError(f"override '{text}'", f"'{part}' is not an index of {'.'.join(parts[:i])}",
                                     f"0 to {len(node) - 1}", "Count from 0.")
            part = int(part)
        elif not isinstance(node, dict):
            raise PosttrainError(f"override '{text}'", f"{'.'.join(parts[:i])} is the value {node!r}, not a section",
                                 "a key inside a section", "Check the dots.")
        if last:
            if isinstance(node, dict) and isinstance(node.get("sweep"), dict) and part in node["sweep"]:
                raise PosttrainError(f"override '{text}'", f"the recipe sweeps {part} over {node['sweep'][part]}", "a list of values for the sweep",
                                     f"Write {'.'.join(parts[:-1])}.sweep.{part}=[{value}].")
            node[part] = _override_value(text, value)
        else:
            if isinstance(node, dict) and (part not in node or node[part] is None):
                node[part] = {}
            node = node[part]


def _from_data_dir(raw: dict, recipe: Path) -> dict[tuple[str, int], str]:
    """Data entries whose path begins with $data_dir/ are read from the folder that `data_dir` names (data_dir=FOLDER), those of them that it has;
    without `data_dir` the recipe does without them. In a recipe with no such entry `data_dir` is an unknown key. Returns what such paths were:
    (data set, number of the entry) -> path."""
    def name_of(entry) -> str | None:
        path = str(entry.get("path")) if isinstance(entry, dict) else ""
        return path.removeprefix("$data_dir/") if path.startswith("$data_dir/") else None

    sets = {k: _as_list(v) for k, v in (raw.get("data") if isinstance(raw.get("data"), dict) else {}).items() if k != "held_out"}
    names = list(dict.fromkeys(n for entries in sets.values() for e in entries if (n := name_of(e))))
    if not names:
        return {}
    folder, have = raw.pop("data_dir", None), []
    if folder is not None:
        folder = Path(str(folder))
        places = [p.expanduser() for p in (recipe.parent / folder, folder)]
        have = [n for n in names if any((p / n).is_file() for p in places)]
        if not have:
            raise PosttrainError(f"{recipe}: data_dir", f"'{folder}' has no file that the recipe names" if any(p.is_dir() for p in places) else
                                 f"no folder '{folder}'", f"a folder with one of {', '.join(names)}", "Check the path and the names of its files.")
    written = {}
    for key, entries in sets.items():
        kept = [e for e in entries if name_of(e) is None or name_of(e) in have]
        raw["data"][key] = [e if name_of(e) is None else e | {"path": str(folder / name_of(e))} for e in kept]
        written |= {(key, i): e["path"] for i, e in enumerate(kept) if name_of(e) is not None}
    return written


def _override_value(text: str, value: str):
    """The YAML value after '='; '@section' may stand without quotes."""
    if value.startswith("@"):
        return value
    try:
        read = yaml.load(value, Loader=_Loader) if value else None
        json.dumps(read, default=str)
        return read
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise PosttrainError(f"override '{text}'", f"'{value}' is not a YAML value ({getattr(e, 'problem', e)})", "a number, word or [list]",
                             "Put quotes around it.") from None


def _suggest(word: str, options) -> str:
    near = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(sorted(map(str, options)))}."


def _model_at(model: type[BaseModel], loc: tuple) -> type[BaseModel] | None:
    """The pydantic class whose key the last element of `loc` names."""
    for part in loc[:-1]:
        if not (isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            continue
        kinds = [model.model_fields[part].annotation]
        found = None
        while kinds:
            kind = kinds.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found = kind
                break
            if get_origin(kind) is not None:
                kinds += list(get_args(kind))
        model = found or model
    return model


def _refuse(error: ValidationError, place: str, model: type[BaseModel], prefix: str = ""):
    """Turn pydantic's first error into ours."""
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # a misspelled key says more than the one it leaves missing
    loc = tuple(p for p in first["loc"] if not (isinstance(p, str) and ("[" in p or p == "HeldOut" or p.startswith("constrained-"))))
    key = prefix + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    if first["type"] == "extra_forbidden":
        owner = DataEntry if "data" in loc[:1] and loc[1:2] != ("held_out",) else HeldOut if loc[:1] == ("data",) else _model_at(model, loc)
        options = [f for f in owner.model_fields if f != "path" or owner is not Recipe] + ["sweep"] * issubclass(owner, StageConfig)
        raise PosttrainError(f"{place}: {key}", "unknown key", f"one of the known keys of {owner.__name__}", _suggest(loc[-1], options))
    if first["type"] == "missing":
        raise PosttrainError(f"{place}: {key}", "missing", "a value", "Add this key; recipes/ shows examples.")
    got = "a value that is not shown" if first["type"] == "hidden" else repr(first.get("input"))  # it may hold a key
    raise PosttrainError(f"{place}: {key}", f"got {got}", first["msg"][:1].lower() + first["msg"][1:], "Change this value.")


def _stage_config(name: str, raw: dict, place: str) -> StageConfig:
    kind = raw.get("stage", name)
    if not isinstance(kind, str) or kind not in STAGES:
        raise PosttrainError(f"{place}: stages.{name}.stage", f"no stage kind '{kind}'", f"one of {', '.join(STAGES)}",
                             _suggest(kind, STAGES) + " A section whose name is not a kind needs 'stage: KIND'.")
    cls = load_config_class(kind)
    try:
        return cls(**{**raw, "stage": kind})
    except ValidationError as e:
        _refuse(e, place, cls, prefix=f"stages.{name}.")


def _expand_sweeps(raw: dict, place: str) -> dict[str, list[str]]:
    """Put one section for each combination of values in the place of a section with `sweep: {KEY: [VALUES]}`, named SECTION-VALUE.

    Named by value, not by number: a value added later leaves the finished sections' names as they are. Returns the members of each.
    """
    given, stages, sweeps = raw.get("stages"), {}, {}
    for name, section in given.items() if isinstance(given, dict) else ():
        if not isinstance(section, dict) or "sweep" not in section:
            stages[name] = section
            continue
        if section["sweep"] is None:  # switched off
            stages[name] = {k: v for k, v in section.items() if k != "sweep"}
            continue
        rest, sweep, key = {k: v for k, v in section.items() if k != "sweep"}, section["sweep"], f"{place}: stages.{name}.sweep"
        kind = rest.setdefault("stage", name)
        known = [k for k in load_config_class(kind).model_fields if k != "stage"] if isinstance(kind, str) and kind in STAGES else []
        if not isinstance(sweep, dict) or not sweep:
            raise PosttrainError(key, f"got {sweep!r}", "keys of the section with a list of values each", "Write sweep: {fraction: [0.25, 0.5, 1.0]}.")
        for k, values in sweep.items():
            if known and k not in known:
                raise PosttrainError(f"{key}.{k}", "unknown key", f"a key of stage '{kind}'", _suggest(k, known))
            if not isinstance(values, list) or not values:
                raise PosttrainError(f"{key}.{k}", f"got {values!r}", "a list of values", "Write them in brackets.")
        sweeps[name] = []
        for values in product(*sweep.values()):
            member = "-".join([str(name), *map(_value_word, values)])
            if member in stages or member in given:
                raise PosttrainError(key, f"two sections would be called '{member}'", "a name of its own for every combination",
                                     "Change a value or a section's name.")
            stages[member] = rest | dict(zip(sweep, values, strict=True))
            sweeps[name].append(member)
    if stages:
        raw["stages"] = stages
    return sweeps


def _value_word(value) -> str:
    """A swept value inside a section's name: 0.25, small; lists joined."""
    text = f"{value:g}" if isinstance(value, float) else "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def references(value) -> list[str]:
    """Every '@section' inside a configuration value, in order of appearance."""
    if isinstance(value, str):
        return [value[1:]] if value.startswith("@") else []
    if isinstance(value, dict):
        return [r for v in value.values() for r in references(v)]
    if isinstance(value, (list, tuple)):
        return [r for v in value for r in references(v)]
    return []


def ancestors(recipe: Recipe, config: StageConfig) -> list[str]:
    """The sections that a stage configuration descends from, through any reference, by name."""
    found, todo = set(), references(config.model_dump())
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += references(recipe.stages[name].model_dump())
    return sorted(found)


def fields_referring_to(config: StageConfig, what: str) -> dict[str, Any]:
    """The fields of a stage configuration declared as `DataNames` ('data') or `ModelRef` ('model'), with their values."""
    out = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra or {}
        if not extra:
            for arg in get_args(field.annotation):
                for meta in getattr(arg, "__metadata__", ()):
                    extra = extra or getattr(meta, "json_schema_extra", None) or {}
        if extra.get("refers_to") == what and getattr(config, name) is not None:
            out[name] = getattr(config, name)
    return out


def _mappings(value) -> list[tuple[str, dict]]:
    """The entries of a mapping that are mappings."""
    return [(k, v) for k, v in value.items() if isinstance(v, dict)] if isinstance(value, dict) else []


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises PosttrainError naming the file and key at fault."""
    path = Path(path)
    raw = read_yaml(path)
    seen, inherited = [path], set()
    while "extends" in raw:
        parent = (seen[-1].parent / str(raw.pop("extends"))).resolve()
        if parent in [p.resolve() for p in seen]:
            raise PosttrainError(str(path), f"'extends' comes back to {parent}", "a chain that ends", "Remove one 'extends'.")
        seen.append(parent)
        below = read_yaml(parent)
        inherited |= set(below.get("stages") or {})
        for name, section in _mappings(raw.get("stages")):
            swept = dict(_mappings(below.get("stages"))).get(name, {}).get("sweep")
            for key in set(section) & set(swept or ()) if "sweep" not in section else ():
                raise PosttrainError(f"{seen[-2]}: stages.{name}.{key}", f"{section[key]!r}, while {parent.name} sweeps it over {swept[key]}",
                                     "one of the two", "Write sweep: null beside it to switch the sweep off.")
        raw = _merge(below, raw)
    if isinstance(raw.get("stages"), dict):  # `NAME: null` leaves out a section of a recipe below
        raw["stages"] = {n: s for n, s in raw["stages"].items() if s is not None or n not in inherited}
    for text in overrides:
        _apply_override(raw, text)
    place = str(path)
    confidential.refuse(raw, place)
    below_data_dir = _from_data_dir(raw, path)
    sweeps = _expand_sweeps(raw, place)
    try:
        recipe = Recipe(**{k: v for k, v in raw.items() if k != "path"}, path=place)
    except ValidationError as e:
        _refuse(e, place, Recipe)
    recipe._below_data_dir = below_data_dir
    if not recipe.stages:
        raise PosttrainError(f"{place}: stages", "no sections", "at least one stage", "Start from a recipe in recipes/.")
    for name, section in recipe.stages.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise PosttrainError(f"{place}: stages.{name}", "not usable as a folder name", "letters, digits, '.', '_', '-'", "Rename the section.")
        if not isinstance(section or {}, dict):
            raise PosttrainError(f"{place}: stages.{name}", f"got {section!r}", "a mapping", "Write the stage's keys below its name.")
        recipe.stages[name] = _stage_config(name, section or {}, place)
    _check_names(recipe, place, sweeps)
    return recipe


def _check_names(recipe: Recipe, place: str, sweeps: dict[str, list[str]]) -> None:
    """Every data name, data format and @reference must exist; references must not form a circle. sweeps: section -> its members."""
    from posttrain.formats import FORMATS

    for name, entries in recipe.data_sets.items():
        if not isinstance(entries, list):
            raise PosttrainError(f"{place}: data.{name}", f"got {type(entries).__name__}", "a list of data entries", "Write '- {path: ..., format: ...}'.")
        for i, entry in enumerate(entries):
            if entry.format not in FORMATS:
                raise PosttrainError(f"{place}: data.{name}[{i}].format", f"unknown format '{entry.format}'",
                                     f"one of {', '.join(FORMATS)}", _suggest(entry.format, FORMATS))
    for name, config in recipe.stages.items():
        for ref in references(config.model_dump()):
            if ref in sweeps:
                raise PosttrainError(f"{place}: stages.{name}", f"'@{ref}' is swept and names {len(sweeps[ref])} sections",
                                     f"one of {', '.join(sweeps[ref])}", f'Say which, such as "@{sweeps[ref][-1]}".')
            if ref not in recipe.stages:
                raise PosttrainError(f"{place}: stages.{name}", f"'@{ref}' names no section", "a section of this recipe",
                                     _suggest(ref, [s for s in recipe.stages if s != name]))
        for field, info in type(config).model_fields.items():
            kinds = _as_list((info.json_schema_extra or {}).get("reads", []))
            for ref in references(getattr(config, field)) if kinds else ():
                if recipe.stages[ref].stage not in kinds:
                    raise PosttrainError(f"{place}: stages.{name}.{field}", f"'@{ref}' is of kind {recipe.stages[ref].stage}",
                                         f"of kind {' or '.join(kinds)}", f"Name a section of kind {' or '.join(kinds)}.")
        for field, names in fields_referring_to(config, "data").items():
            for data_name in names:
                if not data_name.startswith("@") and data_name not in recipe.data_sets:
                    raise PosttrainError(f"{place}: stages.{name}.{field}", f"no data set '{data_name}'", "a name of the data section",
                                         _suggest(data_name, recipe.data_sets))
    order(recipe)


def order(recipe: Recipe) -> list[str]:
    """Section names, parents first, otherwise in the recipe's order. Raises on a circle."""
    done, path = [], []

    def visit(name):
        if name in done:
            return
        if name in path:
            circle = " -> ".join([*path[path.index(name):], name])
            raise PosttrainError(f"{recipe.path}: stages", f"sections wait for each other: {circle}", "references without a circle",
                                 "Break the circle.")
        path.append(name)
        for parent in references(recipe.stages[name].model_dump()):
            visit(parent)
        path.pop()
        done.append(name)

    for name in recipe.stages:
        visit(name)
    return done
