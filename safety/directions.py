"""The paper's directional checks (method.md section 11) as one table: met, not met, too few to tell, judge too weak, not run.

Everything is read from finished sections: the rows of their samples where answers are compared, of their held-out pairs where reward models are
(safety/direction_checks.py). Every value is a mean with its 95 % interval, by bootstrap over prompts unless its check says otherwise. A claim that
something rises or falls is met where the whole interval lies on the paper's side. One that something stays, or reaches a limit, has its limit
written beside it, and an interval on both sides of it decides nothing (too few to tell). A check that fails stays in the table. What a section
lacks is told in the rows that need it and stops no other.

The judges of a check are the reward models that scored the answers it reads. A judge counts where its length-balanced accuracy on held-out pairs
of its own, of FEWEST prompts or more, is above 50 % by two standard errors (else: judge too weak), and only of models that it took no part in
training (else: not run). The best of N is scored anew, by judges that chose nothing: the only thing that this stage computes; it stays in chunks/.
"""

from functools import cache

from posttrain import chat
from posttrain import config as cfg
from posttrain.chunks import in_parts, through_chunks, usable
from posttrain.errors import PosttrainError
from posttrain.log import read_lines
from posttrain.models import roles_for, source_of
from posttrain.packing import tree
from posttrain.runs import Section, write_atomic
from posttrain.statistics import wilson
from posttrain.training import budget_of
from reward.score import scores
from safety.direction_checks import CHECKS, FEWEST, MET, NOT_MET, NOT_RUN, TOO_FEW, Check, asked, bags_of, lacking, words

WEAK = "judge too weak"
PROMPTS = 16  # a chunk of answers that are scored anew: the unit of resume


def run(section: Section) -> None:
    config = section.config
    keys = [k for k in type(config).model_fields if k != "stage" and getattr(config, k)]
    if not keys:
        read = sorted({check.reads for check in CHECKS.values() if check.reads})
        raise PosttrainError(section.place, "no section to read", "at least one key that names one", f"Known: {', '.join(read)}.")
    sources = {key: sections_of(section, key) for key in keys}
    rows = [row_of(section, name, check, sources.get(check.reads)) for name, check in CHECKS.items()]
    write_atomic(section.folder / "directions.md", as_markdown(rows))
    section.finish({"directions": rows, "counts": {status: sum(r["status"] == status for r in rows)
                                                   for status in (MET, NOT_MET, TOO_FEW, WEAK, NOT_RUN)}})
    for r in rows:
        section.log.say(f"{r['status']:>15}: {r['direction']} ({r['paper']}): {said(r)}")


# -- the table ---------------------------------------------------------------------------------------------------------------------------


def sections_of(section: Section, key: str) -> list[Section]:
    """The sections that a key names; the recipe's check saw that they are of its kind."""
    value = getattr(section.config, key)
    return [section.parent(ref) for ref in (value if isinstance(value, list) else [value])]


def row_of(section: Section, name: str, check: Check, sources: list[Section] | None) -> dict:
    row = {"check": name, "direction": check.direction, "paper": check.paper, "status": NOT_RUN, "value": None, "form": check.form,
           "detail": check.why, "sections": [], "judges": []}
    if sources is None:
        return row if check.reads is None else row | {"detail": f"the key {check.reads} names no section"}
    row |= {"sections": [s.name for s in sources]}
    if check.anew and not section.config.judges:
        return row | {"detail": "the key judges names no reward models: by those that chose it, the best answer is the best by construction"}
    try:
        judges = anew_judges(section, sources) if check.anew else [judge_of(source, which) for source in sources for which in check.judges]
        row |= {"judges": judges}
        if taught := [f"{j['name']} took part in {j['part']} {', '.join(j['trained'])}" for j in judges if j["trained"]]:
            return row | {"detail": "; ".join(taught)}
        found = check.find(scored_anew(section, sources)) if check.anew else check.find(*sources)
    except PosttrainError as e:  # of what the sections stored; the recipe's own faults are found before
        return row | {"detail": str(e)}
    row |= {"value": found.value, "detail": found.detail}
    if found.value is None:
        return row
    weak = [f"{j['name']}: {words(j['accuracy'], 'share')} of its own held-out pairs" for j in judges if not j["counts"]]
    return row | {"status": WEAK if weak else found.status, "detail": "; ".join(filter(None, [*weak, found.detail]))}


def judge_of(source: Section, which: str) -> dict:
    """The reward model that scored a section's answers: its held-out accuracy, whether that counts, and which of the section's models it helped
    to train."""
    ref = getattr(source.config, which)
    if not ref.startswith("@") or source.parent(ref).kind != "reward":
        raise PosttrainError(f"{source.name}.{which}", f"'{ref}', of which no held-out accuracy is known", "a reward section of this recipe",
                             "Train the judge in this recipe.")
    judge, models = source.parent(ref), getattr(source.config, "models", None) or {"the policy": source.config.policy}
    trained = [name for name, model in models.items() if model.startswith("@") and judge.name in _behind(source, model)]
    return _judge(judge, which) | {"trained": trained, "part": "training"}


