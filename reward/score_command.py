"""`python -m posttrain score`: the answers in a file under a finished reward model, row by row. Whatever can be wrong with the folder or the
data is told before the model is loaded."""

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from posttrain.config import DataEntry, ModelConfig, read_yaml
from posttrain.data import Finding, Loaded, file_kind, load_entry, read_rows, renamed
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS, Demonstration, Pair, RowError, missing_column
from posttrain.lint import choose_format
from posttrain.log import Ticker, say
from posttrain.runs import read_json, write_atomic

MAX_LENGTH = 2048  # tokens, where no section says
PEEK = 20  # rows


@dataclass
class Model:
    """folder: with the weights. config: the base they belong to. dtype: the section's; None outside of a run, where this machine decides."""

    folder: Path
    config: ModelConfig
    dtype: str | None = None
    max_length: int = MAX_LENGTH


def run(model: Path, data: str, format: str | None, columns: dict[str, str], output: Path | None, max_length: int | None) -> None:
    """Score, write one line a row, and say how it went."""
    # 1. The folder, the rows and the place of the output, before torch is imported.
    found = find(model)
    limit = max_length or found.max_length
    loaded = read(data, format, columns)
    output = output or default_output(found.folder, Path(data.removesuffix(".gz")))
    _check_output(output, data)

    # 2. Token ids.
    tokenizer = load_tokenizer(found)
    trees, kept, unscored = encode(loaded, tokenizer, limit, data)
    unscored |= loaded.skipped_rows
    if not trees:
        reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in unscored.items()) or "it has none"
        raise PosttrainError(data, f"no row can be scored ({reasons})", f"answers of at most {limit} tokens, their prompts included",
                             "Check the file, or raise --max-length.")

    # 3. The model and its scores.
    roles, budget = load(found, tokenizer)
    from reward.score import scores

    with Ticker(sum(len(t.ends) for t in trees), "scoring", "answer") as ticker:
        raw = scores(roles, "reward", trees, budget, ticker)
    scored = [(loaded.row_numbers[i], s) for i, s in zip(kept, raw, strict=True)]
    if odd := [row for row, s in scored if not all(map(math.isfinite, s))]:
        raise PosttrainError(str(found.folder), f"gives row {odd[0]} of {data} a score that is not a finite number", "finite scores",
                             "Its weights are damaged: train it again.")

    # 4. What came out.
    write(output, scored, unscored)
    numbers = str(roles.dtype).removeprefix("torch.") + ("" if found.config.quantization == "none" else f" over {found.config.quantization}")
    say(f"{sum(map(len, raw))} answers in {len(trees)} of {loaded.rows} rows of {data}, by {model} ({numbers})")
    tell(loaded, trees, kept, raw)
    for reason, rows in unscored.items():
        what = f"longer than {limit} tokens" if reason == "too_long" else f"({reason})"
        shown = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        say(f"{len(rows)} row{'s' * (len(rows) != 1)} {what} left without a score: row {shown}")
    say(f"Scores: {output}")


def default_output(model: Path, data: Path) -> Path:
    """A name of its own for every file under every model: the section's before it for what a stage wrote, since all call it samples.jsonl."""
    stage = f"{data.resolve().parent.name}-" if (data.resolve().parent / "manifest.json").exists() else ""
    return Path(f"{stage}{data.stem}.{(model.parent if model.name == 'model' else model).resolve().name}.scores.jsonl")


# -- the model -----------------------------------------------------------------------------------------------------------------------


def find(path: Path) -> Model:
    """What --model names: a finished reward section, the model in it, or an adapter or whole model from elsewhere."""
    if not path.is_dir():
        raise PosttrainError(f"--model {path}", "no such folder", "a reward section's folder (runs/NAME/SECTION) or a model folder", "Check the path.")
    section = next((p for p in (path, path.resolve().parent) if (p / "manifest.json").is_file() and (p / "config.yaml").is_file()), None)
    folder = path / "model" if section == path else path
    found = _of_section(section, folder) if section else _of_folder(folder)
    _check_head(folder)
    return found


def _of_section(section: Path, folder: Path) -> Model:
    manifest, told = read_json(section / "manifest.json"), read_yaml(section / "config.yaml")
    if manifest.get("kind") != "reward":
        raise PosttrainError(str(section), f"a section of the kind '{manifest.get('kind')}'", "a reward section", "Name one that has stage: reward.")
    if folder.name == "model" and not (section / "DONE").exists():
        raise PosttrainError(str(section), "is not finished (no DONE)", "a finished reward section", "Run its recipe again: it goes on from there.")
    try:
        return Model(folder, ModelConfig(**told["model"]), manifest["decisions"]["dtype"], told["stage"]["max_length"])
    except (ValidationError, KeyError, TypeError) as e:
        raise PosttrainError(str(section / "config.yaml"), f"damaged, or its manifest is ({str(e).splitlines()[0]})", "what this program wrote",
                             "Delete the section's folder; it will be made again.") from None


