"""Graders that need no model: string checks, text similarity, and a sum of others by a formula that is read, never run."""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.app.grading.templates import fill
from preftune.core.errors import InputError, UsageError

NEED_A_MODEL = frozenset({"label_model", "score_model"})
PLAIN = frozenset({"string_check", "text_similarity"})
MAX_FORMULA = 500
_CHECKS: Mapping[str, Callable[[str, str], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "like": lambda text, part: part in text,
    "ilike": lambda text, part: part.casefold() in text.casefold(),
}
_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs}


@dataclass(frozen=True, slots=True)
class Graded:
    """What a grader says of one row: a score, and whether it passes."""

    name: str
    type: str
    score: float
    passed: bool
    detail: Mapping[str, Any]


def check_grader(grader: Mapping[str, Any], where: str = "grader") -> None:
    """Refuse a grader that is not offered or lacks what it needs.

    Raises
        UsageError: which one and why; ``python`` graders run code of users and are never offered.
    """
    kind = grader.get("type")
    if kind == "python":
        raise UsageError(f"{where}: python graders are not offered, because code of users is not run here; use another type")
    if kind == "multi":
        parts = _parts(grader)
        for name, part in parts.items():
            if part.get("type") not in ("string_check", "text_similarity"):
                raise UsageError(f"{where}.{name}: a multi grader takes {', '.join(sorted(PLAIN))}")
            check_grader(part, f"{where}.{name}")
        _must_be(grader, where, "calculate_output", str)
        read_formula(grader["calculate_output"], set(parts))
    elif kind in ("string_check", "text_similarity"):
        for key in ("input", "reference", "operation" if kind == "string_check" else "evaluation_metric"):
            _must_be(grader, where, key, str)
        if kind == "string_check" and grader["operation"] not in _CHECKS:
            raise UsageError(f"{where}: operation is one of {', '.join(_CHECKS)}")
        if kind == "text_similarity":
            _metric(grader["evaluation_metric"])
    elif kind in ("label_model", "score_model"):
        _check_asking(grader, where)
    else:
        raise UsageError(f"{where}: type {kind!r} is not offered; there is {', '.join(sorted(NEED_A_MODEL | PLAIN | {'multi'}))}")
    if not isinstance(grader.get("name", ""), str) or not _is_number(grader.get("pass_threshold", 0)):
        raise UsageError(f"{where}: name is a text, pass_threshold a number")


def _check_asking(grader: Mapping[str, Any], where: str) -> None:
    """A grader that asks a model: its name, the messages, and the labels or the range."""
    _must_be(grader, where, "model", str)
    _must_be(grader, where, "input", list)
    for turn in grader["input"]:
        if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "developer", "user", "assistant"):
            raise UsageError(f"{where}.input: a message has a role (system, developer, user, assistant) and content")
        if not isinstance(turn.get("content"), (str, Mapping, list)):
            raise UsageError(f"{where}.input: a message's content is a text")
    if grader["type"] == "label_model":
        for key in ("labels", "passing_labels"):
            _must_be(grader, where, key, list)
            if not grader[key] or not all(isinstance(one, str) and one for one in grader[key]):
                raise UsageError(f"{where}: {key} is a list of texts")
        if not set(grader["passing_labels"]) <= set(grader["labels"]):
            raise UsageError(f"{where}: passing_labels are some of the labels")
    span = grader.get("range") or [0, 1]
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_number, span)) or not span[0] < span[1]:
        raise UsageError(f"{where}: range is two numbers, the lower one first")


