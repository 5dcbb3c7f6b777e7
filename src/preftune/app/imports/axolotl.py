"""Axolotl: the YAML of `axolotl train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.app.imports import shared, variants
from preftune.app.imports.base import Job, Table, To, count, flag, flat, job_sources, leave, number, positive, read, whole
from preftune.app.imports.trl import set_files, set_modules
from preftune.core.errors import InputError

METHODS = ("dpo", "ipo", "orpo", "simpo", "kto")
FORMATS = "rows are recognised by their content, or by data.format and data.columns"


@job_sources.register("axolotl")
@dataclass(frozen=True, slots=True)
class Axolotl:
    """A training file of Axolotl: rl dpo, ipo, orpo, simpo, kto, or none for supervised training."""

    defaults: ClassVar[Mapping[str, Any]] = {"num_epochs": 1, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine"}
    table: ClassVar[Table] = {
        "base_model": To("model.name", str),
        "revision_of_model": To("model.revision", str),
        "learning_rate": To("lr", positive),
        "num_epochs": To("epochs", positive),
        "max_steps": To("max_steps", count),
        "lr_scheduler": To("schedule", shared.SCHEDULE),
        "weight_decay": To("weight_decay", number, "vectors (norms, biases) do not decay here"),
        "max_grad_norm": To("max_grad_norm", shared.grad_norm),
        "adam_epsilon": To("adam_eps", positive),
        "sequence_len": To("data.max_length", count, "rows that are longer are left out and listed, not cut"),
        "val_set_size": To("data.select", shared.share, "is held out by prompt group, to choose checkpoints on"),
        "seed": To("seed", whole, "the same seed draws other numbers in another program: order and results are not the same"),
        "output_dir": To("output", str, "runs get folders of their own below it"),
        "wandb_name": To("name", str),
        "save_total_limit": To("keep_checkpoints", count),
        "saves_per_epoch": To("checkpoints", count, "is a count over the stage here, not over an epoch"),
        "evals_per_epoch": To("evals", whole, "is a count over the stage here, not over an epoch"),
        "gradient_checkpointing": To("gradient_checkpointing", lambda value: value == "offload" or flag(value)),
        "lora_r": To("lora.rank", count),
        "lora_alpha": To("lora.alpha", number),
        "lora_dropout": To("lora.dropout", number),
        "peft_use_rslora": To("lora.rslora", flag),
        "peft_use_dora": To("lora.dora", flag),
        "early_stopping_patience": To("early_stopping.patience", count, "needs data.select, rows to measure on"),
        **read("adapter", "adapter lora_target_modules lora_target_linear"),
        **read("loss", "rl rl_beta dpo_beta dpo_label_smoothing rpo_alpha orpo_alpha cpo_alpha simpo_gamma dpo_norm_loss"),
        **read("loss", "dpo_loss_type dpo_loss_weights dpo_use_weighting kto_desirable_weight kto_undesirable_weight"),
        **read("batch", "micro_batch_size gradient_accumulation_steps"),
        **read("warm-up", "warmup_ratio warmup_steps"),
        **read("adam", "adam_beta1 adam_beta2"),
        **read("optimiser", "optimizer"),
        **read("data", "datasets test_datasets"),
        **leave("the batch follows from micro_batch_size", "batch_size eval_batch_size"),
        "load_in_4bit": To("model.load_in_4bit", flag),
        "load_in_8bit": To("model.load_in_8bit", flag),
        **leave(shared.NO_QUANTS, "gptq", False),
        **leave(shared.TRUST, "trust_remote_code", False),
        **leave(
            shared.LOGGING,
            "wandb_project wandb_entity wandb_watch wandb_log_model logging_steps use_tensorboard use_mlflow debug",
        ),
        **leave(shared.WHEN, "save_steps eval_steps save_strategy eval_strategy"),
        **leave(
            shared.SPEED,
            "flash_attention sdp_attention xformers_attention sample_packing eval_sample_packing pad_to_sequence_len",
        ),
        **leave(
            shared.SPEED,
            "deepspeed fsdp fsdp_config dataset_prepared_path dataset_processes dataloader_num_workers torch_compile",
        ),
        **leave(shared.SPEED, "group_by_length plugins gradient_checkpointing_kwargs local_rank attn_implementation"),
        **leave("precision follows model.dtype; set it to bfloat16 or float32", "bf16 fp16 tf32 bfloat16 float16", "auto", False),
        **leave("the model's own chat template is used; model.chat_template replaces it", "chat_template default_system_message"),
        **leave(
            "the architecture is read from the model's files", "model_type tokenizer_type tokenizer_config is_llama_derived_model"
        ),
        **leave("special tokens are the tokenizer's own", "special_tokens tokens resize_token_embeddings_to_32x"),
        **leave(
            "an adapter to go on from is from_checkpoint: FOLDER", "lora_model_dir peft_layers_to_transform lora_fan_in_fan_out"
        ),
        **leave("only LoRA's own modules are trained", "lora_modules_to_save unfrozen_parameters"),
        **leave(
            "the data set says which rows are refused",
            "strict skip_prepare_dataset remove_unused_columns shuffle_merged_datasets",
        ),
        **leave("`preftune train --resume RUN` goes on with a run", "resume_from_checkpoint auto_resume_from_checkpoints"),
        **leave(shared.HUB, "hub_model_id hub_strategy push_dataset_to_hub hf_use_auth_token"),
        **leave("the loss counts answers only", "train_on_inputs", False),
        **leave("the reference is the model that the stage starts from", "rl_adapter_ref_model precompute_ref_log_probs", True),
        **leave("label smoothing has one form", "dpo_label_smoothing_type"),
    }

    def matches(self, given: Mapping[str, Any]) -> bool:
        """Keys that only Axolotl has."""
        return "base_model" in given and bool({"rl", "datasets", "micro_batch_size", "sequence_len"} & given.keys())

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As it is; data sets stay lists."""
        return flat(given)

    def finish(self, job: Job) -> None:
        """Method, adapter, batch and data."""
        _set_loss(job)
        shared.set_batch(job, "micro_batch_size")
        shared.set_warmup(job)
        shared.set_optimiser(job, "optimizer")
        if {"adam_beta1", "adam_beta2"} & job.values.keys():
            betas = [float(job.get("adam_beta1", 0.9)), float(job.get("adam_beta2", 0.999))]
            job.put("adam_betas", betas, "adam_beta1", "adam_beta2")
        _set_adapter(job)
        if job.get("datasets") is not None:
            set_files(job, [str(one.get("path", one)) if isinstance(one, Mapping) else str(one) for one in job.get("datasets")],
                      "datasets")  # fmt: skip
            job.note(f"datasets: type and split are not carried; {FORMATS}")


