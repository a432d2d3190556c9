"""A plan as text for a terminal: numbers, memory, roles, time, warnings."""

from posttrain import cards

LABELS = ("counted", "declared", "estimated")
HELD = ("base", "roles", "optimizer", "decoder", "gathered")


def weakest(*labels: str) -> str:
    """What a number is that was made from several."""
    return max(labels, key=LABELS.index)


def short(value: float) -> str:
    """15011 -> '15,011', 5704180 -> '5.70 M', 6.74e9 -> '6.74 B'."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def render(rows: list[dict]) -> str:
    """What posttrain.plan.plan found, in tables."""
    if not rows:
        return "Nothing to plan."
    first = rows[0]
    trained = f"{short(first['lora_parameters'])} in an adapter" if first["lora_parameters"] else "all of them trained"
    model = f"Model {first['model']}: {short(first['parameters'])} parameters, {trained} ({first['labels']['parameters']})"
    lines = [f"Plan of {first['run']} ({first['recipe']})", f"{model}; quantization {first['quantization']}", "", *_numbers(rows), ""]
    for r in rows:
        said = "; ".join(r[k] for k in ("note", "arithmetic") if r.get(k))
        lines += [f"{r['section']}: {said}"] * bool(said)
    lines += ["", *_memory(rows), "", *_roles(rows), "", *_work(rows), "", *_totals(rows)]
    warnings = [f"warning: {r['section']}: {w}" for r in rows for w in r["warnings"]]
    return "\n".join(lines + ["", *warnings] * bool(warnings))


def _labelled(row: dict, key: str) -> str:
    return f"{short(row[key])} {row['labels'].get(key, '')}".rstrip() if row.get(key) is not None else "-"


def _plain(row: dict, key: str) -> str:
    return f"{row[key]:,}" if row.get(key) is not None else "-"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, ["-" * w for w in widths], *rows]]


def _numbers(rows: list[dict]) -> list[str]:
    return _table(["section", "kind", "rows", "tokens a row", "samples", "batch", "steps", "warm-up", "tokens through the model"], [
        [r["section"], r["kind"], *(_labelled(r, k) for k in ("rows", "tokens_per_row", "samples")), _plain(r, "batch"),
         _labelled(r, "steps"), _plain(r, "warmup"), _labelled(r, "tokens")] for r in rows])


def _unit(rows: list[dict]) -> tuple[float, str]:
    """The unit that suits the largest section."""
    return (1e9, "GB") if max(r["memory"]["total"] for r in rows) >= 1e8 else (1e6, "MB")


def _memory(rows: list[dict]) -> list[str]:
    (size, unit), card = _unit(rows), rows[0].get("gpu")
    fits = [[f"{r['headroom'] / size:.2f}", "yes" if r["fits"] else "no"] if card else [] for r in rows]
    held = [u for u in HELD if u != "gathered" or any(r["memory"][u] for r in rows)]
    head = [f"{unit}, estimated", *held, "gradients", "activations", "micro-batch", "kv cache", "at once", "decoding", "peak"]
    head += ["headroom", f"fits {card.gigabytes:.4g} GB"] if card else []
    each = []
    for r, told in zip(rows, fits, strict=True):
        m = {k: f"{v / size:.2f}" for k, v in r["memory"].items()}
        each.append([r["section"], *(m[u] for u in held), m["gradients"], m["activations"], _plain(r, "micro_batch"), m["kv_cache"],
                     _plain(r, "side_by_side"), m["decoding"], m["total"], *told])
    cut = [r["section"] for r in rows if r.get("cut", 1) > 1]
    share = [f"Each of the {card.count} cards holds all of this; they share the work."] if card and card.count > 1 else []
    share += [f"Of {', '.join(cut)} it holds its slice of the models, and what is gathered of them at a time."] if cut else []
    return [*_table(head, each), "base: the frozen weights that all adapters share; roles: the models or adapters a section holds; decoder: a merged copy to",
            "decode with, made where there is room. Training (gradients, and activations of a micro-batch of so many tokens) and decoding (keys",
            "and values of so many samples at once, and what a step needs besides) take turns: the larger counts. Headroom leaves 1 GB to the driver.", *share]


def _roles(rows: list[dict]) -> list[str]:
    """Every role once for the sections that hold the same ones."""
    (size, unit), seen = _unit(rows), {}
    for r in rows:
        kinds: dict[tuple, list[str]] = {}
        for role in r["roles"]:
            kinds.setdefault(tuple(v for k, v in role.items() if k != "role"), []).append(role["role"])
        for numbers, names in kinds.items():
            seen.setdefault((", ".join(names), numbers), []).append(r["section"])
    return _table([f"each role ({unit})", "parameters", "weights", "gradients", "optimizer", "in"], [
        [names + " (trained)" * trained, short(parameters), *(f"{v / size:.2f}" for v in (weights, gradients, optimizer)), ", ".join(sections)]
        for (names, (parameters, trained, weights, gradients, optimizer)), sections in seen.items()])


def _work(rows: list[dict]) -> list[str]:
    card, working = rows[0].get("gpu"), [r for r in rows if r.get("flop")]
    if not working:
        return []
    table = _table(["work (estimated)", "FLOP", *["time"] * bool(card)], [
        [r["section"], short(r["flop"]), *([cards.span(*r["seconds"])] if card else [])] for r in working])
    if card is None:
        return [*table, "No GPU is here: --gpu 24GB, --gpu 'RTX 4090' or --gpu 8x80GB tells what fits and how long it takes."]
    (best, worst), (reads, barely) = cards.COMPUTE, cards.READING
    return [*table, f"time: as on {'a' if card.name[0] == 'B' else 'an'} {card.name} by its data sheet ({card.flops / 1e12:.0f} TFLOP/s bf16, "
            f"{card.bandwidth / 1e9:,.0f} GB/s){f' x {card.count}' * (card.count > 1)}: from {best:.0%} to {worst:.0%} of its products in",
            f"training and scoring, {reads:.0%} to {barely:.0%} of its bandwidth in decoding; answers at their longest; loading and saving not counted"]


def _totals(rows: list[dict]) -> list[str]:
    def added(key: str) -> tuple[float, str]:
        having = [r for r in rows if r.get(key)]
        return sum(r[key] for r in having), weakest("counted", *(r["labels"][key] for r in having))

    names = {"steps": "optimizer steps", "samples": "samples", "tokens": "tokens through the model"}
    said = [f"{short(added(k)[0])} {what} ({added(k)[1]})" for k, what in names.items() if added(k)[0]]
    largest, (size, unit) = max(rows, key=lambda r: r["memory"]["total"]), _unit(rows)
    whole = (f"In all: {', '.join(said) or 'nothing to train or sample'}; most memory in {largest['section']}, "
             f"about {largest['memory']['total'] / size:.1f} {unit} (estimated).")
    times = [r["seconds"] for r in rows if "seconds" in r]
    long = [f"Time in all: {cards.span(sum(t[0] for t in times), sum(t[1] for t in times))} (estimated)."] * bool(times and sum(t[1] for t in times))
    return [whole, *long, "counted: from files and keys that are here; declared: rests on the recipe's expect; estimated: rests on 1.35 tokens",
            "a word, answers at their longest, or even packing. A batch and a warm-up are what their steps are."]