def _must_be(grader: Mapping[str, Any], where: str, key: str, kind: type) -> None:
    if not isinstance(grader.get(key), kind) or (kind is list and not grader[key]):
        raise UsageError(f"{where}: {key} is missing; it is a {'text' if kind is str else 'list'}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def grade(grader: Mapping[str, Any], item: Mapping[str, Any], sample: Mapping[str, Any]) -> Graded:
    """The grade of a grader that needs no model.

    Raises
        InputError: the row lacks a field that the grader names.
        UsageError: see ``check_grader``.
    """
    kind, name = str(grader["type"]), str(grader.get("name", grader["type"]))
    if kind == "multi":
        scores = {part: grade(one, item, sample).score for part, one in _parts(grader).items()}
        total = compute(read_formula(str(grader["calculate_output"]), set(scores)), scores)
        return Graded(name, kind, total, total >= float(grader.get("pass_threshold", 0.5)), {"scores": scores})
    text, reference = (fill(str(grader[key]), item, sample) for key in ("input", "reference"))
    if kind == "string_check":
        passed = _CHECKS[str(grader["operation"])](text, reference)
        return Graded(name, kind, float(passed), passed, {})
    score = _metric(str(grader["evaluation_metric"]))(text, reference)
    return Graded(name, kind, score, score >= float(grader.get("pass_threshold", 0.5)), {})


def read_formula(text: str, names: set[str]) -> ast.expr:
    """``calculate_output`` as a tree of numbers, names, + - * / and min, max, abs; anything else is refused.

    >>> compute(read_formula("(a + b) / 2", {"a", "b"}), {"a": 1.0, "b": 0.5})
    0.75
    """
    if not text.strip() or len(text) > MAX_FORMULA:
        raise UsageError(f"calculate_output: write a formula of at most {MAX_FORMULA} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UsageError(f"calculate_output: {text!r} is no formula") from None
    _check(tree, names)
    return tree


def _check(tree: ast.AST, names: set[str]) -> None:
    match tree:
        case ast.Constant(value=bool()):
            raise UsageError("calculate_output: true and false are no numbers")
        case ast.Constant(value=int() | float()):
            return
        case ast.Name(id=name) if name in names:
            return
        case ast.Name(id=name):
            raise UsageError(f"calculate_output: there is no grader {name!r}; there is {', '.join(sorted(names))}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, names)
            _check(right, names)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _check(operand, names)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
            for one in args:
                _check(one, names)
        case _:
            raise UsageError("calculate_output: use numbers, graders' names, + - * /, brackets, min, max and abs")


def compute(tree: ast.expr, scores: Mapping[str, float]) -> float:
    """The value of a formula that ``read_formula`` took."""
    try:
        value = _value(tree, scores)
    except (ZeroDivisionError, OverflowError):
        raise InputError("calculate_output: the formula has no value for this row") from None
    if not math.isfinite(value):
        raise InputError("calculate_output: the formula has no value for this row")
    return value


def _value(tree: ast.AST, scores: Mapping[str, float]) -> float:
    match tree:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return scores[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, scores)
        case ast.UnaryOp(operand=operand):
            return _value(operand, scores)
        case ast.Call(func=ast.Name(id=name), args=args):
            values = [_value(one, scores) for one in args]
            return float(_FUNCTIONS[name](*values) if len(values) > 1 or name == "abs" else values[0])
        case _:
            raise UsageError("calculate_output: this was not read")


def _parts(grader: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The graders of a multi grader by name: OpenAI sends one, or a mapping, or a list."""
    given = grader.get("graders")
    if isinstance(given, Mapping) and "type" in given:
        given = {str(given.get("name", "grader")): given}
    if isinstance(given, list):
        given = {str(one.get("name", index)): one for index, one in enumerate(given) if isinstance(one, Mapping)}
    if not isinstance(given, Mapping) or not given or len(given) > 50:
        raise UsageError("graders: name the graders of a multi grader, at most 50")
    return {str(name): one for name, one in given.items() if isinstance(one, Mapping)}


def _metric(name: str) -> Callable[[str, str], float]:
    if name == "fuzzy_match":
        return lambda text, reference: difflib.SequenceMatcher(None, text[:10_000], reference[:10_000], autojunk=False).ratio()
    if name == "rouge_l":
        return _rouge_l
    if name in {f"rouge_{size}" for size in range(1, 6)}:
        return lambda text, reference: _rouge_n(text, reference, int(name[-1]))
    raise UsageError(f"evaluation_metric {name!r} is not offered; there is fuzzy_match, rouge_1 to rouge_5 and rouge_l")


def _rouge_n(text: str, reference: str, size: int) -> float:
    """F1 of the n-grams that two texts share (ROUGE-N, Lin 2004), on lower-case words."""
    one, other = (_grams(words.lower().split(), size) for words in (text, reference))
    shared = sum((one & other).values())
    return 2 * shared / (sum(one.values()) + sum(other.values())) if shared else 0.0


def _grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of two texts' lower-case words (ROUGE-L, Lin 2004)."""
    one, other = text.lower().split()[:2000], reference.lower().split()[:2000]
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, known in enumerate(other):
            row.append(before[place] + 1 if word == known else max(row[-1], before[place + 1]))
        before = row
    return 2 * before[-1] / (len(one) + len(other)) if before[-1] else 0.0
