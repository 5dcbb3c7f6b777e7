"""The report of a sweep: its best point, its joint interval, its pages."""

import re

from preftune.core.records import Message
from preftune.evaluation.sweep import SweepPoint, SweepReport, joint_interval, write_sweep
from preftune.evaluation.winrate import evaluate_pairs
from preftune.judging.base import Candidate, Verdict
from preftune.statistics.intervals import Interval


def point(beta, rate, drift, **changes):
    interval = Interval(rate - 0.1, rate + 0.1, "bootstrap-t")
    given = {"rate": rate, "interval": interval, "joint": interval, "verdict": "better", "drift": drift} | changes
    return SweepPoint({"beta": beta}, f"runs/{beta}", "done", **given)


def report(*points):
    return SweepReport("s<b>", "2026-01-01", "its reference", "a judge", 300, points)


def test_the_best_point_wins_most_and_then_drifts_least():
    points = [point(0.5, 0.6, 1.0), point(0.1, 0.8, 9.0), point(0.2, 0.8, 4.0), SweepPoint({"beta": 1}, "", "failed", "no")]
    assert report(*points).best is points[2]
    assert report(*points).sentence.startswith(
        "2 of 3 points win equally often; the one that drifted least: beta 0.2, win rate 80.0%"
    )
    assert "best of 2: beta 0.2" in report(*points[::2]).sentence
    blind = [point(beta, 0.5, None) for beta in (0.1, 0.3)]
    assert "2 of 2 points win equally often; the first of them, as drift was not measured: beta 0.1" in report(*blind).sentence
    assert "chosen among 3" in report(*points).sentence
    assert report(points[3]).best is None


class Better:
    identity = "x"

    def describe(self):
        return {"name": "x"}

    def __call__(self, prompt, first, second):
        score = float(first.text > second.text)
        return Verdict(score, "first" if score else "second")


def test_the_joint_interval_is_wider_and_covers_the_single_one():
    prompts = [(Message("user", str(index)),) for index in range(60)]
    ours = [Candidate("b" if index % 3 else "a", 1, True) for index in range(60)]
    theirs = [Candidate("aa", 1, True)] * 60
    rate = evaluate_pairs(prompts, ours, theirs, Better())
    joint = joint_interval(rate, 8, seed=0)
    assert joint.low < rate.interval.low
    assert rate.interval.high < joint.high
    assert joint.level == 1 - 0.05 / 8
    assert joint_interval(rate, 1, seed=0) == rate.interval


def test_pages_show_every_point_and_escape_what_is_given(tmp_path):
    failed = SweepPoint({"beta": 2.0}, "", "failed", "<script>alert(1)</script> | no")
    points = [point(0.05, 0.7, 12.0, reference_forwards=70), point(0.5, 0.65, 0.5), failed]
    files = write_sweep(report(*points), tmp_path)
    html, markdown = files.html.read_text(encoding="utf-8"), files.markdown.read_text(encoding="utf-8")
    assert "<script>" not in html
    assert html.count("<svg") == 1
    for text in ("70.0 %", "65.0 %", "0.05", "0.5"):
        assert text in html
        assert text in markdown
    rows = [line for line in markdown.splitlines() if re.match(r"\| [0-9]", line)]
    assert len(rows) == 3
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_without_drift_there_is_a_table_and_no_figure(tmp_path):
    files = write_sweep(report(point(0.1, 0.6, None)), tmp_path)
    assert "<svg" not in files.html.read_text(encoding="utf-8")
    assert "not measured" in files.markdown.read_text(encoding="utf-8")
