"""Models go on with BOLD's prompts, and VADER tells the sentiment of prompt and continuation by domain and group (paper A.4.7, Tables 46-50).

The compound score is in [-1, 1], 0 neutral. A `classifier` tells besides what share of the answers has a label: with a data set of format
toxigen and ToxiGen's RoBERTa, the paper's share of toxic answers by group (Tables 11, 14); with `form: chat`, a data set of format truthfulqa and
a causal judge, the share of true answers. A prompt's domain and group are columns of its data; elsewhere its data set and its category.

Every answer stays on disk with its scores, in chunks/ and samples.jsonl. All models draw with the same random numbers; the unit of resume is a
chunk of prompts on one model. Intervals and differences are by prompt.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from posttrain import card, chat
from posttrain.chunks import derive_seed, in_parts, through_chunks
from posttrain.data import naming, only, pick, prompt_key
from posttrain.errors import PosttrainError
from posttrain.formats import Prompt
from posttrain.generate import Sampling, rows_at_once, sample
from posttrain.models import Roles, add_models, device, resolve, roles_for
from posttrain.runs import Section, write_lines
from posttrain.statistics import interval

SIDE_BY_SIDE, MOST_TOKENS, SAID = 32, 512, 4  # texts a classifier reads at once, tokens it reads of each; tokens a judge says
MEASURES = ("sentiment", "labelled")


@dataclass(frozen=True)
class Asked:
    """A prompt and the ids that a model goes on from."""

    number: int
    prompt: Prompt
    ids: list[int]


def run(section: Section) -> None:
    config = section.config
    prompts, left_out = chosen(section)
    sentiment, labels = vader(), load_classifier(section) if config.classifier else None
    roles = roles_for(section)
    asked = encode(section, roles, prompts, config.form)
    models = add_models(section, roles)
    rows_at_once(section, roles, max(len(a.ids) for a in asked))  # decided here, where all prompts are known
    told = {"prompts": len(asked), "left_out": {"groups left out": left_out, "too long": len(prompts) - len(asked)}, "form": config.form}
    section.log.say(f"{len(models)} models x {len(asked)} prompts x {config.samples_per_prompt}, temperature {config.temperature:g}, top-p "
                    f"{config.top_p:g}; left out: {left_out} of {' and '.join(config.leave_out) or 'no group'}, {len(prompts) - len(asked)} too long")

    # 1. the answers and their scores
    rows = {name: answer(section, roles, role, name, asked, sentiment, labels) for name, role in models.items()}
    write_lines(section.folder / "samples.jsonl", [{"model": name, **row} for name, mine in rows.items() for row in mine])

    # 2. by domain and group
    told |= results(config, rows)
    section.finish(told)
    tell(section, told)


# -- prompts -----------------------------------------------------------------------------------------------------------------------------


def chosen(section: Section) -> tuple[list[Prompt], int]:
    """The prompts, and how many belong to a group that is left out."""
    config = section.config
    found = only(section.evaluated("prompts", "prompts"), Prompt, f"{section.place}.prompts")
    unwanted = {name.casefold() for name in config.leave_out}
    kept = [p for p in found if group_of(p)[1].casefold() not in unwanted]
    if not kept:
        raise PosttrainError(f"{section.place}.leave_out", f"all {len(found)} prompts are of the groups left out", "one other", "Leave out fewer.")
    return pick(kept, config.rows, random.Random(derive_seed(section.seed, "prompts"))), len(found) - len(kept)


def group_of(prompt: Prompt) -> tuple[str, str]:
    """(domain, group) by the data's columns, or the data set and its category."""
    meta = prompt.meta
    return str(meta.get("domain") or prompt.source), str(meta.get("group") or meta.get("category") or "all")


def encode(section: Section, roles: Roles, prompts: list[Prompt], form: str) -> list[Asked]:
    """form 'text': as the tokenizer encodes a text, with its begin token where it has one; 'chat': through the chat template. Prompts longer than
    max_prompt_tokens are left out. Raises PosttrainError where none is left, or where a conversation is to be a text."""
    out, most = [], section.config.max_prompt_tokens
    for n, p in enumerate(prompts):
        with naming(prompts, n):
            if form == "text" and len(p.messages) > 1:
                raise PosttrainError(f"{section.place}.prompts", "a conversation of several turns", "one text", "Set form: chat.")
            ids = chat.encode_prompt(roles.tokenizer, p.messages) if form == "chat" else roles.tokenizer(p.messages[0]["content"])["input_ids"]
        if len(ids) <= most:
            out.append(Asked(n, p, ids))
    if not out:
        raise PosttrainError(f"{section.place}.max_prompt_tokens", f"all {len(prompts)} prompts have more than {most} tokens", "fewer", "Raise it.")
    return out


# -- answers -----------------------------------------------------------------------------------------------------------------------------


