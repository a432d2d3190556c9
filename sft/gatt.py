"""Ghost Attention (paper section 3.3, A.3.5): demonstrations that keep to an instruction of their first turn.

A dialogue gets an instruction: one to three of a hobby, a language and a public figure, half of the time in full sentences, half of the time
tersely ("Figure: Napoleon. Hobby: Chess."). The policy answers the last turn with the instruction on every user turn; the demonstration has it
on the first alone, and its loss is on the sampled answer alone, since the answers before know nothing of the instruction. `context: resampled`
samples those too, under the instruction, one turn after the other.

Everything sampled stays on disk, in chunks/ and samples.jsonl, and lists/ has what the policy proposed. The unit of resume is a chunk with a
seed of its own. data.jsonl holds the kept rows as ordinary demonstrations; a later section names "@SECTION".
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

from posttrain import chat
from posttrain.chunks import derive_seed, in_parts, through_chunks, usable, write_samples
from posttrain.data import pick
from posttrain.errors import PosttrainError
from posttrain.generate import Sampling, rows_at_once, sample
from posttrain.models import Roles, roles_for, source_of
from posttrain.runs import Section, write_lines
from sft.checkers import words
from sft.instructions import Entry, Exchange, conversation, dialogue, dialogues_of, in_first_turn_only, of_kind, read_entries

ASKED = ("hobby", "figure")  # the kinds that a question can ask about
PROPOSE = {"hobby": "List 50 hobbies that people have, one on each line, with no explanation.",
           "figure": "List 50 famous public figures of the present and the past, one on each line, with no explanation."}
PROPOSALS, FEWEST = 8, 10  # answers to each; fewer usable entries than that, and the file's stand in
BULLET = re.compile(r"^\s*(?:[-*•–]|\d+\s*[.):])\s*")


@dataclass(frozen=True)
class Planned:
    """A row to be made. asks: the kind of instruction that its last turn asks about, or nothing."""

    exchanges: list[Exchange]  # before the last user turn
    last: str
    parts: list[Entry]
    terse: bool
    asks: str = ""

    @property
    def instruction(self) -> str:
        return " ".join(p.said(self.terse) for p in self.parts)

    @property
    def users(self) -> list[str]:
        return [*(u for u, _ in self.exchanges), self.last]

    @property
    def checked(self) -> list[str]:
        """The kinds of its instruction that any right answer keeps: the language always, the others where the last turn asks about them."""
        return [p.kind for p in self.parts if p.kind == "language" or p.kind == self.asks]


def run(section: Section) -> None:
    config = section.config
    entries = read_entries(section)
    questions = of_kind(entries, "question", "training", section.place) if config.asked_share else []
    lists = {kind: of_kind(entries, kind, "training", section.place) for kind in config.kinds}
    roles = roles_for(section)
    items = [item for name in config.data for item in section.run.data_of(name).train]
    dialogues, left_out = dialogues_of(section, items, roles.tokenizer, 1 if config.turns else 2)
    roles.add("policy", source_of(section, config.policy))

    # 1. the instructions: the file's, or what the policy proposes
    if config.generate:
        lists |= proposed(section, roles, entries)
    section.log.say(", ".join(f"{len(lists[k])} {'hobbies' if k == 'hobby' else k + 's'}" for k in config.kinds) + " to draw from")

    # 2. every dialogue with a random combination of them
    planned = combine(section, dialogues, lists, questions)
    section.log.say(f"{len(planned)} rows of {len(dialogues)} dialogues" + "".join(f", {n} {why} left out" for why, n in left_out.items())
                    + f"; {config.samples_per_prompt} answers to each last turn; earlier answers {config.context}")

    # 3. the answers, with the instruction on every user turn
    bags = sample_chunks(section, roles, planned, lists.get("language", []))

    # 4. what is kept, with the instruction on the first turn alone
    kept, dropped = choose(section, planned, bags)
    write_outputs(section, bags, kept)
    told = {"dialogues": len(dialogues), "left_out": left_out, "context": config.context, **results(section, planned, kept, dropped),
            "lists": {kind: {"entries": len(found), "from": "the policy" if found[0].use == "proposed" else "the file"} for kind, found in lists.items()}}
    section.finish(told)
    tell(section, told)


# -- the instructions ----------------------------------------------------------------------------------------------------------------


def proposed(section: Section, roles: Roles, entries: list[Entry]) -> dict[str, list[Entry]]:
    """Hobbies and public figures that the policy names when asked (A.3.5: "so that the model knows them"), without those that the evaluation
    uses; a kind of which it names fewer than FEWEST is left out. The answers stay in lists/, what is used in instructions.jsonl."""
    kinds, stop = [k for k in PROPOSE if k in section.config.kinds], chat.end_of_turn(roles.tokenizer)

    def make(i: int, tick) -> list[dict]:
        ids = chat.encode_prompt(roles.tokenizer, [{"role": "user", "content": PROPOSE[kinds[i]]}])
        drawn, = sample(roles, "policy", [ids], PROPOSALS, Sampling(section.config.max_new_tokens, section.config.temperature),
                        derive_seed(section.seed, section.name, "lists", kinds[i]), stop=stop, batch=PROPOSALS, tick=tick)
        return [{"prompt": PROPOSE[kinds[i]], "answer": chat.decode(roles.tokenizer, c.ids), "finished": c.finished} for c in drawn]

    rows = through_chunks(section, [section.folder / "lists" / f"{kind}.json" for kind in kinds], make, "proposing instructions")
    out = {}
    for i, kind in enumerate(kinds):
        taken = {tuple(words(v)) for e in entries if e.kind == kind and e.use == "evaluation" for v in (e.value, *e.accept)}
        found = [e for e in read_proposals(kind, rows[i * PROPOSALS:(i + 1) * PROPOSALS]) if not taken & {tuple(words(v)) for v in (e.value, *e.accept)}]
        if len(found) < FEWEST:
            section.log.say(f"note: the policy names {len(found)} usable {kind} entries, fewer than {FEWEST}: the file's are used")
        else:
            out[kind] = found
    write_lines(section.folder / "instructions.jsonl", [{"kind": e.kind, "value": e.value, "accept": e.accept} for found in out.values() for e in found])
    return out


def read_proposals(kind: str, rows: list[dict]) -> list[Entry]:
    """The entries that two or more of the answers name, in order of appearance: one to four words a line, after its bullet and before any
    explanation; names begin with capitals. Of lists with bullets, lines without one are no entries; nor is a last line that was cut off."""
    found: dict[tuple, Entry] = {}
    named_by: dict[tuple, set[int]] = {}
    for number, row in enumerate(rows):
        lines = row["answer"].splitlines() if row["finished"] else row["answer"].splitlines()[:-1]
        bulleted = [line for line in lines if BULLET.match(line)]
        for line in bulleted or lines:
            value = re.split(r"[:;,(.]|\s[-–—]\s", BULLET.sub("", line).replace("*", ""), maxsplit=1)[0].strip(" \t\"'“”")
            parts = value.split()
            if not 1 <= len(parts) <= 4 or not 3 <= len(value) <= 40 or not all(re.fullmatch(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", w) for w in parts):
                continue
            if kind == "figure" and not (parts[0][0].isupper() and parts[-1][0].isupper()):
                continue
            surname = kind == "figure" and len(parts) > 1 and not re.fullmatch(r"[IVX]+|\w{1,3}", parts[-1])
            key = tuple(words(value))
            named_by.setdefault(key, set()).add(number)
            found.setdefault(key, Entry(kind, value if kind == "figure" else value.lower(), use="proposed", accept=(parts[-1],) if surname else ()))
    return [e for key, e in found.items() if len(named_by[key]) > 1]


def combine(section: Section, dialogues: list[list[Exchange]], lists: dict[str, list[Entry]], questions: list[Entry]) -> list[Planned]:
    """Every dialogue that is used with one of the kinds of instruction up to all, in random order; half of the rows are terse."""
    config, rng = section.config, random.Random(derive_seed(section.seed, section.name, "rows"))
    numbers = [d for d in pick(range(len(dialogues)), config.rows, rng) for _ in range(config.instructions_per_dialogue)]
    parts = [[rng.choice(lists[kind]) for kind in rng.sample(config.kinds, rng.randint(1, len(config.kinds)))] for _ in numbers]
    terse = {*rng.sample(range(len(numbers)), len(numbers) // 2)}
    able = [i for i, found in enumerate(parts) if any(p.kind in ASKED for p in found)]
    asked = {*pick(able, round(config.asked_share * len(able)), rng)}
    out = []
    for i, d in enumerate(numbers):
        talk = conversation(dialogues, d, rng.randint(*config.turns), rng) if config.turns else dialogues[d]
        last, asks = talk[-1][0], ""
        if i in asked:
            asks = rng.choice([p.kind for p in parts[i] if p.kind in ASKED])
            last = rng.choice([q.text for q in questions if q.of == asks])
        out.append(Planned(talk[:-1], last, parts[i], i in terse, asks))
    return out


# -- sampling ------------------------------------------------------------------------------------------------------------------------


def sample_chunks(section: Section, roles: Roles, planned: list[Planned], languages: list[Entry]) -> list[list[dict]]:
    """The rows sampled for each planned one, by way of chunks/nnnnn.json: its answers, or the one reply at which it ended before its last turn."""
    _rows_side_by_side(section, roles, planned)  # decided here, where all rows are known
    parts = in_parts(range(len(planned)), section.config.chunk)
    rows = through_chunks(section, [section.folder / "chunks" / f"{i:05d}.json" for i in range(len(parts))],
                          lambda i, tick: answer(section, roles, {n: planned[n] for n in parts[i]}, languages, i, tick), "answering under instructions")
    bags: list[list[dict]] = [[] for _ in planned]
    for row in rows:
        bags[row["row"]].append(row)
    return bags


def _rows_side_by_side(section: Section, roles: Roles, planned: list[Planned]) -> int:
    """The longest prompt is known where the context is the data's, and at most max_prompt_tokens where it is sampled."""
    config = section.config
    lengths = [len(chat.encode_prompt(roles.tokenizer, dialogue(p.instruction, p.exchanges, p.last, every_turn=True))) for p in planned]
    fitting = [n for n in lengths if n <= config.max_prompt_tokens]
    if not fitting:
        raise PosttrainError(f"{section.place}.max_prompt_tokens", f"{config.max_prompt_tokens}, and the shortest row has {min(lengths)} tokens",
                             "room for the rows", "Raise it, or use shorter dialogues.")
    return rows_at_once(section, roles, max(fitting) if config.context == "original" else config.max_prompt_tokens)


