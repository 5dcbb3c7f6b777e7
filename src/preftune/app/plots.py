"""Results as matplotlib figures, for notebooks and scripts; no display is needed and none is opened."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from preftune.app.series import Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("change of log-probability, nats a token", ("logps/chosen_change_per_token", "logps/rejected_change_per_token")),
    ("kl to the start, nats a completion", ("kl", "probe/kl")),
    ("entropy of the probe, nats a token", ("probe/entropy",)),
)


def plot_stages(stages: Mapping[str, Mapping[str, Series]]) -> Figure:
    """A row of panels for each stage: the metrics of ``PANELS`` that it has, over its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        name: [(title, [one for one in names if one in series]) for title, names in PANELS if any(one in series for one in names)]
        for name, series in stages.items()
    }
    width = max([len(row) for row in panels.values()], default=1)
    figure = Figure(figsize=(3.4 * max(1, width), 2.6 * max(1, len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, len(panels)), max(1, width), squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for row, (stage, shown) in zip(grid, panels.items(), strict=False):
        for axes, (title, names) in zip(row, shown, strict=False):
            axes.set_visible(True)
            for name in names:
                mark = "o" if len(stages[stage][name].steps) < 20 else ""
                axes.plot(*stages[stage][name], marker=mark, markersize=3, linewidth=1.2, label=name)
            axes.set_title(f"{stage}: {title}", fontsize=9)
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=8)
            if len(names) > 1:
                axes.legend(fontsize=7, frameon=False)
    return figure


def plot_rates(rates: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Rates with their intervals, (rate, low, high) each, against one half."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 0.8 + 0.45 * len(rates)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (rate, low, high) in enumerate(rates.values()):
        axes.plot([low, high], [place, place], color="C0", linewidth=2)
        axes.plot([rate], [place], marker="o", color="C0")
    axes.axvline(0.5, color="grey", linewidth=1, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rates) - 0.5, -0.5)
    axes.set_yticks(range(len(rates)), list(rates))
    axes.set_xlabel("rate, with its 95 % interval")
    return figure


def as_html(title: str, lines: Sequence[str], figure: Figure) -> str:
    """A heading, lines and the figure as inline SVG: what a notebook shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    paragraphs = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f"<div><b>{escape(title)}</b>{paragraphs}{text[text.index('<svg') :]}</div>"