def anew_judges(section: Section, rounds: list[Section]) -> list[dict]:
    """The stage's own judges: in `trained` the rounds that one of them chose in, or whose policy it helped to train."""
    judges = zip(("helpfulness", "safety"), sections_of(section, "judges"), strict=True)
    return [_judge(judge, which) | {"trained": [s.name for s in rounds if judge.name in cfg.ancestors(s.recipe, s.config)], "part": "what it judges:"}
            for which, judge in judges]


def _judge(judge: Section, which: str) -> dict:
    accuracy = (judge.results()["held_out"]["own"] or {}).get("length_balanced_accuracy")
    if not accuracy or accuracy["mean"] is None:
        raise lacking(judge, "length-balanced accuracy on held-out pairs of its own", "Set data.held_out.pairs.")
    return {"name": judge.name, "score": which, "accuracy": accuracy, "counts": counts_as_judge(accuracy)}


def _behind(source: Section, model: str) -> list[str]:
    return [model[1:], *cfg.ancestors(source.recipe, source.recipe.stages[model[1:]])]


def counts_as_judge(x: dict) -> bool:
    """x: a 95 % interval of an accuracy; its width, or that of Wilson's with every prompt as one trial if wider (the bootstrap has none where
    all pairs are right), is 3.92 standard errors."""
    if x["low"] is None or x["groups"] < FEWEST:
        return False
    low, high = wilson(x["mean"], x["groups"])
    return x["mean"] - 0.5 > 2 * max(x["high"] - x["low"], high - low) / 3.92


# -- answers scored anew -----------------------------------------------------------------------------------------------------------------


def scored_anew(section: Section, rounds: list[Section]) -> list[dict]:
    """Every answer of the rounds that could be kept, with the merged reward that chose among them (`merged`) and the score of a judge that did not
    (`judge`): the safety judge's for a prompt that is tagged as adversarial, the helpfulness judge's for any other, each in deviations of its own
    held-out scores. By way of chunks/ROUND-nnnnn.json."""
    names = ("helpfulness", "safety")
    deviation = {name: judge.results().get("score_std") for name, judge in zip(names, sections_of(section, "judges"), strict=True)}
    if not all(deviation.values()):
        raise PosttrainError(f"{section.name}.judges", "a model without a deviation of held-out scores", "", "Set data.held_out.pairs.")

    @cache
    def loaded():
        roles = roles_for(section)
        for name, ref in zip(names, section.config.judges, strict=True):
            roles.add(name, source_of(section, ref), head="saved")
        return roles, budget_of(section, roles, roles["helpfulness"])

    bags = [(s.name, bag) for s in rounds for bag in bags_of(filter(usable, read_lines(s.folder / "samples.jsonl")), asked).values()]
    parts = in_parts(bags, PROMPTS)

    def make(i: int, tick) -> list[dict]:
        (roles, budget), out = loaded(), []
        for name in names:
            mine = [(of, bag) for of, bag in parts[i] if bag[0]["is_safety"] == (name == "safety")]
            trees = [tree(chat.encode_prompt(roles.tokenizer, bag[0]["prompt"]),
                          [chat.encode_answer(roles.tokenizer, r["prompt"], r["answer"]) for r in bag]) for _, bag in mine]
            for (of, bag), raw in zip(mine, scores(roles, name, trees, budget), strict=True):
                out += [{"round": of, "prompt": asked(r), "merged": r["merged"], "judge": x / deviation[name]} for r, x in zip(bag, raw, strict=True)]
            tick(sum(len(t.ids) for t in trees))
        return out

    return through_chunks(section, [section.folder / "chunks" / f"{i:05d}.json" for i in range(len(parts))], make, "scoring answers anew")


# -- words -------------------------------------------------------------------------------------------------------------------------------


def said(row: dict) -> str:
    return "; ".join(filter(None, [row["value"] and words(row["value"], row["form"]), row["detail"]]))


def as_markdown(rows: list[dict]) -> str:
    lines = ["| direction | paper | outcome | value | read from |", "|---|---|---|---|---|"]
    lines += [f"| {r['direction']} | {r['paper']} | {r['status']} | {said(r)} | {', '.join(r['sections'])} |" for r in rows]
    return ("# The paper's directional checks\n\n" + "\n".join(lines)
            + "\n\nIntervals are 95 %, by bootstrap over prompts unless a check says otherwise.\n")
