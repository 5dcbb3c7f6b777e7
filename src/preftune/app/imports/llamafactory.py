"""LLaMA-Factory: the YAML of `llamafactory-cli train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.app.imports import shared, variants
from preftune.app.imports.base import Job, Table, To, count, flag, flat, job_sources, leave, number, read
from preftune.app.imports.trl import set_files, set_modules
from preftune.core.errors import InputError

STAGES = ("dpo", "kto", "sft")
TAIL = "LLaMA-Factory weights the tail of the policy alone; here policy and reference, as the paper does"
FTX = "averaged over each chosen answer's own tokens, as in the source"


@job_sources.register("llamafactory")
@dataclass(frozen=True, slots=True)
class LlamaFactory:
    """A training file of LLaMA-Factory, stages dpo, kto and sft."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-5,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "cutoff_len": 2048,
        "lora_rank": 8,
    }
    table: ClassVar[Table] = {
        **shared.HF_TRAINER,
        "model_name_or_path": To("model.name", str),
        "model_revision": To("model.revision", str),
        "cutoff_len": To(
            "data.max_length", count, "rows that are longer are left out and listed, not cut (data.too_long: cut cuts)"
        ),
        "max_samples": To("data.limit", count),
        "val_size": To("data.select", number, "is held out by prompt group, to choose checkpoints on"),
        **read("adapter", "finetuning_type lora_rank lora_alpha lora_dropout lora_target use_rslora use_dora"),
        **read(
            "loss", "stage pref_beta pref_loss pref_ftx dpo_label_smoothing simpo_gamma kto_chosen_weight kto_rejected_weight"
        ),
        **read("data", "dataset dataset_dir eval_dataset"),
        **leave(
            "the model's own chat template is used; model.chat_template replaces it", "template default_system enable_thinking"
        ),
        **leave(shared.NO_QUANTS, "quantization_bit quantization_method double_quantization quantization_type"),
        **leave(shared.TRUST, "trust_remote_code", False),
        **leave(shared.SPEED, "preprocessing_num_workers overwrite_cache flash_attn packing neat_packing enable_liger_kernel"),
        **leave(shared.SPEED, "use_unsloth low_cpu_mem_usage preprocessing_batch_size streaming upcast_layernorm pure_bf16"),
        **leave("curves are in the report", "plot_loss"),
        **leave(
            "the reference is the model that the stage starts from", "ref_model ref_model_adapters ref_model_quantization_bit"
        ),
        **leave("an adapter to go on from is from_checkpoint: FOLDER", "adapter_name_or_path create_new_adapter"),
        **read("loss", "ld_alpha pref_bco_weight"),
        **leave("this weighting is not offered", "dpo_loss_norm", 0, 0.0, False),
        **leave(
            "this kind of training is not offered", "freeze_trainable_layers use_galore use_badam use_apollo loraplus_lr_ratio"
        ),
        **leave("only LoRA's own modules are trained", "additional_target"),
        **leave("the loss counts answers only", "train_on_prompt mask_history", False),
        **leave("models are read from a folder or the hub", "cache_dir hf_hub_token use_fast_tokenizer resize_vocab"),
        **leave("`preftune eval` samples from the trained model", "do_predict predict_with_generate", False),
    }

    def matches(self, given: Mapping[str, Any]) -> bool:
        """Keys that only LLaMA-Factory has."""
        return bool({"finetuning_type", "pref_beta", "cutoff_len", "pref_loss", "dataset_dir"} & given.keys())

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As it is: the arguments are flat."""
        return flat(given)

    def finish(self, job: Job) -> None:
        """Stage, loss, adapter and data."""
        stage = job.get("stage", "sft")
        if stage not in STAGES:
            raise InputError(f"stage: {stage!r} is not here; there is {', '.join(STAGES)}")
        job.carried["stage"] = "method"
        _set_loss(job, stage)
        shared.finish_trainer(job)
        _set_adapter(job)
        _set_data(job)


def _set_loss(job: Job, stage: str) -> None:
    beta = shared.number_or(job, "pref_beta", 0.1)
    if stage == "sft":
        job.put("method", "sft")
        return
    if stage == "kto":
        job.put("method", "kto")
        job.put("loss.beta", beta, "pref_beta")
        for key, option in (("kto_chosen_weight", "lambda_d"), ("kto_rejected_weight", "lambda_u")):
            job.put(f"loss.{option}", shared.number_or(job, key, 1.0), key)
        job.note("kto: the reference point is the mean over the whole step, not of a micro batch")
        return
    name = job.get("pref_loss", "sigmoid")
    if name == "orpo":
        job.put("method", "orpo", "pref_loss")
        job.put("loss.lambda_or", beta, "pref_beta")
        job.note("pref_beta: is the weight lambda of the odds ratio in ORPO and not the beta of DPO")
    elif name == "simpo":
        job.put("method", "simpo", "pref_loss")
        job.put("loss.beta", beta, "pref_beta")
        job.put("loss.gamma", shared.number_or(job, "simpo_gamma", 0.5), "simpo_gamma")
        job.note("simpo_gamma: is the margin itself (gamma); SimPO's own code names gamma / beta")
    else:
        smoothing = shared.number_or(job, "dpo_label_smoothing", 0.0)
        shared.set_loss(job, name, None, beta, smoothing, ("pref_loss", "", "pref_beta", "dpo_label_smoothing"))
        variants.set_tail(job, "ld_alpha", TAIL)
        _add_bco(job, beta)
    if job.get("pref_ftx") is not None and name != "orpo":
        shared.add_sft(job, float(job.get("pref_ftx")), "pref_ftx", FTX)


def _add_bco(job: Job, beta: float) -> None:
    """``pref_bco_weight``: a BCO term beside the preference loss."""
    weight = shared.number_or(job, "pref_bco_weight", 0.0)
    if "pref_bco_weight" not in job.values:
        return
    if weight <= 0:
        job.carried["pref_bco_weight"] = variants.AS_ANYWAY
        return
    method, options = job.recipe["method"], job.recipe.get("loss", {})
    job.put("method", "mix")
    job.recipe["loss"] = {"parts": {method: {"weight": 1.0, **options}, "bco_pair": {"weight": weight, "beta": beta}}}
    job.carried["pref_bco_weight"] = "loss.parts.bco_pair"


def _set_adapter(job: Job) -> None:
    kind = job.get("finetuning_type", "lora")
    if kind not in {"lora", "full"}:
        raise InputError(f"finetuning_type: {kind!r} is not here; there is lora and full")
    job.put("adapter", kind, "finetuning_type")
    if kind == "full":
        return
    rank = count(job.get("lora_rank", 8))
    job.put("lora.rank", rank, "lora_rank")
    job.put("lora.alpha", float(job.get("lora_alpha", 2 * rank)), "lora_alpha")
    job.put("lora.dropout", float(job.get("lora_dropout", 0.0)), "lora_dropout")
    for key, option in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if key in job.values:
            job.put(f"lora.{option}", flag(job.get(key)), key)
    set_modules(job, job.get("lora_target", "all"), "lora_target")


def _set_data(job: Job) -> None:
    names = job.get("dataset")
    if names is None:
        return
    listed = names if isinstance(names, list) else [one.strip() for one in str(names).split(",")]
    set_files(job, [str(one) for one in listed], "dataset")
    job.note("dataset: names stand for files in dataset_info.json of dataset_dir; its columns are known formats here")
