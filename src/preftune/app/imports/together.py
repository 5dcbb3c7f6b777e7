"""Together: the body of POST /v1/fine-tunes, or the arguments of the SDK's ``fine_tuning.create``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.app.imports import shared
from preftune.app.imports.base import (
    CannotCarry,
    Job,
    Table,
    To,
    count,
    flag,
    flat,
    job_sources,
    leave,
    number,
    positive,
    read,
    whole,
)
from preftune.app.imports.trl import set_files, set_modules
from preftune.core.errors import InputError

DEEP = ("training_method", "training_type", "lr_scheduler", "lr_scheduler.lr_scheduler_args")
MAX = "means as many as the service's hardware takes; preftune's own 16 is used"
SERVICE = "belongs to the service"


def _batch(value: Any) -> int:
    if value in ("max", "auto"):
        raise CannotCarry(f"{value!r} {MAX if value == 'max' else 'is chosen by the service'}")
    return count(value)


def _ratio(value: Any) -> float:
    found = number(value)
    if not 0 <= found <= 1:
        raise CannotCarry(f"is {value!r}, not a share of the peak rate")
    return found


@job_sources.register("together")
@dataclass(frozen=True, slots=True)
class Together:
    """A job of Together, as JSON."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "n_epochs": 1,
        "learning_rate": 1e-5,
        "lr_scheduler.lr_scheduler_type": "cosine",
        "warmup_ratio": 0,
        "training_type.type": "Lora",
    }
    table: ClassVar[Table] = {
        "n_epochs": To("epochs", positive),
        "n_checkpoints": To("checkpoints", whole),
        "n_evals": To("evals", whole, "needs data.select, rows to measure on"),
        "learning_rate": To("lr", positive),
        "warmup_ratio": To("warmup", shared.share),
        "max_grad_norm": To("max_grad_norm", shared.grad_norm),
        "weight_decay": To("weight_decay", number),
        "max_seq_length": To("data.max_length", count, "is the length of a whole row here: prompt and one answer"),
        "random_seed": To("seed", whole, "the same seed draws other numbers in another program: results are not the same"),
        "suffix": To("name", str),
        "hf_model_revision": To("model.revision", str),
        "from_checkpoint": To("from_checkpoint", str, "is a job of the service; export its model and give the folder"),
        "validation_file": To("data.select", str, "is a file of the service; download it and give its path"),
        "early_stopping_patience": To("early_stopping.patience", count),
        "early_stopping_min_delta": To("early_stopping.min_delta", number),
        "early_stopping_warmup_evals": To("early_stopping.warmup_evals", whole),
        "lr_scheduler.lr_scheduler_type": To("schedule", shared.SCHEDULE),
        "lr_scheduler.lr_scheduler_args.min_lr_ratio": To("min_lr_ratio", _ratio),
        "lr_scheduler.lr_scheduler_args.num_cycles": To("num_cycles", positive),
        "min_lr_ratio": To("min_lr_ratio", _ratio),
        "scheduler_num_cycles": To("num_cycles", positive),
        **read("batch", "batch_size gradient_accumulation_steps"),
        **read("model", "model from_hf_model"),
        **read(
            "loss", "training_method.method training_method.dpo_beta training_method.dpo_reference_free training_method.rpo_alpha"
        ),
        **read(
            "loss", "training_method.dpo_normalize_logratios_by_length training_method.simpo_gamma dpo_beta rpo_alpha simpo_gamma"
        ),
        **read("loss", "training_method dpo_normalize_logratios_by_length"),
        **read("adapter", "training_type.type training_type.lora_r training_type.lora_alpha training_type.lora_dropout"),
        **read("adapter", "training_type.lora_trainable_modules lora lora_r lora_alpha lora_dropout lora_trainable_modules"),
        **read("data", "training_file"),
        **read("early stopping", "early_stopping_enabled"),
        **leave("`lr_scheduler` of the SDK's own arguments is lr_scheduler_type", "lr_scheduler_type", "cosine"),
        **leave("pairs are always packed, with prompts shared", "packing", True),
        **leave("the loss counts answers only", "train_on_inputs training_method.train_on_inputs", "auto", False),
        **leave(
            "metrics are in the run's folder", "wandb_key wandb_api_key wandb_base_url wandb_project_name wandb_name wandb_entity"
        ),
        **leave("models here read and write text only", "train_vision multimodal_params", False),
        **leave(shared.HUB, "hf_output_repo_name hf_api_token"),
        **leave(SERVICE, "verbose model_limits training_type.model_output_name"),
    }

    def matches(self, given: Mapping[str, Any]) -> bool:
        """A body with training_method, training_type or the SDK's own arguments."""
        own = {"training_method", "training_type", "dpo_beta", "n_checkpoints", "lora_trainable_modules", "from_hf_model"}
        return "training_file" in given and bool(own & given.keys())

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The method's, type's and scheduler's objects taken apart."""
        return flat(given, DEEP)

    def finish(self, job: Job) -> None:
        """Loss, adapter, batch, model and files."""
        _set_loss(job)
        _set_adapter(job)
        _set_batch(job)
        name = str(job.get("from_hf_model") or job.get("model") or "")
        if name:
            if name.endswith("-Reference"):
                name = name.removesuffix("-Reference")
                job.note(f"model: the service's name ends in -Reference, the hub's is {name!r}")
            job.put("model.name", name, "model", "from_hf_model")
        if job.get("training_file") is not None:
            set_files(job, [str(job.get("training_file"))], "training_file")
        if "early_stopping_enabled" in job.values:
            if flag(job.get("early_stopping_enabled")):
                job.recipe.setdefault("early_stopping", {})
                job.note("early_stopping_enabled: needs data.select, rows to measure on")
            else:
                job.recipe.pop("early_stopping", None)
            job.carried["early_stopping_enabled"] = "early_stopping"


