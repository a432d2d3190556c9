"""The report's parts: what each stage kind shows, as figures with their findings, tables and key figures.

A new stage kind gets its own part with one entry in PARTS and its key figures with one in KEYS, at the bottom; without them it is
shown by the numbers it stored. Every takeaway is computed from the numbers of its figure.
"""

import json
from dataclasses import dataclass

from posttrain import plots
from posttrain.plots import Dot, Line
from posttrain.report_benchmarks import bold_part, diversity_part, first_task, last_sentiment, last_slopes, lm_eval_part
from posttrain.report_directions import counted, directions_of, directions_part
from posttrain.report_distill import distill_gain, distill_part
from posttrain.report_evaluate import scale_words
from posttrain.report_gatt import gatt_part, recall_of
from posttrain.report_pieces import Figure, Fold, Part, Table, at, average, ci, drawn, everything, facts, named, said, some, table
from posttrain.report_redteam import last_fixed, last_rate, redteam_part
from posttrain.report_reward import reward_part
from posttrain.report_safety_sweep import result_part
from posttrain.report_views import (
    GAP,
    View,
    bounds,
    cell,
    clip,
    dig,
    fixed,
    interval,
    listed,
    loose,
    models_of,
    moved,
    number,
    percent,
    plain,
    rows_of,
    table_of,
    turns,
    word,
)

FAULTS = (TypeError, KeyError, ValueError, IndexError, AttributeError, ZeroDivisionError, OverflowError)  # of damaged numbers


# ---------------------------------------------------------------- key figures (pipeline boxes and `show`)

@dataclass
class Key:
    label: str
    value: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.label} {self.value}" + (f" ({self.note})" if self.note else "")


def _key(value, label: str, text: str, note: str = "") -> list[Key]:
    return [] if value is None else [Key(label, text, note)]


def sft_keys(v: View) -> list[Key]:
    before, after, last = v.get("held_out_loss_before"), v.get("held_out_loss_after"), v.get("train_loss_last")
    keys = _key(after, "held-out loss", fixed(after), f"was {fixed(before)}" if before is not None else "")
    keys += _key(last, "train loss", fixed(last)) if not keys else []
    return keys + _key(v.get("steps"), "steps", loose(v.get("steps")))


def reward_keys(v: View) -> list[Key]:
    own = dig(v.results, "held_out", "own")
    balanced, accuracy = interval(dig(own, "length_balanced_accuracy")), interval(dig(own, "accuracy"))
    ends = f"{percent(balanced.low)} to {percent(balanced.high)}" if balanced and balanced.bounded else ""
    keys = _key(balanced, "length-balanced accuracy", percent(balanced and balanced.mean), ends)
    keys += _key(accuracy, "held-out accuracy", percent(accuracy and accuracy.mean))
    return keys + _key(number(dig(own, "unsafe_recall")), "unsafe recall", percent(number(dig(own, "unsafe_recall"))))


def best_of(results: dict) -> list[tuple[float, float | None, float | None, float | None, float | None]]:
    """(n, max, median, max_low, max_high) rows with a number in n and one of max and median, by n."""
    rows = [tuple(number(r.get(k)) for k in ("n", "max", "median", "max_low", "max_high")) for r in rows_of(results.get("best_of_n"))]
    return sorted((r for r in rows if r[0] is not None and r[1] is not None), key=lambda r: r[0])


def sweep_of(v: View) -> list[tuple[float, list[tuple]]]:
    """(temperature, its best_of rows) of the temperatures that were tried, as rejection sampling stores them: by temperature."""
    tried = [(number(c.get("temperature")), best_of(c)) for c in rows_of(dig(v.results, "temperature_sweep", "curves"))]
    return [t for t in tried if t[0] is not None and t[1]]


