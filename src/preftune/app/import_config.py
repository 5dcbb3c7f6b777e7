"""A job of another system as a recipe, with everything that could not be carried and what means something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from preftune.app.imports.base import CannotCarry, Job, carry, job_sources
from preftune.app.recipes import make_recipe, read_mapping
from preftune.core.errors import InputError, RecipeError, UsageError
from preftune.core.files import write_text

# asked in this order: a file of LLaMA-Factory also has keys of TRL's
ORDER = ("seekrflow", "together", "openai", "axolotl", "llamafactory", "trl")


@dataclass(frozen=True, slots=True)
class Imported:
    """The recipe and what was said on the way.

    carried: key of the source -> key of the recipe. left: key -> why it was not carried. notes: what means something else.
    defaults: the source's own defaults that were written out because its file left them open.
    """

    source: str
    file: str
    recipe: dict[str, Any]
    carried: dict[str, str]
    left: dict[str, str]
    notes: list[str]
    defaults: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "source": self.source,
            "recipe": self.recipe,
            "carried": self.carried,
            "not_carried": self.left,
            "notes": self.notes,
            "defaults": self.defaults,
        }

    def talk(self) -> list[str]:
        """What a person is told."""
        lines = [f"{self.file}: a job of {self.source}; {len(self.carried)} keys carried, {len(self.left)} not"]
        lines += [f"not carried: {key}: {reason}" for key, reason in self.left.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.defaults:
            filled = ", ".join(f"{key} {value}" for key, value in self.defaults.items())
            lines.append(f"note: left open in the file, so the defaults of {self.source} are written: {filled}")
        return lines

    def to_yaml(self) -> str:
        """The recipe with what was said as comments."""
        comments = "".join(f"# {line}\n" for line in self.talk())
        return comments + yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the file cannot say: its source, its trainer, the devices of the job, and files and models that are here."""

    source: str | None = None
    trainer: str = ""
    devices: int = 1
    model: str | None = None
    data: tuple[str, ...] = ()


def import_config(file: Path, answers: Answers | None = None, out: Path | None = None) -> Imported:
    """Read a job's file (YAML or JSON) and make a recipe of it that ``make_recipe`` accepts.

    Raises
        InputError: the file is no mapping, of no known source, or has a loss or method that is not here.
        UsageError: there is no such source.
    """
    said = answers or Answers()
    given = _read(file)
    name = said.source or _source_of(file, given)
    source = job_sources.build(name)
    try:
        job = carry(source, given, said.devices, said.trainer)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (CannotCarry, TypeError, ValueError) as error:
        raise InputError(f"{file}: a value is of the wrong kind for {name}: {error}") from None
    _answer(job, said)
    recipe = _ordered(job.recipe)
    if "model" not in recipe:
        raise UsageError(f"{file}: names no model; say which with --model")
    try:
        make_recipe(recipe)
    except RecipeError as error:
        raise InputError(f"{file}: its values make no recipe: {error}") from None
    filled = {key: job.values[key] for key in sorted(job.defaults) if key in job.carried}
    carried = {key: path for key, path in job.carried.items() if key not in job.defaults}
    made = Imported(name, str(file), recipe, carried, job.left, job.notes, filled)
    if out is not None:
        write_text(out, made.to_yaml())
    return made


def _read(file: Path) -> dict[str, Any]:
    if file.suffix != ".json":
        return read_mapping(file)
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}; check the commas and quotes there") from None
    if not isinstance(given, dict):
        raise InputError(f"{file}: holds no mapping; a job is one JSON object")
    return given


def _source_of(file: Path, given: Mapping[str, Any]) -> str:
    names = [*ORDER, *(name for name in job_sources.names() if name not in ORDER)]
    for name in names:
        if job_sources.build(name).matches(given):
            return name
    raise InputError(f"{file}: looks like no job of {', '.join(names)}; say which with --from")


def _answer(job: Job, said: Answers) -> None:
    if said.model is not None:
        job.put("model.name", said.model)
    if said.data:
        job.put("data.train", [str(Path(file).resolve()) for file in said.data])
        job.notes[:] = [note for note in job.notes if "--data FILE" not in note]
    elif "train" not in job.recipe.get("data", {}):
        job.put("data.train", ["pairs.jsonl"])
        job.note("the file names no data: pairs.jsonl is written; give your file's path (--data FILE)")


def _ordered(recipe: dict[str, Any]) -> dict[str, Any]:
    first = ("name", "model", "seed", "output", "method", "loss", "data", "adapter", "lora")
    keys = [key for key in first if key in recipe] + [key for key in recipe if key not in first]
    return {key: recipe[key] for key in keys}
