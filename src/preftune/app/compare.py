"""Two models, or what two models wrote, compared by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.contest import Contest
from preftune.app.context import Context
from preftune.app.named import find_named
from preftune.core.errors import InputError, UsageError
from preftune.core.events import EventSink, ignore
from preftune.core.recipe import ModelConfig, Recipe

if TYPE_CHECKING:
    from preftune.app.evaluate import EvaluationResult
    from preftune.data.pipeline import PromptRow
    from preftune.judging.base import Candidate


def compare(
    first: str,
    second: str,
    *,
    judge: str | Mapping[str, Any],
    prompts: str | None = None,
    overrides: Sequence[str] = (),
    output: Path = Path("runs"),
    sink: EventSink = ignore,
    labels: tuple[str, str] | None = None,
) -> EvaluationResult:
    """How often the first wins over the second, with the same figures and report as an evaluation.

    Parameters
        first, second: a run, ``RUN@STEP``, a folder, a hub id or ``starter``; or a file of completions with prompts, whatever
            model wrote them.
        judge: a judge file, ``llm:MODEL@URL``, or a mapping. prompts: a file; where both sides are files, those that the first
            answers.
        overrides: keys of the evaluation section, such as ``limit=100`` or ``decoding.temperature=0``.
        labels: what the sides are called in the report; their last names where it is None.

    Raises
        UsageError: no such model, or no prompts.
        InputError: a file of completions that lacks a prompt.
    """
    from preftune.app.evaluate import hold, next_folder
    from preftune.app.recipes import apply_override, make_recipe

    files = {role: given for role, given in (("policy", first), ("baseline", second)) if Path(given).expanduser().is_file()}
    asked = prompts or (files["policy"] if len(files) == 2 else None)
    if asked is None:
        raise UsageError("--prompts is missing: name a file of prompts (two files of completions bring their own)")
    given: dict[str, Any] = {"model": "starter", "method": "sft", "evaluation": {"prompts": asked, "judge": judge}}
    for one in overrides:
        key, sign, value = one.partition("=")
        apply_override(given, f"evaluation.{key.removeprefix('evaluation.')}{sign}{value}")
    recipe = make_recipe(given)
    assert recipe.evaluation is not None
    contest = Contest(
        recipe,
        recipe.evaluation,
        policy=_config(recipe, first, output, "policy" in files),
        baseline=_config(recipe, second, output, "baseline" in files),
        folder=next_folder(output, "comparison"),
        run=None,
        written={role: _completions(path) for role, path in files.items()},
        policy_label=labels[0] if labels else _label(first),
        baseline_label=labels[1] if labels else _label(second),
    )
    return hold(contest, sink, Context.from_environment())


def written_answers(contest: Contest, rows: Sequence[PromptRow], role: str) -> list[Candidate]:
    """The completions of a side that were written before, in the order of the prompts.

    Raises
        InputError: a prompt that the file does not answer.
    """
    from preftune.evaluation.winrate import prompt_key

    known = contest.written[role]
    config = contest.policy if role == "policy" else contest.baseline
    missing = [row for row in rows if prompt_key(row.prompt) not in known]
    if missing:
        where = missing[0].provenance
        raise InputError(
            f"{config.name}: has no completion for {len(missing)} of {len(rows)} prompts, first {where.file}:{where.line}; "
            "add them, or compare on the prompts of both"
        )
    return [known[prompt_key(row.prompt)] for row in rows]


def _label(given: str) -> str:
    """A side in the words of a sentence: what the user called it, without the folders before it."""
    return given.rstrip("/").rpartition("/")[2] or given


def _config(recipe: Recipe, given: str, output: Path, is_file: bool) -> ModelConfig:
    if is_file:
        return recipe.model.model_copy(update={"name": str(Path(given).expanduser().resolve()), "revision": None})
    return find_named(given, output).config


def _completions(path: str) -> Mapping[str, Candidate]:
    """Completion by prompt: of demonstrations and completions files the text, of pairs the chosen side."""
    from preftune.core.records import demonstration_of, text_of
    from preftune.data.pipeline import read_examples
    from preftune.evaluation.winrate import prompt_key
    from preftune.judging.base import Candidate

    found: dict[str, Candidate] = {}
    for example in read_examples([path], style="chat").examples:
        completion = demonstration_of(example)
        if completion is not None:
            text = text_of(completion)
            found.setdefault(prompt_key(example.prompt), Candidate(text, len(text.split()), is_complete=True))
    if not found:
        raise InputError(f"{path}: holds no completion; rows are prompt and completion")
    return found
