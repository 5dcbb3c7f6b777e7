"""What a request asks of training, in a dialect's words or ours, as the recipe of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform
from preftune.app.recipes import make_recipe
from preftune.server.errors import ApiError
from preftune.store.records import File, Job, new_id

# What ``extra_body={"preftune": {...}}`` may set: nothing here names a path.
EXTRA = frozenset(
    {"method", "loss", "adapter", "lora", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm", "pairs_per_step",
     "tokens_per_pack", "epochs", "max_steps", "evals", "checkpoints", "keep_checkpoints", "seed", "max_length", "too_long",
     "dtype", "chat_template"}
)  # fmt: skip


@dataclass(slots=True)
class Wanted:
    """A job that a dialect asks for, before it is checked.

    stage: keys of the recipe's stage. extra: the caller's own keys, which go before. validation: a file's id, or None.
    """

    dialect: str
    model: str
    training: tuple[str, ...]
    request: Mapping[str, Any]
    stage: dict[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    validation: str | None = None
    suffix: str = ""
    seed: int = 0
    from_checkpoint: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    idempotency: str | None = None


@cache
def base_lr(method: str, adapter: str) -> float:
    """The published learning rate of a method, which OpenAI's multiplier multiplies."""
    from preftune.core.recipe import StageConfig
    from preftune.maths.losses.base import losses
    from preftune.training.optim import lr_of

    return lr_of(StageConfig.model_validate({"method": method, "adapter": adapter}), losses.factory(method).view)


def job_of(platform: Platform, project: str, wanted: Wanted) -> Job:
    """A job with its checked recipe.

    Raises
        ApiError: a model or file that does not exist, a key that cannot be set, a value out of range.
    """
    extra = dict(wanted.extra)
    unknown = sorted(set(extra) - EXTRA)
    if unknown:
        raise ApiError(
            400, f"preftune.{unknown[0]} cannot be set here; there is {', '.join(sorted(EXTRA))}", param=f"preftune.{unknown[0]}"
        )
    base = find_model(platform, project, wanted.model)
    files = tuple(dict.fromkeys([*wanted.training, *([wanted.validation] if wanted.validation else [])]))
    data: dict[str, Any] = {"train": list(wanted.training), "select": wanted.validation or 0.0}
    for key in ("max_length", "too_long"):
        if key in extra:
            data[key] = extra.pop(key)
    model: dict[str, Any] = {"name": base.name}
    for key in ("dtype", "chat_template"):
        if key in extra:
            model[key] = extra.pop(key)
    if model.get("chat_template") not in {None, "chatml", "plain"}:
        raise ApiError(400, "preftune.chat_template: write chatml or plain", param="preftune.chat_template")
    seed = int(extra.pop("seed", wanted.seed))
    stage = {**wanted.stage, **extra, "data": data}
    if wanted.from_checkpoint:
        stage["from_checkpoint"] = wanted.from_checkpoint
    recipe = make_recipe({"model": {**model, "name": "starter"}, "seed": seed, "stages": [stage]}).model_dump(mode="json")
    recipe["model"] = {**recipe["model"], "name": base.name}
    recipe["stages"][0] |= {"data": {**recipe["stages"][0]["data"], **data}, "from_checkpoint": wanted.from_checkpoint}
    for key in ("output", "name", "sweep", "evaluation"):
        recipe.pop(key, None)
    for file_id in files:
        if platform.store.get(File, file_id, project) is None:
            raise ApiError(400, f"there is no file {file_id!r}; upload it first", param="training_file", code="file_not_found")
    job_id = new_id("ft-")
    tail = f"{wanted.suffix}-{job_id[3:11]}" if wanted.suffix else job_id[3:11]
    return Job(
        id=job_id, project=project, work="train", dialect=wanted.dialect, request=dict(wanted.request), recipe=recipe,
        model=base.name, files=files, name=f"{base.name}-{tail}", metadata=wanted.metadata, idempotency=wanted.idempotency,
    )  # fmt: skip