def answer(section: Section, roles: Roles, planned: dict[int, Planned], languages: list[Entry], chunk: int, tick) -> list[dict]:
    """A chunk's rows. planned: row number -> row. A row whose earlier answer can't be sampled ends there."""
    config = section.config
    replies = {n: [] if config.context == "resampled" else [a for _, a in p.exchanges] for n, p in planned.items()}
    ended: dict[int, list[dict]] = {}

    def ask(turns: dict[int, int], samples: int, *purpose) -> dict[int, list[dict]]:
        """Answers to one user turn of each row. turns: row number -> turn, counted from 0."""
        prompts = {n: dialogue(planned[n].instruction, list(zip(planned[n].users[:t], replies[n], strict=True)), planned[n].users[t], every_turn=True)
                   for n, t in turns.items()}
        ids = {n: chat.encode_prompt(roles.tokenizer, prompt) for n, prompt in prompts.items()}
        able = [n for n in turns if len(ids[n]) <= config.max_prompt_tokens]
        drawn = sample(roles, "policy", [ids[n] for n in able], samples, Sampling(config.max_new_tokens, config.temperature),
                       derive_seed(section.seed, section.name, chunk, *purpose), stop=chat.end_of_turn(roles.tokenizer),
                       batch=rows_at_once(section, roles, config.max_prompt_tokens), tick=tick) if able else []
        out = {n: [_row(roles, planned[n], n, prompts[n], languages)] for n in turns if n not in able}
        return out | {n: [_row(roles, planned[n], n, prompts[n], languages, c) for c in found] for n, found in zip(able, drawn, strict=True)}

    last = {n: len(p.exchanges) for n, p in planned.items()}
    for turn in range(max(last.values())) if config.context == "resampled" else ():
        for n, (row,) in ask({n: turn for n in planned if n not in ended and turn < last[n]}, 1, "reply", turn).items():
            if usable(row):
                replies[n].append(row["answer"])
            else:
                ended[n] = [row]
    ended |= ask({n: t for n, t in last.items() if n not in ended}, config.samples_per_prompt, "answer")
    return [row for n in planned for row in ended[n]]


