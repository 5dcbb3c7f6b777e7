"""``preftune --server URL eval``, and ``compare`` with a judge file: the server's models answer, and rules judge there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from preftune.cli.output import print_json, say
from preftune.core.errors import InputError, UsageError

if TYPE_CHECKING:
    from preftune.core import api

JUDGE_FILES = frozenset({".yaml", ".yml", ".json"})
PREFIX = "evaluation."
# what may be set, by the command line's key -> the field of a new evaluation, and its kind
SETTINGS: Mapping[str, tuple[str, type]] = {
    "limit": ("limit", int), "margin": ("margin", float), "decoding.temperature": ("temperature", float),
    "decoding.max_new_tokens": ("max_new_tokens", int),
}  # fmt: skip


def eval_there(server: str, model: str, baseline: str | None, overrides: Sequence[str], *, is_json: bool) -> int:
    """Evaluate a model of a server against ``baseline``, or the model that its job started from.

    Raises
        UsageError: prompts or a judge are missing, a setting does not go there, or no model to compare with is known.
        JobFailed: the evaluation did not succeed.
    """
    given = {one.partition("=")[0]: one.partition("=")[2] for one in overrides}
    unknown = [
        key for key in given if key.removeprefix(PREFIX) not in {"prompts", "judge", *SETTINGS} or not key.startswith(PREFIX)
    ]
    if unknown:
        known = ", ".join(f"{PREFIX}{key}" for key in ("prompts", "judge", *SETTINGS))
        raise UsageError(f"{unknown[0]} cannot be set on a server; {known} can")
    asked = {key.removeprefix(PREFIX): value for key, value in given.items()}
    prompts, judge = asked.pop("prompts", ""), asked.pop("judge", "")
    if not prompts or not judge:
        raise UsageError("on a server, write evaluation.prompts=FILE and evaluation.judge=FILE (rules, or a reward model's name)")
    if baseline is None:
        baseline = _start_of(server, model)
    settings = [f"{key}={value}" for key, value in asked.items()]
    if is_judge_file(judge):
        return contest_there(server, (model, baseline), judge, prompts, settings, is_json=is_json)
    from preftune.cli.remote_data import compare_there

    return compare_there(server, (model, baseline), judge, prompts, settings, is_json=is_json)


def is_judge_file(judge: str) -> bool:
    """Whether a judge is declared in a file, not a model that is asked."""
    return Path(judge).suffix in JUDGE_FILES


def contest_there(
    server: str, sides: tuple[str, str], judge: str | Mapping[str, Any], prompts: str, overrides: Sequence[str], *, is_json: bool
) -> int:
    """Let two models of a server answer prompts, and rules or a registered reward model there say which answer is better.

    Parameters
        judge: a file that declares it, or what such a file holds.

    Raises
        UsageError: a setting or a judge that does not go there.
        InputError: a file that cannot be read.
        JobFailed: the evaluation did not succeed.
    """
    from preftune.sdk import Client

    settings, declared = settings_of(overrides, SETTINGS), _declared(judge)
    if not Path(prompts).is_file():
        raise InputError(f"{prompts}: no such file; check the path")
    with Client(server) as client:
        file = client.files.upload(prompts, purpose="eval")
        made = client.evaluations.contest(sides[0], sides[1], judge=declared, prompts=file.id, **settings)
        say(f"evaluation {made.id}; Ctrl-C leaves it running, `preftune show {made.id}` comes back to it")
        result = client.jobs.wait(made.id).result
    if is_json:
        print_json({"evaluation": made.id, "first": sides[0], "second": sides[1], **result})
        return 0
    figures = result["win_rate"]
    click.echo(result["sentence"])
    click.echo(f"{sides[0]} wins {figures['wins']}, {sides[1]} wins {figures['losses']}, ties {figures['ties']}")
    return 0


def _start_of(server: str, model: str) -> str:
    """The name of the model that a tuned one was trained from."""
    from preftune.sdk import Client

    with Client(server) as client:
        found = client.models.get(model)
        if found.job is None:
            raise UsageError(f"{model} was not trained there; name what it is compared with: --baseline MODEL")
        job: api.JobDetail = client.jobs.get(found.job)
    stages = job.recipe["stages"]
    if len(stages) > 1:
        raise UsageError(
            f"{model} has {len(stages)} stages, and a server keeps the model of the last one only; name what it is compared "
            f"with: --baseline {job.model}"
        )
    return str(stages[0].get("from_checkpoint") or job.model)


def settings_of(overrides: Sequence[str], known: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """KEY=VALUE as the fields of a request; ``known``: each key's field, and what kind of number it takes.

    Raises
        UsageError: another key, or a value that is no such number.
    """
    found: dict[str, Any] = {}
    for one in overrides:
        key, _, text = one.partition("=")
        if key not in known:
            raise UsageError(f"{key} cannot be set on a server; {', '.join(known)} can")
        name, kind = known[key]
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(f"{key}={text}: write a number") from None
        if not value >= (key == "limit"):
            raise UsageError(f"{key}={text}: write a number from {int(key == 'limit')} on")
        found[name] = value
    return found


def _declared(judge: str | Mapping[str, Any]) -> dict[str, Any]:
    """What a judge file declares, checked here as far as it needs nothing of the server."""
    from preftune.judging.base import load_judge

    if isinstance(judge, Mapping):
        given: Any = judge
    else:
        try:
            given = yaml.safe_load(Path(judge).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            given = None
    if not isinstance(given, Mapping) or given.get("name") == "rules":
        load_judge(judge, Path())  # says what is wrong with it, with its place
    if not isinstance(given, Mapping) or given.get("name") not in {"rules", "reward_model"}:
        raise UsageError(
            f"judge {judge}: a server judges by rules or a registered reward model; a model that is asked is named itself, or as "
            "llm:MODEL@URL"
        )
    return dict(given)