def _set_loss(job: Job) -> None:
    method = job.get("rl")
    if method is None:
        job.put("method", "sft")
        return
    if method not in METHODS:
        raise InputError(f"rl: {method!r} is not here; there is {', '.join(METHODS)}, or none for sft")
    job.carried["rl"] = "method"
    key = "rl_beta" if job.get("rl_beta") is not None else "dpo_beta"
    beta = shared.number_or(job, key, 0.1)
    if method in {"dpo", "ipo"}:
        names = "ipo" if method == "ipo" else job.get("dpo_loss_type", "sigmoid")
        if isinstance(names, list) and len(names) == 1:
            names = names[0]
        if names == "sigmoid" and flag(job.get("dpo_norm_loss", False)):
            names = "sigmoid_norm"
            job.carried["dpo_norm_loss"] = "loss.length_normalised"
        keys = ("dpo_loss_type" if "dpo_loss_type" in job.values else "rl", "dpo_loss_weights", key, "dpo_label_smoothing")
        shared.set_loss(job, names, job.get("dpo_loss_weights"), beta, shared.number_or(job, "dpo_label_smoothing", 0.0), keys)
        variants.set_weighting(job, "dpo_use_weighting")
        if job.get("rpo_alpha") is not None:
            shared.add_sft(job, float(job.get("rpo_alpha")), "rpo_alpha",
                           "the NLL is averaged over each completion's own tokens, not over a micro batch")  # fmt: skip
        return
    job.put("method", method)
    if method == "orpo":
        job.put("loss.lambda_or", shared.number_or(job, "orpo_alpha", beta), "orpo_alpha", key)
        job.put("loss.nll_scope", "prompt_and_answer")
        job.note("orpo_alpha (rl_beta): is the weight lambda of the odds ratio and not the beta of DPO")
    elif method == "kto":
        job.put("loss.beta", beta, key)
        for name, option in (("kto_desirable_weight", "lambda_d"), ("kto_undesirable_weight", "lambda_u")):
            job.put(f"loss.{option}", shared.number_or(job, name, 1.0), name)
        job.note("kto: the reference point is the mean over the whole step, not of a micro batch")
    else:
        job.put("loss.beta", beta, key)
        job.put("loss.gamma", shared.number_or(job, "simpo_gamma", 0.5), "simpo_gamma")
        job.note("simpo_gamma: is the margin itself (gamma); SimPO's own code names gamma / beta")
        shared.add_sft(job, shared.number_or(job, "cpo_alpha", 1.0), "cpo_alpha",
                       "Axolotl's SimPO is TRL's CPOTrainer, which adds the NLL with weight 1 unless cpo_alpha is 0")  # fmt: skip


def _set_adapter(job: Job) -> None:
    kind = job.get("adapter")
    is_lora = kind in {"lora", "qlora"}
    if kind is not None and not is_lora:
        raise InputError(f"adapter: {kind!r} is not here; there is lora, or none for full")
    job.put("adapter", "lora" if is_lora else "full", "adapter")
    if kind == "qlora":
        job.note(f"adapter qlora: {shared.NO_QUANTS}")
    if not is_lora:
        job.recipe.pop("lora", None)
        return
    modules = job.get("lora_target_modules")
    is_all = flag(job.get("lora_target_linear", False)) or not modules
    set_modules(job, "all-linear" if is_all else modules, "lora_target_modules")
    if "lora_target_linear" in job.values:
        job.carried["lora_target_linear"] = "lora.target_modules"
