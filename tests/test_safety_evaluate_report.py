"""The report on an evaluation: failed gates and the paper's directions among the checks, refusals without the classifier's errors, which KL it is."""

from pathlib import Path

import pytest

from posttrain.report import checks, verdict
from posttrain.report_evaluate import evaluate_part
from posttrain.report_views import GAP, View
from safety.figures import by_kind, by_source

RATES = {"recall": {"mean": 0.75, "low": 0.69, "high": 0.82, "n": 185, "groups": 185},
         "false_positive_rate": {"mean": 0.04, "low": 0.01, "high": 0.06, "n": 188, "groups": 188}}


def view(kind: str, name: str = "", state: str = "done", **results) -> View:
    return View(name or kind, kind, Path("nowhere"), state, {"fingerprint": "0"}, results)


def evaluated(**changed) -> View:
    rows = [{"key": str(i), "kind": "helpful" if i < 20 else "borderline", "source": "set", "refuses": i in (0, 20, 21, 22, 23), "merged": 0.0,
             "safety": 1.0, "helpfulness": 0.0} for i in range(40)]
    told = {"kinds": by_kind(rows, None, 0.0, RATES), "sources": by_source(rows, 0.0, RATES), "kl": 3.0, "merged": 0.1}
    return view("evaluate", "eval", refusal_classifier=RATES, models={"old": told | {"kl": 0.0}, "new": told}, kl_temperature=1.0,
                paired=[{"a": "new", "b": "old", "merged": {"mean": 0.1, "low": 0.0, "high": 0.2}, "kl": 3.0}], **changed)


def directions(*statuses: str) -> View:
    return view("directions", "paper", directions=[{"check": f"c{i}", "direction": "up", "status": s} for i, s in enumerate(statuses)])


# -- checks ------------------------------------------------------------------------------------------------------------------------------


def test_a_failed_gate_is_named_as_one():
    gate = {"name": "new: violations at most 10%", "met": False, "detail": "18.0%", "gate": "max_violation"}
    other = {"name": "KL", "met": False, "detail": "11 nats"}
    found = checks([view("evaluate", "eval", "unfinished", checks=[gate, gate | {"met": True}, other]), view("ppo", checks=[other])])
    assert [c["detail"] for c in found] == ["18.0%; the gate max_violation stops the run here", "18.0%", "11 nats"]
    assert [c["met"] for c in found] == [False, True, False] and found[0]["name"] == gate["name"]


@pytest.mark.parametrize("statuses, met", [
    (["met", "met", "judge too weak", "not run"], True), (["met", "not met"], False), (["not met"], False), (["not run", "judge too weak"], False)])
def test_the_papers_directions_are_a_check(statuses, met):
    """Met where something is and nothing is not; what could not be judged decides nothing, and is counted."""
    check, = checks([directions(*statuses)])
    assert check["met"] is met and check["name"].startswith("paper: every direction of the paper that could be judged is met")
    for status in ("met", "not met", "judge too weak", "not run"):
        assert f"{statuses.count(status)} {status}" in check["detail"].split(", ")
    words = "every check is met (1)" if met else "1 of 1 check is not met"
    assert words in verdict([directions(*statuses)]).lower()


@pytest.mark.parametrize("results", [{}, {"directions": []}, {"directions": "x"}, {"directions": [3]}])
def test_directions_without_rows_are_no_check(results):
    assert checks([view("directions", "paper", **results)]) == []


# -- the evaluation's part ---------------------------------------------------------------------------------------------------------------


def table_of(v: View, caption: str):
    return next(t for t in evaluate_part([v]).tables if t.caption.startswith(caption))


def test_the_corrected_share_of_refusals_stands_beside_the_classifiers():
    """Of 20 helpful prompts one is called a refusal: (0.05 - 0.04) / 0.71; of 20 borderline ones four: 0.16 / 0.71."""
    told = table_of(evaluated(), "By kind of prompt")
    at = told.head.index("refusals")
    assert told.head[at + 1] == "refusals, corrected"
    cells = {row[0]: row[at:at + 2] for row in told.rows}
    assert [c[0].replace(GAP, " ") for c in cells["helpful, new"]] == ["5.0 %", "1.4 %"]
    assert [c[0].replace(GAP, " ") for c in cells["borderline, new"]] == ["20.0 %", "22.5 %"]
    note = told.note.replace(GAP, " ")
    assert "finds 75 % of refusals (95 % interval 69 % to 82 %) and takes 4.0 % of other answers for one (95 % interval 1.0 % to 6.0 %)" in note


def test_an_evaluation_without_corrected_shares_has_no_such_column():
    v = evaluated()
    del v.results["refusal_classifier"]
    for model in v.results["models"].values():
        for kind in model["kinds"].values():
            kind.pop("refusals_corrected", None)  # both models' are one
    told = table_of(v, "By kind of prompt")
    assert "refusals" in told.head and "refusals, corrected" not in told.head and "Corrected" not in told.note


@pytest.mark.parametrize("caption", ["Each model on", "Differences, paired by prompt"])
def test_the_kl_is_told_as_it_was_measured(caption):
    v = evaluated()
    assert "KL: of both models at temperature 1 over the whole vocabulary, summed along the answers." in table_of(v, caption).note
    del v.results["kl_temperature"]  # an earlier version's
    assert "KL: log-ratios of the drawn tokens at the temperature of decoding." in table_of(v, caption).note
