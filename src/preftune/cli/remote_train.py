"""``preftune --server URL train``: the recipe's files are uploaded, the job is followed, and its model's name is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.cli.output import say
from preftune.core.errors import UsageError

if TYPE_CHECKING:
    from preftune.core import api
    from preftune.sdk import Client

LEFT_HERE = {"output", "evaluation", "sweep", "tracking", "name"}


def train_there(server: str, recipe: Path, overrides: tuple[str, ...], *, no_probe: bool = False) -> api.JobDetail:
    """The job when it has succeeded. no_probe: nobody asks whether the model can do the task.

    Raises
        UsageError: a model that is a folder of this machine, or rounds of generating.
        JobFailed: it did not succeed.
    """
    from preftune.app.recipes import load_recipe
    from preftune.cli.installation import event_line
    from preftune.sdk import Client

    made = load_recipe(recipe, overrides)
    if Path(made.model.name).is_absolute():
        raise UsageError(
            f"model {made.model.name}: a server knows models by name; offer it there with `preftune serve --model NAME=FOLDER`"
        )
    given = made.model_dump(mode="json", exclude_defaults=True, exclude=LEFT_HERE)
    if made.evaluation is not None:
        say("the recipe's evaluation is not part of the job; `preftune --server URL eval MODEL` holds it there")
    with Client(server) as client:
        uploaded: dict[str, str] = {}
        for stage, config in zip(given["stages"], made.stages, strict=True):
            if config.data is None:
                raise UsageError(f"stage {config.name}: a job trains on files; make pairs with `preftune generate` first")
            stage["data"]["train"] = [_uploaded(client, path, uploaded) for path in config.data.train]
            if isinstance(config.data.select, str):
                stage["data"]["select"] = _uploaded(client, config.data.select, uploaded)
        told: dict[str, Any] = {"no_probe": True} if no_probe else {}  # else unsaid: an older server has no such field
        job = client.jobs.create(given, **told, suffix=re.sub(r"[^A-Za-z0-9._-]", "-", made.name)[:64])
        say(f"job {job.id}; Ctrl-C leaves it running, `preftune logs {job.id} --follow` comes back to it")
        return client.jobs.wait(job.id, on_event=lambda event: say(event_line(event)))


def _uploaded(client: Client, path: str, known: dict[str, str]) -> str:
    """The id of a file, uploaded once."""
    if path not in known:
        last: list[Any] = [0]

        def tell(sent: int, total: int) -> None:
            tenth = 10 * sent // max(1, total)
            if tenth > last[0]:
                last[0] = tenth
                say(f"{Path(path).name}: {sent:,} of {total:,} bytes")

        known[path] = client.files.upload(path, progress=tell).id
    return known[path]
