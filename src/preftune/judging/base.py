"""What a judge is: two completions of one prompt in, a verdict out. The caller runs both orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from preftune.core.errors import InputError, UsageError
from preftune.core.records import Messages
from preftune.core.registry import Registry, suggest

MAX_FILE_BYTES = 1 << 20


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


judges: Registry[Judge] = Registry("judge", "preftune.judging", "preftune.judges")


def load_judge(spec: str | Mapping[str, Any], base_folder: Path) -> Judge:
    """The judge that a YAML file or a mapping declares.

    Parameters
        spec: a path (relative ones from ``base_folder``), or a mapping with ``name`` and the judge's options.
        base_folder: the folder of the file that names the judge.

    Raises
        InputError: a file that is missing, unreadable or no YAML.
        UsageError: a judge, key or value that does not exist, with the nearest one that does.
    """
    if isinstance(spec, Mapping):
        return _build(spec, "judge")
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