def _of_folder(folder: Path) -> Model:
    adapter = _json(folder / "adapter_config.json")
    if adapter:
        base = adapter.get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise PosttrainError(str(folder / "adapter_config.json"), "no base_model_name_or_path", "the base that the adapter was trained on",
                                 "Write its folder or hub name there.")
        return Model(folder, ModelConfig(name_or_path=base, revision=adapter.get("revision")))
    if (folder / "config.json").exists():
        return Model(folder, ModelConfig(name_or_path=str(folder)))
    inside = sorted(str(p.parent) for p in folder.glob("*/manifest.json") if _json(p).get("kind") == "reward")
    raise PosttrainError(str(folder), "no model (neither adapter_config.json nor config.json)", "a reward section's folder or a model folder",
                         f"Name {' or '.join(inside)}." if inside else "Check the path.")


def _json(path: Path) -> dict:
    try:
        return read_json(path)
    except PosttrainError as e:
        raise PosttrainError(e.place, e.found, "JSON", "Copy the folder again from where it was made.") from None


def _check_head(folder: Path) -> None:
    """Weights in safetensors, among them a scalar head."""
    from safetensors import SafetensorError, safe_open

    files, rows = sorted(folder.glob("*.safetensors")), None
    for file in files:
        try:
            with safe_open(file, "np") as tensors:
                heads = [k for k in tensors.keys() if k.removeprefix("base_model.model.") == "score.weight"]  # noqa: SIM118  not a dict
                rows = tensors.get_slice(heads[0]).get_shape()[0] if heads else rows
        except SafetensorError as e:
            raise PosttrainError(str(file), f"damaged ({e})", "a whole safetensors file", "Copy it again from where it was made.") from None
    if rows != 1:
        found = f"its head gives {rows} numbers" if rows else "has no scalar head (score.weight)" if files else "holds no .safetensors"
        raise PosttrainError(str(folder), found, "a reward model: an adapter or a sequence classifier with one label", "Name a reward section's folder.")


def load_tokenizer(model: Model):
    """The tokenizer saved with the model, whose template is the one of training; else the base's with the recipe's template."""
    from posttrain import models

    folder, config = model.folder, model.config
    models.resolve(config.name_or_path, f"{folder}: its base")
    saved = (folder / "chat_template.jinja").exists() or "chat_template" in _json(folder / "tokenizer_config.json")
    if saved:
        config = config.model_copy(update={"name_or_path": str(folder), "chat_template": None, "add_tokens": False})
    try:
        tokenizer = models.load_tokenizer(config, str(folder))
    except PosttrainError as e:
        if "no chat template" not in e.found:
            raise
        raise PosttrainError(str(folder), e.found, "the template that the model was trained with",
                             "Put it into the folder as chat_template.jinja, beside the tokenizer's files.") from None
    rows = saved and _json(folder / "adapter_config.json").get("trainable_token_indices")
    if rows:  # of turn tokens that were added to the vocabulary
        tokenizer.added_turn_tokens = tokenizer.convert_ids_to_tokens(next(iter(rows.values())) if isinstance(rows, dict) else rows)
    return tokenizer


def load(model: Model, tokenizer) -> tuple:
    """(Roles with the role 'reward', tokens a forward pass may hold). Outside of a run: float32 on a CPU, which rounds nothing."""
    import torch

    from posttrain import models
    from posttrain.training import choose_budget

    models.set_threads(None)
    dtype = model.dtype or ("float32" if models.device().type == "cpu" else models.choose_dtype(model.config))
    roles = models.Roles(model.config, getattr(torch, dtype), str(model.folder), tokenizer)
    role = roles.add("reward", model.folder, head="saved")
    return roles, choose_budget(roles, role)


# -- the rows ------------------------------------------------------------------------------------------------------------------------


def read(data: str, format: str | None, columns: dict[str, str]) -> Loaded:
    """Every row of --data as a pair or a demonstration. Raises at the first row that cannot be used, and where nothing has an answer."""
    path = Path(data).expanduser()
    chosen = choose_format(path, format, columns, "--format")
    if chosen == "prompt" and _answered(path, columns):
        loaded = _samples(path, data, columns)
    elif FORMATS[chosen].kind == "prompt":
        raise PosttrainError(data, "holds prompts without answers", "pairs, demonstrations, or rows with prompt and answer", "Name a file with answers.")
    else:
        loaded = load_entry(DataEntry(path=data, format=chosen, columns=columns), Path(), 0, "--data")
    if bad := loaded.findings:
        where = data if bad[0].row is None else f"{data}, row {bad[0].row}"
        raise PosttrainError(where, bad[0].detail, "", f"{len(bad)} bad row{'s' * (len(bad) != 1)} in all, read as {chosen}: correct them, "
                             "or name another --format.")
    return loaded


def _answered(path: Path, columns: dict[str, str]) -> bool:
    """The first rows have prompt and answer, as those of samples.jsonl."""
    names = {columns.get("prompt", "prompt"), columns.get("answer", "answer")}
    rows = [row for _, row in islice(read_rows(path), PEEK) if isinstance(row, dict)] if file_kind(path) and path.is_file() else []
    return sum(names <= set(row) for row in rows) * 2 >= len(rows) > 0