def rejection_keys(v: View) -> list[Key]:
    rows = best_of(v.results)
    gain = rows[-1][1] - rows[-1][2] if rows and rows[-1][2] is not None else None
    keys = _key(gain, f"best of {rows[-1][0]:.0f} over the median" if rows else "", fixed(gain, sign=True))
    kept, samples = v.get("kept"), v.get("samples")
    keys += _key(kept, "answers kept", loose(kept), f"of {loose(samples)}" if samples is not None else "")
    return keys + (_key(v.get("temperature"), "temperature", loose(v.get("temperature"))) if sweep_of(v) else [])


def collect_keys(v: View) -> list[Key]:
    tasks, prompts = v.get("tasks"), v.get("prompts")
    return _key(tasks, "tasks for annotators", loose(tasks), f"of {loose(prompts)} prompts" if prompts is not None else "")


def annotations_keys(v: View) -> list[Key]:
    pairs, tasks = v.get("pairs"), v.get("tasks")
    return _key(pairs, "pairs", loose(pairs), f"from {loose(v.get('annotated_tasks'))} of {loose(tasks)} tasks" if tasks is not None else "")


def distill_keys(v: View) -> list[Key]:
    gain, kept, distilled = distill_gain(v), v.get("kept"), v.get("distilled")
    keys = _key(gain, "safety with a preprompt", fixed(gain and gain.mean, sign=True), f"{fixed(gain.low, sign=True)} to {fixed(gain.high, sign=True)}"
                if gain and gain.bounded else "")
    return keys + _key(kept, "answers kept", loose(kept), f"of {loose(distilled)}" if distilled is not None else "")


def gatt_keys(v: View) -> list[Key]:
    kept, rows = v.get("kept"), v.get("rows")
    return _key(kept, "rows kept", loose(kept), f"of {loose(rows)}" if rows is not None else "")


def gatt_eval_keys(v: View) -> list[Key]:
    """Recall of the last model at the latest turn."""
    name, by_turn = next(reversed(recall_of(v).items()), ("", {}))
    turn, share = next(reversed(by_turn.items()), ("", None))
    ends = f"{percent(share.low)} to {percent(share.high)}" if share and share.bounded else ""
    return _key(share, f"recall of {name} at turn {turn}", percent(share and share.mean), ends)


def redteam_keys(v: View) -> list[Key]:
    (name, rate), (pair, share) = last_rate(v), last_fixed(v)
    ends = f"{fixed(rate.low, 1)} to {fixed(rate.high, 1)}" if rate and rate.bounded else ""
    keys = _key(rate, f"violations of {name} per 100 attacks", fixed(rate and rate.mean, 1), ends)
    return keys + _key(share, f"failures of {word(pair.get('b'))} fixed", percent(share and share.mean))


def bold_keys(v: View) -> list[Key]:
    name, mean, pair = last_sentiment(v)
    keys = _key(mean, f"sentiment of {name}", fixed(mean and mean.mean))
    up, of = number(pair.get("up")), number(pair.get("groups"))
    return keys + _key(up, f"groups up from {word(pair.get('b'))}", f"{loose(up)} of {loose(of)}")


def diversity_keys(v: View) -> list[Key]:
    name, slopes = last_slopes(v)
    return [Key(f"Self-BLEU slope of {name}, {plain(kind)}", fixed(slope.mean, sign=True)) for kind, slope in slopes.items()]


def lm_eval_keys(v: View) -> list[Key]:
    name, task, value = first_task(v)
    return _key(value, f"{task} of {name}", fixed(value and value.mean, 3))


def ppo_keys(v: View) -> list[Key]:
    gain, kl = interval(dig(v.results, "watched", "paired_difference")), v.get("watched", "kl")
    ends = f"{fixed(gain.low, sign=True)} to {fixed(gain.high, sign=True)}" if gain and gain.bounded else ""
    keys = _key(gain, "watched merged reward", fixed(gain and gain.mean, sign=True), ends)
    return keys + _key(kl, "KL", f"{fixed(kl, 1)}{GAP}nats") + _key(v.get("iterations"), "iterations", loose(v.get("iterations")))


