"""Templates and graders of users: what they give, and that nothing of theirs is ever run."""

import pytest

from preftune.app.grading.graders import check_grader, compute, grade, read_formula
from preftune.app.grading.run import _reconciled
from preftune.app.grading.templates import fill, render
from preftune.core.errors import InputError, UsageError

LABELS = {
    "type": "label_model", "labels": ["a"], "passing_labels": ["a"], "model": "m", "input": [{"role": "user", "content": "x"}],
}  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ row.update({'a': 1}) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ missing }}",
        "{% if %}",
        "x" * 30_000,
    ],
)
def test_a_template_that_is_refused(template):
    with pytest.raises(InputError, match="template"):
        render(template, {"row": {}})


def test_a_place_in_a_text_is_no_jinja():
    assert fill("{{item.a.b}} {{ 7*7 }} {% x %}", {"a": {"b": "{{item.c}}"}}, {}) == "{{item.c}} {{ 7*7 }} {% x %}"
    with pytest.raises(InputError, match=r"no sample\.output_text"):
        fill("{{sample.output_text}}", {}, {})


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os').system('touch pwned')", "a.__class__", "a ** 99999", "a if a else a", "[a for a in a]", "b", "True", "",
        "lambda: 1", "a; a", "open('x')", "a" + "+a" * 500, "f'{a}'", "a and a", "max(*a)", "min(key=a)",
    ],
)  # fmt: skip
def test_a_formula_that_is_refused(formula, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="calculate_output"):
        read_formula(formula, {"a"})
    assert not list(tmp_path.iterdir())


def test_formulas():
    scores = {"a": 0.5, "b": 0.25}
    assert compute(read_formula("-(a - b) * 4 + max(a, b, 1) / 2", scores.keys()), scores) == pytest.approx(-0.5)
    assert compute(read_formula("abs(b - a)", scores.keys()), scores) == pytest.approx(0.25)
    with pytest.raises(InputError, match="no value"):
        compute(read_formula("a / (b - b)", scores.keys()), scores)


def check(operation, text, reference):
    grader = {
        "type": "string_check",
        "name": "g",
        "operation": operation,
        "input": "{{sample.output_text}}",
        "reference": reference,
    }
    return grade(grader, {}, {"output_text": text}).passed


def test_string_checks():
    assert [check("eq", "a", "a"), check("eq", "a", "A"), check("ne", "a", "b")] == [True, False, True]
    assert [check("like", "say Paris", "Paris"), check("like", "say paris", "Paris"), check("ilike", "say paris", "Paris")] == [
        True, False, True,
    ]  # fmt: skip


def similar(metric, text, reference):
    grader = {"type": "text_similarity", "evaluation_metric": metric, "input": "{{item.a}}", "reference": "{{item.b}}",
              "pass_threshold": 0.6}  # fmt: skip
    return grade(grader, {"a": text, "b": reference}, {})


def test_similarities():
    # 3 of 4 and 3 of 3 words: 2 * 3 / 7; the bigrams "the cat" and "cat sat": 2 * 2 / 5; the longest subsequence has 3 words
    assert similar("rouge_1", "the cat sat down", "The cat sat").score == pytest.approx(6 / 7)
    assert similar("rouge_2", "the cat sat down", "the cat sat").score == pytest.approx(4 / 5)
    assert similar("rouge_l", "the big cat sat", "the cat sat").score == pytest.approx(6 / 7)
    assert similar("rouge_3", "a b", "a b").score == 0.0
    assert similar("fuzzy_match", "abcd", "abcd").passed
    assert not similar("fuzzy_match", "abcd", "wxyz").passed


@pytest.mark.parametrize(
    ("grader", "words"),
    [
        ({"type": "python", "source": "import os"}, "code of users is not run"),
        ({"type": "multi", "graders": {"p": {"type": "python"}}, "calculate_output": "p"}, "a multi grader takes"),
        ({"type": "string_check", "operation": "regex", "input": "", "reference": ""}, "operation is one of"),
        ({"type": "string_check", "operation": ["eq"], "input": "", "reference": ""}, "operation is missing"),
        ({"type": ["string_check"]}, "is not offered"),
        ({"type": "text_similarity", "evaluation_metric": "cosine", "input": "", "reference": ""}, "is not offered"),
        ({**LABELS, "passing_labels": ["b"]}, "passing_labels are some"),
        ({**LABELS, "input": [{"role": "robot", "content": "x"}]}, "a message has a role"),
        ({**LABELS, "type": "score_model", "range": [1, 0]}, "the lower one first"),
        ({"type": "nothing"}, "is not offered"),
    ],
)
def test_a_grader_that_is_refused(grader, words):
    with pytest.raises(UsageError, match=words):
        check_grader(grader)


def test_two_orders_are_one_choice():
    # the second letter is that of the turned order: there B means the first answer
    both = {(x, y): _reconciled(x, y, both=True) for x in ("A", "B", "TIE") for y in ("A", "B", "TIE")}
    assert both == {
        ("A", "B"): "A", ("B", "A"): "B", ("A", "A"): "TIE", ("B", "B"): "TIE", ("TIE", "TIE"): "TIE",
        ("A", "TIE"): "A", ("TIE", "B"): "A", ("B", "TIE"): "B", ("TIE", "A"): "B",
    }  # fmt: skip
    assert _reconciled("A", None, both=True) is None
    assert _reconciled("A", "A", both=False) == "A"
