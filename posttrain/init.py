"""A recipe for the user's own model, data and GPU: the `init` command. Asks for what no option gives, looks at the data, plans until it fits.

What it decides, in this order: the format of every file and what its pairs compare; where demonstrations and prompts come from if there are none;
the chat template; lengths, from the tokens of the rows; full, LoRA or QLoRA and the sizes of batches, by the plan's memory. It never overwrites.
"""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from statistics import quantiles

import typer

from posttrain import builtin, chat, doctor, lint, plan, shape
from posttrain import config as cfg
from posttrain.data import Item, content, held_out_keys, load_entry, naming, prompt_key, read_rows, remembering
from posttrain.errors import PosttrainError
from posttrain.formats import FORMATS, Demonstration, Pair, Prompt, name_columns
from posttrain.init_recipe import SMALL, TUNINGS, Choice, Fitting, Numbers, Source, Text, choose, render, seconds, speed_of, tuning_note, up
from posttrain.log import duration, say
from posttrain.runs import write_atomic, write_lines

FEWEST = 12  # pairs or prompts under which nothing can be held out and learnt from
LOOKED_AT = 2000  # rows of a set whose tokens are counted
CPU_ROOM, GPU_ROOM = 0.8, 0.9  # of memory that a recipe may fill: a CPU's is shared with everything else, and the plan's count is an estimate
PAIR_SETS = ("pairs", "helpful", "safety")


@dataclass(frozen=True)
class Given:
    """What the options say. None or [] asks."""

    model: str | None = None
    pairs: list[Path] = field(default_factory=list)
    helpful: list[Path] = field(default_factory=list)
    safety: list[Path] = field(default_factory=list)
    demonstrations: list[Path] | None = None
    prompts: list[Path] | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    gpu: str | None = None
    tuning: str = "auto"
    drop_bad_rows: bool = False


@dataclass(frozen=True)
class Asker:
    """Asks in the terminal; with `yes` the default is the answer."""

    yes: bool = False

    def __call__(self, question: str, default: str | None, option: str) -> str:
        if not self.yes:
            return typer.prompt(question, default=default or "", show_default=bool(default)).strip()
        if default is None:
            raise PosttrainError("init", f"no answer to: {question}", option, "Give it, or leave out --yes to be asked.")
        return default


# -- the data ------------------------------------------------------------------------------------------------------------------------


def first_row(path: Path) -> dict:
    """The first row that is one. Raises where the path is no file of a kind that is read."""
    if not path.exists():
        raise PosttrainError(str(path), "no such file", "a local .jsonl, .json, .csv or .parquet file",
                             "A hub data set goes into the recipe by hand: docs/custom-data.md, or download it first.")
    if path.is_dir() or lint.file_kind(path) is None:
        raise PosttrainError(str(path), "not a file that we read", "a .jsonl, .json, .csv or .parquet file, or one of these as .gz", "Name the file itself.")
    return next((row for _, row in islice(read_rows(path), 100) if isinstance(row, dict)), {})


def short(text: str, width: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 3] + "..."


def example(item: Item) -> list[str]:
    """A row as it was understood."""
    turns = item.prompt if isinstance(item, Pair) else item.messages
    last = next(m["content"] for m in reversed(turns) if m["role"] == "user")
    lines = [f"asked:    {short(last)}" + f"  ({len(turns)} turns)" * (len(turns) > 2)]
    if isinstance(item, Pair):
        labels = {"rating": item.rating, "chosen_safe": item.chosen_safe, "rejected_safe": item.rejected_safe}
        told = ", ".join(f"{k} {v}" for k, v in labels.items() if v is not None)
        lines += [f"chosen:   {short(item.chosen)}", f"rejected: {short(item.rejected)}"] + [f"labels:   {told}"] * bool(told)
    elif isinstance(item, Demonstration):
        lines.append(f"answered: {short(item.messages[-1]['content'])}")
    return lines


def load(source: Source, place: str = "init") -> list[Item]:
    """A file's usable items; rows at fault are check-data's to tell."""
    return load_entry(cfg.DataEntry(**source.entry(Path())), Path(), 0, place).items


def ask_columns(path: Path, row: dict, asker: Asker) -> dict[str, str]:
    """ours -> theirs of a preference file whose columns no format has."""
    say(f"The columns of {path} fit no known layout: {name_columns(row)}. Which is which?")
    wanted = {"prompt": "the question", "chosen": "the better answer", "rejected": "the worse answer", "rating": "how much better it is (empty: none)"}
    named = {ours: asker(f"  column of {what}", "" if ours == "rating" else None, f"--columns {ours}=NAME") for ours, what in wanted.items()}
    return {ours: theirs for ours, theirs in named.items() if theirs and theirs != ours}