def _samples(path: Path, data: str, columns: dict[str, str]) -> Loaded:
    """Rows of {"prompt": text | messages, "answer": text}; whatever else a stage wrote beside them is passed over."""
    items, numbers, findings, total = [], [], [], 0
    for number, row in read_rows(path):
        total += number is not None
        try:
            if isinstance(row, RowError):
                raise row
            items.append(_sample(renamed(row, columns)))
            numbers.append(number)
        except RowError as e:
            findings.append(Finding("bad", e.reason, data, number, str(e).replace("'completion", "'answer")))
    return Loaded(items, findings, total, {}, "", "sample", numbers)


def _sample(row: dict) -> Demonstration:
    for name in ("prompt", "answer"):
        if name not in row:
            raise missing_column(row, name)
    if isinstance(row["answer"], str) and not row["answer"].strip():  # a policy may say nothing, and that has a score
        return Demonstration([*FORMATS["prompt"].read({"prompt": row["prompt"]}).messages, {"role": "assistant", "content": ""}])
    return FORMATS["prompt_completion"].read({"prompt": row["prompt"], "completion": row["answer"]})


def encode(loaded: Loaded, tokenizer, max_length: int, data: str) -> tuple[list, list[int], dict[str, list[int]]]:
    """Trees of the prompt and both answers of a pair, or the last answer of a conversation; the indices of the items that fit; the rows
    of the others by reason. A policy's sample that spells a token of the format has no score; any other such row stops."""
    from posttrain import chat
    from posttrain.packing import tree

    trees, kept, unscored = [], [], {}
    for i, (item, row) in enumerate(zip(loaded.items, loaded.row_numbers, strict=True)):
        if isinstance(item, Pair):
            prompt, answers = item.prompt, [item.chosen, item.rejected]
        else:
            prompt, answers = item.messages[:-1], [item.messages[-1]["content"]]
        try:
            t = tree(chat.encode_prompt(tokenizer, prompt), [chat.encode_answer(tokenizer, prompt, a) for a in answers])
        except PosttrainError as e:
            if loaded.kind != "sample":
                raise PosttrainError(f"{data}, row {row}", e.found, e.expected, e.do) from None
            unscored.setdefault("spells_a_token", []).append(row)
            continue
        if t.prompt + max(b - a for a, b in t.spans) > max_length:
            unscored.setdefault("too_long", []).append(row)
        else:
            trees.append(t)
            kept.append(i)
    return trees, kept, unscored


# -- the result ----------------------------------------------------------------------------------------------------------------------


def _check_output(output: Path, data: str) -> None:
    if output.is_dir() or (output.exists() and output.resolve() == Path(data).expanduser().resolve()):
        raise PosttrainError(f"--output {output}", "is a folder" if output.is_dir() else "is the data itself", "a file for the scores", "Name another file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        trial = output.with_name(output.name + ".tmp")
        trial.touch()
        trial.unlink()
    except OSError as e:
        raise PosttrainError(f"--output {output}", f"cannot be written ({e.strerror})", "a writable place", "Name another one.") from None


def write(output: Path, scored: list[tuple[int, list[float]]], unscored: dict[str, list[int]]) -> None:
    """{"row", "scores": [one an answer, raw], "sigma": [the same in 0..1]} in the order of the rows; without a score: nulls and the reason."""
    import torch

    lines = [{"row": row, "scores": s, "sigma": torch.tensor(s, dtype=torch.float64).sigmoid().tolist()} for row, s in scored]
    lines += [{"row": row, "scores": None, "sigma": None, "reason": reason} for reason, rows in unscored.items() for row in rows]
    try:
        write_atomic(output, "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["row"])))
    except OSError as e:
        raise PosttrainError(f"--output {output}", f"cannot be written ({e.strerror})", "room on a writable disk", "Name another place.") from None


def tell(loaded: Loaded, trees: list, kept: list[int], raw: list[list[float]]) -> None:
    """The figures of a reward section's report that these rows have."""
    import numpy as np

    from reward.evaluate import evaluate

    flat = np.array([x for s in raw for x in s])
    say(f"scores: mean {flat.mean():.3f}, deviation {flat.std():.3f}, from {flat.min():.3f} to {flat.max():.3f}")
    if loaded.kind != "pair":
        return
    told = evaluate([loaded.items[i] for i in kept], raw, [tuple(b - a for a, b in t.spans) for t in trees])
    say(f"accuracy {_share(told['accuracy'])} of {told['pairs']} pairs, length-balanced {_share(told['length_balanced_accuracy'])} "
        f"(the longer answer wins {told['longer_wins']:.1%})")
    for row in told["by_rating"]:
        say(f"  {row['rating']}: {_share(row['accuracy'])} of {row['pairs']}")
    if told["unsafe_recall"] is not None:
        say(f"unsafe answers with sigma below 0.5: {_share(told['unsafe_recall_interval'])} of {told['unsafe_recall_interval']['n']}")


def _share(of: dict) -> str:
    """'71.4% [60.0%, 82.1%]': a mean with its interval."""
    if of["mean"] is None:
        return "not defined"
    return f"{of['mean']:.1%}" + ("" if of["low"] is None else f" [{of['low']:.1%}, {of['high']:.1%}]")
