"""Every error that preftune raises on purpose, and the exit code that each one means.

    PreftuneError              exit 1   the work could not be done
    ├── UsageError             exit 2   the request itself is wrong: an unknown verb, key or name
    │   ├── UnknownName        exit 2   a name that is not registered; the message lists what is
    │   └── RecipeError        exit 2   a recipe that does not validate; the message says which key and what to write
    ├── InputError             exit 1   a file that cannot be read: where (file, line, field), why, what to do
    │   └── BadRow             exit 1   one row of a data file; collected and counted rather than raised to the user
    ├── Blocked                exit 1   preflight refuses the run: typed findings, each with a way out
    ├── CheckpointError        exit 1   a checkpoint that is truncated, altered or of another run
    ├── NonFiniteLoss          exit 1   training stopped before the optimiser step; names the pairs
    ├── RankLost               exit 1   another process of a distributed run ended; what was saved before is whole
    └── Interrupted            exit 130 SIGINT or SIGTERM; a checkpoint was written first

Every message is one line: what, where, why, what to do. A traceback means a bug of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


class PreftuneError(Exception):
    """The work could not be done; the message is one line for the user."""

    exit_code: ClassVar[int] = 1


class UsageError(PreftuneError):
    """The request itself is wrong."""

    exit_code: ClassVar[int] = 2


class UnknownName(UsageError):
    """The name is not registered."""


class RecipeError(UsageError):
    """A recipe that does not validate."""


class InputError(PreftuneError):
    """A file that cannot be read as what it should be."""


class BadRow(InputError):
    """One row that is not an example. The reader adds file and line.

    Parameters
        reason: a short stable slug that is counted, such as ``identical`` or ``missing_field``.
        detail: one sentence for a person.
        field: the field of the row that is at fault, dotted for nested ones.
    """

    def __init__(self, reason: str, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.field = field


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact that preflight found: a blocker stops the run, a warning does not.

    >>> print(Finding("blocker", "no_chat_template", "model 'm' has no chat template", "set chat_template: chatml"))
    blocker no_chat_template: model 'm' has no chat template; set chat_template: chatml
    """

    level: Literal["blocker", "warning"]
    code: str
    fact: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.level} {self.code}: {self.fact}; {self.way_out}"


class Blocked(PreftuneError):
    """Preflight refuses the run; ``findings`` holds every blocker, not only the first."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("; ".join(str(finding) for finding in findings))
        self.findings = findings


class CheckpointError(PreftuneError):
    """A checkpoint that is truncated, altered or belongs to another run."""


class NonFiniteLoss(PreftuneError):
    """A loss or gradient that is not finite; raised before the optimiser step."""


class RankLost(PreftuneError):
    """Another process of the run ended or stopped answering; what was saved before is whole."""


class Interrupted(PreftuneError):
    """SIGINT or SIGTERM; a checkpoint was written first."""

    exit_code: ClassVar[int] = 130
