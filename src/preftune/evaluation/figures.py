"""Figures of a report as inline SVG: drawn by matplotlib, coloured by the page's own CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from preftune.evaluation.winrate import Judged
from preftune.statistics.intervals import Floats

# Stand-ins that no figure uses otherwise; each becomes a CSS variable, so that one SVG serves light and dark pages.
INK, MUTED, GRID, ACCENT, SECOND = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent", SECOND: "--second"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
MAX_POINTS = 400
WINDOWS = 30


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart: its name, steps and values, and how it is drawn."""

    name: str
    steps: Floats
    values: Floats
    color: str = ACCENT
    is_held_out: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled SVG with a caption in words, for those who do not see it."""

    title: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str, str], ...] = ()  # (name, CSS colour variable, mark: line | dash | dot)


_CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("loss", ACCENT),)),
    ("Reward margin (chosen − rejected)", (("rewards/margins", ACCENT),)),
    ("Reward accuracy", (("rewards/accuracies", ACCENT),)),
    ("Log-probability of completions (nats)", (("logps/chosen", ACCENT), ("logps/rejected", SECOND))),
    ("KL to the start, sampled (nats a completion)", (("kl", ACCENT),)),
)


def stage_charts(name: str, rows: Sequence[Mapping[str, float]]) -> list[Chart]:
    """The curves of a stage, train and held-out; metrics that the stage does not have make no chart."""
    charts = []
    for number, (title, metrics) in enumerate(_CHARTS):
        curves = [
            curve
            for metric, color in metrics
            for prefix in ("", "eval_")
            if (curve := _curve(rows, prefix + metric, metric, color, bool(prefix))) is not None
        ]
        if curves:
            charts.append(_line_chart(f"{name}-{number}", title, curves))
    return charts


def length_scatter(judged: Sequence[Judged], policy: str, baseline: str) -> Chart:
    """Characters of the baseline's text against the policy's, one mark a prompt, by result."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.4, 3.6)
        sizes = [len(text) for one in judged for text in (one.policy.text, one.baseline.text)]
        bottom, top = 0.85 * min(sizes), 1.05 * max(1, *sizes)
        axes.plot([bottom, top], [bottom, top], color=MUTED, linewidth=0.8, dashes=(3, 3))
        for label, marker, color in (("tie", "o", MUTED), ("win", "^", ACCENT), ("loss", "v", SECOND)):
            own = [one for one in judged if one.label == label]
            axes.plot(
                [len(one.baseline.text) for one in own], [len(one.policy.text) for one in own],
                linestyle="none", marker=marker, markersize=4.2, color=color, alpha=0.7, markeredgewidth=0,
            )  # fmt: skip
        axes.set_xlim(bottom, top)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("characters, baseline")
        axes.set_ylabel("characters, tuned")
        longer = sum(len(one.policy.text) > len(one.baseline.text) for one in judged)
        caption = f"{longer} of {len(judged)} texts by {policy} are longer than those by {baseline}."
        legend = (
            ("win", "--accent", "▲"),
            ("tie", "--muted", "●"),
            ("loss", "--second", "▼"),
            ("equal length", "--muted", "- -"),
        )
        return Chart("Length of the texts", _svg(figure, "lengths", caption), caption, legend)