def _row(roles: Roles, p: Planned, number: int, prompt: list[dict], languages: list[Entry], completion=None) -> dict:
    """What stays on disk of an answer. prompt: as sampled, with the instruction on every user turn; completion None: it was too long."""
    text = chat.decode(roles.tokenizer, completion.ids) if completion else ""
    return {"row": number, "turn": sum(m["role"] == "user" for m in prompt), "turns": len(p.users), "instruction": p.instruction, "terse": p.terse,
            "parts": {e.kind: e.value for e in p.parts}, "asks": p.asks, "prompt": prompt, "answer": text, "ids": completion.ids if completion else [],
            "finished": bool(completion and completion.finished), "spells": chat.spelled_token(roles.tokenizer, text), "too_long": completion is None,
            "keeps": {e.kind: e.kept(text, languages) for e in p.parts}}


# -- the choice ----------------------------------------------------------------------------------------------------------------------


def why_dropped(row: dict) -> str:
    """Why a sample can't be a demonstration; nothing where it can."""
    if usable(row):
        return ""
    why = ("longer than max_prompt_tokens" if row["too_long"] else "cut off" if not row["finished"] else "empty" if not row["answer"]
           else "spelling a turn token")
    return why + " before the last turn" * (row["turn"] < row["turns"])


def choose(section: Section, planned: list[Planned], bags: list[list[dict]]) -> tuple[dict[int, dict], Counter]:
    """Of every row the usable answer that keeps most of what is checked, of equals the first; and why the others are dropped. With
    only_complying a row whose best answer does not keep all of it is dropped."""
    kept, dropped = {}, Counter()
    for n, (p, bag) in enumerate(zip(planned, bags, strict=True)):
        able = [r for r in bag if not why_dropped(r)]
        best = max(able, key=lambda r: sum(r["keeps"][kind] for kind in p.checked), default=None)
        if best is None:
            dropped[why_dropped(bag[0])] += 1
        elif section.config.only_complying and not all(best["keeps"][kind] for kind in p.checked):
            dropped["against its instruction"] += 1
        else:
            kept[n] = best
    if not kept:
        raise PosttrainError(section.place, f"no row can be kept: {_listed(dropped)}", "finished answers",
                             "Raise max_new_tokens, or train the policy to end its answers.")
    return kept, dropped


