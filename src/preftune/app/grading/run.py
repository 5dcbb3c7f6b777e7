"""An evaluation from its task to its report: answers are written where there are none, then judged row by row."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from preftune.app.grading.asking import Asked, LocalModel, Sampling, Turns, Written, model_of
from preftune.app.grading.contests import REPORT, ROWS, run_contest
from preftune.app.grading.graders import NEED_A_MODEL, Graded, grade
from preftune.app.grading.templates import fill, render
from preftune.core.errors import InputError
from preftune.core.files import replacing, write_json
from preftune.core.records import Message
from preftune.judging.base import Candidate
from preftune.judging.llm_prompt import question

MAX_ROWS = 100_000
LETTERS = ("A", "B", "TIE")


def run(task: Mapping[str, Any], folder: Path) -> None:
    """Do the task; ``folder`` gets the report and a line for every row.

    Raises
        InputError: the file holds no rows, or a row lacks a column that the evaluation names.
    """
    if task["kind"] == "contest":
        run_contest(task, folder)
        return
    rows = list(_rows(Path(task["path"])))
    kinds = {"compare": _compare, "score": _score, "classify": _classify, "graders": _graders}
    lines, report = kinds[task["kind"]](task, rows)
    with replacing(folder / ROWS) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    write_json(folder / REPORT, report)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    from preftune.data.sources.base import source_for

    count = 0
    for number, row in source_for(path)[1].rows(path):
        if not isinstance(row, Mapping):
            raise InputError(f"row {number} of the file is no object of columns and values")
        count += 1
        if count > MAX_ROWS:
            raise InputError(f"the file has more than {MAX_ROWS:,} rows; evaluate a part of them")
        yield dict(row)
    if not count:
        raise InputError("the file has no rows")


# ---- what one side wrote ---------------------------------------------------------------------------------------------------


def _side(spec: Any, rows: Sequence[Mapping[str, Any]]) -> list[Written | None]:
    """A column of the rows, or what a model answers to its template over them."""
    if isinstance(spec, str):
        missing = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get(spec), str)), None)
        if missing is not None:
            raise InputError(f"row {missing} has no text in column {spec!r}")
        return [Written(str(row[spec])) for row in rows]
    asked: list[Turns] = []
    for row in rows:
        system = render(spec["system_template"], row) if spec.get("system_template") else ""
        turns = [("system", system)] if system else []
        asked.append([*turns, ("user", render(spec["input_template"], row))])
    sampling = Sampling(float(spec.get("temperature", 0.7)), 1.0, int(spec.get("max_tokens", 512)))
    return model_of(spec).answers(asked, sampling)


def _prompt_of(spec: Any, row: Mapping[str, Any], columns: set[str]) -> str:
    """What was asked: the rendered template of a side, the column ``prompt``, or the row without the answers."""
    if isinstance(spec, Mapping):
        return render(spec["input_template"], row)
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    return json.dumps({key: value for key, value in row.items() if key not in columns}, ensure_ascii=False)


# ---- Together's three kinds ------------------------------------------------------------------------------------------------


def _compare(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    sides = [_side(task[key], rows) for key in ("model_a", "model_b")]
    judge = model_of(task["judge"])
    columns = {spec for spec in (task["model_a"], task["model_b"]) if isinstance(spec, str)}
    spec = next((task[key] for key in ("model_a", "model_b") if isinstance(task[key], Mapping)), None)
    counts: Counter[str] = Counter()
    lines = []
    for row, first, second in zip(rows, *sides, strict=True):
        line: dict[str, Any] = dict(row)
        if first is None or second is None:
            counts["generation_fail_count"] += 1
            lines.append({**line, "choice": None})
            continue
        prompt = _prompt_of(spec, row, columns)
        criteria = render(task["judge"]["system_template"], row)
        original = _verdict(judge, criteria, prompt, first.text, second.text)
        turned = original if not task["both_orders"] else _verdict(judge, criteria, prompt, second.text, first.text)
        counts["judge_fail_count"] += (original is None) + (turned is None and task["both_orders"])
        line |= {"MODEL_A_response": first.text, "MODEL_B_response": second.text, "choice_original": original}
        if task["both_orders"]:
            line["choice_flipped"] = turned
        choice = _reconciled(original, turned, both=task["both_orders"])
        if choice is not None:
            counts[{"A": "A_wins", "B": "B_wins"}.get(choice, "Ties")] += 1
        lines.append({**line, "choice": choice})
    names = ("A_wins", "B_wins", "Ties", "generation_fail_count", "judge_fail_count")
    return lines, {name: counts[name] for name in names}


def _reconciled(original: str | None, turned: str | None, *, both: bool) -> str | None:
    """A or B where the two orders do not contradict each other, else a tie; None without a whole verdict."""
    if original is None or turned is None:
        return None
    if not both:
        return original
    back = {"A": "B", "B": "A"}.get(turned, "TIE")
    values = {"A": 1, "B": -1, "TIE": 0}
    total = values[original] + values[back]
    return "A" if total > 0 else "B" if total < 0 else "TIE"


def _verdict(judge: Asked, criteria: str, prompt: str, first: str, second: str) -> str | None:
    candidates = [Candidate(text, len(text.split()), is_complete=True) for text in (first, second)]
    text = question("", criteria, (Message("user", prompt),), *candidates)
    return judge.choose([("user", text)], LETTERS)


def _one_answer(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Turns | None]]:
    """Each row with what the judge is asked of its answer; None where there is no answer."""
    answers = _side(task["model_to_evaluate"], rows)
    spec = task["model_to_evaluate"]
    columns = {spec} if isinstance(spec, str) else set()
    for row, written in zip(rows, answers, strict=True):
        if written is None:
            yield dict(row), None
            continue
        asked = _prompt_of(spec, row, columns)
        system = render(task["judge"]["system_template"], row)
        yield {**row, "response": written.text}, [("system", system), ("user", f"PROMPT:\n{asked}\n\nANSWER:\n{written.text}")]


def _score(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    judge, low, high = model_of(task["judge"]), float(task["min_score"]), float(task["max_score"])
    lines, scores, failed = [], [], 0
    for line, turns in _one_answer(task, rows):
        value = None if turns is None else judge.score(turns, low, high)
        failed += turns is None
        lines.append({**line, "score": value})
        if value is not None:
            scores.append(value)
    passed = sum(value >= float(task["pass_threshold"]) for value in scores)
    together = {
        "mean_score": fmean(scores) if scores else None,
        "std_score": pstdev(scores) if scores else None,
        "pass_percentage": 100 * passed / len(scores) if scores else None,
    }
    invalid = len(rows) - failed - len(scores)
    return lines, {
        "aggregated_scores": together, "generation_fail_count": failed, "invalid_score_count": invalid,
        "judge_fail_count": invalid, "failed_samples": failed + invalid,
    }  # fmt: skip


def _classify(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    judge, labels = model_of(task["judge"]), [str(label) for label in task["labels"]]
    lines, counts, failed = [], Counter[str](), 0
    for line, turns in _one_answer(task, rows):
        label = None if turns is None else judge.choose(turns, labels)
        failed += turns is None
        lines.append({**line, "label": label})
        if label is not None:
            counts[label] += 1
    total = sum(counts.values())
    passed = sum(counts[label] for label in task["pass_labels"])
    invalid = len(rows) - failed - total
    return lines, {
        "label_counts": dict(counts), "pass_percentage": 100 * passed / total if total else None,
        "generation_fail_count": failed, "invalid_label_count": invalid, "judge_fail_count": invalid,
    }  # fmt: skip


# ---- OpenAI's graders ------------------------------------------------------------------------------------------------------


def _graders(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    items = [row["item"] if isinstance(row.get("item"), Mapping) else row for row in rows]
    samples, usage = _samples(task, rows, items)
    models = {name: model_of(spec) for name, spec in task["models"].items()}
    lines: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    passes: dict[str, Counter[str]] = {}
    for item, sample in zip(items, samples, strict=True):
        results, error = [], ""
        for grader in task["graders"]:
            try:
                graded = _graded(grader, models, item, sample)
            except InputError as caught:
                graded, error = None, str(caught)
            if graded is not None:
                results.append({**asdict(graded), "detail": dict(graded.detail)})
                passes.setdefault(graded.name, Counter())["passed" if graded.passed else "failed"] += 1
            elif not error:
                error = f"grader {grader.get('name')!r}: its model gave no verdict"
        status = "error" if error else "pass" if all(one["passed"] for one in results) else "fail"
        counts[{"error": "errored", "pass": "passed", "fail": "failed"}[status]] += 1
        lines.append({"item": item, "sample": sample, "results": results, "status": status, "error": error})
    totals = {"total": len(rows), **{name: counts[name] for name in ("passed", "failed", "errored")}}
    criteria = [
        {"testing_criteria": name, "passed": found["passed"], "failed": found["failed"]} for name, found in passes.items()
    ]
    return lines, {"result_counts": totals, "per_testing_criteria_results": criteria, "usage": usage}


def _samples(
    task: Mapping[str, Any], rows: list[dict[str, Any]], items: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What each row's answer is: written before, or written now by the model of the run."""
    spec = task.get("sample")
    if spec is None:
        return [dict(row["sample"]) if isinstance(row.get("sample"), Mapping) else {} for row in rows], {}
    asked = [[(turn["role"], fill(turn["content"], item, {})) for turn in spec["template"]] for item in items]
    sampling = Sampling(**spec["sampling"])
    samples, usage = [], Counter[str]()
    for turns, written in zip(asked, model_of(spec).answers(asked, sampling), strict=True):
        told: dict[str, Any] = {"input": [{"role": role, "content": text} for role, text in turns]}
        if written is None:
            samples.append({**told, "error": "the prompt leaves no room for an answer"})
            continue
        usage.update({"invocation_count": 1, "prompt_tokens": written.num_prompt_tokens, "completion_tokens": written.num_tokens})
        samples.append({
            **told, "output_text": written.text, "finish_reason": "stop" if written.is_complete else "length",
            "prompt_tokens": written.num_prompt_tokens, "completion_tokens": written.num_tokens,
        })  # fmt: skip
    return samples, dict(usage)