def evaluate_keys(v: View) -> list[Key]:
    """Checks, then the last model's violations and refusals of borderline prompts."""
    checks, models = rows_of(v.results.get("checks")), v.results.get("models")
    met = sum(bool(c.get("met")) for c in checks)
    keys = [Key("checks met", f"{met} of {len(checks)}")] if checks else []
    name, last = next(reversed(models_of(v).items()), ("", {}))
    for what, found in (("violations", last.get("unsafe_share_adversarial")),
                        ("refused borderline prompts", dig(last, "kinds", "borderline", "refusals"))):
        share = interval(found)
        ends = f"{percent(share.low)} to {percent(share.high)}" if share and share.bounded else ""
        keys += _key(share, f"{what} of {name}", percent(share and share.mean), ends)
    keys += [Key("models compared", str(len(models)))] if isinstance(models, dict) and models else []
    return keys + _key(v.get("prompts"), "held-out prompts", loose(v.get("prompts")))


def directions_keys(v: View) -> list[Key]:
    counts = counted(directions_of(v))
    asked = sum(counts.values()) - counts["not run"]
    keys = [Key("directions met", f"{counts['met']} of {asked}")] if asked else []
    return keys + ([Key("judge too weak", str(counts["judge too weak"]))] if counts["judge too weak"] else [])


def export_keys(v: View) -> list[Key]:
    dtype, kl, files = v.results.get("dtype"), v.get("merged_kl"), v.results.get("files")
    keys = _key(dtype, "model folder", loose(dtype)) + _key(kl, "merged KL", f"{kl:.2g}{GAP}nats" if kl is not None else "")
    return keys + ([Key("files", str(len(files)))] if isinstance(files, list) else [])


def any_keys(v: View) -> list[Key]:
    return [Key(plain(k), loose(x)) for k, x in v.results.items() if number(x) is not None][:3]


def keys_of(v: View) -> list[Key]:
    """What a section's box and line say, the most telling first."""
    try:
        keys = KEYS.get(v.kind, any_keys)(v) if v.results else []
    except FAULTS:
        keys = []
    if not keys and v.last_step is not None:
        keys = [Key("last step", f"{v.last_step:,}")]
    return keys


# ---------------------------------------------------------------- supervised fine-tuning

def sft_part(vs: list[View]) -> Part:
    part = Part("sft", "Supervised fine-tuning", "The loss counts the assistant's turns only; held-out rows share no prompt with training.")
    for v in vs:
        part.figures += sft_figure(vs, v)
    part.facts = facts("Fine-tuning in numbers", vs, [v.name for v in vs], [
        ("optimizer steps", at("steps")), ("batch size", at("batch_size")), ("epochs", at("epochs")), ("training rows", rows_used),
        ("left out, too long", at("too_long")), ("held out, too long", at("held_out_too_long")), ("tokens read", at("train_tokens")),
        ("tokens with loss", at("loss_tokens")),
        ("training loss, first", at("train_loss_first", form=fixed)), ("training loss, last", at("train_loss_last", form=fixed)),
        ("held-out loss, before", at("held_out_loss_before", form=fixed)), ("held-out loss, after", at("held_out_loss_after", form=fixed)),
        ("tokens a second", average("sft/tokens_per_second"))], "Losses are in nats per token.")
    tables = [t for v in vs for t in table(f"Training rows of {v.name}", "source", [plain(k) for k in sources(v)],
                                           [("rows", [loose(n) for n in sources(v).values()])])]
    part.folds = ([Fold("Training rows by source", tables=tables)] if tables else []) + everything(vs)
    return part


def sources(v: View) -> dict:
    data = v.results.get("data")
    return data if isinstance(data, dict) else {}