def look(path: Path, kind: str, given: Given, asker: Asker) -> Source:
    """The file's format, from its columns; says what was understood. kind: demonstration, pair or prompt."""
    row, format, columns = first_row(path), None, {}
    if kind == "pair":
        format, columns = given.format, {o: t for o, t in given.columns.items() if t in row}
    try:
        format = lint.choose_format(path, format, columns, f"init: {path}")
    except PosttrainError:
        if kind != "pair" or asker.yes or format is not None:
            raise
        columns, format = ask_columns(path, row, asker), "preference"
    if kind == "prompt" and FORMATS[format].kind != kind and "prompt" in row:
        format = "prompt"
    if FORMATS[format].kind != kind:
        raise PosttrainError(str(path), f"it reads as {FORMATS[format].kind}s (format {format}; columns: {name_columns(row)})", f"{kind}s",
                             "Give it under the option for its kind, or map its columns.")
    source = Source(path, format, columns, drop=given.drop_bad_rows)
    items = load(source)
    say(f"{path}: format {format} (columns {name_columns(row)}), {len(items):,} {kind}s. The first:")
    for line in example(items[0]) if items else ["no usable row"]:
        say(f"    {line}")
    return source


def gather_pairs(given: Given, asker: Asker) -> dict[str, list[Source]]:
    """pairs | helpful | safety -> files. What a file compares is asked where no option says it."""
    rows = [first_row(path) for name in PAIR_SETS for path in getattr(given, name)]
    for ours, theirs in given.columns.items():
        if rows and not any(theirs in row for row in rows):
            raise PosttrainError(f"--columns {ours}={theirs}", f"no preference file has a column '{theirs}'", f"one of {name_columns(rows[0])}",
                                 "Correct the name, or leave --columns out where they have ours.")
    found = {name: [look(p, "pair", given, asker) for p in getattr(given, name)] for name in PAIR_SETS}
    while not any(found.values()) or (not asker.yes and not (given.pairs or given.helpful or given.safety)):
        more = any(found.values())
        path = asker("Another preference file (empty: none)" if more else "Preference pairs, a file", "" if more else None,
                     "--pairs FILE, or --helpful FILE and --safety FILE")
        if not path:
            break
        source = look(Path(path).expanduser(), "pair", given, asker)
        role = ""
        while role not in ("both", "helpful", "safety"):
            role = asker("What do they compare: helpful, safety or both", "both", "--helpful or --safety")
        found["pairs" if role == "both" else role].append(source)
    if found["pairs"] and (found["helpful"] or found["safety"]):
        raise PosttrainError("init", "pairs for both beside pairs for one", "either files for both (--pairs), or a role for every file",
                             "Say of each file whether it compares helpfulness (--helpful) or safety (--safety).")
    return by_layout(found)


def by_layout(found: dict[str, list[Source]]) -> dict[str, list[Source]]:
    """PKU-SafeRLHF's layout holds two comparisons of every pair, by helpfulness and by safety."""
    def two_sided(s: Source) -> bool:
        return s.format == "safe_rlhf" and "better_response_id" in first_row(s.path)

    helpful = [replace(s, format="safe_rlhf_helpful") if two_sided(s) else s for s in found["helpful"]]
    if found["pairs"] and all(map(two_sided, found["pairs"])):
        return {"helpful": [replace(s, format="safe_rlhf_helpful") for s in found["pairs"]], "safety": found["pairs"]}
    return {k: v for k, v in (found | {"helpful": helpful}).items() if v}


def checked(sets: dict[str, list[Source]], given: Given, place: str) -> None:
    """check-data on all files. Stops where a row cannot be used, unless such rows are to be left out."""
    report = lint.check({name: [cfg.DataEntry(**s.entry(Path())) for s in sources] for name, sources in sets.items()}, Path(), place)
    bad = [f for f in report.findings if f.severity == "bad"]
    if bad and not given.drop_bad_rows:
        say(lint.render(report))
        raise PosttrainError(f"{bad[0].file}" + (f", row {bad[0].row}" if bad[0].row else ""), bad[0].detail, "",
                             f"{len(bad)} of {report.rows:,} rows cannot be used (listed above). Correct them, or leave them out: --drop-bad-rows.")
    warned = sorted({f.reason for f in report.findings if f.severity == "warning"})
    say(f"check-data: {len(bad)} of {report.rows:,} rows cannot be used" + (" and are left out" if bad else "")
        + (f"; warnings: {', '.join(warned)}" if warned else ""))