def _either(job: Job, name: str) -> tuple[str, Any]:
    """A key of the body's object, or the SDK's argument of the same name."""
    inner = f"training_method.{name}"
    return (inner, job.get(inner)) if job.get(inner) is not None else (name, job.get(name))


def _set_loss(job: Job) -> None:
    method = job.get("training_method.method") or job.get("training_method") or ("dpo" if job.get("dpo_beta") else "sft")
    if method not in {"dpo", "sft"}:
        raise InputError(f"training_method: {method!r} is not here; there is dpo and sft")
    for key in ("training_method.method", "training_method"):
        if key in job.values:
            job.carried[key] = "method"
    if method == "sft":
        job.put("method", "sft")
        return
    beta_key, beta = _either(job, "dpo_beta")
    gamma_key, gamma = _either(job, "simpo_gamma")
    norm_key, norm = _either(job, "dpo_normalize_logratios_by_length")
    free_key, free = _either(job, "dpo_reference_free")
    alpha_key, alpha = _either(job, "rpo_alpha")
    beta = 0.1 if beta is None else float(beta)
    if gamma:
        job.put("method", "simpo")
        job.put("loss.beta", beta, beta_key)
        job.put("loss.gamma", float(gamma), gamma_key)
        for key in (norm_key, free_key):
            job.carried[key] = "what simpo means"
        job.note("simpo_gamma: a value above 0 means the whole of SimPO: margin, length normalisation and no reference")
        if beta < 1:
            job.note(f"dpo_beta {beta:g} is small for SimPO, which is published with 2 to 10: the margin dwarfs the log-probs")
    else:
        if gamma_key in job.values:
            job.carried[gamma_key] = "as preftune does anyway"
        job.put("method", "dpo")
        job.put("loss.beta", beta, beta_key)
        if norm is not None:
            job.put("loss.length_normalised", flag(norm), norm_key)
        if free is not None:
            job.put("loss.reference_free", flag(free), free_key)
    if alpha is not None:
        shared.add_sft(job, float(alpha), alpha_key, "the NLL of the chosen answer, averaged over its own tokens")


def _set_adapter(job: Job) -> None:
    is_lora = str(job.get("training_type.type", "Lora")).lower() == "lora"
    if job.get("lora") is not None:
        is_lora = flag(job.get("lora"))
    job.put("adapter", "lora" if is_lora else "full", "training_type.type", "lora")
    if not is_lora:
        return
    values = {name: job.get(f"training_type.{name}") or job.get(name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
    rank = count(values["lora_r"]) if values["lora_r"] else None
    if rank is None:
        job.note("lora_r: the service's default depends on the model; preftune's own rank 16 is used")
    else:
        job.put("lora.rank", rank, "training_type.lora_r", "lora_r")
        job.put("lora.alpha", float(values["lora_alpha"] or 2 * rank), "training_type.lora_alpha", "lora_alpha")
    job.put("lora.dropout", float(values["lora_dropout"] or 0.0), "training_type.lora_dropout", "lora_dropout")
    modules = job.get("training_type.lora_trainable_modules") or job.get("lora_trainable_modules") or "all-linear"
    set_modules(job, modules, "lora_trainable_modules")
    if "training_type.lora_trainable_modules" in job.values:
        job.carried["training_type.lora_trainable_modules"] = "lora.target_modules"


def _set_batch(job: Job) -> None:
    try:
        size = _batch(job.get("batch_size", "max"))
    except CannotCarry as error:
        job.leave("batch_size", str(error))
        if job.get("gradient_accumulation_steps") is not None:
            job.leave("gradient_accumulation_steps", "the batch is not known")
        return
    steps = count(job.get("gradient_accumulation_steps", 1))
    job.put("pairs_per_step", size * steps, "batch_size", "gradient_accumulation_steps")
    job.note(f"pairs_per_step {size * steps} = batch_size {size} x {steps} accumulated; micro batches are made by tokens here")
