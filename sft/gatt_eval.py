"""How long models keep to what the first turn says (paper section 3.3): several side by side on the same dialogues.

Attributes (Table 30): the first user turn sets a public figure and a hobby, turns of a data set follow, and the last one asks for one of the
two. Forms (Fig. 28): the first turn asks for a form that no Ghost Attention row was made with (a haiku, lower case), and the last is an
ordinary turn of the data. Every turn of `turns` is such a last turn, each with the dialogue that stood before it, so that a question never
reminds a later one. Checkers tell what is kept (sft/checkers.py). Differences are paired by dialogue, with McNemar's exact test.

Every answer stays on disk, in answers/ and samples.jsonl. attention.png shows where the last answers' tokens look (Fig. 10).
"""

import random
from dataclasses import dataclass

from posttrain import chat
from posttrain.chunks import derive_seed, in_parts, through_chunks
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling, rows_at_once, sample
from posttrain.models import Roles, add_models, roles_for
from posttrain.runs import Section, write_json, write_lines
from posttrain.statistics import interval, mcnemar
from sft import attention_map
from sft.instructions import Entry, Exchange, attach, conversation, dialogue, dialogues_of, of_kind, read_entries

ATTRIBUTES = ("figure", "hobby")  # of Table 30
WATCHED, LONGEST = 8, 1500  # dialogues and prompt tokens of the attention figures
GAIN, P, GAIN_TURNS = 0.2, 0.01, (4, 6)  # what Ghost Attention must show against a model without it


@dataclass(frozen=True)
class Asked:
    """One answer that every model gives. entry: what it must keep; other: an attribute of another dialogue, by which chance is told."""

    dialogue: int
    turn: int
    entry: Entry
    other: Entry | None
    instruction: str
    messages: list[dict]
    ids: list[int]

    @property
    def group(self) -> str:
        return "forms" if self.entry.kind == "constraint" else "attributes"


def run(section: Section) -> None:
    config = section.config
    entries = read_entries(section)
    roles = roles_for(section)
    fillers = fillers_of(section, roles)

    # 1. what is asked
    asked = [*attributes(section, roles, entries, fillers), *forms(section, roles, entries, fillers)]
    asked, too_long = fitting(section, asked)
    models = add_models(section, roles)
    rows_at_once(section, roles, max(len(a.ids) for a in asked))  # decided here, where all prompts are known
    section.log.say(f"{len(config.models)} models x {len(asked)} answers at turns {', '.join(map(str, turns_of(config)))}"
                    + (f"; {too_long} dialogues longer than {config.max_prompt_tokens} tokens left out" if too_long else ""))

    # 2. the answers
    answers = {name: answer(section, roles, role, name, asked) for name, role in models.items()}
    write_lines(section.folder / "samples.jsonl", [{"model": name, **{k: v for k, v in row.items() if k != "ids"}}
                                                   for name, rows in answers.items() for row in rows])

    # 3. where they look
    looks = look(section, roles, models, asked, answers) if config.attention else {}

    # 4. what is kept
    told = results(config, answers) | {"too_long": too_long, "attention": looks}
    section.finish(told)
    tell(section, told)


def turns_of(config) -> list[int]:
    return sorted({*config.turns})


# -- what is asked -------------------------------------------------------------------------------------------------------------------


def fillers_of(section: Section, roles: Roles) -> list[list[Exchange]]:
    """The data's dialogues, each up to its first exchange of more than max_filler_tokens."""
    config, out = section.config, []
    whole, _ = dialogues_of(section, section.evaluated("data", "demonstrations"), roles.tokenizer, 1)
    for talk in whole:
        fits = [len(roles.tokenizer(f"{u}\n{a}", add_special_tokens=False)["input_ids"]) <= config.max_filler_tokens for u, a in talk]
        out.append(talk[:fits.index(False)] if False in fits else talk)
    out, wanted = [talk for talk in out if talk], max(turns_of(config))
    if (have := sum(map(len, out))) < wanted:
        raise PosttrainError(f"{section.place}.data", f"{have} exchanges of at most {config.max_filler_tokens} tokens", f"{wanted} for turn {wanted}",
                             "Hold out more demonstrations, raise max_filler_tokens, or leave out the late turns.")
    return out