def labelled(items: list[Item]) -> bool:
    """Whether safety labels of both kinds are there: then the safety loss has something to learn."""
    flags = {flag for i in items for flag in (i.chosen_safe, i.rejected_safe)}
    return {True, False} <= flags


def unique(items: list) -> list:
    """The first of those that say the same."""
    return list({content(i): i for i in reversed(items)}.values())[::-1]


def prompts_of(sets: dict[str, list[Item]]) -> list[dict]:
    """Rows of format `prompt`: what the pairs answer. Those of the safety pairs carry the safety tag."""
    found = unique([Prompt(i.prompt, source=name, safety=name == "safety") for name in ("safety", "helpful", "pairs") for i in sets.get(name, [])])
    return [{"prompt": p.messages, "source": p.source} | ({"safety": True} if p.safety else {}) for p in found]


def chosen_of(sets: dict[str, list[Item]]) -> list[dict]:
    """Rows of format `messages`: the chosen answers, but for those labelled unsafe."""
    found = unique([Demonstration([*i.prompt, {"role": "assistant", "content": i.chosen}], source=name, safety=name == "safety")
                    for name, items in sets.items() for i in items if i.chosen_safe is not False])
    return [{"messages": d.messages, "source": d.source} | ({"safety": True} if d.safety else {}) for d in found]


