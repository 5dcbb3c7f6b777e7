"""The body of a Together job, and what it asks of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from preftune.app.jobs.models import start_of
from preftune.app.jobs.platform import Platform
from preftune.app.jobs.reporting import PROJECT, Report
from preftune.server.errors import ApiError
from preftune.server.recipes import NAME, Wanted, check_beta

Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Some = Annotated[float, Field(ge=0)]
BETA = 0.1  # what Together's documentation says of a job without one
MAX = {"n_epochs": 1000, "n_checkpoints": 1000, "n_evals": 10_000, "batch_size": 65_536, "lora_r": 4096}


class Body(BaseModel):
    """A request; keys that are not known are kept in the job's request, because clients send more than they document."""

    model_config = ConfigDict(extra="allow")


class Method(Body):
    """``sft`` or ``dpo`` with its options."""

    method: Literal["sft", "dpo"]
    train_on_inputs: bool | Literal["auto"] | None = None
    dpo_beta: Annotated[float, Field(gt=0, le=100)] | None = None
    dpo_normalize_logratios_by_length: bool = False
    dpo_reference_free: bool = False
    rpo_alpha: Some | None = None
    simpo_gamma: Some | None = None


class TrainingType(Body):
    """``Lora`` with its options, or ``Full``."""

    type: Literal["Lora", "Full", "lora", "full"]
    lora_r: Annotated[int, Field(ge=1, le=MAX["lora_r"])] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    lora_trainable_modules: Annotated[str, Field(max_length=2000)] | None = None


class SchedulerArgs(Body):
    """Options of a schedule."""

    min_lr_ratio: Share | None = None
    num_cycles: Annotated[float, Field(gt=0, le=1000)] | None = None


class Scheduler(Body):
    """The shape of the learning rate."""

    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    lr_scheduler_args: SchedulerArgs | None = None


class JobRequest(Body):
    """The body of POST /v1/fine-tunes. preftune: keys of a recipe's stage that Together's API has no word for."""

    training_file: str
    validation_file: str | None = None
    model: Annotated[str, Field(max_length=512)] | None = None
    from_checkpoint: Annotated[str, Field(max_length=600)] | None = None
    n_epochs: Annotated[int, Field(ge=1, le=MAX["n_epochs"])] = 1
    n_checkpoints: Annotated[int, Field(ge=1, le=MAX["n_checkpoints"])] | None = 1
    n_evals: Annotated[int, Field(ge=0, le=MAX["n_evals"])] | None = 0
    batch_size: Annotated[int, Field(ge=1, le=MAX["batch_size"])] | Literal["max"] | None = "max"
    gradient_accumulation_steps: Annotated[int, Field(ge=0, le=65_536)] | None = None
    max_seq_length: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Rate | None = 1e-5
    lr_scheduler: Scheduler | None = None
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    max_grad_norm: Some | None = 1.0
    weight_decay: Some | None = 0.0
    training_method: Method = Method(method="sft")
    training_type: TrainingType | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=NAME)] | None = None
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    early_stopping_enabled: bool = False
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    early_stopping_min_delta: Some | None = None
    early_stopping_warmup_evals: Annotated[int, Field(ge=0)] | None = None
    wandb_key: str | None = None
    wandb_api_key: str | None = None
    wandb_base_url: str | None = None
    wandb_project_name: str | None = None
    wandb_name: str | None = None
    wandb_entity: str | None = None
    from_hf_model: str | None = None
    hf_output_repo_name: str | None = None
    multimodal_params: dict[str, Any] | None = None
    preftune: dict[str, Any] = Field(default_factory=dict)


def wanted_of(platform: Platform, project: str, body: JobRequest, idempotency: str | None) -> Wanted:
    """What the body asks for.

    Raises
        ApiError: 400, a thing that is not offered.
        UsageError: a checkpoint that is not there.
    """
    _refuse(body)
    start = body.from_checkpoint or None
    method = "sft" if body.training_method.method == "sft" else "dpo"
    stage = {**_schedule(body), **_adapter(platform, project, body), **_loss(body.training_method)}
    checkpoints = max(0, (body.n_checkpoints or 1) - 1)  # the final model is one of those that are asked for
    stage |= {"checkpoints": checkpoints, "keep_checkpoints": max(1, checkpoints), "evals": body.n_evals or 0}
    if body.early_stopping_enabled:
        rule = {
            "patience": body.early_stopping_patience or 2, "min_delta": body.early_stopping_min_delta or 0.0,
            "warmup_evals": 1 if body.early_stopping_warmup_evals is None else body.early_stopping_warmup_evals,
        }  # fmt: skip
        stage |= {"early_stopping": rule, "keep": "best"}
        if not body.n_evals:
            raise ApiError(400, "early stopping needs n_evals, evaluations to decide by", param="n_evals")
    warnings: list[str] = []
    beta = body.training_method.dpo_beta
    if method == "dpo" and beta is not None and not body.training_method.simpo_gamma:
        warnings += check_beta(beta, method, "dpo_beta")
    return Wanted(
        "together", body.model or "", (body.training_file,), body.model_dump(exclude_none=True), stage,
        {} if body.max_seq_length is None else {"max_length": body.max_seq_length}, body.preftune, body.validation_file or None,
        body.suffix or "", body.random_seed or 0, start, idempotency=idempotency, warnings=warnings,
        report=_report(body),
    )  # fmt: skip