def drift_chart(marks: Sequence[tuple[str, float, float, float, float]]) -> Chart | None:
    """Win rate against drift with an interval for each mark: (label, drift, rate, low, high); None without marks."""
    if not marks:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(7.2, 3.6)
        labels = [mark[0] for mark in marks]
        drift, rate, low, high = (np.array([mark[place] for mark in marks]) for place in (1, 2, 3, 4))
        axes.axhline(50, color=MUTED, linewidth=1, dashes=(3, 3))
        axes.errorbar(
            drift, 100 * rate, yerr=100 * np.maximum(0, [rate - low, high - rate]), fmt="o", markersize=6, color=ACCENT,
            ecolor=MUTED, elinewidth=1, capsize=2,
        )  # fmt: skip
        if drift.min() > 0 and drift.max() > 20 * drift.min():
            axes.set_xscale("log")
        for turn, place in enumerate(np.argsort(drift)):  # above and below the bars in turn, so that neighbours stay apart
            is_above = turn % 2 == 0
            axes.annotate(
                labels[place], (drift[place], 100 * (high if is_above else low)[place]), textcoords="offset points",
                xytext=(0, 4 if is_above else -4), ha="center", va="bottom" if is_above else "top", fontsize=8, color=INK,
            )  # fmt: skip
        axes.set_xlabel("drift: KL(policy || reference), nats a completion")
        axes.set_ylabel("win rate, %")
        axes.margins(x=0.12, y=0.12)
        order = np.argsort(drift)
        parts = [f"{labels[place]}: {drift[place]:.3g} nats, {100 * rate[place]:.1f} %" for place in order]
        caption = f"Drift against win rate: {'; '.join(parts)}."
        return Chart("Drift against win rate", _svg(figure, "drift", caption), caption)


def smooth(values: Floats) -> Floats:
    """Centred moving average over about a fifteenth of the series, narrower at its ends, so that nothing lags.

    >>> smooth(np.array([1.0, 2.0, 6.0, 4.0]))
    array([1., 3., 4., 4.])
    """
    size = len(values)
    reach = np.minimum(max(1, size // WINDOWS), np.minimum(np.arange(size), np.arange(size)[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smoothed: Floats = (sums[np.arange(size) + reach + 1] - sums[np.arange(size) - reach]) / (2 * reach + 1)
    return smoothed


def _curve(rows: Sequence[Mapping[str, float]], key: str, metric: str, color: str, is_held_out: bool) -> Curve | None:
    found = [(row["step"], row[key]) for row in rows if "step" in row and key in row and np.isfinite(row[key])]
    if not found:
        return None
    steps, values = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    if not is_held_out and len(found) > MAX_POINTS:
        edges = np.linspace(0, len(found), MAX_POINTS + 1).astype(int)[:-1]
        sizes = np.diff(np.append(edges, len(found)))
        steps, values = np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges) / sizes
    return Curve(metric.rpartition("/")[2], steps, values, color, is_held_out)


def _line_chart(key: str, title: str, curves: Sequence[Curve]) -> Chart:
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.4, 2.3)
        legend: list[tuple[str, str, str]] = []
        several = len({curve.name for curve in curves}) > 1
        for curve in curves:
            name = f"{curve.name}, " if several else ""
            if curve.is_held_out:
                axes.plot(
                    curve.steps, curve.values, color=curve.color, linewidth=1.2, dashes=(3, 2), marker="o", markersize=4,
                    markerfacecolor=curve.color, markeredgewidth=0,
                )  # fmt: skip
                legend.append((f"{name}held-out", _VARIABLES[curve.color], "- ●"))
            elif len(curve.values) >= 20:
                axes.plot(curve.steps, curve.values, color=curve.color, linewidth=0.8, alpha=0.3)
                axes.plot(curve.steps, smooth(curve.values), color=curve.color, linewidth=1.6)
                legend.append((f"{name}train", _VARIABLES[curve.color], "—"))
            else:
                axes.plot(curve.steps, curve.values, color=curve.color, linewidth=1.6)
                legend.append((f"{name}train", _VARIABLES[curve.color], "—"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        parts = [
            f"{curve.name} ({'held-out' if curve.is_held_out else 'train'}) {curve.values[0]:.4g} to {curve.values[-1]:.4g}"
            for curve in curves
        ]
        caption = f"{title}: {', '.join(parts)}."
        return Chart(title, _svg(figure, key, caption), caption, tuple(legend))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, key: str, caption: str) -> str:
    """The figure as an SVG element for a page: no prologue, no metadata, own ids, the page's colours and fonts."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    prefix = re.sub(r"[^A-Za-z0-9-]", "-", key)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1).strip()