def held(items: list[Item], most: int) -> int:
    """Rows to hold out: a tenth, of few rows up to a quarter, as many as whole groups of one prompt allow."""
    count, keys = min(most, max(len(items) // 10, min(len(items) // 4, 60))), [prompt_key(i) for i in items]
    while count:
        with suppress(PosttrainError):
            held_out_keys(keys, count, 0, "")
            return count
        count //= 2
    return 0


# -- the model -----------------------------------------------------------------------------------------------------------------------


def read_tokenizer(name: str):
    """The model's tokenizer, where it is on this machine; else None."""
    from transformers import AutoTokenizer

    source = str(builtin.folder(name)) if builtin.is_builtin(name) else name
    with suppress(OSError, ValueError, ImportError):
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    return None


def choose_template(name: str, config: dict) -> Text:
    """The tokenizer's own template; else the shipped one whose turn tokens it has; without a tokenizer, by the vocabulary's size."""
    tokenizer = read_tokenizer(name)
    if tokenizer is None:
        known = {32000: "llama-2", 128256: "llama-3"}.get(config.get("vocab_size")) if config.get("model_type") == "llama" else None
        return Text(None, known or "chatml", known is None, "a guess by the size of the vocabulary: the tokenizer is not on this machine")
    if tokenizer.chat_template:
        with suppress(PosttrainError):
            chat.prepare(tokenizer, None, "init")
            return Text(tokenizer, None, False, "the tokenizer's own", chats=True)
    for template in ("llama-3", "chatml", "llama-2"):
        fresh = read_tokenizer(name)
        with suppress(PosttrainError):
            chat.prepare(fresh, template, "init")
            return Text(fresh, template, False, "its turn tokens are in the vocabulary")
    chat.prepare(tokenizer, "chatml", "init", add_tokens=True)
    return Text(tokenizer, "chatml", True, "no shipped template's turn tokens are in the vocabulary: they are added and trained")


def tokens(text: Text, items: list, i: int) -> tuple[int, int]:
    """(tokens of the prompt, of the longest answer) of a row; a demonstration's answer is all that follows its first user turn."""
    item, count = items[i], lambda words: round(plan.TOKENS_PER_WORD * len(words.split()))
    turns = item.prompt if isinstance(item, Pair) else item.messages
    answers = [item.chosen, item.rejected] if isinstance(item, Pair) else [item.messages[-1]["content"]] if isinstance(item, Demonstration) else []
    before = turns[:-1] if isinstance(item, Demonstration) else turns
    if text.tokenizer is None:
        return sum(count(m["content"]) for m in before) + plan.TEMPLATE_TOKENS, max((count(a) for a in answers), default=0)
    with naming(items, i):
        return (len(chat.encode_prompt(text.tokenizer, before)),
                max((len(chat.encode_answer(text.tokenizer, before, a)) for a in answers), default=0))


def most_of(values: list[int], share: int) -> int:
    """The length that `share` % of the rows keep within."""
    return max(values) if len(values) < 2 or share >= 100 else math.ceil(quantiles(values, n=100, method="inclusive")[share - 1])


def lengths(text: Text, sets: dict[str, list[Item]], context: int, cpu: bool) -> tuple[Numbers, int, int]:
    """(numbers with lengths from the data, rows looked at, of these longer than max_length)."""
    counted = {name: [tokens(text, items, i) for i in range(0, len(items), max(1, len(items) // LOOKED_AT))] for name, items in sets.items()}
    answers = [a for name, rows in counted.items() if name != "prompts" for _, a in rows]
    new = min(up(most_of(answers, 95), 32), 128 if cpu else 512, up(context // 2, 32))
    prompt = min(up(most_of([p for p, _ in counted["prompts"]], 99), 64), context - new)
    whole = [p + a for name, rows in counted.items() if name != "prompts" for p, a in rows]
    longest = min(max(up(max(whole), 64) if max(whole) <= 1024 else up(most_of(whole, 99), 64), prompt + new), context, 1024 if cpu else 4096)
    most = max(longest, 16384) if not cpu else None
    return (Numbers("", longest, prompt, new, 64, most, max(8192, prompt + new) if not cpu else None), len(whole), sum(n > longest for n in whole))


# -- the command ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What to plan for. size: all of it, room: what a recipe may fill, in bytes; here: it is this machine's, and can be timed."""

    words: str
    size: float
    room: float
    cpu: bool
    here: bool


def machine(gpu: str | None) -> Memory:
    """From the option, else the smallest GPU that torch sees, else this CPU."""
    if gpu is not None and gpu.strip().lower() != "cpu":
        gigabytes = plan.gigabytes(gpu)
        return Memory(f"one GPU of {gigabytes:g} GB", gigabytes * 1e9, gigabytes * 1e9 * GPU_ROOM, cpu=False, here=False)
    torch = doctor.load_torch() if gpu is None else None
    seen = doctor.gpus(torch) if hasattr(torch, "cuda") else []
    if seen:
        name, memory = min(seen, key=lambda g: g[1])
        return Memory(f"one {name} of {memory / 1e9:.0f} GB", memory, memory * GPU_ROOM, cpu=False, here=True)
    import psutil

    total = psutil.virtual_memory().total
    return Memory(f"a CPU with {total / 1e9:.0f} GB", total, total * CPU_ROOM, cpu=True, here=True)


def default_model() -> str:
    with suppress(PosttrainError):
        builtin.check(builtin.SMOLLM2, "")
        return builtin.SMOLLM2
    return builtin.TINY


def free_name(path: Path, what: str) -> Path:
    """Nothing is overwritten."""
    if path.exists():
        raise PosttrainError(str(path), f"is there already, and {what} would go there", "a name that is free", "Name another recipe, or move that file away.")
    return path


def optional_sources(given: Given, asker: Asker, name: str, question: str) -> list[Source]:
    paths = getattr(given, name)
    if paths is None:
        answer = asker(question, "", f"--{name} FILE")
        paths = [Path(answer).expanduser()] if answer else []
    return [look(p, name.removesuffix("s"), given, asker) for p in paths]


@dataclass
class Found:
    """What was asked and read. config: the model's config.json."""

    model: str
    parameters: int
    config: dict
    text: Text
    sets: dict[str, list[Source]]
    items: dict[str, list[Item]]
    notes: dict[str, str]


def run(path: Path, given: Given, asker: Asker) -> None:
    """Ask, look, plan, write. Where the plan fails, the files of prompts and demonstrations that it wrote are taken away again."""
    check(path, given)
    memory = machine(given.gpu)
    made = []
    with remembering():
        found = gather(path, given, asker)
        written = stand_ins(path, found)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for file, rows in written.items():
                write_lines(file, rows)
                made.append(file)
            found.items |= {key: [i for s in found.sets[key] for i in load(s)] for key in ("demonstrations", "prompts") if key in found.sets}
            for note in found.notes.values():
                say(f"note: {note}")
            fitting, numbers, rows = conclude(path, given, found, memory)
            recipe, _ = fitting.planned(numbers)
            write_atomic(free_name(path, "the recipe"), render(fitting.choice, numbers, path.parent, path))
        except BaseException as e:
            for file in made:
                file.unlink()
            if isinstance(e, OSError):
                raise PosttrainError(str(e.filename or path), f"cannot be written ({e.strerror})", "a place that you may write to",
                                     f"Name another recipe than {path}.") from None
            raise
    tell(path, {file: len(lines) for file, lines in written.items()}, fitting.choice, numbers, rows, recipe, memory)


def check(path: Path, given: Given) -> None:
    """What can be wrong with the words alone."""
    if path.suffix not in (".yaml", ".yml"):
        raise PosttrainError(f"init {path}", "not the name of a recipe", "a name that ends in .yaml", f"Write {path}.yaml.")
    if given.tuning not in ("auto", *TUNINGS):
        raise PosttrainError("init: --tuning", f"got '{given.tuning}'", f"auto, {', '.join(TUNINGS)}", "Write one of these.")
    if given.format is not None and given.format not in FORMATS:
        near = get_close_matches(given.format, FORMATS, n=1)
        raise PosttrainError("init: --format", f"unknown format '{given.format}'", f"one of {', '.join(FORMATS)}",
                             (f"Did you mean '{near[0]}'? " if near else "") + "Without --format it is guessed from the columns.")
    free_name(path, "the recipe")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise PosttrainError(f"init {path}", f"{above} is a file", "a recipe in a folder", "Name another place.")


def check_model(name: str) -> None:
    """What is meant as a place on this machine has to be a model folder."""
    folder = Path(name)
    meant = not builtin.is_builtin(name) and (folder.exists() or name.startswith((".", "/")) or name.count("/") > 1)
    if meant and not (folder / "config.json").is_file():
        found = "no config.json in it" if folder.is_dir() else "not a folder" if folder.exists() else "no such folder"
        raise PosttrainError(f"--model {name}", found, "a model folder, a hub name such as OWNER/NAME, or a built-in name", "Check the path.")


def gather(path: Path, given: Given, asker: Asker) -> Found:
    """The model, the data and the template."""
    name = given.model or asker("Base model: a folder, a hub name or a built-in name", default_model(), "--model NAME")
    config = cfg.ModelConfig(name_or_path=str(Path(name).expanduser()) if name.startswith("~") else name)
    check_model(config.name_or_path)
    parameters = shape.read_shape(config, "init").parameters
    say(f"{name}: {plan.short(parameters)} parameters")
    raw = json.loads(shape._config_file(config, "init").read_text(encoding="utf-8"))

    pairs = gather_pairs(given, asker)
    others = {"demonstrations": optional_sources(given, asker, "demonstrations", "Demonstrations, a file (empty: none)"),
              "prompts": optional_sources(given, asker, "prompts", "Prompts, a file (empty: those of the pairs)")}
    sets = pairs | {key: sources for key, sources in others.items() if sources}
    checked(sets, given, str(path))
    items = {key: [i for s in sources for i in load(s)] for key, sources in pairs.items()}
    for key, rows in items.items():
        if len(rows) < FEWEST:
            raise PosttrainError("init", f"{len(rows)} usable pairs in {', '.join(str(s.path) for s in pairs[key])}", f"at least {FEWEST}, better hundreds",
                                 "Add pairs; recipes/tiny.yaml shows the whole road on data that comes with it.")
    text = choose_template(config.name_or_path, raw.get("text_config") or raw)
    say(f"chat template: {text.template or 'its own'} ({text.why})")
    return Found(config.name_or_path, parameters, raw.get("text_config") or raw, text, sets, items, pair_notes(pairs, items))


def stand_ins(path: Path, found: Found) -> dict[Path, list[dict]]:
    """Files to write in the place of prompts and demonstrations that were not given: name -> rows. Adds them to the sets, and says why."""
    out = {}
    if "prompts" not in found.sets:
        file = free_name(path.with_name(f"{path.stem}.prompts.jsonl"), "the pairs' prompts")
        out[file], found.sets["prompts"] = prompts_of(found.items), [Source(file, "prompt")]
        found.notes["prompts"] = "no prompts were given: these are the pairs' own, each once" + (
            "; those of the safety pairs carry the safety tag" if "safety" in found.sets else "")
    if "demonstrations" not in found.sets and found.text.chats:
        found.notes["policy"] = "no demonstrations were given, and the tokenizer has a chat template: the model is taken to chat already, and sft is left out"
    elif "demonstrations" not in found.sets:
        file = free_name(path.with_name(f"{path.stem}.demonstrations.jsonl"), "the chosen answers")
        out[file], found.sets["demonstrations"] = chosen_of(found.items), [Source(file, "messages")]
        found.notes["demonstrations"] = ("no demonstrations were given: the pairs' chosen answers stand in, none that is labelled unsafe; "
                                         "demonstrations written for the purpose are better")
    return out


def pair_notes(sets: dict[str, list[Source]], items: dict[str, list[Item]]) -> dict[str, str]:
    """What the pairs at hand mean for the reward models."""
    if {"helpful", "safety"} <= {*sets}:
        same = {s.path for s in sets["helpful"]} == {s.path for s in sets["safety"]}
        whose = "of the two comparisons that one file holds" if same else "each on its own pairs and a share of the others"
        return {"rewards": f"two reward models, {whose}" + ("; the safety one also learns the labels" if labelled(items["safety"]) else "")}
    one = next(iter(sets))
    if labelled(items[one]):
        return {"rewards": "two reward models on the same pairs: the second one also learns the safety labels, and PPO's safety gate reads it"}
    lack = {"helpful": "safety", "safety": "helpfulness"}.get(one)
    why = f"no pairs compare {lack}" if lack else "the pairs carry no safety labels"
    return {"rewards": f"one reward model in both places, helpfulness and safety: {why}, so the safety gate changes nothing, "
            "and 'unsafe' in the report only means a low score"}


def conclude(path: Path, given: Given, found: Found, memory: Memory) -> tuple[Fitting, Numbers, list[dict]]:
    """Held-out rows and lengths from the data, the rest from the plan: (fitting, numbers, the plan's rows)."""
    items, cpu = found.items, memory.cpu
    if len(items["prompts"]) < FEWEST:
        raise PosttrainError("init", f"{len(items['prompts'])} prompts", f"at least {FEWEST}, better hundreds", "Add prompts, or pairs with other prompts.")
    held_out = {"demonstrations": held(items["demonstrations"], 200)} if "demonstrations" in items else {}
    held_out |= {"pairs": min(held(items[key], 1000) for key in PAIR_SETS if key in items), "prompts": held(items["prompts"], 48 if cpu else 200)}
    numbers, looked, long = lengths(found.text, items, found.config.get("max_position_embeddings") or 4096, cpu)
    if long:
        found.notes["too_long"] = f"{long} of {looked:,} rows looked at are longer than max_length {numbers.max_length}: left out of training"
        say(f"note: {found.notes['too_long']}")
    labels = labelled(next(items[key] for key in ("safety", "pairs", "helpful") if key in items))
    choice = Choice(name=re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "mine", model=found.model, machine=memory.words, cpu=cpu,
                    float32=cpu and not doctor.bf16_flags(), small=found.parameters < SMALL, text=found.text, sets=found.sets,
                    counts={key: len(rows) for key, rows in items.items()}, held_out=held_out, labels=labels, notes=found.notes)
    fitting = Fitting(choice, path, memory.room)
    return fitting, *choose(fitting, numbers, given.tuning)


def tell(path: Path, written: dict[Path, int], choice: Choice, numbers: Numbers, rows: list[dict], recipe: cfg.Recipe, memory: Memory) -> None:
    """Memory, time, and the next three commands."""
    gigabytes, largest = memory.size / 1e9, max(rows, key=lambda r: r["memory"]["total"])
    speed = speed_of(gigabytes, memory.here)
    basis = "scaled from the demo's measured run, by this machine's speed now" if choice.cpu else "a rough guess: no GPU has been timed yet"
    basis += "" if memory.here else f"; a card of {speed / 1e12:.0f} TFLOP/s is assumed"
    say()
    for row in rows:
        for warning in row["warnings"]:
            say(f"note: {row['section']}: {warning}")
    say(f"Tuning: {tuning_note(choice, numbers)}")
    say(f"Memory: most in {largest['section']}, about {(largest['memory']['total'] + plan.RESERVE) / 1e9:.1f} of {gigabytes:.1f} GB (estimated)")
    say(f"Time: about {duration(seconds(recipe, rows, speed, choice.cpu))} in all ({basis})\n")
    for file, lines in written.items():
        say(f"Wrote {file}: {lines:,} rows")
    say(f"Wrote {path}. Next:")
    for command in (f"check-data {path}", f"plan {path}" + ("" if choice.cpu else f" --gpu {gigabytes:g}GB"), f"run {path}"):
        say(f"  python -m posttrain {command}")
