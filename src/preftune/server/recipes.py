"""What a request asks of training, in a dialect's words or ours, as the recipe of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from preftune.app.jobs import reporting, states
from preftune.app.jobs.models import find_model, start_of
from preftune.app.jobs.platform import Platform, event
from preftune.app.recipes import check_recipe
from preftune.server.errors import ApiError
from preftune.server.security import Caller, audit
from preftune.store.records import File, Job, ModelVersion, new_id

# What ``extra_body={"preftune": {...}}`` may set: nothing here names a path.
EXTRA = frozenset(
    {"method", "loss", "adapter", "lora", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm", "pairs_per_step",
     "tokens_per_pack", "epochs", "max_steps", "evals", "checkpoints", "keep_checkpoints", "seed", "max_length", "too_long",
     "dtype", "chat_template", "min_lr_ratio", "num_cycles", "early_stopping", "keep", "probe", "no_probe"}
)  # fmt: skip
# What a request may hold and nobody is ever shown again, nor kept.
SECRETS = frozenset({"wandb_key", "wandb_api_key", "hf_api_token", "api_key", "external_api_token", "token", "password"})
USUAL_BETA = (0.05, 0.9)
NAME = r"^[A-Za-z0-9._-]*$"


@dataclass(slots=True)
class Wanted:
    """A job that a dialect asks for, before it is checked.

    model: a name, or empty with ``from_checkpoint``. stage, data: keys of the recipe's stage and of its data. extra: the
    caller's own keys, which go before. validation: a file's id, or None. warnings: what the caller should know; they become
    events of the job. report: where it reports to, or None.
    """

    dialect: str
    model: str
    training: tuple[str, ...]
    request: Mapping[str, Any]
    stage: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    validation: str | None = None
    suffix: str = ""
    seed: int = 0
    from_checkpoint: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    idempotency: str | None = None
    warnings: list[str] = field(default_factory=list)
    report: reporting.Report | None = None


def create(platform: Platform, caller: Caller, wanted: Wanted) -> Job:
    """Create the job that is wanted; its warnings are its first events.

    Raises
        ApiError: see ``job_of``.
        UsageError: a file that cannot be used, or an idempotency key of another request.
    """
    caller.must_be("developer")
    return submit(platform, caller, job_of(platform, caller.project, wanted), wanted.warnings, wanted.report)


def submit(platform: Platform, caller: Caller, job: Job, warnings: Sequence[str], report: reporting.Report | None = None) -> Job:
    """Keep a checked job, or give the one of before where its idempotency key is known."""
    if report is not None:
        job, lacking = reporting.attach(platform, job, report)
        warnings = [*warnings, *lacking]
    try:
        kept = states.submit(platform, job)
    except BaseException:
        reporting.forget(platform, job)
        raise
    if kept.id != job.id:
        reporting.forget(platform, job)
    else:
        for text in warnings:
            platform.store.insert(event(job.id, job.project, "warning", text, level="warn"))
        audit(platform, caller, "job.create", job.id)
    return kept


def without_secrets(given: Any) -> Any:
    """The same JSON without the values that must not be kept or shown, at any depth.

    >>> without_secrets({"wandb_key": "k", "wandb_name": "run", "judge": {"external_api_token": "t", "model": "m"}})
    {'wandb_name': 'run', 'judge': {'model': 'm'}}
    """
    if isinstance(given, Mapping):
        return {key: without_secrets(value) for key, value in given.items() if key not in SECRETS}
    return [without_secrets(one) for one in given] if isinstance(given, (list, tuple)) else given


def check_beta(beta: float, method: str, where: str) -> list[str]:
    """What to say of a DPO beta outside of the range that hosted services allow.

    >>> check_beta(0.1, "dpo", "dpo_beta")
    []
    >>> check_beta(2.0, "dpo", "dpo_beta")[0][:16]
    'dpo_beta 2 is ou'
    """
    low, high = USUAL_BETA
    if method != "dpo" or low <= beta <= high:
        return []
    return [f"{where} {beta:g} is outside of {low:g} to {high:g}, which hosted services allow; it is used as it is"]


def _base(platform: Platform, project: str, wanted: Wanted) -> ModelVersion:
    """The registered model that training begins from; of a checkpoint, the base beneath it."""
    if not wanted.from_checkpoint:
        return find_model(platform, project, wanted.model)
    start = start_of(platform, project, wanted.from_checkpoint)
    base = platform.store.get(ModelVersion, start.base) if start.base else start
    return base or start


@lru_cache(maxsize=256)
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
    base = _base(platform, project, wanted)
    files = tuple(dict.fromkeys([*wanted.training, *([wanted.validation] if wanted.validation else [])]))
    data: dict[str, Any] = {**wanted.data, "train": list(wanted.training), "select": wanted.validation or 0.0}
    for key in ("max_length", "too_long"):
        if key in extra:
            data[key] = extra.pop(key)
    model: dict[str, Any] = {"name": base.name}
    for key in ("dtype", "chat_template"):
        if key in extra:
            model[key] = extra.pop(key)
    if model.get("chat_template") not in {None, "chatml", "plain"}:
        raise ApiError(400, "preftune.chat_template: write chatml or plain", param="preftune.chat_template")
    seed = extra.pop("seed", wanted.seed)
    no_probe = extra.pop("no_probe", False)
    if not isinstance(no_probe, bool):
        raise ApiError(400, "preftune.no_probe: write true or false", param="preftune.no_probe")
    stage = {**wanted.stage, **extra, "data": data}
    if stage.get("early_stopping") is not None and not wanted.validation:
        raise ApiError(400, "early stopping needs a validation file to measure on", param="validation_file")
    if wanted.from_checkpoint:
        stage["from_checkpoint"] = wanted.from_checkpoint
    try:
        made = check_recipe({"model": {**model, "name": "starter"}, "seed": seed, "stages": [stage]})
    except (TypeError, ValueError, AttributeError) as error:  # a value of another kind than its key takes
        raise ApiError(400, f"preftune: a value is of the wrong kind: {' '.join(str(error).split())}", param="preftune") from None
    recipe = made.model_dump(mode="json")
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
        id=job_id, project=project, work="train", dialect=wanted.dialect, request=without_secrets(wanted.request), recipe=recipe,
        model=base.name, files=files, name=f"{base.name}-{tail}", metadata=wanted.metadata, idempotency=wanted.idempotency,
        no_probe=no_probe,
    )  # fmt: skip