def rows_used(v: View) -> str:
    """Training rows as stored, else the sum over sources."""
    counts = some(*map(number, sources(v).values()))
    return loose(v.get("train_rows") if v.get("train_rows") is not None else sum(counts) if counts else None)


def sft_figure(vs: list[View], v: View) -> list[Figure]:
    train, held = v.line("sft/loss", "training", 0, quiet=True), v.line("sft/held_out_loss", "held out", 1)
    before, after = v.get("held_out_loss_before"), v.get("held_out_loss_after")
    if not held and before is not None and after is not None:
        held = Line("held out", [0, v.get("steps") or v.last_step or 1], [before, after], 1)
    series = some(train, held)
    if not series:
        return []
    svg = plots.lines(f"sft-{v.name}", series, "optimizer step", "loss (nats per token)")
    note = "A training loss is of one batch and noisy; the held-out loss is always of the same rows." if len(series) > 1 else ""
    return drawn(named(vs, v, "Loss"), sft_words(v, held, before, after), "Training and held-out loss over steps", svg, note)


def sft_words(v: View, held: Line | None, before: float | None, after: float | None) -> str:
    if (before is None or after is None) and held and len(held.ys) > 1:
        before, after = held.ys[0], held.ys[-1]
    ends = v.ends("sft/loss")
    if before is not None and after is not None:
        words = moved("Held-out loss", before, after, unit="nats per token")
        if before <= 0 or "stayed" in words:
            return words
        return f"{words}, {percent(abs(after / before - 1))} {'lower' if after < before else 'higher'}"
    if ends:
        return moved("Training loss", *ends[:2], unit="nats per token") + "; no held-out loss was recorded"
    last = (held.ys if held else v.series("sft/loss")[1])[-1]
    return f"One loss was recorded: {fixed(last)} nats per token"


# ---------------------------------------------------------------- rejection sampling

def rejection_part(vs: list[View]) -> Part:
    part = Part("rejection", "Rejection sampling",
                "Several answers to each prompt are drawn and scored; the best is kept for the next fine-tuning.")
    part.figures += path_figure(vs) + temperatures_figure(vs)
    for v in vs:
        part.figures += best_of_figure(vs, v) + sweep_figure(vs, v)
    part.facts = facts("Rejection sampling in numbers", vs, [v.name for v in vs], [
        ("prompts", at("prompts")), ("samples a prompt", at("samples_per_prompt")), ("temperature", at("temperature")),
        ("samples", at("samples")), ("kept", at("kept")), ("unfinished", at("unfinished")),
        ("spelling a turn token", at("spelling_a_turn_token")),
        ("tokens of an answer", at("answer_tokens", form=fixed, digits=0)),
        ("safety score counts", at("share_routed_safety", form=percent)),
        ("mean merged reward, all", at("mean_reward_all", form=fixed)), ("mean merged reward, kept", at("mean_reward_kept", form=fixed)),
        ("tokens a second", at("tokens_per_second", form=fixed, digits=0))])
    for v in vs:
        origins = table_of(v.results.get("pool"))
        part.facts += table(f"Where the kept answers of {v.name} come from", "sampled in", list(origins), [
            ("usable answers", [loose(number(o.get("answers"))) for o in origins.values()]),
            ("mean merged reward", [fixed(number(o.get("mean_reward"))) for o in origins.values()]),
            ("kept", [loose(number(o.get("kept"))) for o in origins.values()])],
            f"All of them under the reward models of {v.name}.") if origins else []
        tables = rejection_examples(v)
        part.folds += [Fold(f"Best and worst answers to the first prompts of {v.name}", tables=tables)] if tables else []
    part.folds += everything(vs)
    return part