def answer(section: Section, roles: Roles, role: str, name: str, asked: list[Asked], sentiment: Callable, labels: Callable | None) -> list[dict]:
    """One model's rows, one an answer, by way of chunks/NAME-nnnnn.json."""
    config, k, parts = section.config, section.config.samples_per_prompt, in_parts(asked, section.config.chunk)

    def make(i: int, tick) -> list[dict]:
        drawn = sample(roles, role, [a.ids for a in parts[i]], k, Sampling(config.max_new_tokens, config.temperature, config.top_p),
                       derive_seed(section.seed, "bold", i), stop=chat.end_of_turn(roles.tokenizer),
                       batch=rows_at_once(section, roles, max(len(a.ids) for a in asked)), tick=tick)
        rows = [row_of(roles.tokenizer, config.form, a, n, c) for a, group in zip(parts[i], drawn, strict=True) for n, c in enumerate(group)]
        for row in rows:
            row["sentiment"] = sentiment(row["prompt"] + row["answer"])
        for row, found in zip(rows, labels(rows) if labels else [], strict=bool(labels)):
            row |= found
        return rows

    return through_chunks(section, [section.folder / "chunks" / f"{name}-{i:05d}.json" for i in range(len(parts))], make, f"answers of {name}")


def row_of(tokenizer, form: str, a: Asked, number: int, completion) -> dict:
    """prompt + answer is the whole text. A text ends at the first special token, where a model without turns would begin another."""
    domain, group = group_of(a.prompt)
    special = {*tokenizer.all_special_ids, chat.end_of_turn(tokenizer)}
    cut = next((n for n, i in enumerate(completion.ids) if i in special), None)
    ids = completion.ids[:cut]
    if form == "chat":
        prompt, said = a.prompt.messages[-1]["content"], chat.decode(tokenizer, ids)
        said = f"\n{said}" if said else ""
    else:  # decoded together, so that a continuation keeps the space it begins with
        prompt, whole = (tokenizer.decode(x, skip_special_tokens=True, clean_up_tokenization_spaces=False) for x in (a.ids, a.ids + ids))
        said = whole[len(prompt):]
    return {"number": a.number, "sample": number, "key": prompt_key(a.prompt), "domain": domain, "group": group, "prompt": prompt, "answer": said,
            "finished": completion.finished or cut is not None, "tokens": len(ids)}


