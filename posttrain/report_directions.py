"""The report's part on the paper's directional checks: one table of what is met, what is not, and what too few prompts or no judge could tell."""

from posttrain.report_pieces import Part, table
from posttrain.report_views import View, bounds, fixed, interval, listed, number, percent, plain, rows_of, sentence, text_of, word

ORDER = ("met", "not met", "too few to tell", "judge too weak", "not run")


def directions_of(v: View) -> list[dict]:
    return rows_of(v.results.get("directions"))


def counted(rows: list[dict]) -> dict[str, int]:
    return {status: sum(r.get("status") == status for r in rows) for status in ORDER}


def value_of(row: dict) -> str:
    value = interval(row.get("value"))
    if value is None:
        return "–"
    form, settings = {"points": (percent, {"digits": 1, "sign": True}), "share": (percent, {"digits": 1}), "number": (fixed, {})}.get(
        row.get("form"), (fixed, {"digits": 3, "sign": True}))
    return form(value.mean, **settings) + bounds(value, form, **settings)


def judges_of(row: dict) -> str:
    found = {word(j.get("name")): number((j.get("accuracy") or {}).get("mean")) for j in rows_of(row.get("judges"))}
    return ", ".join(f"{plain(name)} {percent(share)}" for name, share in found.items()) or "–"


def directions_part(vs: list[View]) -> Part:
    part = Part("directions", "The paper's directions", "Each row is a direction that the paper found. It is met where the whole 95 % interval lies "
                "on the paper's side, unless the row says otherwise; one that fails stays here. Where something is said to stay, or to reach a limit, "
                "the row names the limit, and an interval on both sides of it has too few prompts to tell. A judge counts where its length-balanced "
                "accuracy on held-out pairs of its own is above 50 % by two standard errors, and only of what it took no part in.")
    for v in vs:
        rows = sorted(directions_of(v), key=lambda r: ORDER.index(r["status"]) if r.get("status") in ORDER else len(ORDER))
        counts = counted(rows)
        words = [f"{n} {status}" for status, n in counts.items() if n]
        part.tables += table(f"{sentence(listed(words) or 'Nothing was checked')[:-1]} ({v.name})" if len(vs) > 1 else sentence(listed(words))[:-1],
                             "direction", [word(r.get("direction")) for r in rows], [
            ("paper", [word(r.get("paper"), "–") for r in rows]), ("outcome", [word(r.get("status"), "–") for r in rows]),
            ("value", [value_of(r) for r in rows]), ("detail", [text_of(r.get("detail")) or "–" for r in rows]),
            ("judge", [judges_of(r) for r in rows]),
            ("read from", [listed([word(s) for s in r["sections"]]) or "–" if isinstance(r.get("sections"), list) else "–" for r in rows])],
            "Judge: length-balanced accuracy on held-out pairs of its own.")
    return part