def best_of_figure(vs: list[View], v: View) -> list[Figure]:
    rows = best_of(v.results)
    if not rows:
        return []
    medians = [(r[0], r[2]) for r in rows if r[2] is not None]
    low, high = ([r[i] for r in rows] for i in (3, 4))
    shade = None not in low + high
    series = [Line("best of K", [r[0] for r in rows], [r[1] for r in rows], 0, low if shade else None, high if shade else None)]
    series += [Line("median of K", [n for n, _ in medians], [m for _, m in medians], 1)] if medians else []
    n, top, middle = rows[-1][:3]
    takeaway = (f"The best of {n:.0f} answers has a mean reward of {fixed(top)}" if middle is None else
                f"The best of {n:.0f} answers scores {fixed(top - middle)} above their median: that is what choosing can gain")
    svg = plots.lines(f"best-{v.name}", series, "samples per prompt, K", merged_axis(v))
    return drawn(named(vs, v, "Best of K"), takeaway, "Mean over prompts of the best and of the median reward among K samples", svg,
                 "Means over prompts" + ("; the shade is the 95 % interval of the best." if shade else "."))


def collect_part(vs: list[View]) -> Part:
    """Tasks that went to annotators, and what came back."""
    part = Part("collect", "Annotation", "Annotators choose between two answers, of two variants of the model; their pairs train the next reward models.")
    sent, back = ([v for v in vs if v.kind == kind] for kind in ("collect", "annotations"))
    part.facts = facts("Tasks for annotators", sent, [v.name for v in sent], [
        ("prompts", at("prompts")), ("tasks", at("tasks")), ("safety tasks", at("safety_tasks")), ("share left out", at("share_left_out", form=percent)),
        ("drawn again", at("drawn_again"))])
    part.facts += facts("What came back", back, [v.name for v in back], [
        ("annotations", at("annotations")), ("tasks annotated", at("annotated_tasks")), ("without a majority", at("ties")), ("pairs", at("pairs")),
        ("held out", at("held_out")), ("the reward models' order, helpfulness tasks", ci("agreement", "helpfulness", form=percent)),
        ("the reward models' order, safety tasks", ci("agreement", "safety", form=percent)),
        *((plain(level), at("ratings", level)) for level in ("significantly_better", "better", "slightly_better", "negligibly_better")),
        *((plain(name), at("safety_bins", name)) for name in ("preferred_safe", "both_safe", "both_unsafe", "no bin"))],
        "The reward models' order: how often their higher score was the annotators' choice.")
    for v in sent:
        told = table_of(v.results.get("variants"))
        part.tables += table(named(sent, v, "The two variants' answers"), "variant", list(told), [
            (label, [fixed(number(t.get(key)), digits) for t in told.values()])
            for label, key, digits in (("tokens of an answer", "tokens", 0), ("helpfulness", "helpfulness", 2), ("safety", "safety", 2))])
    for v in back:
        wins = {name: interval(w) for name, w in table_of(v.results.get("wins")).items()}
        part.tables += table(named(back, v, "Which variant was chosen"), "variant", list(wins), [("chosen", [cell(w, percent) for w in wins.values()])])
    return part


def path_figure(vs: list[View]) -> list[Figure]:
    """Version by version: the mean merged reward of all samples and of the kept answers."""
    rows = [Dot(v.name, mean, group=group, style=style) for style, (group, key) in enumerate((
        ("all samples", "mean_reward_all"), ("kept answers", "mean_reward_kept"))) for v in vs if (mean := v.get(key)) is not None]
    means = [(v.name, v.get("mean_reward_all")) for v in vs if v.get("mean_reward_all") is not None]
    if len(means) < 2:
        return []
    (first, before), (last, after) = means[0], means[-1]
    takeaway = f"{moved('The mean reward of all samples', before, after)} between {first} and {last}"
    return drawn("The path of the versions", takeaway, "Mean merged reward of all samples and of the kept answers of each round",
                 plots.dots("versions", rows, merged_axis(vs[-1]), percent=False),
                 "Every round as its own reward models and prompts give it: where those differ between rounds, so may the level.")