def _listed(counts: dict) -> str:
    return ", ".join(f"{n} {why}" for why, n in counts.items())


def demonstration(section: Section, row: dict) -> dict:
    """A kept row in the format `messages`: the instruction on the first user turn alone, the loss on the sampled answer alone."""
    return {"messages": [*in_first_turn_only(row["prompt"], row["instruction"]), {"role": "assistant", "content": row["answer"]}], "loss": "last",
            "source": section.name, "kinds": "+".join(sorted(row["parts"])), "terse": row["terse"]}


def write_outputs(section: Section, bags: list[list[dict]], kept: dict[int, dict]) -> None:
    """data.jsonl: the demonstrations. samples.jsonl: everything sampled."""
    write_lines(section.folder / "data.jsonl", [demonstration(section, r) for _, r in sorted(kept.items())])
    write_samples(section, [r for bag in bags for r in bag], kept.values())


def results(section: Section, planned: list[Planned], kept: dict[int, dict], dropped: Counter) -> dict:
    """Counts by kind and by reason. complies: of the kept answers, how many keep each kind of instruction; a hobby or a figure need not be named
    by an answer that nobody asked for it, so those asked are told apart."""
    rows = list(kept.values())
    shares = {}
    for kind in section.config.kinds:
        for label, of in ((kind, rows), (f"{kind}, asked", [r for r in rows if r["asks"] == kind])):
            told = [r["keeps"][kind] for r in of if kind in r["parts"]]
            shares |= {label: {"answers": len(told), "share": sum(told) / len(told)}} if told else {}
    return {"rows": len(planned), "kept": len(kept), "dropped": dict(dropped), "terse_share": sum(r["terse"] for r in rows) / len(rows),
            "asked": sum(bool(r["asks"]) for r in rows), "kinds": {k: sum(k in r["parts"] for r in rows) for k in section.config.kinds},
            "combinations": dict(Counter("+".join(sorted(r["parts"])) for r in rows)), "complies": shares,
            "user_turns": sum(r["turns"] for r in rows) / len(rows), "answer_tokens": sum(len(r["ids"]) for r in rows) / len(rows)}


def tell(section: Section, told: dict) -> None:
    section.log.say(f"{told['kept']} of {told['rows']} rows are kept" + (f"; dropped: {_listed(told['dropped'])}" if told["dropped"] else "")
                    + f"; rows with a {', '.join(f'{k} {n}' for k, n in told['kinds'].items())}; {told['terse_share']:.0%} terse")
    section.log.say("answers that keep it, by the checker: " + ", ".join(f"{k} {c['share']:.0%} of {c['answers']}" for k, c in told["complies"].items()))
