"""The report written: JSON, Markdown, and one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from preftune.core.files import write_json, write_text
from preftune.evaluation.figures import length_scatter, stage_charts
from preftune.evaluation.report import PAIRS_LABEL, WORDS, Report, without_nonfinite
from preftune.evaluation.showing import (
    clean,
    duration,
    fact,
    fact_name,
    fenced,
    in_table,
    interval_text,
    number,
    percent,
    points,
    shorten,
)
from preftune.judging.rules import RulePoints

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report was written."""

    json: Path
    markdown: Path
    html: Path


def write_report(report: Report, folder: Path) -> ReportFiles:
    """Write ``report.json``, ``report.md`` and ``report.html`` into a folder, each one atomically."""
    files = ReportFiles(folder / "report.json", folder / "report.md", folder / "report.html")
    write_json(files.json, without_nonfinite(report.to_dict()))
    write_text(files.markdown, to_markdown(report))
    write_text(files.html, to_html(report))
    return files


def to_html(report: Report) -> str:
    """One page with inline figures; everything that is no template of ours is escaped."""
    environment = environment_of(is_html=True)
    charts = [(stage, stage_charts(f"s{index}-{stage.name}", stage.rows)) for index, stage in enumerate(report.stages)]
    return environment.get_template("report.html.j2").render(
        **_facts(report),
        stages=charts,
        scatter=length_scatter(report.win_rate.judged, clean(report.policy), clean(report.baseline)),
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def to_markdown(report: Report) -> str:
    """The same figures as tables, texts in code blocks."""
    return environment_of(is_html=False).get_template("report.md.j2").render(**_facts(report)).strip() + "\n"


def _facts(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "sentence": report.sentence,
        "rate": report.win_rate,
        "same": report.pairs_win_rate,
        "pairs_label": PAIRS_LABEL,
        "words": WORDS,
        "exclusions": report.exclusions(),
        "times": {name: duration(seconds) for name, seconds in report.timings.items()},
    }


def environment_of(*, is_html: bool) -> Environment:
    """The templates of this package with the filters that make figures and hostile text readable."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=is_html,  # noqa: S701  # Markdown has no HTML to escape: its filters `cell` and `fenced` do that
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "as_yaml": as_yaml,
        "cell": in_table,
        "clean": clean,
        "fact": fact,
        "fact_name": fact_name,
        "fenced": fenced,
        "interval": interval_text,
        "number": number,
        "opened": opened,
        "percent": percent,
        "points": points,
        "pvalue": pvalue,
        "safe_figure": Markup,  # only what figures.py drew and our own style sheet
        "shorten": shorten,
        "signed": signed,
        "total": total,
    }
    return environment


def as_yaml(value: Mapping[str, Any]) -> str:
    """A mapping as YAML, cleaned for display."""
    return clean(yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=100))


def pvalue(value: float) -> str:
    """A p-value with its relation sign.

    >>> pvalue(0.0226), pvalue(1e-9)
    ('= 0.023', '< 0.001')
    """
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def opened(text: str) -> str:
    """Text that begins with a capital letter.

    >>> opened("the tuned model")
    'The tuned model'
    """
    return text[:1].upper() + text[1:]


def signed(value: float) -> str:
    """Points with their sign; zero has none.

    >>> signed(1.25), signed(-4.0), signed(0.0)
    ('+1.25', '−4.00', '0')
    """
    rounded = round(value, 2)
    return "0" if rounded == 0 else f"{rounded:+.2f}".replace("-", "−")


def total(rules: Sequence[RulePoints]) -> str:
    """The sum of a text's points, for its heading; nothing where the judge gives none."""
    return f" ({signed(sum(rule.points for rule in rules))} points)" if rules else ""
