"""The report's figures as inline SVG text. Each function takes plain numbers and returns one `<svg>` element.

Every series differs by colour, line style and marker, so that a grey print reads as well as a screen. Text stays text: it takes
the page's font, can be searched, and keeps a figure at a few kilobytes. matplotlib is imported only when a figure is drawn.
"""

import io
import math
import re
import textwrap
import warnings
from dataclasses import dataclass
from itertools import pairwise

INK, SOFT, GRID = "#1c2430", "#566070", "#e3e7ec"
STYLES = [  # colour, line, marker, whether the marker is filled
    ("#174a8b", "-", "o", True),
    ("#b4530b", "--", "s", False),
    ("#1f7a5c", "-.", "^", True),
    ("#7a3b8f", ":", "D", False),
    ("#4a5361", (0, (5, 1, 1, 1, 1, 1)), "v", True),
    ("#9c2148", (0, (8, 2)), "P", False),
]
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++++", "||||", "----")  # of areas; without one an area is filled
UNSHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # control characters and halves of surrogate pairs
WIDTH, HEIGHT = 4.3, 2.75  # inches; small, so that the text is still readable when a phone scales the figure down
RC = {
    "font.family": "sans-serif", "font.size": 8.0, "text.color": INK, "text.parse_math": False, "svg.fonttype": "none",
    "svg.hashsalt": "posttrain", "axes.edgecolor": SOFT, "axes.labelcolor": INK, "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.size": 2.5,
    "ytick.major.size": 0, "xtick.major.width": 0.6, "lines.linewidth": 1.5, "lines.markersize": 4.2, "legend.frameon": False,
    "legend.fontsize": 8.0, "legend.handlelength": 2.8, "legend.borderaxespad": 0.0, "legend.columnspacing": 1.4,
    "hatch.linewidth": 0.7, "figure.constrained_layout.h_pad": 0.04, "figure.constrained_layout.w_pad": 0.04,
}


@dataclass
class Line:
    """One series over steps. low and high, where given, are the ends of an interval round each point."""

    label: str
    xs: list[float]
    ys: list[float]
    style: int = 0
    low: list[float] | None = None
    high: list[float] | None = None
    quiet: bool = False  # a noisy series drawn thin behind the ones that matter


