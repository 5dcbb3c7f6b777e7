"""The report: the same figures in every form, no network, hostile text escaped, readable contrast."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from preftune.evaluation.figures import stage_charts
from preftune.evaluation.render import TEMPLATES, to_html, to_markdown, write_report
from preftune.evaluation.report import Report, samples_of
from preftune.evaluation.showing import clean, in_table, percent

VOID = {"meta", "link", "br", "img", "input", "hr", "base"}
RESOURCE = {"src", "href", "xlink:href", "data", "action", "srcset", "poster", "formaction", "background", "cite"}


class Page(HTMLParser):
    """Every tag, attribute and text of a page; a tag that is closed in the wrong order fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.data: dict[str, set[tuple[str, str]]] = {}
        self._open: list[str] = []
        self._name: tuple[str, str] | None = None
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        given = dict(attrs)
        if tag == "data":
            self._name = (str(given["data-name"]), str(given["value"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "data":
            self._name = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._name is not None:
            self.data.setdefault(self._name[0], set()).add((self._name[1], data))

    @property
    def shown(self) -> str:
        return "".join(self.text)


def lookup(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(to_html(report))


@pytest.fixture(scope="module")
def hostile_page(hostile_report: Report) -> Page:
    return Page(to_html(hostile_report))


@pytest.fixture
def tree(report: Report, tmp_path: Path) -> Any:
    return json.loads(write_report(report, tmp_path).json.read_text())


def test_every_figure_of_the_page_is_that_of_the_json(page: Page, tree: Any) -> None:
    assert len(page.data) >= 20
    for name, values in page.data.items():
        for value, text in values:
            assert float(value) == lookup(tree, name), name
            if text.endswith("%"):
                assert text == percent(lookup(tree, name)), name
    assert {"win_rate.rate", "win_rate.interval.low", "win_rate.controlled.rate", "pairs_win_rate.rate", "held_out.accuracy",
            "verdict_set_uses", "win_rate.consistency", "win_rate.length_ratio"} <= set(page.data)  # fmt: skip


def test_the_verdict_sentence_is_in_every_form(report: Report, page: Page, tree: Any) -> None:
    assert tree["sentence"] == report.sentence
    assert tree["verdict"] == report.win_rate.verdict == "better"
    assert report.sentence.startswith("Better: the tuned model wins 8")
    assert "unseen prompts against the SFT model, judged by rules 'warm tone, word list B' in both orders" in report.sentence
    assert report.sentence.removeprefix("Better: the")[:40] in page.shown
    assert in_table(report.sentence) in to_markdown(report)


def test_the_pairs_judge_is_named_as_such(report: Report, page: Page, tree: Any) -> None:
    assert "same judge as the pairs" in page.shown
    assert "same judge as the pairs" in to_markdown(report)
    assert tree["pairs_win_rate"]["label"] == "same judge as the pairs"


@pytest.mark.parametrize("which", ["report", "hostile_report"])
def test_nothing_is_fetched_or_run(which: str, request: pytest.FixtureRequest) -> None:
    html = to_html(request.getfixturevalue(which))
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "image"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in RESOURCE:
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
            assert "url(http" not in (value or "")
            assert "javascript:" not in (value or "")
    style = (TEMPLATES / "report.css").read_text()
    assert "@import" not in style
    assert "http" not in style
    assert "xmlns" not in html
    assert all(
        "http" not in str(attributes)
        for _, attributes in page.tags
        if "content" not in attributes and "aria-label" not in attributes
    )


def test_ids_are_unique_and_every_reference_is_met(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    uses = {str(value)[1:] for _, attributes in page.tags for name, value in attributes.items() if name == "href"}
    clips = set(re.findall(r"url\(#([^)]*)\)", " ".join(str(attributes) for _, attributes in page.tags)))
    assert uses | clips <= set(ids)
    assert clips


def test_hostile_text_is_shown_and_never_read(hostile_page: Page, hostile_report: Report) -> None:
    assert "<script>alert('x')</script><img src=x onerror=alert(1)>" in hostile_page.shown
    assert "</div></main>" in hostile_page.shown
    assert "{{ 7*7 }}" in hostile_page.shown
    assert "עברית and العربية" in hostile_page.shown
    html = to_html(hostile_report)
    assert "<script" not in html.lower()
    for forbidden in ("\x00", "\x1b", "\u202e", "\u2066"):
        assert forbidden not in html
    html.encode("utf-8")
    texts = [attributes for tag, attributes in hostile_page.tags if "text" in (attributes.get("class") or "").split()]
    assert texts
    assert all(attributes.get("dir") == "auto" for attributes in texts)


def test_hostile_text_fits_json_and_markdown(hostile_report: Report, tmp_path: Path) -> None:
    files = write_report(hostile_report, tmp_path)
    tree = json.loads(files.json.read_text(encoding="utf-8"))
    assert "<script>" in tree["samples"][0]["policy"]
    markdown = files.markdown.read_text(encoding="utf-8")
    fence = re.compile(r"^(`{3,})(?:text)?$", re.MULTILINE)
    opened: str | None = None
    outside: list[str] = []
    for line in markdown.split("\n"):
        found = fence.match(line)
        if found and opened is None:
            opened = found[1]
        elif found and line == opened:
            opened = None
        elif opened is None:
            outside.append(line)
    assert opened is None
    prose = "\n".join(outside)
    assert "<" not in prose
    assert "\n# heading" not in prose


def test_escaping_is_what_keeps_it_harmless(hostile_report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.evaluation import render

    plain = render.environment_of

    def without_escaping(*, is_html: bool) -> Any:
        environment = plain(is_html=is_html)
        environment.autoescape = False
        return environment

    monkeypatch.setattr(render, "environment_of", without_escaping)
    assert "<script>" in to_html(hostile_report)


def test_verdicts_in_plain_words(make_report: Callable[..., Report]) -> None:
    worse = make_report(warmth=0.1, baseline_warmth=0.6, count=60)
    assert worse.sentence.startswith("Worse: the tuned model wins only ")
    unclear = make_report(warmth=0.2, baseline_warmth=0.15, count=30)
    assert unclear.sentence.startswith("Inconclusive: ")
    assert "the interval holds one half, and about" in unclear.sentence
    assert "Inconclusive" in Page(to_html(unclear)).shown


def test_a_report_of_little_is_whole(make_report: Callable[..., Report]) -> None:
    whole = make_report(count=12)
    bare = Report(run="r", created="now", win_rate=whole.win_rate)
    page = Page(to_html(bare))
    assert "not identified" in page.shown or "At equal length" in page.shown
    assert "same judge as the pairs" not in page.shown
    assert to_markdown(bare).startswith("# r\n")
    json.dumps(bare.to_dict(), allow_nan=False)


def test_shared_words_and_notes_are_printed(report: Report) -> None:
    from dataclasses import replace

    changed = replace(report, shared_words=("gentle",), notes=("overridden: no other judge at hand",))
    for text in (Page(to_html(changed)).shown, to_markdown(changed)):
        assert "shares words with the judge that made the pairs: gentle" in text
        assert "overridden: no other judge at hand" in text
    assert "shares no word with the judge of the pairs" not in Page(to_html(changed)).shown
    assert "shares no word with the judge of the pairs" in Page(to_html(report)).shown


def test_a_metric_that_is_not_finite_is_written_as_text(report: Report, tmp_path: Path) -> None:
    from dataclasses import replace

    from preftune.evaluation.report import StageReport

    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
    files = write_report(replace(report, stages=(StageReport("dpo", "dpo", {}, rows),)), tmp_path)
    assert json.loads(files.json.read_text())["stages"][0]["last"]["loss"] == "inf"


def test_samples_are_drawn_by_seed_and_losses_are_added(report: Report) -> None:
    win_rate = report.win_rate
    one, same, other = (samples_of(win_rate, None, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert [sample.why for sample in one] == ["drawn"] * 6 + ["lost"] * 2
    assert all(sample.label == "loss" for sample in one[6:])
    assert one[0].policy_points == ()
    texts = [sample.policy for sample in samples_of(win_rate, None, count=500, losses=0)]
    assert sorted(texts) == sorted(judged.policy.text for judged in win_rate.judged)


def test_exclusions_are_counted_by_reason(report: Report, page: Page) -> None:
    assert report.exclusions() == [
        {"file": "pairs.jsonl", "reason": "identical", "count": 3, "line": 14, "detail": "both completions are the same text"}
    ]
    assert "line 14: both completions are the same text" in page.shown


def test_charts_hold_train_and_held_out() -> None:
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 1000)] + [{"step": 999, "eval_loss": 0.5}]
    (chart,) = stage_charts("sft", rows)
    assert {name for name, _, _ in chart.legend} == {"train", "held-out"}
    assert "loss (train)" in chart.caption
    assert "loss (held-out) 0.5 to 0.5" in chart.caption
    assert "var(--accent)" in chart.svg
    assert "#0102" not in chart.svg
    assert len(chart.svg) < 60_000  # a thousand steps are averaged before they are drawn
    assert stage_charts("empty", []) == []


def luminance(color: str) -> float:
    full = color if len(color) == 7 else "#" + "".join(letter * 2 for letter in color[1:])
    parts = [int(full[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_light_and_dark() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    roots = re.findall(r":root\{([^}]*)\}", (TEMPLATES / "report.css").read_text())
    assert len(roots) == 2
    for root in roots:
        colors = dict(re.findall(r"--(\w+):(#\w+)", root))
        for ground in ("paper", "card"):
            for ink in ("ink", "muted", "accent", "second"):
                assert contrast(colors[ink], colors[ground]) >= 4.5, (ink, ground)
        assert contrast(colors["ink"], colors["soft"]) >= 4.5
        assert contrast(colors["accent"], colors["soft"]) >= 4.5
        assert contrast(colors["ink"], colors["softer"]) >= 4.5
        assert contrast(colors["second"], colors["softer"]) >= 4.5


def test_clean_leaves_ordinary_text_alone() -> None:
    text = "Grüße, 你好 — 'quoted' \"text\"\n\ttab 😀 עברית"
    assert clean(text) == text