def temperatures_figure(vs: list[View]) -> list[Figure]:
    """The paper's Fig. 8 over versions: the best of K against the temperature, a curve a round."""
    tried = [(v, sweep_of(v)) for v in vs if len(sweep_of(v)) > 1]
    if len(tried) < 2:
        return []
    series = [Line(v.name, [t for t, _ in curve], [rows[-1][1] for _, rows in curve], i) for i, (v, curve) in enumerate(tried)]
    takeaway = "the best temperature is " + listed([f"{loose(v.get('temperature'))} for {v.name}" for v, _ in tried])
    return drawn("The best temperature by version", takeaway, "Reward of the best of K against the temperature, for each round",
                 plots.lines("temperatures", series, "temperature", merged_axis(vs[-1]), whole=False),
                 "On the prompts of each round's sweep; the level depends on the round's prompts, the place of the maximum is what counts.")


def sweep_figure(vs: list[View], v: View) -> list[Figure]:
    """The paper's Fig. 8 for one round: the reward of the best of n against the temperature, a curve for each n."""
    tried = sweep_of(v)
    if len(tried) < 2:
        return []
    sizes = [row[0] for row in tried[0][1]][-5:]
    series = [Line(f"best of {n:.0f}", [t for t, rows in tried if n in {r[0] for r in rows}], [r[1] for _, rows in tried for r in rows if r[0] == n], i)
              for i, n in enumerate(sizes)]
    used, most = v.get("temperature"), sizes[-1]
    edge = ", at the edge of those tried" if used in (tried[0][0], tried[-1][0]) else ""
    takeaway = f"The best of {most:.0f} answers scores highest at temperature {loose(used)}{edge}; the round uses it"
    prompts = loose(v.get("temperature_sweep", "prompts"))
    return drawn(named(vs, v, "Temperature"), takeaway, "Mean over prompts of the best reward among n samples, against the temperature",
                 plots.lines(f"sweep-{v.name}", series, "temperature", merged_axis(v), whole=False),
                 f"Means over {prompts} prompts; an answer that cannot be kept counts as the lowest score its prompt got.")


def rejection_examples(v: View) -> list[Table]:
    groups: dict[str, list[dict]] = {}
    for s in v.first_samples(400):
        if number(s.get("merged")) is not None:
            groups.setdefault(json.dumps(s.get("prompt"), sort_keys=True, default=str), []).append(s)
    out = []
    for rows in [g for g in groups.values() if len(g) > 1][:3]:
        rows = sorted(rows, key=lambda s: -s["merged"])
        picked = [("best", rows[0]), ("worst", rows[-1])]
        cells = [[f"{which} of {len(rows)}", fixed(s["merged"]), clip(s.get("answer"), 600)[0]] for which, s in picked]
        out.append(Table(plots.short(turns(rows[0].get("prompt"))[-1]["text"], 200), ["", "merged reward", "answer"], cells))
    return out


# ---------------------------------------------------------------- PPO

def merged_axis(v: View) -> str:
    return f"merged reward ({'standardized' if v.results.get('standardize_rewards') else 'raw'} score)"


def ppo_part(vs: list[View]) -> Part:
    part = Part("ppo", "PPO", "The merged reward is the safety score where a prompt is tagged or an answer looks unsafe, and the "
                "helpfulness score elsewhere. It is shown before whitening and before the KL penalty." + scale_words(vs))
    for v in vs:
        for build in (ppo_reward_figure, ppo_kl_figure, ppo_scores_figure, gate_figure, length_figure):
            part.figures += build(vs, v)
    part.facts = facts("PPO in numbers", vs, [v.name for v in vs], [
        ("iterations", at("iterations")), ("kept iteration", at("best_iteration")), ("stopped early", said("stopped_early")),
        ("watched merged reward, start", ci("watched", "start")), ("watched merged reward, kept", ci("watched", "best")),
        ("paired difference", ci("watched", "paired_difference", sign=True)),
        ("KL, kept (nats)", at("watched", "kl", form=fixed, digits=1)),
        ("safety threshold", said("safety_threshold")), ("seconds generating", average("ppo/seconds_generate", 1)),
        ("seconds scoring", average("ppo/seconds_score", 1)), ("seconds updating", average("ppo/seconds_update", 1)),
        ("tokens a second", average("ppo/tokens_per_second"))], "Seconds and tokens a second are means over iterations."
                       + max(optimistic(v, " The", ".") for v in vs))
    part.folds = everything(vs)
    return part


