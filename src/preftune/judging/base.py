"""What a judge is: two completions of one prompt in, a verdict out. The caller runs both orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import yaml

from preftune.core.errors import InputError, PreftuneError, UsageError
from preftune.core.records import Messages
from preftune.core.registry import Registry, suggest

MAX_FILE_BYTES = 1 << 20
SHORT_LLM = "llm:"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion as a judge sees it.

    Parameters
        text: the assistant's text; hostile input, never interpreted.
        num_tokens: tokens generated, the end token included.
        is_complete: the model ended by itself rather than at the length limit.
    """

    text: str
    num_tokens: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement of two completions in the order shown.

    Parameters
        score: in [0, 1]; 1 = the first is better, 0 = the second, one half = no difference.
        label: ``first``, ``second`` or ``tie``.
        detail: what the judge has to say for itself, JSON values only.
    """

    score: float
    label: Literal["first", "second", "tie"]
    detail: Mapping[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """Says which of two completions of a prompt is better."""

    @property
    def identity(self) -> str:
        """Digest of everything that decides a verdict; equal digests mean equal verdicts."""

    def describe(self) -> dict[str, Any]:
        """The judge in JSON values, for a report: ``name``, ``title``, ``identity`` and its settings."""

    def __call__(self, prompt: Messages, first: Candidate, second: Candidate) -> Verdict:
        """Judge two completions in this order."""


class NoVerdict(PreftuneError):
    """A judge that was asked and gave no verdict; the pair is left out and counted, never scored."""


Request: TypeAlias = tuple[Messages, Candidate, Candidate]
OnProgress: TypeAlias = Callable[[int, int], None]


@runtime_checkable
class ManyJudge(Protocol):
    """A judge that answers many requests at once, such as one behind a network."""

    def judge_many(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Verdict | None]:
        """A verdict for every request in its order; None where there is none."""


@runtime_checkable
class PreparedJudge(Protocol):
    """A judge that needs a key, a model or a cache before the first request."""

    def prepare(self, cache: Path | None) -> None:
        """Get ready; errors of the environment are raised here. cache: a folder in which verdicts may be kept."""


@runtime_checkable
class CountingJudge(Protocol):
    """A judge that keeps account of its requests."""

    def counts(self) -> dict[str, Any]:
        """What was asked, answered, kept and refused so far, in JSON values."""


def judge_all(judge: Judge, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Verdict | None]:
    """A verdict for every request in its order, None where the judge gave none; at once where the judge can do that.

    Raises
        PreftuneError: a score outside [0, 1].
    """
    if isinstance(judge, ManyJudge):
        verdicts = judge.judge_many(requests, on_progress)
    else:
        verdicts = []
        for prompt, first, second in requests:
            try:
                verdicts.append(judge(prompt, first, second))
            except NoVerdict:
                verdicts.append(None)
            if on_progress is not None:
                on_progress(len(verdicts), len(requests))
    for verdict in verdicts:
        if verdict is not None and not 0.0 <= verdict.score <= 1.0:
            raise PreftuneError(f"judge {judge.describe().get('name')!r} gave the score {verdict.score}; it must lie in [0, 1]")
    return verdicts


def names_of(judge: Judge) -> list[str]:
    """What rows carry of the judge that labelled them: its identity, and the model that it asks, if it asks one."""
    told = judge.describe()
    models = [f"{told['name']}:{told[key]}" for key in ("model", "weights") if told.get(key)]
    return [judge.identity, *models]


def counts_of(judge: Judge) -> dict[str, Any]:
    """The judge's account; empty where it keeps none."""
    return judge.counts() if isinstance(judge, CountingJudge) else {}


judges: Registry[Judge] = Registry("judge", "preftune.judging", "preftune.judges")


def prepared_judge(spec: str | Mapping[str, Any], base_folder: Path, cache: Path | None) -> Judge:
    """``load_judge``, made ready to answer; verdicts that cost something are kept below ``cache``."""
    judge = load_judge(spec, base_folder)
    if isinstance(judge, PreparedJudge):
        judge.prepare(cache)
    return judge


def is_short_form(spec: str) -> bool:
    """Whether a text is a judge by itself, ``llm:MODEL@URL``, rather than a path."""
    return spec.startswith(SHORT_LLM)


def load_judge(spec: str | Mapping[str, Any], base_folder: Path) -> Judge:
    """The judge that a YAML file, a mapping or the short form declares.

    Parameters
        spec: a path (relative ones from ``base_folder``), ``llm:MODEL@URL``, or a mapping with ``name`` and the judge's
            options.
        base_folder: the folder of the file that names the judge.

    Raises
        InputError: a file that is missing, unreadable or no YAML.
        UsageError: a judge, key or value that does not exist, with the nearest one that does.
    """
    if isinstance(spec, Mapping):
        return _build(spec, "judge")
    if is_short_form(spec):
        model, at, url = spec.removeprefix(SHORT_LLM).rpartition("@")
        if not at or not model or not url:
            raise UsageError(f"judge {spec!r}: the short form is llm:MODEL@URL, such as llm:qwen2.5:7b@http://localhost:11434/v1")
        return _build({"name": "llm", "model": model, "url": url}, "judge")
    path = Path(base_folder, spec)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes is no judge; a judge is a YAML file of at most 1 MiB")
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such judge file; write a path from {base_folder}, or the judge itself") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the judge: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, Mapping):
        raise UsageError(f"{path}: a judge is a mapping with name and options, got {type(given).__name__}")
    return _build(given, str(path))


def _build(given: Mapping[str, Any], where: str) -> Judge:
    options = dict(given)
    if "name" not in options:
        raise UsageError(f"{where}: name is missing: {suggest('', judges.names())}")
    name = options.pop("name")
    try:
        return judges.build(str(name), options)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None