def _report(body: JobRequest) -> Report | None:
    """Where the job reports to: nowhere, without a key and a project. (The SDK's ``wandb_api_key`` is sent as ``wandb_key``.)"""
    key = body.wandb_key or body.wandb_api_key or ""
    if not key and not body.wandb_project_name and not body.wandb_base_url:
        return None
    return Report(
        body.wandb_project_name or PROJECT, body.wandb_entity or "", body.wandb_name or "", (), key, body.wandb_base_url or ""
    )


def _refuse(body: JobRequest) -> None:
    if bool(body.model) == bool(body.from_checkpoint):
        raise ApiError(400, "name a model or a from_checkpoint, one of them", param="model")
    if body.from_hf_model:
        raise ApiError(
            400, "from_hf_model is not taken: only registered models are trained; the operator offers one with "
            "preftune serve --model NAME=FOLDER", param="from_hf_model",
        )  # fmt: skip
    if body.hf_output_repo_name:
        raise ApiError(
            400, "hf_output_repo_name is not taken: download the model, or push it with preftune export --push-to-hub",
            param="hf_output_repo_name",
        )  # fmt: skip
    if body.training_method.train_on_inputs is True:
        raise ApiError(
            400, "train_on_inputs: true is not offered, the loss counts answers only; send auto or false",
            param="training_method.train_on_inputs",
        )  # fmt: skip
    if (body.multimodal_params or {}).get("train_vision"):
        raise ApiError(400, "models here read and write text only", param="multimodal_params.train_vision")


def _schedule(body: JobRequest) -> dict[str, Any]:
    scheduler = body.lr_scheduler or Scheduler()
    options = scheduler.lr_scheduler_args or SchedulerArgs()
    stage: dict[str, Any] = {
        "epochs": body.n_epochs,
        "lr": body.learning_rate or 1e-5,
        "schedule": scheduler.lr_scheduler_type,
        "min_lr_ratio": options.min_lr_ratio or 0.0,
        "num_cycles": options.num_cycles or 0.5,
        "warmup": body.warmup_ratio or 0.0,
        "max_grad_norm": body.max_grad_norm or None,  # 0 means no clipping
        "weight_decay": body.weight_decay or 0.0,
    }
    if isinstance(body.batch_size, int):
        stage["pairs_per_step"] = body.batch_size * (body.gradient_accumulation_steps or 1)
    return stage


def _adapter(platform: Platform, project: str, body: JobRequest) -> dict[str, Any]:
    kind = body.training_type
    if kind is None:  # as the job that is gone on from, else LoRA
        is_full = bool(body.from_checkpoint) and start_of(platform, project, str(body.from_checkpoint)).form == "full"
        return {"adapter": "full" if is_full else "lora"}
    if kind.type.lower() == "full":
        return {"adapter": "full"}
    rank = kind.lora_r or 16
    names = [name for name in (kind.lora_trainable_modules or "all-linear").replace(",", " ").split() if name]
    modules: Any = "all-linear" if names in (["all-linear"], []) else names
    lora = {
        "rank": rank, "alpha": float(kind.lora_alpha or 2 * rank), "dropout": kind.lora_dropout or 0.0, "target_modules": modules
    }  # fmt: skip
    return {"adapter": "lora", "lora": lora}


def _loss(method: Method) -> dict[str, Any]:
    """sft, dpo with its options, or simpo where a gamma is given: then without a reference and by length, as it means."""
    if method.method == "sft":
        return {"method": "sft"}
    beta, alpha = method.dpo_beta or BETA, method.rpo_alpha or 0.0
    if not method.simpo_gamma:
        loss = {"beta": beta, "rpo_alpha": alpha, "length_normalised": method.dpo_normalize_logratios_by_length,
                "reference_free": method.dpo_reference_free}  # fmt: skip
        return {"method": "dpo", "loss": loss}
    simpo = {"beta": beta, "gamma": method.simpo_gamma}
    if not alpha:
        return {"method": "simpo", "loss": simpo}
    return {"method": "mix", "loss": {"parts": {"simpo": simpo, "sft": {"weight": alpha}}}}