def optimistic(v: View, before: str, after: str = "") -> str:
    """That PPO's gain is measured on what chose it; TRL's algorithms keep the last policy."""
    words = f"{before} kept iteration was chosen on the watched prompts: its gain there is optimistic{after}"
    return words if v.results.get("algorithm", "ppo") == "ppo" else ""


def kept_mark(v: View) -> tuple[float, str] | None:
    best = v.get("best_iteration")
    return None if best is None else (best, f"kept, {best:.0f}")


def ppo_reward_figure(vs: list[View], v: View) -> list[Figure]:
    train = v.line("ppo/merged_reward", "training prompts", 0, quiet=True)
    held = v.line("ppo/watched_merged_reward", "watched prompts", 1)
    if not train and not held:
        return []
    gain, start, best = (interval(dig(v.results, "watched", k)) for k in ("paired_difference", "start", "best"))
    ends = v.ends("ppo/watched_merged_reward" if held else "ppo/merged_reward")
    if gain:
        where = f" went from {fixed(start.mean)} to {fixed(best.mean)}" if start and best else ""
        takeaway = f"Watched merged reward{where}: {fixed(gain.mean, sign=True)} paired by prompt{bounds(gain, sign=True)}"
    elif ends:
        takeaway = moved(f"Merged reward on {'watched' if held else 'training'} prompts", *ends[:2])
    else:
        takeaway = f"One point was recorded: a merged reward of {fixed((held or train).ys[-1])}"
    svg = plots.lines(f"ppo-reward-{v.name}", some(train, held), "iteration", merged_axis(v), mark=kept_mark(v))
    return drawn(named(vs, v, "Merged reward"), takeaway, "Merged reward over iterations", svg,
                 "The dotted line marks the iteration that was kept." + (optimistic(v, " The", ".") if gain else "") if kept_mark(v) else "")


def ppo_kl_figure(vs: list[View], v: View) -> list[Figure]:
    train, held = v.line("ppo/kl", "training prompts", 0, quiet=True), v.line("ppo/watched_kl", "watched prompts", 1)
    shown, final = held or train, v.get("watched", "kl")
    if not shown:
        return []
    takeaway = (f"The kept policy is {fixed(final, 1)}{GAP}nats from where PPO started" if final is not None else
                f"The policy ended {fixed(shown.ys[-1], 1)}{GAP}nats from where PPO started")
    takeaway += f"; the farthest it went was {fixed(max(shown.ys), 1)}"
    svg = plots.lines(f"ppo-kl-{v.name}", some(train, held), "iteration", "KL of a whole answer (nats)", mark=kept_mark(v))
    return drawn(named(vs, v, "Distance from the starting policy"), takeaway, "Mean sequence KL over iterations", svg,
                 "To the frozen starting policy, summed over an answer's tokens, mean over answers: on training prompts the log-ratio of the drawn "
                 "tokens, on watched prompts the KL over the whole vocabulary, which scatters less.")


def ppo_scores_figure(vs: list[View], v: View) -> list[Figure]:
    series = some(v.line("ppo/helpfulness", "helpfulness", 0), v.line("ppo/safety", "safety", 1))
    words = [moved(name, *ends[:2]) for name in ("helpfulness", "safety") if (ends := v.ends(f"ppo/{name}"))]
    if not series or not words:
        return []
    svg = plots.lines(f"ppo-scores-{v.name}", series, "iteration", "raw score, mean over answers")
    return drawn(named(vs, v, "The two scores behind it"), f"{listed(words)} on training prompts",
                 "Helpfulness and safety score over iterations", svg,
                 "Both models score every answer; the gate decides which score counts.")


