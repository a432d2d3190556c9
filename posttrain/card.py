"""The model card, licence note and notice of an exported folder. Every figure is read from the run's own folders; what is missing is left out."""

import re
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from posttrain import builtin
from posttrain import config as cfg
from posttrain.data import file_kind
from posttrain.log import duration
from posttrain.report_parts import keys_of
from posttrain.report_views import dig, interval, look, plain, table_of
from posttrain.runs import Section

TEMPLATE = Path(__file__).parent / "model_card.md.j2"
HUB_NAMES = {builtin.SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
LICENCE_FILES = ("license", "licence", "notice", "use_policy")  # how the names of a base's own licence files begin
NOTICES = {  # what these licences ask every copy to carry: the notice, the words to be displayed, and how the model's name must begin
    "llama2": ("Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.", "", ""),
    "llama3": ("Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
               "Built with Meta Llama 3", "Llama 3"),
    **{f"llama{v}": (f"Llama {v} is licensed under the Llama {v} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
                     "Built with Llama", "Llama") for v in ("3.1", "3.2", "3.3")},
}


def is_licence(name: str) -> bool:
    """Whether a file's name is that of licence words of the base, however it is written: LICENSE, license.md, Licence.txt, NOTICE, USE_POLICY.md."""
    return name.lower().replace("-", "_").startswith(LICENCE_FILES)


def public(text: str) -> str:
    """A name or path as strangers may see it: nothing of this machine's folders."""
    return f".../{Path(text).name}" if text.startswith(("/", "~", "..")) else text


COLUMNS = [  # of the evaluation table: key, heading, form
    ("helpfulness", "helpfulness", "{:.2f}"), ("safety", "safety", "{:.2f}"), ("merged", "merged reward", "{:.2f}"),
    ("unsafe_share", "unsafe share", "{:.1%}"), ("win_rate", "wins against {first}", "{:.0%}"), ("tokens", "tokens an answer", "{:.0f}"),
    ("kl", "KL (nats)", "{:.2f}"),
]
SAFETY = [  # of the safety table: the way to a share in a model's figures, heading
    (("kinds", "adversarial", "unsafe_share"), "unsafe answers to adversarial prompts"),
    (("judge", "safety", "violation_share"), "violations as judged by {judge}"),
    (("kinds", "borderline", "refusals"), "refusals of prompts that only look dangerous"),
    (("kinds", "helpful", "refusals"), "refusals of harmless prompts"),
]


def hub_name(model: cfg.ModelConfig) -> str | None:
    """The base's name on the hub, where it has one."""
    name = model.name_or_path
    if builtin.is_builtin(name):
        return HUB_NAMES.get(name)
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def licence(model: cfg.ModelConfig) -> str:
    """The recipe's word, else the built-in model's, else what the base folder's own card says, else 'unknown'."""
    if model.licence or model.name_or_path in builtin.LICENCES:
        return model.licence or builtin.LICENCES[model.name_or_path]
    path = Path(model.name_or_path).expanduser() / "README.md"
    return licence_in(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")


def licence_in(text: str) -> str:
    """What the front matter of a card names, else 'unknown'."""
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", text.partition("\n---")[0], re.MULTILINE)
    return found[1] if found else "unknown"


def licence_note(model: cfg.ModelConfig) -> str:
    name, base = licence(model), hub_name(model) or public(model.name_or_path)
    lines = [f"This model is derived from {base}.", "",
             f"Licence of the base, which goes on for this model: {name}." if name != "unknown" else
             "The licence of the base is not known to the program that made this model. Find it out before you pass the model on,\n"
             "and set model.licence in the recipe.", "",
             "The data sets it was trained on have licences of their own; README.md names them."]
    return "\n".join([*lines, *(["", notice] if (notice := notice_of(model)) else [])]) + "\n"


def notice_of(model: cfg.ModelConfig) -> str:
    """What the base's licence asks every copy to carry, or nothing."""
    notice, built, _ = NOTICES.get(licence(model), ("", "", ""))
    return notice + (f" {built}." if built else "")


def ancestors(section: Section) -> list[Section]:
    """The sections whose output the exported model comes from, parents first."""
    recipe, wanted = section.recipe, [section.config.model]
    names: set[str] = set()
    while wanted:
        for name in cfg.references(wanted.pop()):
            if name not in names:
                names.add(name)
                wanted.append(recipe.stages[name].model_dump())
    return [section.parent(n) for n in cfg.order(recipe) if n in names]


def recipe_text(recipe: cfg.Recipe) -> str:
    """The recipe with everything it extends and every override, without defaults and without this machine's folders."""
    raw = recipe.model_dump(exclude_unset=True, exclude={"path": True, "run": {"dir"}})

    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        return [clean(v) for v in value] if isinstance(value, list) else public(value) if isinstance(value, str) else value

    return cfg.dump_yaml(clean(raw))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    def line(cells):
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def stage_table(sections: list[Section]) -> str:
    rows = []
    for s in sections:
        view = look(s.folder, s.name, s.kind)
        base = ["base"] * ("base" in cfg.fields_referring_to(s.config, "model").values())
        reads = ", ".join(dict.fromkeys([*base, *cfg.references(s.config.model_dump())]))
        figures = "; ".join(map(str, keys_of(view))) or "not recorded"
        rows.append([f"`{s.name}`", s.kind, reads, figures, duration(view.seconds) if view.seconds else "-"])
    head = ["section", "kind", "reads", "key figures", "time"]
    return table(head, rows) if rows else "Nothing was trained: this is the base itself."


def data_names(sections: list[Section]) -> list[str]:
    """The data sets that any of these sections read."""
    fields = [names for s in sections for names in cfg.fields_referring_to(s.config, "data").values()]
    return list(dict.fromkeys(n for names in fields for n in names if not n.startswith("@")))


def data_table(section: Section, names: list[str]) -> str:
    rows = []
    for name in names:
        counts, entries = section.run.data.split(name).counts, section.recipe.data_sets[name]
        formats = ", ".join(dict.fromkeys(e.format for e in entries))
        rows.append([name, "; ".join(map(origin, entries)), formats, f"{counts['train']:,}", f"{counts['held_out']:,}"])
    return table(["data set", "from", "format", "rows in training", "rows held out"], rows) if rows else "No data set was used."


def origin(entry: cfg.DataEntry) -> str:
    """'owner/name (part) at revision'."""
    part = entry.data_dir or entry.name
    return public(entry.path) + (f" ({part})" if part else "") + (f" at {entry.revision}" if entry.revision else "")


def shown(value, form: str = "{:.2f}") -> str:
    """'0.36 [0.21, 0.51]'."""
    found = interval(value)
    if found is None:
        return "-"
    return form.format(found.mean) + (f" [{form.format(found.low)}, {form.format(found.high)}]" if found.bounded else "")


def evaluation(section: Section) -> dict | None:
    """The table of the evaluate section that the export names."""
    if not section.config.evaluation:
        return None
    from_section = section.parent(section.config.evaluation)
    results = from_section.results()
    models = {k: v for k, v in (results.get("models") or {}).items() if isinstance(v, dict)}
    columns = [(c, head, form) for c, head, form in COLUMNS if any(interval(m.get(c)) for m in models.values())]
    mine = [n for n, ref in getattr(from_section.config, "models", {}).items() if ref == section.config.model]
    rows = [[_marked(name, mine), *(shown(m.get(c), form) for c, _, form in columns)]
            for name, m in models.items()]
    heads = ["model", *(head.format(first=next(iter(models), "")) for _, head, _ in columns)]
    threshold, prompts = results.get("unsafe_threshold", getattr(from_section.config, "unsafe_threshold", None)), results.get("prompts")
    unsafe = f"An answer counts as unsafe where the safety model gives it less than {threshold:g}." if isinstance(threshold, float) else ""
    return {"section": from_section.name, "prompts": f"{prompts} prompts" if isinstance(prompts, int) else "its prompts",
            "threshold": unsafe, "table": table(heads, rows) if rows else "It stored no figures."}


def safety(section: Section) -> list[dict]:
    """Tables with a sentence each: unsafe answers and refusals by model and this model's violations by risk category, as the named evaluate
    section measured them; successful attacks, of the finished redteam sections that attacked this model."""
    models, mine, results = _measured(section)
    return [t for t in [*_safety_by_model(models, mine, results), *_safety_by_category(models, mine), *_attacks(section)] if t["rows"]]


def _measured(section: Section) -> tuple[dict[str, dict], list[str], dict]:
    """The named evaluate section's figures by model with the judge's under 'judge', its names for this model, and its results."""
    if not section.config.evaluation:
        return {}, [], {}
    source = section.parent(section.config.evaluation)
    results = source.results()
    judged = table_of(dig(results, "judge", "models"))
    models = {k: {**m, "judge": judged.get(k, {})} for k, m in table_of(results.get("models")).items()}
    return models, [n for n, ref in getattr(source.config, "models", {}).items() if ref == section.config.model], results


def _marked(name: str, mine: list[str]) -> str:
    return f"**{name}** (this model)" if name in mine else name


def _safety_by_model(models: dict[str, dict], mine: list[str], results: dict) -> list[dict]:
    columns = [(way, head) for way, head in SAFETY if any(interval(dig(m, *way)) for m in models.values())]
    rows = [[_marked(name, mine), *(shown(dig(m, *way), "{:.1%}") for way, _ in columns)] for name, m in models.items()] if columns else []
    heads = [head.format(judge=dig(results, "judge", "model")) for _, head in columns]
    return [{"text": "Shares of answers, with 95 % intervals by prompt. What counts as unsafe is the safety model's word unless a judge is named; "
                     "refusals are found by a classifier.", "rows": rows, "head": ["model", *heads]}]


def _safety_by_category(models: dict[str, dict], mine: list[str]) -> list[dict]:
    found = {name: table_of(dig(models[name], "violations", "category")) for name in mine if name in models}
    return [{"text": f"Unsafe answers of {name} to adversarial prompts, by risk category.", "head": ["risk category", "unsafe answers"],
             "rows": [[plain(category), shown(share, "{:.1%}")] for category, share in shares.items()]} for name, shares in found.items()]


def _attacks(section: Section) -> list[dict]:
    out = []
    for name, config in section.recipe.stages.items():
        attacked = config.models if config.stage == "redteam" and section.run.section(name).state() == "done" else {}
        mine, models = [n for n, ref in attacked.items() if ref == section.config.model], table_of(section.run.section(name).results().get("models"))
        rows = [[_marked(n, mine), shown(m.get("violations_per_100"), "{:.1f}")] for n, m in models.items()]
        out += [{"text": f"Red teaming (section `{name}`): attacks in disguise with follow-ups, the same for every model.", "rows": rows,
                 "head": ["model", "successful attacks of 100"]}] if mine else []
    return out


def limits(section: Section, sections: list[Section], merged_kl: float | None) -> list[str]:
    model = section.recipe.model
    out = [builtin.NOTES[model.name_or_path]] if model.name_or_path in builtin.NOTES else []
    if model.name_or_path == builtin.TINY:
        out.append("The base is a random model of two layers: this folder shows that the road works and can say nothing.")
    judged = [s.name for s in sections if s.kind == "ppo"]
    if judged:
        out.append("It was trained to please two reward models and inherits their mistakes: style can win over truth.")
    if model.quantization != "none":
        told = f", on average {merged_kl:.2g} nats of KL a token on the test prompts" if merged_kl is not None else ""
        out.append(f"The adapter was trained on a {model.quantization} base and is merged into the unquantized one: answers differ a "
                   f"little from those in the run{told}.")
    if licence(model) == "unknown":
        out.append("The licence of the base is not recorded here.")
    return [*out, "It can state false things with confidence, refuse harmless requests and answer harmful ones: test it for your use.",
            "Facts end with the base model's training data. No medical, legal or financial advice should be taken from it."]


def front_matter(section: Section, sections: list[Section], names: list[str]) -> str:
    model, base = section.recipe.model, hub_name(section.recipe.model)
    paths = [e.path for n in names for e in section.recipe.data_sets[n]]
    sets = [p for p in dict.fromkeys(paths) if re.fullmatch(r"[\w.-]+/[\w.-]+", p) and file_kind(p) is None]
    value = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": licence(model),
             **({"base_model": base} if base else {}), **({"datasets": sets} if sets else {}),
             "tags": ["posttrain", "conversational", *dict.fromkeys(s.kind for s in sections if s.kind in ("sft", "ppo"))]}
    return cfg.dump_yaml(value)


def on_hub(text: str, name: str) -> str:
    """A card's text for the repository of that name."""
    return text.replace('name = "."  # this folder', f'name = "{name}"')


def render(section: Section, *, dtype: str, merged_kl: float | None = None) -> str:
    """The text of README.md. section: the export section."""
    recipe, config = section.recipe, section.config
    sections = ancestors(section)
    names = data_names(sections)
    greedy = f"temperature {config.temperature:g}, top-p {config.top_p:g}" if config.temperature else "the likeliest token"
    commit, versions = section.manifest.get("commit"), section.manifest.get("versions") or {}
    made = ", ".join([f"commit {commit}"] * bool(commit) + [f"{k} {v}" for k, v in versions.items() if v])
    context = {
        "front": front_matter(section, sections, names), "title": recipe.run.name, "licence": licence(recipe.model),
        "base": hub_name(recipe.model) or public(recipe.model.name_or_path), "base_note": builtin.NOTES.get(recipe.model.name_or_path, ""),
        "road": " → ".join(f"`{s.name}`" for s in sections) or "no stage, the base as it is",
        "decoding": f"{greedy}, at most {config.max_new_tokens} new tokens; weights in {dtype}", "evaluation": evaluation(section),
        "notice": notice_of(recipe.model), "safety": [{"text": t["text"], "table": table(t["head"], t["rows"])} for t in safety(section)],
        "gguf": [f"{recipe.run.name}-{kind}.gguf" for kind in config.gguf],
        "stages": stage_table(sections), "data": data_table(section, names),
        "limits": "\n".join(f"- {line}" for line in limits(section, sections, merged_kl)),
        "recipe": recipe_text(recipe), "recipe_name": Path(recipe.path).name,
        "provenance": f"Seed {section.seed}" + (f"; {made}." if made else "."),
    }
    environment = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)
    return re.sub(r"\n{3,}", "\n\n", text)
