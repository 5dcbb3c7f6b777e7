"""Stages that make pairs, in a recipe's mappings: their keys, the data of the stage behind them, and rounds written out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from preftune.core.errors import RecipeError
from preftune.core.ids import digest_json
from preftune.core.registry import suggest

GENERATE = "generate"
PREVIOUS = "previous"
"""In ``data.train``: the pairs of the nearest generate stage before."""

MAX_ROUNDS = 100
"""Every round is written out in the resolved recipe."""

OWN_KEYS = ("name", "from_checkpoint", "round")


def generate_stage(
    stage: Mapping[str, Any],
    defaults: Mapping[str, Any],
    where: str,
    sections: tuple[type[BaseModel], type[BaseModel]],
) -> dict[str, Any]:
    """A generate stage with its keys in the section ``generate``.

    Parameters
        sections: the sections of a stage and of its ``generate`` part.

    Raises
        RecipeError: an unknown key, or one that only training has.
    """
    stage_section, own_section = sections
    own = own_section.model_fields
    merged: dict[str, Any] = {"method": GENERATE}
    section: dict[str, Any] = {}
    for is_default, source in ((True, defaults), (False, stage)):
        for key, value in source.items():
            if key == GENERATE:
                if not isinstance(value, Mapping) and value is not None:
                    raise RecipeError(f"{where}{GENERATE}: write a mapping of keys and values, got {value!r}")
                section.update(value or {})
            elif key in own:
                section[key] = value
            elif key in OWN_KEYS and not (is_default and where):
                merged[key] = value
            elif key == "method" or (is_default and where):
                continue
            elif key not in stage_section.model_fields:
                raise RecipeError(f"unknown key '{where}{key}': {suggest(key, sorted({*own, *OWN_KEYS}))}")
            elif not _is_default(stage_section, key, value):
                raise RecipeError(f"{where}{key}: a generate stage trains nothing; its keys are {', '.join(own)}")
    for key in section:
        if key not in own:
            raise RecipeError(f"unknown key '{where}{GENERATE}.{key}': {suggest(str(key), sorted(own))}")
    for key in ("prompts", "judge"):
        if section.get(key) is None:
            raise RecipeError(f"{where}{key} is missing: a generate stage needs prompts and a judge")
    merged[GENERATE] = section
    return merged


def fill_previous(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages whose data were left out behind a generate stage train on the pairs that it makes.

    Raises
        RecipeError: ``data: previous`` where no generate stage comes before.
    """
    filled: list[dict[str, Any]] = []
    has_generated = False
    for index, stage in enumerate(stages):
        if stage["method"] == GENERATE:
            has_generated = True
            filled.append(stage)
            continue
        data = stage.get("data")
        if index and stages[index - 1]["method"] == GENERATE and (data is None or not data.get("train")):
            data = {**(data or {}), "train": [PREVIOUS]}
        train = None if data is None else data.get("train")
        if isinstance(train, (list, tuple)) and PREVIOUS in train and not has_generated:
            raise RecipeError(f"stages.{index}.data: previous: no generate stage comes before it")
        filled.append(stage if data is None else {**stage, "data": data})
    return filled


def write_rounds(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the stages of every round written out, from the first generate stage on.

    Round r starts from the model of round r - 1, which is also its reference. ``prompts_per_round`` gives round r the
    r-th run of so many prompts.

    Raises
        RecipeError: rounds of a recipe that generates nothing or has its rounds written out already.
    """
    left = dict(recipe)
    rounds, count = left.get("rounds", 1), left.get("prompts_per_round")
    is_number = all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in (rounds, count or 1))
    if not is_number or count == 0 or rounds > MAX_ROUNDS or (rounds == 1 and count is None):
        return left  # the section says what is wrong with a number
    stages: list[dict[str, Any]] = left["stages"]
    first = next((index for index, stage in enumerate(stages) if stage["method"] == GENERATE), None)
    if first is None:
        key = "prompts_per_round" if rounds == 1 else "rounds"
        raise RecipeError(f"{key}: no stage has method: generate; the stages from the first one on are repeated")
    if any(stage.get("round") for stage in stages):
        raise RecipeError("rounds: the stages of every round are written out already; use the recipe that they came from")
    block = stages[first:]
    late = [first + place for place, stage in enumerate(block) if place and stage.get("from_checkpoint") is not None]
    if rounds > 1 and late:
        raise RecipeError(f"stages.{late[0]}.from_checkpoint: inside rounds a stage starts from the one before it")
    names = _names(block)
    written = [
        _in_round(stage, name, number, rounds, count)
        for number in range(1, rounds + 1)
        for stage, name in zip(block, names, strict=True)
    ]
    left["stages"] = [*stages[:first], *written]
    left["rounds"], left["prompts_per_round"] = 1, None
    return left


def seed_of(seed: int, round_number: int) -> int:
    """The seed of a stage: the recipe's own outside rounds and in the first, another one in each later round.

    >>> seed_of(7, 0), seed_of(7, 1), seed_of(7, 2) != seed_of(7, 3)
    (7, 7, True)
    """
    return seed if round_number <= 1 else int(digest_json([seed, "round", round_number])[:8], 16)


def _in_round(stage: Mapping[str, Any], name: str, number: int, rounds: int, count: Any) -> dict[str, Any]:
    made = dict(stage) if rounds == 1 else {**stage, "name": f"{name}-r{number}", "round": number}
    if number > 1:
        made.pop("from_checkpoint", None)
    if made["method"] == GENERATE and count is not None:
        skip = made[GENERATE].get("skip") or 0
        made[GENERATE] = {**made[GENERATE], "skip": skip + (number - 1) * count, "limit": count}
    return made


def _names(block: list[dict[str, Any]]) -> list[str]:
    names: list[str] = []
    seen: Counter[str] = Counter()
    for stage in block:
        name = str(stage.get("name") or stage["method"])
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _is_default(section: type[BaseModel], key: str, value: Any) -> bool:
    try:
        return bool(
            getattr(section.model_validate({key: value}), key) == section.model_fields[key].get_default(call_default_factory=True)
        )
    except ValidationError:
        return False
