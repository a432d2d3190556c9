"""The paper's directional checks (method.md section 11) as one table: met, not met, judge too weak, not run.

Everything is read from finished sections: the rows of their samples where answers are compared, their results where reward models are
(safety/direction_checks.py). Every value is a mean with its 95 % interval, by bootstrap over prompts unless its check says otherwise; a direction is
met where the whole interval lies on the paper's side. A check that fails stays in the table.

The judges of a check are the reward models that scored the answers it reads. A judge counts where its length-balanced accuracy on held-out pairs
of its own is above 50 % by two standard errors (else: judge too weak), and only of models that it took no part in training (else: not run).
"""

from posttrain import config as cfg
from posttrain.errors import PosttrainError
from posttrain.runs import Section, write_atomic
from safety.direction_checks import CHECKS, Check, lacking, words

MET, NOT_MET, WEAK, NOT_RUN = "met", "not met", "judge too weak", "not run"


def run(section: Section) -> None:
    config = section.config
    keys = [k for k in type(config).model_fields if k != "stage" and getattr(config, k)]
    if not keys:
        known = sorted({check.reads for check in CHECKS.values() if check.reads})
        raise PosttrainError(section.place, "no section to read", "at least one key that names one", f"Known: {', '.join(known)}.")
    sources = {key: sections_of(section, key) for key in keys}
    rows = [row_of(name, check, sources.get(check.reads)) for name, check in CHECKS.items()]
    write_atomic(section.folder / "directions.md", as_markdown(rows))
    section.finish({"directions": rows, "counts": {status: sum(r["status"] == status for r in rows) for status in (MET, NOT_MET, WEAK, NOT_RUN)}})
    for r in rows:
        section.log.say(f"{r['status']:>14}: {r['direction']} ({r['paper']}): {said(r)}")


# -- the table ---------------------------------------------------------------------------------------------------------------------------


def sections_of(section: Section, key: str) -> list[Section]:
    """The sections that a key names. Raises PosttrainError where one is of another kind."""
    value, kind = getattr(section.config, key), type(section.config).model_fields[key].json_schema_extra["reads"]
    found = [section.parent(ref) for ref in (value if isinstance(value, list) else [value])]
    for s in found:
        if s.kind != kind:
            raise PosttrainError(f"{section.place}.{key}", f"'@{s.name}' is of kind {s.kind}", f"of kind {kind}", f"Name a section of kind {kind}.")
    return found


def row_of(name: str, check: Check, sources: list[Section] | None) -> dict:
    row = {"check": name, "direction": check.direction, "paper": check.paper, "status": NOT_RUN, "value": None, "form": check.form,
           "detail": check.why, "sections": [], "judges": []}
    if sources is None:
        return row if check.reads is None else row | {"detail": f"the key {check.reads} names no section"}
    judges = [judge_of(source, which) for source in sources for which in check.judges]
    row |= {"sections": [s.name for s in sources], "judges": judges}
    if taught := [f"{j['name']} took part in training {', '.join(j['trained'])}" for j in judges if j["trained"]]:
        return row | {"detail": "; ".join(taught)}
    found = check.find(*sources)
    row |= {"value": found.value, "detail": found.detail}
    if found.value is None:
        return row
    weak = [f"{j['name']}: {words(j['accuracy'], 'share')} of its own held-out pairs" for j in judges if not j["counts"]]
    row["detail"] = "; ".join(filter(None, [*weak, found.detail]))
    return row | {"status": WEAK if weak else MET if found.met else NOT_MET}


def judge_of(source: Section, which: str) -> dict:
    """The reward model that scored a section's answers: its held-out accuracy, whether that counts, and which of the section's models it helped
    to train."""
    ref = getattr(source.config, which)
    if not ref.startswith("@") or source.parent(ref).kind != "reward":
        raise PosttrainError(f"{source.place}.{which}", f"'{ref}', of which no held-out accuracy is known", "a reward section of this recipe",
                             "Train the judge in this recipe, or leave the section out of the directional checks.")
    judge, models = source.parent(ref), getattr(source.config, "models", None) or {"the policy": source.config.policy}
    accuracy = (judge.results()["held_out"]["own"] or {}).get("length_balanced_accuracy")
    if not accuracy or accuracy["mean"] is None:
        raise lacking(judge, "length-balanced accuracy on held-out pairs of its own", "Set data.held_out.pairs.")
    return {"name": judge.name, "score": which, "accuracy": accuracy, "counts": counts_as_judge(accuracy),
            "trained": [name for name, model in models.items() if model.startswith("@") and judge.name in _behind(source, model)]}


def _behind(source: Section, model: str) -> list[str]:
    return [model[1:], *cfg.ancestors(source.recipe, source.recipe.stages[model[1:]])]


def counts_as_judge(x: dict) -> bool:
    """x: a 95 % interval of an accuracy; its width is 3.92 standard errors."""
    return x["low"] is not None and x["mean"] - 0.5 > 2 * (x["high"] - x["low"]) / 3.92


def said(row: dict) -> str:
    return "; ".join(filter(None, [row["value"] and words(row["value"], row["form"]), row["detail"]]))


def as_markdown(rows: list[dict]) -> str:
    lines = ["| direction | paper | outcome | value | read from |", "|---|---|---|---|---|"]
    lines += [f"| {r['direction']} | {r['paper']} | {r['status']} | {said(r)} | {', '.join(r['sections'])} |" for r in rows]
    return ("# The paper's directional checks\n\n" + "\n".join(lines)
            + "\n\nIntervals are 95 %, by bootstrap over prompts unless a check says otherwise.\n")