def gate_figure(vs: list[View], v: View) -> list[Figure]:
    series = some(v.line("ppo/routed_by_tag", "prompt tagged", 0), v.line("ppo/routed_by_threshold", "score below the threshold", 1))
    shares = [(v.mean("ppo/routed_by_tag"), "because of the prompt's tag"), (v.mean("ppo/routed_by_threshold"), "because of a low score")]
    words = [f"for {percent(x, 0 if x >= 0.1 else 1)} of answers {why}" for x, why in shares if x is not None]
    if not series:
        return []
    svg = plots.lines(f"ppo-gate-{v.name}", series, "iteration", "share of answers", percent=True, zero=True)
    return drawn(named(vs, v, "What the gate gave to the safety model"), f"The safety score counted {listed(words)}",
                 "Shares of answers routed by tag and by threshold over iterations", svg, "The percentages are means over iterations.")


def length_figure(vs: list[View], v: View) -> list[Figure]:
    line, ends, finished = v.line("ppo/answer_tokens", "answer"), v.ends("ppo/answer_tokens"), v.ends("ppo/finished")
    if not line or not ends:
        return []
    takeaway = moved("Answer length", ends[0], ends[1], 0, "tokens") + (f"; {percent(finished[1])} end by themselves" if finished else "")
    svg = plots.lines(f"ppo-length-{v.name}", [line], "iteration", "tokens of an answer, mean")
    return drawn(named(vs, v, "Answer length"), takeaway, "Mean answer length over iterations", svg,
                 "A reward that grows only with length would be a warning.")


# ---------------------------------------------------------------- export, and kinds without a part of their own

def export_part(vs: list[View]) -> Part:
    part = Part("export", "Export", "The adapters are merged into the base; transformers loads the folder as it is.")
    part.facts = facts("What was exported", vs, [v.name for v in vs], [
        ("folder", said("folder")), ("dtype", said("dtype")), ("KL of merged to unmerged (nats)", at("merged_kl")),
        ("files", said("files"))])
    part.folds = everything(vs)
    return part


def other_part(vs: list[View]) -> Part:
    """Every number that sections of other kinds stored and recorded."""
    part = Part("other", "Other sections")
    for v in vs:
        part.facts += facts(f"{v.name} ({v.kind})", [v], ["value"], [(plain(k), said(k)) for k in v.results])
    part.folds = everything(vs)
    return part


KEYS = {"sft": sft_keys, "gatt": gatt_keys, "gatt_eval": gatt_eval_keys, "reward": reward_keys, "rejection": rejection_keys, "ppo": ppo_keys,
        "evaluate": evaluate_keys, "collect": collect_keys, "annotations": annotations_keys, "distill": distill_keys, "redteam": redteam_keys,
        "bold": bold_keys, "diversity": diversity_keys, "lm_eval": lm_eval_keys, "directions": directions_keys, "export": export_keys}
PARTS = {"evaluate": ("result", result_part), "directions": ("directions", directions_part),
         "sft": ("sft", sft_part), "reward": ("reward", reward_part),
         "rejection": ("rejection", rejection_part), "collect": ("collect", collect_part), "annotations": ("collect", collect_part),
         "distill": ("distill", distill_part), "gatt": ("gatt", gatt_part), "gatt_eval": ("gatt", gatt_part),
         "redteam": ("redteam", redteam_part), "bold": ("bold", bold_part), "diversity": ("diversity", diversity_part),
         "lm_eval": ("lm_eval", lm_eval_part), "ppo": ("ppo", ppo_part), "export": ("export", export_part)}
