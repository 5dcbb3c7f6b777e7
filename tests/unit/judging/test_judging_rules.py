"""The rules judge: points by hand, bad declarations in one line, independence, and no pay for length."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.core.errors import InputError, UnknownName, UsageError
from preftune.core.records import Message
from preftune.judging.base import Candidate, judges, load_judge
from preftune.judging.kinds import rule_kinds
from preftune.judging.rules import RulesJudge, independence, load_rules

PROMPT = (Message("system", "You tell stories about dragons."), Message("user", "Tell a story about a cat and a big boat."))


def candidate(text: str, *, is_complete: bool = True) -> Candidate:
    return Candidate(text, len(text.split()), is_complete)


def judge(*rules: dict[str, Any], margin: float = 0.0) -> RulesJudge:
    return RulesJudge(rules, tie_margin=margin)


def measure(rule: dict[str, Any], text: str, *, is_complete: bool = True) -> float:
    return judge({"weight": 1.0, **rule}).breakdown(PROMPT, candidate(text, is_complete=is_complete))[0].measure


WARM = {"kind": "lexicon", "name": "warm", "words": ["kind", "thank you"], "weight": 1.0}


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        (WARM, "A kind, KIND cat. Thank you!", 50.0),  # 3 matches in 6 words
        (WARM, "A kindly cat thanks you.", 0.0),  # whole words only
        (WARM, "", 0.0),
        ({**WARM, "cap": 8}, "kind kind", 8.0),
        ({**WARM, "measure": "count"}, "kind kind thank you", 3.0),
        ({**WARM, "measure": "count", "cap": 2}, "kind kind thank you", 2.0),
        ({**WARM, "measure": "present"}, "kind kind", 1.0),
        ({**WARM, "measure": "present"}, "nothing", 0.0),
        ({"kind": "lexicon", "words": ["don't", "Straße"]}, "I don’t like the STRASSE", 40.0),
        ({"kind": "pattern", "regex": "[A-Z]{5,}"}, "HELLO THERE", 1.0),
        ({"kind": "pattern", "regex": "[A-Z]{5,}", "measure": "count"}, "HELLO THERE", 2.0),
        ({"kind": "pattern", "regex": "x*", "measure": "count"}, "a x b", 1.0),  # an empty match is none
        ({"kind": "pattern", "regex": "!", "measure": "rate"}, "a b c d !", 25.0),
        ({"kind": "complete"}, "x", 1.0),
        ({"kind": "repetition"}, "a b c d a b c d", 1 - 4 / 5),  # abcd bcda cdab dabc abcd: 4 of 5 distinct
        ({"kind": "repetition"}, "a b c", 0.0),
        ({"kind": "mentions"}, "The CAT sat in a boat.", 2 / 5),  # tell story cat big boat; the system turn does not count
        ({"kind": "length", "min": 4, "max": 8}, "a b c d", 0.0),
        ({"kind": "length", "min": 4, "max": 8}, "a", -0.75),
        ({"kind": "length", "min": 4, "max": 8}, "a " * 12, -0.5),
        ({"kind": "length", "min": 4, "max": 8}, "a " * 80, -1.0),  # capped
        ({"kind": "length", "min": 4, "max": 8, "cap": 3}, "a " * 24, -2.0),
    ],
)  # fmt: skip
def test_measures_by_hand(rule: dict[str, Any], text: str, expected: float) -> None:
    assert measure(rule, text) == pytest.approx(expected)


def test_complete_is_zero_for_a_text_that_was_cut() -> None:
    assert measure({"kind": "complete"}, "x", is_complete=False) == 0.0


def test_score_is_the_weighted_sum_and_decides_the_verdict() -> None:
    rules = judge({**WARM, "measure": "count", "weight": 1.5}, {"kind": "complete", "weight": 2.0}, margin=0.5)
    warm, plain = candidate("kind kind"), candidate("x")
    assert rules.score(PROMPT, warm) == pytest.approx(1.5 * 2 + 2.0)
    assert [(one.name, one.points) for one in rules.breakdown(PROMPT, plain)] == [("warm", 0.0), ("complete", 2.0)]
    assert (rules(PROMPT, warm, plain).label, rules(PROMPT, warm, plain).score) == ("first", 1.0)
    assert (rules(PROMPT, plain, warm).label, rules(PROMPT, plain, warm).score) == ("second", 0.0)
    assert rules(PROMPT, warm, warm).label == "tie"


@pytest.mark.parametrize(("margin", "label"), [(0.0, "first"), (1.0, "first"), (1.01, "tie")])
def test_a_difference_below_the_margin_is_a_tie(margin: float, label: str) -> None:
    rules = judge({**WARM, "measure": "count"}, margin=margin)
    assert rules(PROMPT, candidate("kind"), candidate("x")).label == label


def test_equal_scores_are_a_tie_without_a_margin() -> None:
    verdict = judge(WARM)(PROMPT, candidate("x"), candidate("y"))
    assert (verdict.label, verdict.score) == ("tie", 0.5)


BAD: list[tuple[Any, type[Exception], str]] = [
    ({"name": "rule", "rules": [WARM]}, UnknownName, "did you mean 'rules'"),
    ({"rules": [WARM]}, UsageError, "name is missing"),
    ({"name": "rules", "rulez": [WARM]}, UnknownName, "no option 'rulez': did you mean 'rules'"),
    ({"name": "rules", "rules": []}, UsageError, "at least 1 entry, got []"),
    ({"name": "rules", "rules": "warm"}, UsageError, "option 'rules'"),
    ({"name": "rules", "rules": [WARM], "tie_margin": -1}, UsageError, "tie_margin"),
    ({"name": "rules", "rules": [{**WARM, "wieght": 1}]}, UnknownName, "rules.0: rule 'lexicon' has no option 'wieght': did"),
    ({"name": "rules", "rules": [{"kind": "lexicn"}]}, UnknownName, "no rule 'lexicn': did you mean 'lexicon'"),
    ({"name": "rules", "rules": [{"weight": 1}]}, UsageError, "rules.0: kind is missing"),
    ({"name": "rules", "rules": [{**WARM, "words": [False]}]}, UsageError, "rules.0.words: False is no text"),
    ({"name": "rules", "rules": [{**WARM, "words": ["--"]}]}, UsageError, "never matches"),
    ({"name": "rules", "rules": [{**WARM, "words": []}]}, UsageError, "words"),
    ({"name": "rules", "rules": [{**WARM, "weight": float("inf")}]}, UsageError, "weight"),
    ({"name": "rules", "rules": [{**WARM, "measure": "mean"}]}, UsageError, "measure"),
    ({"name": "rules", "rules": [{**WARM, "cap": 0}]}, UsageError, "cap"),
    ({"name": "rules", "rules": [{"kind": "complete"}]}, UsageError, "weight"),
    ({"name": "rules", "rules": [{"kind": "length", "weight": 1}]}, UsageError, "write min, max or both"),
    ({"name": "rules", "rules": [{"kind": "length", "weight": 1, "min": 9, "max": 3}]}, UsageError, "above max"),
    ({"name": "rules", "rules": [{"kind": "length", "weight": -1, "max": 3}]}, UsageError, "weight"),
    ({"name": "rules", "rules": [{"kind": "pattern", "regex": r"(a)\1", "weight": 1}]}, UsageError, "no backreferences"),
    ({"name": "rules", "rules": [{"kind": "pattern", "regex": "(", "weight": 1}]}, UsageError, "RE2 syntax"),
    ({"name": "rules", "rules": [WARM, WARM]}, UsageError, "two rules are called 'warm'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_bad_declarations_are_one_line(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        load_judge(given, Path())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_are_read_from_their_folder(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"name": "rules", "title": "t", "rules": [WARM]}))
    read = load_rules("judge.yaml", tmp_path)
    assert read.label == "rules 't'"
    assert read.identity == load_rules({"name": "rules", "rules": [WARM]}, Path()).identity


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InputError, "no such judge file"),
        (b"\xff\xfe", InputError, "cannot read the judge"),
        (b"{a: [", InputError, "no YAML"),
        (b"- a", UsageError, "a mapping"),
        (b"", UsageError, "a mapping"),
        (b"#" * (1 << 21), InputError, "no judge"),
        (b"!!python/object/apply:os.system ['true']", InputError, "no YAML"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes | None, error: type[Exception], message: str) -> None:
    if content is not None:
        (tmp_path / "j.yaml").write_bytes(content)
    with pytest.raises(error) as raised:
        load_judge("j.yaml", tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_identity_is_of_what_decides() -> None:
    base = judge(WARM)
    assert base.identity == RulesJudge(({**WARM, "measure": "rate", "cap": None},), title="other").identity
    assert base.identity != judge({**WARM, "weight": 1.1}).identity
    assert base.identity != judge(WARM, margin=0.1).identity
    assert base.describe()["identity"] == base.identity
    assert base.describe()["rules"][0]["measure"] == "rate"


def test_independence_names_every_shared_word() -> None:
    one = judge(WARM)
    assert independence(one, judge({**WARM, "words": ["gentle", "happy"]})) == []
    assert independence(one, judge({**WARM, "words": ["Kind", "you"]})) == ["kind", "you"]
    assert independence(one, judge({"kind": "pattern", "regex": r"(?i)\bkin", "weight": 1})) == ["kind"]
    assert independence(judge({"kind": "pattern", "regex": "Thank", "weight": 1}), one) == ["thank"]
    same = {"kind": "pattern", "regex": "zzz", "weight": 1}
    assert independence(judge(same), judge(same)) == ["/zzz/"]


def test_pay_for_length_is_reported() -> None:
    assert judge(WARM, {"kind": "length", "min": 3, "max": 9, "weight": 1}).rewards_length == []
    assert judge({**WARM, "measure": "count", "weight": -1.0}).rewards_length == []
    assert "measure: rate" in judge({**WARM, "measure": "count"}).rewards_length[0]
    assert "write max too" in judge({"kind": "length", "min": 3, "weight": 1}).rewards_length[0]
    assert judge({"kind": "pattern", "regex": "a", "measure": "count", "weight": 1}).rewards_length


def test_repeating_a_text_pays_only_where_length_is_counted() -> None:
    once, twice = candidate("kind cats nap all day long here now"), candidate("kind cats nap all day long here now " * 2)
    rate, count = judge(WARM), judge({**WARM, "measure": "count"})
    assert rate.score(PROMPT, twice) == pytest.approx(rate.score(PROMPT, once))
    assert count.score(PROMPT, twice) > count.score(PROMPT, once)


def test_hostile_text_costs_linear_time() -> None:
    # a backtracking engine takes exponential time on the first and quadratic on the second
    rules = judge(
        {"kind": "pattern", "regex": "(a+)+b", "name": "nested", "weight": 1},
        {"kind": "pattern", "regex": "a*a*a*c", "name": "three", "weight": 1},
        {"kind": "repetition", "weight": -1},
        WARM,
    )
    started = time.monotonic()
    assert rules.score(PROMPT, candidate("a" * 200_000 + "\ud800\x00")) == 0.0
    assert time.monotonic() - started < 5


def test_registries_name_their_leaves() -> None:
    assert "rules" in judges.names()
    assert set(rule_kinds.names()) >= {"lexicon", "pattern", "complete", "repetition", "mentions", "length"}