@dataclass
class Dot:
    """A value with its interval; `group` is the heading it stands under."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    style: int = 0
    group: str = ""
    cross: bool = False  # a reference value rather than a measured model


def short(text: str, length: int = 22) -> str:
    """A label that fits a figure, without what a font can't show."""
    text = " ".join(UNSHOWN.sub("\ufffd", str(text)).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def figure_svg(key: str, draw, size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    """Run draw(figure) and return the figure as an SVG element whose ids all start with `key`."""
    import matplotlib
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.rc_context(RC):
        warnings.simplefilter("ignore")  # a glyph that the measuring font lacks; the page's font shows it
        fig = Figure(figsize=size, layout="constrained")
        draw(fig)
        out = io.StringIO()
        fig.savefig(out, format="svg", transparent=True)
    return _inline(out.getvalue(), re.sub(r"[^A-Za-z0-9]+", "-", key))


def _inline(svg: str, key: str) -> str:
    """A standalone SVG file -> an element that can share a page: no prolog, no global style, ids of its own, page-wide width."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{key}-', svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0]), svg)  # coordinates, never the text between tags
    return re.sub(r"\n\s*", "\n", svg).strip()


def _percent(axis) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 1):g} %".replace("-", "−")))


def _legend(ax, columns: int = 3, always: bool = False) -> None:
    """Above the axes, in as many columns as its words leave room for."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1 or always:
        columns = min(columns, max(1, 44 // (max(map(len, labels), default=1) + 7)))
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.03), ncols=columns)


def _look(style: int, quiet: bool = False) -> dict:
    colour, line, marker, filled = STYLES[style % len(STYLES)]
    look = {"color": colour, "linestyle": line, "marker": marker, "markerfacecolor": colour if filled else "white"}
    return {**look, "linewidth": 0.9, "alpha": 0.75, "marker": ""} if quiet else look


def lines(key: str, series: list[Line], x: str, y: str, mark: tuple[float, str] | None = None, level: tuple[float, str] | None = None,
          percent: bool = False, whole: bool = True, zero: bool = False) -> str:
    """Curves over steps. mark: a vertical line (x, words); level: a horizontal one (y, words); zero: the y axis starts at 0."""
    def draw(fig):
        from matplotlib.ticker import MaxNLocator

        ax = fig.subplots()
        for s in series:
            quiet = s.quiet and len(s.xs) > 1
            if s.low and s.high:
                ax.fill_between(s.xs, s.low, s.high, color=STYLES[s.style % len(STYLES)][0], alpha=0.14, linewidth=0)
            ax.plot(s.xs, s.ys, label=short(s.label, 30), markevery=max(1, len(s.xs) // 14), **_look(s.style, quiet))
        if mark:
            ax.axvline(mark[0], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
            right = mark[0] < sum(ax.get_xlim()) / 2
            ax.annotate(mark[1], (mark[0], 0.03), xycoords=("data", "axes fraction"), xytext=(4 if right else -4, 0),
                        textcoords="offset points", ha="left" if right else "right", va="bottom", color=SOFT)
        if level:
            _level(ax, level)
        if whole:
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if percent:
            _percent(ax.yaxis)
        if zero:
            ax.set_ylim(bottom=0)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        _legend(ax)
    return figure_svg(key, draw)


def by_category(key: str, categories: list[str], series: dict[str, list[Dot | None]], y: str, level: tuple[float, str]) -> str:
    """Shares with intervals over ordered categories, one marker a series, joined so that the trend shows."""
    def draw(fig):
        ax = fig.subplots()
        for i, (name, dots) in enumerate(series.items()):
            shift = (i - (len(series) - 1) / 2) * 0.2
            found = [(j + shift, d) for j, d in enumerate(dots) if d]
            xs, ys = [x for x, _ in found], [d.value for _, d in found]
            ax.plot(xs, ys, label=short(name, 30), zorder=3, **{**_look(i), "linewidth": 0.8})
            for x, d in found:
                ax.vlines(x, _or(d.low, d.value), _or(d.high, d.value), color=STYLES[i % len(STYLES)][0], linewidth=1.2)
        _level(ax, level)
        ax.set_xticks(range(len(categories)), [_two_lines(c) for c in categories])
        ax.set_xlim(-0.5, len(categories) - 0.5)
        ax.grid(axis="x", visible=False)
        _percent(ax.yaxis)
        ax.set_ylabel(y)
        _legend(ax)
    return figure_svg(key, draw)


def _level(ax, level: tuple[float, str]) -> None:
    """A dotted horizontal line (y, words) that is always inside the axes."""
    bottom, top = ax.get_ylim()
    ax.axhline(level[0], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
    ax.annotate(level[1], (1, level[0]), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
                ha="right", va="bottom", color=SOFT)
    ax.set_ylim(min(bottom, level[0] - 0.04 * (top - bottom)), max(top, level[0]))


def against(key: str, series: dict[str, list[tuple[float, Dot, list[float]]]], ticks: dict[float, str], x: str, y: str,
            level: tuple[float, str]) -> str:
    """Shares with intervals over an amount on a logarithmic axis. series: name -> [(amount, value, the values it is a mean of)]; ticks:
    amount -> words."""
    def draw(fig):
        from matplotlib.ticker import FixedLocator, NullLocator

        ax, ends = fig.subplots(), (min(ticks), max(ticks))
        span = math.log(ends[1] / ends[0]) or 1.0
        for i, (name, rows) in enumerate(series.items()):
            shift = math.exp(span * 0.022 * (i - (len(series) - 1) / 2))  # so that bars stand side by side
            xs, colour = [at * shift for at, _, _ in rows], STYLES[i % len(STYLES)][0]
            ax.plot(xs, [d.value for _, d, _ in rows], label=short(name, 30), zorder=3, **{**_look(i), "linewidth": 1.1})
            for at, (_, d, singles) in zip(xs, rows, strict=True):
                ax.vlines(at, _or(d.low, d.value), _or(d.high, d.value), color=colour, linewidth=1.2)
                ax.plot([at] * len(singles), singles, linestyle="", marker=".", markersize=3, color=INK, zorder=4)
        ax.set_xscale("log")
        ax.set_xlim(ends[0] * math.exp(-0.08 * span), ends[1] * math.exp(0.08 * span))
        shown: list[float] = []
        for at in sorted(ticks, reverse=True):  # from the largest, as many words as have room
            if not shown or math.log(shown[-1] / at) > 0.11 * span:
                shown.append(at)
        ax.xaxis.set_major_locator(FixedLocator(shown))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(shown, [ticks[at] for at in shown])
        _level(ax, level)
        _percent(ax.yaxis)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        _legend(ax, columns=2)
    return figure_svg(key, draw)


def _two_lines(label: str) -> str:
    return "\n".join(short(line, 15) for line in textwrap.wrap(label, 14)[:2])


def _or(value, other):
    return other if value is None else value


def dots(key: str, rows: list[Dot], x: str, level: tuple[float, str] | None = None, percent: bool = True) -> str:
    """Values with intervals on horizontal rows under group headings, the number written at the right."""
    groups = list(dict.fromkeys(r.group for r in rows))
    places, heads, y = {}, {}, 0.0
    for group in groups:
        if group:
            heads[group] = y
            y += 0.95
        for i, row in enumerate(rows):
            if row.group == group:
                places[i] = y
                y += 1.0
        y += 0.25

    def draw(fig):
        ax = fig.subplots()
        for i, row in enumerate(rows):
            _dot(ax, row, places[i])
            text = f"{100 * row.value:.0f} %" if percent else f"{row.value:.2f}".replace("-", "−")
            ax.annotate(text, (1.01, places[i]), xycoords=("axes fraction", "data"), va="center", ha="left", color=INK)
        if level:
            ax.axvline(level[0], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(level[1], (level[0], 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=SOFT)
        ax.set_yticks(list(places.values()), [short(r.label, 24) for r in rows])
        for group, place in heads.items():
            ax.annotate(short(group, 40), (0, place), xycoords=("axes fraction", "data"), xytext=(0, 0), textcoords="offset points",
                        ha="left", va="center", fontweight="bold", annotation_clip=False,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})
        ax.set_ylim(y - 0.4, -0.7)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.08)
        if percent:
            _percent(ax.xaxis)
        ax.set_xlabel(x)
    return figure_svg(key, draw, (WIDTH, max(1.5, 0.75 + 0.21 * y)))


def _dot(ax, row: Dot, y: float) -> None:
    colour, _, marker, filled = STYLES[row.style % len(STYLES)]
    if row.low is not None and row.high is not None:
        ax.hlines(y, row.low, row.high, color=colour, linewidth=1.6)
    if row.cross:
        ax.plot([row.value], [y], marker="x", color=SOFT, markersize=5, linestyle="", markeredgewidth=1.6)
    else:
        ax.plot([row.value], [y], marker=marker, color=colour, markerfacecolor=colour if filled else "white", linestyle="", markersize=5.5)


def calibration(key: str, curves: dict[str, list[tuple[float, float, float]]]) -> str:
    """curves: name -> [(confidence, accuracy, pairs)]; a marker's area follows the number of pairs."""
    def draw(fig):
        ax = fig.subplots()
        low = min([0.5, *(min(c, a) for rows in curves.values() for c, a, _ in rows)])
        ax.plot([low, 1], [low, 1], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        ax.annotate("perfectly calibrated", (0.97, 0.97), xytext=(-4, 3), textcoords="offset points", ha="right", va="bottom", color=SOFT)
        for i, (name, rows) in enumerate(curves.items()):
            colour, _, marker, filled = STYLES[i % len(STYLES)]
            xs, ys = [c for c, _, _ in rows], [a for _, a, _ in rows]
            most = max([n for _, _, n in rows] or [1]) or 1
            ax.plot(xs, ys, label=short(name, 30), zorder=3, **{**_look(i), "markersize": 3.5})
            ax.scatter(xs, ys, s=[12 + 70 * n / most for _, _, n in rows], marker=marker, zorder=4,
                       facecolors=colour if filled else "white", edgecolors=colour)
        _percent(ax.xaxis)
        _percent(ax.yaxis)
        ax.set_xlabel("confidence: σ of the gap between the two scores")
        ax.set_ylabel("pairs ordered rightly")
        _legend(ax)
    return figure_svg(key, draw)


def histogram(key: str, edges: list[float], counts: dict[str, list[float]], x: str, marks: list[float] = ()) -> str:
    """Shares of two kinds of answers by score: a filled outline against a dashed, hatched one. marks: dotted vertical lines."""
    def draw(fig):
        ax = fig.subplots()
        for i, (label, found) in enumerate(counts.items()):
            colour, line, _, filled = STYLES[i]
            heights = [c / sum(found) for c in found]
            ax.stairs(heights, edges, fill=True, facecolor=(*_rgb(colour), 0.22) if filled else "none", edgecolor=(*_rgb(colour), 0.55),
                      hatch=None if filled else "////", linewidth=0)
            ax.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.5, label=short(label, 30))
        for at in marks:
            ax.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        _percent(ax.yaxis)
        ax.set_xlabel(x)
        ax.set_ylabel("share of answers")
        _legend(ax)
    return figure_svg(key, draw)


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))


def plane(key: str, points: list[tuple[str, Dot, Dot]], x: str, y: str) -> str:
    """points: (name, horizontal value, vertical value) in order; arrows lead from each to the next."""
    def draw(fig):
        ax = fig.subplots()
        _arrows(ax, points)
        for i, (name, h, v) in enumerate(points):
            _point(ax, h, v, i)
            dx, dy = ((6, -11), (-6, 5), (6, 5), (-6, -11))[i % 4]  # so that equal points keep readable names
            ax.annotate(short(name, 18), (h.value, v.value), xytext=(dx, dy), textcoords="offset points", color=INK, fontweight="bold",
                        ha="left" if dx > 0 else "right", zorder=5)
        ax.margins(0.14)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
    return figure_svg(key, draw)


def planes(key: str, paths: dict[str, list[tuple[str, Dot, Dot]]], x: str, y: str) -> str:
    """`plane` for several series of points, each with a style of its own: name -> its points in order."""
    def draw(fig):
        ax = fig.subplots()
        for i, (series, points) in enumerate(paths.items()):
            _arrows(ax, points)
            dx, dy = ((6, -11), (-6, 5), (6, 5), (-6, -11))[i % 4]
            for j, (name, h, v) in enumerate(points):
                _point(ax, h, v, i, label=short(series, 30) if j == 0 else "")
                ax.annotate(short(name, 18), (h.value, v.value), xytext=(dx, dy), textcoords="offset points", color=STYLES[i % len(STYLES)][0],
                            ha="left" if dx > 0 else "right", zorder=5)
        ax.margins(0.1)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        _legend(ax, columns=4, always=True)
    return figure_svg(key, draw, (8.6, 4.2))


def _arrows(ax, points: list[tuple[str, Dot, Dot]]) -> None:
    for (_, ax0, ay0), (_, ax1, ay1) in pairwise(points):
        ax.annotate("", (ax1.value, ay1.value), (ax0.value, ay0.value), zorder=2,
                    arrowprops={"arrowstyle": "-|>", "color": SOFT, "linewidth": 0.9, "shrinkA": 6, "shrinkB": 6, "linestyle": "-"})


def _point(ax, h: Dot, v: Dot, style: int, label: str = "") -> None:
    """A value across and one up, with their intervals."""
    colour, _, marker, filled = STYLES[style % len(STYLES)]
    ax.hlines(v.value, _or(h.low, h.value), _or(h.high, h.value), color=colour, linewidth=1.0, alpha=0.7)
    ax.vlines(h.value, _or(v.low, v.value), _or(v.high, v.value), color=colour, linewidth=1.0, alpha=0.7)
    ax.plot([h.value], [v.value], marker=marker, markersize=6.5, color=colour, markerfacecolor=colour if filled else "white",
            linestyle="", zorder=4, label=label or None)


def bars(key: str, rows: dict[str, dict[str, float]], x: str) -> str:
    """A bar a row, the first at the top, made of its parts: row -> part -> amount. Parts differ by colour and by hatch; the row's sum stands at its
    end."""
    parts = list(dict.fromkeys(p for row in rows.values() for p, amount in row.items() if amount > 0))

    def draw(fig):
        ax, starts = fig.subplots(), dict.fromkeys(rows, 0.0)
        for i, part in enumerate(parts):
            colour, hatch = STYLES[i % len(STYLES)][0], HATCHES[i % len(HATCHES)]
            ax.barh(list(range(len(rows))), [row.get(part, 0.0) for row in rows.values()], left=list(starts.values()), height=0.62, hatch=hatch,
                    facecolor="none" if hatch else colour, edgecolor=colour, linewidth=0.8, label=short(part, 30))
            starts = {name: start + rows[name].get(part, 0.0) for name, start in starts.items()}
        for j, total in enumerate(starts.values()):
            ax.annotate(f"{total:,.1f}", (total, j), xytext=(4, 0), textcoords="offset points", va="center", ha="left", color=INK)
        ax.set_yticks(list(range(len(rows))), [short(name, 24) for name in rows])
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(x)
        _legend(ax, always=True)
    return figure_svg(key, draw, (WIDTH, 1.3 + 0.32 * len(rows)))


def grid(key: str, series: list[Line], x: str) -> str:
    """Small panels, one a metric: everything a section recorded, at a glance."""
    columns = 4
    rows = -(-len(series) // columns)

    def draw(fig):
        from matplotlib.ticker import MaxNLocator

        axes = fig.subplots(rows, columns, squeeze=False)
        for i, ax in enumerate(axes.flat):
            if i >= len(series):
                ax.set_visible(False)
                continue
            s = series[i]
            ax.plot(s.xs, s.ys, color=STYLES[0][0], linewidth=1.0, marker="o" if len(s.xs) < 8 else "", markersize=2.5)
            ax.set_title(short(s.label, 26), fontsize=8, loc="left", fontweight="bold")
            ax.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(nbins=3))
            if i + columns >= len(series):
                ax.set_xlabel(x)
    return figure_svg(key, draw, (8.6, 0.35 + 1.25 * rows))