def _graded(
    grader: Mapping[str, Any], models: Mapping[str, Asked], item: Mapping[str, Any], sample: Mapping[str, Any]
) -> Graded | None:
    """A grade, None where the grader's model gives no verdict."""
    if grader["type"] not in NEED_A_MODEL:
        return grade(grader, item, sample)
    name, kind = str(grader.get("name", grader["type"])), str(grader["type"])
    turns = [(str(turn["role"]), fill(_text(turn["content"]), item, sample)) for turn in grader["input"]]
    model = models[str(grader["model"])]
    if kind == "label_model":
        labels = [str(label) for label in grader["labels"]]
        label = model.choose(turns, labels)
        if label is None:
            return None
        passed = label in grader["passing_labels"]
        detail: dict[str, Any] = {"label": label}
        if isinstance(model, LocalModel):
            shares = model.shares(turns, labels) or []
            detail["shares"] = dict(zip(labels, shares, strict=False))
        return Graded(name, kind, float(passed), passed, detail)
    low, high = (float(one) for one in grader.get("range") or (0.0, 1.0))
    score = model.score(turns, low, high)
    if score is None or not math.isfinite(score):
        return None
    return Graded(name, kind, score, score >= float(grader.get("pass_threshold", (low + high) / 2)), {})


def _text(content: Any) -> str:
    """The text of a message, which may be an object or a list of them."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
