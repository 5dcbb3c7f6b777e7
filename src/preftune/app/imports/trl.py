"""TRL: DPOConfig, CPOConfig, ORPOConfig, KTOConfig, SFTConfig, with the script's and the model's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.app.imports import shared, variants
from preftune.app.imports.base import Job, Leave, Table, To, count, flag, flat, job_sources, leave, number, one_of, read
from preftune.core.errors import InputError

TRAINERS = ("dpo", "cpo", "orpo", "kto", "sft")
KTO_LOSSES = ("kto", "apo_zero_unpaired")
TARGETS = "None means TRL's own choice for the architecture (often q_proj and v_proj only); here all linear layers"


@job_sources.register("trl")
@dataclass(frozen=True, slots=True)
class TRL:
    """A YAML or JSON file of TRL 0.x or 1.x, as `trl dpo --config FILE` takes it."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-6,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "max_length": 1024,
    }
    table: ClassVar[Table] = {
        **shared.HF_TRAINER,
        "model_name_or_path": To("model.name", str),
        "model_revision": To("model.revision", str),
        "chat_template_path": To("model.chat_template", str),
        "dtype": To("model.dtype", one_of(auto="auto", float32="float32", bfloat16="bfloat16")),
        "torch_dtype": To("model.dtype", one_of(auto="auto", float32="float32", bfloat16="bfloat16")),
        "max_length": To(
            "data.max_length", count, "rows that are longer are left out and listed, not cut (data.too_long: cut cuts)"
        ),
        "lora_r": To("lora.rank", count),
        "lora_alpha": To("lora.alpha", number),
        "lora_dropout": To("lora.dropout", number),
        "use_rslora": To("lora.rslora", flag),
        "use_dora": To("lora.dora", flag),
        **read("adapter", "use_peft lora_target_modules"),
        **read("loss", "loss_type loss_weights beta label_smoothing rpo_alpha simpo_gamma cpo_alpha desirable_weight"),
        **read("loss", "undesirable_weight alpha"),
        **read("loss", "f_divergence_type f_alpha_divergence_coef use_weighting ld_alpha discopop_tau"),
        **read("data", "dataset_name dataset_config dataset_train_split dataset_test_split datasets"),
        **leave("the prompt is never cut; what does not fit is left out and listed", "max_prompt_length max_completion_length"),
        **leave("data.too_long says what happens to long rows", "truncation_mode"),
        **leave(
            "the reference is the model that the stage starts from, computed once and kept", "precompute_ref_log_probs", True
        ),
        **leave("the reference is the model that the stage starts from", "ref_model ref_model_name_or_path model_init_kwargs"),
        **leave("the reference is computed once and kept; it does not move", "sync_ref_model", False),
        **leave("the reference does not move", "ref_model_mixup_alpha ref_model_sync_steps"),
        **leave("dpo here has a reference; simpo, orpo and cpo are losses without one", "reference_free", False),
        "load_in_4bit": To("model.load_in_4bit", flag),
        "load_in_8bit": To("model.load_in_8bit", flag),
        **leave(shared.NO_QUANTS, "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"),
        **leave(shared.TRUST, "trust_remote_code", False),
        **leave(
            shared.SPEED, "attn_implementation padding_free pad_to_multiple_of dataset_num_proc use_liger_loss use_logits_to_keep"
        ),
        **leave(shared.SPEED, "precompute_ref_batch_size activation_offloading packing eval_packing dataset_batch_size"),
        **leave("special tokens are the tokenizer's own", "pad_token eos_token label_pad_token_id padding_value"),
        **leave("dropout is off: a policy is its own reference at step 0", "disable_dropout", True),
        **leave("samples of the probe are always written (probe)", "generate_during_eval", False),
        **leave("only named modules of LoRA are trained", "lora_modules_to_save lora_task_type", "CAUSAL_LM"),
        **leave("rows are streamed through the reader anyway", "dataset_streaming ignore_bias_buffers"),
        **leave("models here are decoders", "is_encoder_decoder", False),
        **leave("the loss counts answers only", "completion_only_loss assistant_only_loss", True),
        "dataset_text_field": Leave("data.columns names columns: {prompt: ..., completion: ...}"),
    }

    def matches(self, given: Mapping[str, Any]) -> bool:
        """Arguments of TRL's scripts and of nobody else here."""
        own = {"model_name_or_path", "per_device_train_batch_size", "loss_type", "dataset_name", "max_prompt_length", "use_peft"}
        return bool(own & given.keys())

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As it is: the arguments are flat."""
        return flat(given)

    def finish(self, job: Job) -> None:
        """Trainer, loss, adapter and data."""
        trainer = job.trainer or _trainer_of(job)
        if trainer not in TRAINERS:
            raise InputError(f"--trainer {trainer!r}: there is {', '.join(TRAINERS)}")
        if not job.trainer and trainer == "dpo" and "loss_type" not in job.values:
            job.note("the file does not name its trainer; DPOTrainer is assumed (--trainer orpo, cpo, kto or sft says otherwise)")
        _set_loss(job, trainer)
        shared.finish_trainer(job)
        _set_adapter(job)
        _set_data(job)


def _trainer_of(job: Job) -> str:
    if {"desirable_weight", "undesirable_weight"} & job.values.keys() or job.get("loss_type") in KTO_LOSSES:
        return "kto"
    if {"cpo_alpha", "simpo_gamma"} & job.values.keys() or str(job.get("loss_type")) in {"simpo", "alphapo"}:
        return "cpo"
    return "dpo"


def _set_loss(job: Job, trainer: str) -> None:
    beta = shared.number_or(job, "beta", 0.1)
    if trainer == "dpo":
        smoothing = shared.number_or(job, "label_smoothing", 0.0)
        names = job.get("loss_type", "sigmoid")
        shared.set_loss(
            job, names, job.get("loss_weights"), beta, smoothing, ("loss_type", "loss_weights", "beta", "label_smoothing")
        )
        variants.set_divergence(job, "f_divergence_type", "f_alpha_divergence_coef")
        variants.set_tau(job, "discopop_tau")
        variants.set_tail(job, "ld_alpha")
        variants.set_weighting(job, "use_weighting")
        if job.get("rpo_alpha") is not None:
            shared.add_sft(job, float(job.get("rpo_alpha")), "rpo_alpha", "TRL averages the NLL over a micro batch's tokens, "
                           "here over each completion's own")  # fmt: skip
    elif trainer == "kto":
        kind = job.get("loss_type", "kto")
        if kind not in KTO_LOSSES:
            raise InputError(f"loss_type: KTOTrainer has {', '.join(KTO_LOSSES)}, got {kind!r}")
        job.put("method", kind, "loss_type")
        job.put("loss.beta", beta, "beta")
        for key, option in (("desirable_weight", "lambda_d"), ("undesirable_weight", "lambda_u")):
            job.put(f"loss.{option}", shared.number_or(job, key, 1.0), key)
        if kind == "kto":
            job.note("kto: the reference point is the mean over the whole step, not of a micro batch")
    elif trainer == "orpo":
        job.put("method", "orpo")
        job.put("loss.lambda_or", beta, "beta")
        job.put("loss.nll_scope", "prompt_and_answer")
        job.note(
            "beta: is the weight lambda of the odds ratio in ORPO and not the beta of DPO; TRL's NLL is over prompt and answer"
        )
    elif trainer == "cpo":
        _set_cpo(job, beta)
    else:
        job.put("method", "sft")


def _set_cpo(job: Job, beta: float) -> None:
    """CPO itself, its SimPO form, and that with an alpha, AlphaPO."""
    kind, alpha = str(job.get("loss_type", "sigmoid")), shared.number_or(job, "alpha", 0.0)
    if kind not in {"sigmoid", "simpo", "alphapo"} or (kind == "sigmoid" and alpha != 0):
        what = f"{kind!r} of CPO{' with an alpha' if kind == 'sigmoid' else ''}"
        raise InputError(f"loss_type: {what} is not here; there is sigmoid (cpo), simpo and alphapo; write the recipe by hand")
    weight = 0.0 if kind == "alphapo" else shared.number_or(job, "cpo_alpha", 1.0)
    if kind == "sigmoid":
        job.put("method", "cpo", "loss_type")
        job.put("loss.beta", beta, "beta")
        job.put("loss.alpha", weight, "cpo_alpha")
        job.note("cpo_alpha: the NLL is averaged over the tokens of the whole step here, of a micro batch in TRL")
        if job.get("simpo_gamma") is not None:
            job.leave("simpo_gamma", "is of the SimPO form, and the job's loss_type is sigmoid")
    else:
        is_shaped = alpha != 0 or kind == "alphapo"
        job.put("method", "alphapo" if is_shaped else "simpo", "loss_type")
        job.put("loss.beta", beta, "beta")
        job.put("loss.gamma", shared.number_or(job, "simpo_gamma", 0.5), "simpo_gamma")
        job.note("simpo_gamma: is the margin itself (gamma); SimPO's own code names gamma / beta")
        if is_shaped:
            job.put("loss.alpha", alpha, "alpha")
    if "alpha" in job.values and "alpha" not in job.carried:
        job.carried["alpha"] = variants.AS_ANYWAY
    if "label_smoothing" in job.values:
        job.put("loss.label_smoothing", shared.number_or(job, "label_smoothing", 0.0), "label_smoothing")
    if kind == "simpo":
        shared.add_sft(job, weight, "cpo_alpha", "TRL adds the chosen answer's NLL with weight 1 unless it is 0; averaged over "
                       "the tokens of the whole step here")  # fmt: skip
    elif kind == "alphapo" and job.get("cpo_alpha") is not None:
        job.leave("cpo_alpha", "TRL sets it to 0 for loss_type: alphapo")


def _set_adapter(job: Job) -> None:
    is_lora = flag(job.get("use_peft", False))
    job.put("adapter", "lora" if is_lora else "full", "use_peft")
    if not is_lora:
        if job.recipe.pop("lora", None) is not None:
            job.note("lora_*: without use_peft: true TRL trains all weights, so these say nothing")
        return
    modules = job.get("lora_target_modules")
    if modules is None:
        job.note(f"lora_target_modules: {TARGETS}")
    else:
        set_modules(job, modules, "lora_target_modules")
    lora = job.recipe.setdefault("lora", {})
    missing = {key: value for key, value in (("rank", 16), ("alpha", 32.0), ("dropout", 0.05)) if key not in lora}
    if missing:
        lora.update(missing)
        job.note("lora: TRL's own defaults are written: " + ", ".join(f"{key} {value}" for key, value in missing.items()))


def set_modules(job: Job, modules: Any, key: str) -> None:
    """Target modules of LoRA: one name for all linear layers, or a list."""
    names = modules if isinstance(modules, list) else str(modules).replace(",", " ").split()
    job.put("lora.target_modules", "all-linear" if names in (["all-linear"], ["all"]) else names, key)


def _set_data(job: Job) -> None:
    name = job.get("dataset_name")
    if job.get("datasets") is not None:
        paths = [str(one.get("path", one)) if isinstance(one, Mapping) else str(one) for one in job.get("datasets")]
        set_files(job, paths, "datasets")
    elif name is not None:
        set_files(job, [str(name)], "dataset_name")
    split = job.get("dataset_train_split", "train")
    if "dataset_train_split" in job.values:
        if split == "train":
            job.carried["dataset_train_split"] = "data.train"
        else:
            job.leave("dataset_train_split", f"data.train is a file; write the split {split!r} to one")


def set_files(job: Job, files: list[str], key: str) -> None:
    """data.train; a name that is no file here has to become one."""
    from pathlib import Path

    job.put("data.train", files, key)
    for file in files:
        if not Path(file).is_file():
            job.note(f"{key}: {file!r} is no file here; download it and give its path (data.train, or --data FILE)")