def fill(section: Section, fillers: list[list[Exchange]], unsaid: list[str], rng: random.Random) -> list[Exchange]:
    """Exchanges for the latest turn, by lot, of dialogues that say none of these names by themselves."""
    able = [t for t in fillers if not any(name.casefold() in f"{u} {a}".casefold() for u, a in t for name in unsaid)]
    wanted = max(turns_of(section.config))
    talk = conversation(able, rng.randrange(len(able)), wanted, rng) if able else []
    if len(talk) < wanted:
        raise PosttrainError(f"{section.place}.data", f"{len(talk)} exchanges that do not name {unsaid[0]}", f"{wanted}", "Add dialogues.")
    return talk


def attributes(section: Section, roles: Roles, entries: list[Entry], fillers: list[list[Exchange]]) -> list[Asked]:
    """Dialogues with a public figure and a hobby each, in full and tersely in turn; every second one is asked for its hobby."""
    config, out = section.config, []
    lists = {kind: of_kind(entries, kind, "evaluation", section.place) for kind in ATTRIBUTES}
    questions = {kind: [q.text for q in of_kind(entries, "question", "evaluation", section.place) if q.of == kind] for kind in ATTRIBUTES}
    for kind in ATTRIBUTES:
        if len(lists[kind]) < 2 or not questions[kind]:
            raise PosttrainError(f"{section.place}.instructions", f"{len(lists[kind])} {kind} entries and {len(questions[kind])} questions for evaluation",
                                 "at least two entries and a question", 'Add rows with "use": "evaluation".')
    for d in range(config.dialogues):
        rng = random.Random(derive_seed(section.seed, "attributes", d))
        kind = ATTRIBUTES[d % 2]
        drawn = {k: rng.sample(lists[k], 2) for k in ATTRIBUTES}
        instruction = " ".join(drawn[k][0].said(terse=d // 2 % 2 == 1) for k in ATTRIBUTES)
        names = [name for k in ATTRIBUTES for name in (drawn[k][0].value, *drawn[k][0].accept)]
        talk, question = fill(section, fillers, names, rng), rng.choice(questions[kind])
        for turn in turns_of(config):
            out.append(_asked(roles, d, turn, *drawn[kind], instruction, talk, question))
    return out


def forms(section: Section, roles: Roles, entries: list[Entry], fillers: list[list[Exchange]]) -> list[Asked]:
    """Dialogues for each form, whose last turn is the next one of the data."""
    config, out = section.config, []
    found = of_kind(entries, "constraint", "evaluation", section.place) if config.constraint_dialogues else []
    for f, value in enumerate(dict.fromkeys(e.value for e in found)):
        ways = [e for e in found if e.value == value]
        for i in range(config.constraint_dialogues):
            rng = random.Random(derive_seed(section.seed, "forms", value, i))
            entry, talk = ways[i % len(ways)], fill(section, fillers, [], rng)
            number = config.dialogues + f * config.constraint_dialogues + i
            out += [_asked(roles, number, turn, entry, None, entry.text, talk, talk[turn - 1][0]) for turn in turns_of(config)]
    return out


def _asked(roles: Roles, number: int, turn: int, entry: Entry, other: Entry | None, instruction: str, talk: list[Exchange], last: str) -> Asked:
    messages = dialogue(instruction, talk[:turn - 1], last, every_turn=False)
    return Asked(number, turn, entry, other, instruction, messages, chat.encode_prompt(roles.tokenizer, messages))


def fitting(section: Section, asked: list[Asked]) -> tuple[list[Asked], int]:
    """Without the dialogues of which a turn is too long, so that every turn is asked of the same ones; and how many those are."""
    long = {a.dialogue for a in asked if len(a.ids) > section.config.max_prompt_tokens}
    left = [a for a in asked if a.dialogue not in long]
    if (few := len({a.dialogue for a in left if a.group == "attributes"})) < 2:
        raise PosttrainError(f"{section.place}.max_prompt_tokens", f"{few} of {section.config.dialogues} dialogues have at most "
                             f"{section.config.max_prompt_tokens} tokens at their last turn", "at least two",
                             "Raise it, lower max_filler_tokens, or leave out the late turns.")
    return left, len(long)


# -- the answers ---------------------------------------------------------------------------------------------------------------------


def answer(section: Section, roles: Roles, role: str, name: str, asked: list[Asked]) -> list[dict]:
    """One model's rows, in the order asked, by way of answers/NAME-nnnnn.json. All models draw with the same random numbers."""
    config = section.config
    parts = in_parts(asked, config.chunk)

    def make(i: int, tick) -> list[dict]:
        drawn = sample(roles, role, [a.ids for a in parts[i]], 1, Sampling(config.max_new_tokens, config.temperature, config.top_p),
                       derive_seed(section.seed, section.name, i), stop=chat.end_of_turn(roles.tokenizer),
                       batch=rows_at_once(section, roles, max(len(a.ids) for a in asked)), tick=tick)
        return [_row(roles, a, completion) for a, (completion,) in zip(parts[i], drawn, strict=True)]

    return through_chunks(section, [section.folder / "answers" / f"{name}-{i:05d}.json" for i in range(len(parts))], make, f"answers of {name}")


def _row(roles: Roles, a: Asked, completion) -> dict:
    text = chat.decode(roles.tokenizer, completion.ids)
    return {"dialogue": a.dialogue, "group": a.group, "kind": a.entry.kind, "value": a.entry.value, "turn": a.turn, "instruction": a.instruction,
            "prompt": a.messages, "answer": text, "ids": completion.ids, "finished": completion.finished, "kept": a.entry.kept(text, []),
            "chance": a.other.kept(text, []) if a.other else None}


# -- where they look (Fig. 10) -------------------------------------------------------------------------------------------------------


def instruction_span(roles: Roles, a: Asked) -> tuple[int, int]:
    """The instruction's first token in a dialogue, and the first one after it."""
    def shared(first_turn: str) -> int:
        other = chat.encode_prompt(roles.tokenizer, [{"role": "user", "content": first_turn}, *a.messages[1:]])
        return next((i for i, (x, y) in enumerate(zip(a.ids, other, strict=False)) if x != y), min(len(a.ids), len(other)))

    same = {shared(f"{mark} {a.messages[0]['content']}") for mark in ("0", "?")}
    return min(same), max(shared(attach(a.instruction, mark)) for mark in ("0", "?"))


def look(section: Section, roles: Roles, models: dict[str, str], asked: list[Asked], answers: dict[str, list[dict]]) -> dict:
    """The largest attention weight of each answer token on the instruction, its mean over tokens and dialogues, by model, at the latest turn whose
    prompts have at most LONGEST tokens; attention.png shows the first of these dialogues, attention.json its numbers."""
    able = [i for i, a in enumerate(asked) if a.group == "attributes" and len(a.ids) <= LONGEST]
    if not able:
        section.log.say(f"note: no prompt has at most {LONGEST} tokens: no attention figure")
        return {}
    turn = max(asked[i].turn for i in able)
    able = [i for i in able if asked[i].turn == turn][:WATCHED]
    out, maps = {"turn": turn, "dialogues": len(able), "on_instruction": {}}, {}
    spans = {i: instruction_span(roles, asked[i]) for i in able}
    for name, rows in answers.items():
        values = []
        for i in able:
            a, (first, end) = asked[i], spans[i]
            weights = attention_map.activations(roles, models[name], a.ids + rows[i]["ids"], len(a.ids))
            values.append(float(weights[:, first:end].amax(1).mean()))
            maps.setdefault(name, {"weights": weights, "start": len(a.ids), "instruction": (first, end)})
        out["on_instruction"][name] = interval(values)
    attention_map.draw(section.folder / "attention.png", maps)
    write_json(section.folder / "attention.json", {
        name: {"prompt_tokens": m["start"], "instruction": m["instruction"], "answer": answers[name][able[0]]["answer"],
               "weights": [[round(float(x), 4) for x in row] for row in attention_map.binned(m["weights"][:, :m["start"]], attention_map.COLUMNS, 1)[0]]}
        for name, m in maps.items()})
    return out


# -- what is kept --------------------------------------------------------------------------------------------------------------------


def results(config, answers: dict[str, list[dict]]) -> dict:
    """Shares by model and turn with intervals by dialogue; by kind; chance; paired differences with McNemar's test; the checks."""
    turns, models = turns_of(config), {}

    def at(name: str, turn: int, **same) -> list[dict]:
        return [r for r in answers[name] if r["turn"] == turn and all(r[k] == v for k, v in same.items())]

    def shares(name: str, key: str = "kept", **same) -> dict:
        return {str(t): interval([r[key] for r in at(name, t, **same)]) for t in turns}

    for name, rows in answers.items():
        kinds = {g: list(dict.fromkeys(r["value"] if g == "forms" else r["kind"] for r in rows if r["group"] == g)) for g in ("attributes", "forms")}
        models[name] = {"attributes": shares(name, group="attributes"), "chance": shares(name, "chance", group="attributes"),
                        "by_attribute": {k: shares(name, group="attributes", kind=k) for k in kinds["attributes"]},
                        "forms": shares(name, group="forms") if kinds["forms"] else {},
                        "by_form": {k: shares(name, group="forms", value=k) for k in kinds["forms"]},
                        "finished": sum(r["finished"] for r in rows) / len(rows)}
    paired = []
    for after, before in config.compare:
        for group in dict.fromkeys(r["group"] for r in answers[after]):
            for turn in turns:
                a, b = ([bool(r["kept"]) for r in at(name, turn, group=group)] for name in (after, before))
                paired.append({"a": after, "b": before, "group": group, "turn": turn, **mcnemar(a, b),
                               "difference": interval([x - y for x, y in zip(map(int, a), map(int, b), strict=True)])})
    first = next(iter(answers.values()))
    return {"turns": turns, "dialogues": len({r["dialogue"] for r in first if r["group"] == "attributes"}),
            "form_dialogues": len({r["dialogue"] for r in first if r["group"] == "forms"}), "models": models, "paired": paired,
            "checks": [_check(p) for p in paired if p["group"] == "attributes" and p["turn"] in GAIN_TURNS]}


def _check(p: dict) -> dict:
    d = p["difference"]
    return {"name": f"{p['a']} over {p['b']}: recall at turn {p['turn']} higher by {GAIN:.0%} of the dialogues or more, McNemar p below {P:g}",
            "met": d["mean"] >= GAIN and p["p"] < P,
            "detail": f"{d['mean']:+.0%} [{d['low']:+.0%}, {d['high']:+.0%}], {p['only_a']} dialogues against {p['only_b']}, p = {p['p']:.2g}"}


def tell(section: Section, told: dict) -> None:
    for name, m in told["models"].items():
        recall = ", ".join(f"turn {t} {s['mean']:.0%} (chance {m['chance'][t]['mean']:.0%})" for t, s in m["attributes"].items())
        forms_kept = ", ".join(f"turn {t} {s['mean']:.0%}" for t, s in m["forms"].items())
        section.log.say(f"{name:>12}: attributes {recall}" + f"; forms {forms_kept}" * bool(forms_kept))
    for check in told["checks"]:
        section.log.say(f"{'met' if check['met'] else 'NOT MET'}: {check['name']} ({check['detail']})")