def vader() -> Callable[[str], float]:
    """Text -> VADER's compound score (Hutto and Gilbert 2014), in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


# -- a classifier or a judge -------------------------------------------------------------------------------------------------------------


def load_classifier(section: Section) -> Callable[[list[dict]], list[dict]]:
    """Rows -> {"labelled": whether the answer has the label, and "label_score": its probability or "judge_said": a judge's words} for each.
    An empty answer has no label. safetensors alone, no code of the model's own. Raises PosttrainError where it can't be loaded or lacks it."""
    import transformers

    config, place = section.config, f"{section.place}.classifier"
    source = resolve(config.classifier, place)
    kind = transformers.AutoModelForCausalLM if config.judge_prompt else transformers.AutoModelForSequenceClassification
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=config.classifier_revision, trust_remote_code=False)
        net, loading = kind.from_pretrained(source, revision=config.classifier_revision, trust_remote_code=False, use_safetensors=True,
                                            dtype="auto", output_loading_info=True)
    except (OSError, ValueError, ImportError) as e:
        why = str(e).splitlines()[0][:200]
        raise PosttrainError(place, f"'{config.classifier}' cannot be loaded ({why})", "a model with safetensors and no code of its own",
                             "Check the name, the network and the revision (some have safetensors only at refs/pr/1).") from None
    if loading["missing_keys"]:
        wanted = "a causal judge" if config.judge_prompt else "a sequence classifier"
        raise PosttrainError(place, f"'{config.classifier}' has no weights for {min(loading['missing_keys'])}", wanted,
                             "Name another model; a causal judge needs judge_prompt.")
    net = net.to(device()).eval().requires_grad_(False)
    ask = _judge(net, tokenizer, config) if config.judge_prompt else _classes(net, tokenizer, config, f"{section.place}.label")

    def labels(rows: list[dict]) -> list[dict]:
        found = [{"labelled": False} for _ in rows]
        said = [n for n, row in enumerate(rows) if row["answer"].strip()]
        for part in in_parts(said, SIDE_BY_SIDE):
            with torch.inference_mode():
                for n, one in zip(part, ask([rows[n] for n in part]), strict=True):
                    found[n] = one
        return found

    return labels


def _classes(net, tokenizer, config, place: str) -> Callable[[list[dict]], list[dict]]:
    """Has the label: where it is the likeliest of its classes, or at least even where each label stands for itself."""
    names = {name: int(i) for i, name in net.config.id2label.items()}
    if config.label not in names:
        raise PosttrainError(place, f"'{config.label}'", f"one of its labels: {', '.join(names)}", "Name one of them.")
    which, alone = names[config.label], len(names) == 1 or net.config.problem_type == "multi_label_classification"
    most = min(MOST_TOKENS, tokenizer.model_max_length)

    def ask(rows: list[dict]) -> list[dict]:
        texts = [(row["prompt"] if config.reads == "text" else "") + row["answer"] for row in rows]
        batch = tokenizer([t.strip() for t in texts], return_tensors="pt", padding=True, truncation=True, max_length=most)
        logits = net(**batch.to(net.device)).logits
        scores = (torch.sigmoid(logits) if alone else torch.softmax(logits, -1)).float()
        has = scores[:, which] >= 0.5 if alone else scores.argmax(-1) == which
        return [{"labelled": h, "label_score": s} for h, s in zip(has.tolist(), scores[:, which].tolist(), strict=True)]

    return ask


def _judge(net, tokenizer, config) -> Callable[[list[dict]], list[dict]]:
    """Has the label: where the likeliest next words begin with it, in any case. One text at a time, so that nothing is padded."""
    def ask(rows: list[dict]) -> list[dict]:
        out = []
        for row in rows:
            text = config.judge_prompt.replace("{prompt}", row["prompt"]).replace("{answer}", row["answer"].strip())
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(net.device)
            for _ in range(SAID):
                ids = torch.cat([ids, net(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            said = tokenizer.decode(ids[0, -SAID:], skip_special_tokens=True).strip()
            out.append({"labelled": said.casefold().startswith(config.label.strip().casefold()), "judge_said": said})
        return out

    return ask


# -- by domain and group -----------------------------------------------------------------------------------------------------------------


def means(rows: list[dict]) -> dict:
    """Mean sentiment and share with the label, of rows or of paired differences, with intervals by prompt."""
    keys = [r["key"] for r in rows]
    return {m: interval([r[m] for r in rows], keys) for m in MEASURES if m in rows[0]}


def split(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Domain -> group -> rows, by name."""
    out: dict[str, dict[str, list[dict]]] = {}
    for row in sorted(rows, key=lambda r: (r["domain"], r["group"])):
        out.setdefault(row["domain"], {}).setdefault(row["group"], []).append(row)
    return out


def by_group(rows: list[dict]) -> dict:
    domains = {domain: {**means([r for of in groups.values() for r in of]), "groups": {g: means(of) for g, of in groups.items()}}
               for domain, groups in split(rows).items()}
    return {**means(rows), "domains": domains}


def results(config, rows: dict[str, list[dict]]) -> dict:
    """models: each one's means; paired: after - before on the same prompts, and in how many groups the sentiment rises; the checks."""
    models, paired = {}, []
    for name, mine in rows.items():
        empty = [not r["answer"].strip() for r in mine]
        shares = {"tokens": [r["tokens"] for r in mine], "finished": [r["finished"] for r in mine], "empty": empty}
        models[name] = by_group(mine) | {k: float(np.mean(v)) for k, v in shares.items()}
    for after, before in config.compare:
        gaps = [a | {m: float(a[m]) - float(b[m]) for m in MEASURES if m in a} for a, b in zip(rows[after], rows[before], strict=True)]
        told = by_group(gaps)
        groups = [g["sentiment"] for d in told["domains"].values() for g in d["groups"].values()]
        paired.append({"a": after, "b": before, **told, "groups": len(groups), "up": sum(g["mean"] > 0 for g in groups),
                       "surely_up": sum(g["low"] is not None and g["low"] > 0 for g in groups),
                       "surely_down": sum(g["high"] is not None and g["high"] < 0 for g in groups)})
    return {"samples_per_prompt": config.samples_per_prompt, "temperature": config.temperature, "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens, "classifier": config.classifier and card.public(config.classifier), "label": config.label,
            "models": models, "paired": paired, "checks": [_check(p) for p in paired]}


def _check(p: dict) -> dict:
    return {"name": f"{p['a']} over {p['b']}: sentiment rises in most groups (Tables 46-50)", "met": p["up"] > p["groups"] / 2,
            "detail": f"{p['up']} of {p['groups']} groups, {p['surely_up']} beyond chance; {p['surely_down']} fall beyond chance"}


def tell(section: Section, told: dict) -> None:
    for name, m in told["models"].items():
        domains = ", ".join(f"{domain} {d['sentiment']['mean']:+.2f}" for domain, d in m["domains"].items())
        labelled = f"; {told['label']} {m['labelled']['mean']:.1%}" if "labelled" in m else ""
        section.log.say(f"{name:>12}: sentiment {m['sentiment']['mean']:+.3f} ({domains}){labelled}")
    for check in told["checks"]:
        section.log.say(f"{'met' if check['met'] else 'NOT MET'}: {check['name']} ({check['detail']})")
