"""``preftune --server URL check`` and ``compare``: files go to the server, which validates them or lets a judge decide."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preftune.cli.output import print_json, say
from preftune.cli.remote_eval import contest_there, is_judge_file, settings_of
from preftune.core.errors import InputError, UsageError
from preftune.core.served import AskedModel

if TYPE_CHECKING:
    from preftune.core import api
    from preftune.sdk import Client

VALIDATION_SECONDS = 3600.0
SETTINGS: Mapping[str, tuple[str, type]] = {
    "limit": ("limit", int), "decoding.temperature": ("temperature", float), "decoding.max_new_tokens": ("max_tokens", int),
}  # fmt: skip


def check_there(server: str, files: Sequence[Path], *, shown: int | None, is_json: bool) -> int:
    """Upload files, and print what the server's validation found; the exit code is ``check``'s.

    Raises
        InputError: no such file.
    """
    from preftune.sdk import Client

    reports: list[tuple[api.File, api.FileReport]] = []
    with Client(server) as client:
        for path in files:
            kept = client.files.upload(path)
            say(f"{path}: uploaded as {kept.id}; the server validates it")
            reports.append((client.files.wait(kept.id, timeout=VALIDATION_SECONDS), client.files.report(kept.id)))
    is_good = all(report.valid and not report.num_excluded for _, report in reports)
    if is_json:
        print_json([{"id": file.id, "filename": file.filename, **report.model_dump()} for file, report in reports])
        return 0 if is_good else 1
    for file, report in reports:
        for row in report.bad_rows[:shown]:
            field = f" field {row.field!r}" if row.field else ""
            click.echo(f"{file.filename}:{row.line}{field} {row.reason}: {row.message}")
        if report.error:
            click.echo(f"{file.filename}: {report.error}")
        counts = f"{report.num_rows or 0} good rows, {report.num_excluded} bad rows"
        click.echo(f"{file.id}  {file.filename}: format {report.format}, {counts}")
    return 0 if is_good else 1


def compare_there(
    server: str, sides: tuple[str, str], judge: str, prompts: str | None, overrides: Sequence[str], *, is_json: bool
) -> int:
    """Let two models of a server answer prompts, and a judge there say which answer is better.

    Raises
        UsageError: a side or a judge that is no model of a server; a setting that does not go there.
        InputError: a row of the prompts has no text.
        JobFailed: the evaluation did not succeed.
    """
    from preftune.sdk import Client

    if prompts is None or any(Path(side).is_file() for side in sides):
        raise UsageError("on a server, name two of its models and --prompts FILE; files are compared without --server")
    if is_judge_file(judge):
        return contest_there(server, sides, judge, prompts, overrides, is_json=is_json)
    settings = settings_of(overrides, SETTINGS)
    limit = settings.pop("limit", None)
    judging = _judge(judge)
    writers = [AskedModel(model=side, **settings) for side in sides]
    rows = _prompts(Path(prompts))[:limit]
    with Client(server) as client:
        file = _uploaded(client, rows)
        made = client.evaluations.compare(file.id, writers[0], writers[1], judge=judging)
        say(f"evaluation {made.id} of {len(rows)} prompts; Ctrl-C leaves it running, `preftune show {made.id}` comes back to it")
        result = client.jobs.wait(made.id).result
    told = {"evaluation": made.id, "first": sides[0], "second": sides[1], **_counted(result)}
    if is_json:
        print_json(told)
        return 0
    click.echo(f"{sides[0]} wins {told['wins']}, {sides[1]} wins {told['losses']}, ties {told['ties']}")
    if told["win_rate"] is not None:
        low, high = told["interval"]
        click.echo(f"win rate {told['win_rate']:.3f} [{low:.3f}, {high:.3f}], ties half")
    if told["unjudged"]:
        click.echo(f"{told['unjudged']} times an answer or a verdict is missing")
    return 0


def _counted(result: Mapping[str, Any]) -> dict[str, Any]:
    """Wins and their rate with its 95 % interval; None where nothing was judged."""
    from preftune.statistics.intervals import mean_interval

    wins, losses, ties = (int(result[name]) for name in ("A_wins", "B_wins", "Ties"))
    scores = [1.0] * wins + [0.0] * losses + [0.5] * ties
    found = mean_interval(scores) if scores else None
    return {
        "wins": wins, "losses": losses, "ties": ties,
        "win_rate": sum(scores) / len(scores) if scores else None, "interval": [found.low, found.high] if found else None,
        "unjudged": int(result["generation_fail_count"]) + int(result["judge_fail_count"]),
    }  # fmt: skip


def _judge(spec: str) -> AskedModel:
    """A judge of the server by its name, or one elsewhere in the short form."""
    if not spec.startswith("llm:"):
        return AskedModel(model=spec)
    model, mark, url = spec.removeprefix("llm:").rpartition("@")
    if not mark or not model or not url.startswith(("http://", "https://")):
        raise UsageError(f"judge {spec!r}: the short form is llm:MODEL@URL")
    return AskedModel(model=model, url=url)


def _prompts(path: Path) -> list[str]:
    """The texts of the column ``prompt``; of a conversation of one message, its text."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    found: list[str] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{path}:{number}: no JSON; write one object with a prompt on each line") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
            prompt = prompt[0].get("content")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{path}:{number} field 'prompt': no text; a server asks its models one message a row")
        found.append(prompt)
    if not found:
        raise InputError(f"{path}: no prompts")
    return found


def _uploaded(client: Client, prompts: Sequence[str]) -> api.File:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": one}, ensure_ascii=False) + "\n" for one in prompts), "utf-8")
        return client.files.upload(path, purpose="eval")
