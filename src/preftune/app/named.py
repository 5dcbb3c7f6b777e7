"""The model that a verb's MODEL names: the starter, a run, ``RUN@STEP``, a folder, or a hub id with an optional revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.app.runs import RUN_FILE, RunFolder, find_model
from preftune.core.errors import CheckpointError, UsageError
from preftune.core.files import read_json, read_jsonl
from preftune.core.recipe import ModelConfig
from preftune.core.records import Message, Messages

STARTER = "starter"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model and, where it came out of a run, that run.

    step: of the checkpoint; None where the final weights are meant.
    """

    config: ModelConfig
    run: RunFolder | None = None
    step: int | None = None

    def report(self) -> dict[str, Any] | None:
        """The newest report of the run; None for a model of another step, which it does not speak of."""
        newest = None if self.run is None or self.step is not None else self.run.newest_report()
        return None if newest is None else dict(read_json(newest))

    def prompts(self, limit: int) -> list[Messages]:
        """Prompts that the run was evaluated on."""
        newest = None if self.run is None else self.run.newest_report()
        rows = [] if newest is None else read_jsonl(newest.parent / "completions.jsonl")
        return [tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]) for row in rows[:limit]]


def find_named(given: str, output: Path, chat_template: str | None = None) -> NamedModel:
    """The model of that name.

    Raises
        UsageError: there is no such run or folder and it is no hub id.
    """
    if given == STARTER:
        return NamedModel(ModelConfig(name=given, chat_template=chat_template))
    try:
        path = find_model(given, output, "model")
    except CheckpointError as error:
        is_here = (output / given.partition("@")[0]).exists() or Path(given.partition("@")[0]).expanduser().exists()
        if is_here or HUB_ID.fullmatch(given) is None:
            raise UsageError(f"{error}; a model is a run, RUN@STEP, a folder, a hub id or starter") from None
        name, _, revision = given.partition("@")
        return NamedModel(ModelConfig(name=name, revision=revision or None, chat_template=chat_template))
    run = next((RunFolder(parent) for parent in path.parents if (parent / RUN_FILE).is_file()), None)
    match = re.fullmatch(r"step-(\d+)", path.parent.name)
    return NamedModel(ModelConfig(name=str(path), chat_template=chat_template), run, int(match[1]) if match else None)
