"""What Hugging Face's trainer and every trainer built on it have in common: its arguments, batches, warm-up, loss names."""

from __future__ import annotations

from typing import Any

from preftune.app.imports.base import (
    CannotCarry,
    Job,
    Rule,
    To,
    count,
    flag,
    leave,
    number,
    one_of,
    positive,
    read,
    required_number,
    whole,
)
from preftune.core.errors import InputError

SCHEDULE = one_of(linear="linear", cosine="cosine", constant="constant", constant_with_warmup="constant")
ADAM = "AdamW in float32 here, whatever the variant"
LOGGING = "metrics.jsonl, events.jsonl and the report are always written"
WHEN = "evaluations and checkpoints are counts over a stage (evals, checkpoints), evenly spaced"
SPEED = "how fast, not what: chosen by preftune itself, or not offered on one machine"
TRUST = "code of a model's repository is never executed"
HUB = "pushing is a verb of its own: preftune export MODEL --to DIR --push-to-hub REPO"
NO_QUANTS = "write model.load_in_4bit (NF4, double quantisation) or load_in_8bit; other ways of rounding are not offered"


def share(value: Any) -> float:
    """A share in [0, 1)."""
    found = number(value)
    if not 0 <= found < 1:
        raise CannotCarry(f"is {value!r}, not a share below 1")
    return found


def grad_norm(value: Any) -> float | None:
    """The norm that gradients are clipped to; 0 means no clipping."""
    return None if number(value) == 0 else positive(value)


def max_steps(value: Any) -> int:
    """Optimiser steps; -1 means by epochs."""
    return count(value)


HF_TRAINER: dict[str, Rule] = {
    "learning_rate": To("lr", positive),
    "num_train_epochs": To("epochs", positive),
    "max_steps": To("max_steps", max_steps),
    "lr_scheduler_type": To("schedule", SCHEDULE),
    "weight_decay": To("weight_decay", number, "vectors (norms, biases) do not decay here"),
    "max_grad_norm": To("max_grad_norm", grad_norm),
    "adam_epsilon": To("adam_eps", positive),
    "seed": To("seed", whole, "the same seed draws other numbers in another program: order and results are not the same"),
    "run_name": To("name", str),
    "output_dir": To("output", str, "runs get folders of their own below it"),
    "save_total_limit": To("keep_checkpoints", count),
    "gradient_checkpointing": To("gradient_checkpointing", flag),
    **read("batch", "per_device_train_batch_size gradient_accumulation_steps"),
    **read("warm-up", "warmup_ratio warmup_steps"),
    **read("adam", "adam_beta1 adam_beta2"),
    **read("optimiser", "optim"),
    **read("best weights", "load_best_model_at_end metric_for_best_model greater_is_better"),
    **leave(LOGGING, "report_to logging_steps logging_strategy logging_first_step logging_dir log_level logging_nan_inf_filter"),
    **leave(
        LOGGING, "disable_tqdm project trackio_space_id log_completions include_tokens_per_second include_num_input_tokens_seen"
    ),
    **leave(
        WHEN, "eval_strategy evaluation_strategy eval_steps eval_on_start eval_delay save_strategy save_steps do_eval do_train"
    ),
    **leave(
        "evaluation has no batch size of its own; packs are filled by tokens",
        "per_device_eval_batch_size eval_accumulation_steps",
    ),
    **leave("checkpoints hold optimiser state, so that a run can go on", "save_only_model", False),
    **leave("checkpoints are safetensors", "save_safetensors", True),
    **leave("`preftune train --resume RUN` goes on with a run", "resume_from_checkpoint overwrite_output_dir", False),
    **leave(
        "precision follows model.dtype; set it to bfloat16 or float32", "bf16 fp16 tf32 bf16_full_eval fp16_full_eval", False
    ),
    **leave(
        SPEED, "dataloader_num_workers dataloader_pin_memory dataloader_drop_last dataloader_prefetch_factor group_by_length"
    ),
    **leave(
        SPEED, "deepspeed fsdp fsdp_config ddp_timeout ddp_find_unused_parameters accelerator_config torch_compile local_rank"
    ),
    **leave(SPEED, "use_liger_kernel optim_args torch_empty_cache_steps auto_find_batch_size gradient_checkpointing_kwargs"),
    **leave("every column that a format knows is read", "remove_unused_columns"),
    **leave("the recipe's seed draws the data's order too", "data_seed"),
    **leave(HUB, "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision"),
    **leave("schedules have no further options; the rate ends at 0", "lr_scheduler_kwargs", {}),
    **leave("runs are bit-exact on one machine unless deterministic: false", "full_determinism"),
    **leave("label smoothing is an option of the loss", "label_smoothing_factor", 0, 0.0),
    **leave("noise on embeddings is not offered", "neftune_noise_alpha"),
}


def finish_trainer(job: Job, batch: str = "per_device_train_batch_size") -> None:
    """Batch, warm-up, AdamW's betas, the optimiser's name and best weights, from arguments of Hugging Face's trainer."""
    set_batch(job, batch)
    set_warmup(job)
    if job.get("adam_beta1") is not None or job.get("adam_beta2") is not None:
        betas = [float(job.get("adam_beta1", 0.9)), float(job.get("adam_beta2", 0.999))]
        job.put("adam_betas", betas, "adam_beta1", "adam_beta2")
    set_optimiser(job, "optim")
    set_best(job)


def set_optimiser(job: Job, key: str) -> None:
    """AdamW of any variant is ours; another optimiser is not."""
    value = job.get(key)
    if value is None:
        return
    if str(value) in {"adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"}:
        job.put("optimizer", "adamw_8bit", key)
    elif "adamw" in str(value):
        job.carried[key] = "as preftune does anyway"
        if str(value) not in {"adamw_torch", "adamw_torch_fused"} and key not in job.defaults:
            job.note(f"{key}: {value} is {ADAM}")
    else:
        job.leave(key, f"{value!r} has no counterpart; AdamW is used")


def set_batch(job: Job, batch: str, accumulation: str = "gradient_accumulation_steps") -> None:
    """pairs_per_step = micro batch x accumulation x devices."""
    micro, steps = job.get(batch), job.get(accumulation, 1)
    if micro is None:
        return
    if not all(isinstance(value, int) and value > 0 for value in (micro, steps)):
        for key, value in ((batch, micro), (accumulation, steps)):
            if not isinstance(value, int) or value <= 0:
                job.leave(key, f"is {value!r}, so the batch is not known; preftune's own 16 is used")
        return
    job.put("pairs_per_step", micro * steps * job.devices, batch, accumulation)
    job.note(
        f"pairs_per_step {micro * steps * job.devices} = {micro} a device x {steps} accumulated x {job.devices} "
        f"device{'' if job.devices == 1 else 's'} (--devices says how many the job ran on); micro batches are made by tokens here"
    )


def set_warmup(job: Job) -> None:
    """A share of the steps; a number of steps becomes one where the number of all steps is known."""
    steps, ratio = job.get("warmup_steps"), job.get("warmup_ratio")
    if steps is not None and 0 < float(steps) < 1:
        job.put("warmup", float(steps), "warmup_steps")
    elif steps:
        in_all = job.get("max_steps", -1)
        if int(in_all) > int(steps):
            job.put("warmup", round(int(steps) / int(in_all), 6), "warmup_steps")
        else:
            job.leave("warmup_steps", "warm-up is a share of the steps here (warmup: 0.1), and max_steps is not given")
            return
        if ratio:
            job.leave("warmup_ratio", "warmup_steps goes before it")
    elif ratio is not None or steps is not None:
        job.put("warmup", share(ratio or 0), "warmup_ratio", "warmup_steps")


def set_best(job: Job) -> None:
    """``load_best_model_at_end`` is ``keep: best``."""
    if job.get("load_best_model_at_end") is None:
        return
    is_best = flag(job.get("load_best_model_at_end"))
    job.put("keep", "best" if is_best else "last", "load_best_model_at_end")
    metric = job.get("metric_for_best_model")
    if is_best:
        job.note("load_best_model_at_end: keep: best needs data.select, rows to choose on")
        if metric in {"eval_loss", "loss"}:
            job.carried["metric_for_best_model"] = "as preftune does anyway"


SAME_NAMES = (
    "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
)  # fmt: skip

# loss name of TRL -> ours, the option that takes beta, further options, what to say
LOSSES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "sigmoid": ("dpo", "beta", {}, ""),
    "sigmoid_norm": ("dpo", "beta", {"length_normalised": True}, "log-ratios are divided by length, as in the source"),
    "ipo": (
        "ipo", "tau", {"length_normalised": True},
        "beta is the tau of IPO; the source divides log-ratios by length, so does length_normalised: true; the paper does not",
    ),
    "sft": ("sft", "", {}, "averaged over the tokens of the whole step, not of each micro batch"),
    **{name: (name, "beta", {}, "") for name in SAME_NAMES},
}  # fmt: skip


def set_loss(job: Job, names: Any, weights: Any, beta: float, smoothing: float, keys: tuple[str, ...]) -> None:
    """The method and options of TRL's ``loss_type`` and ``loss_weights``.

    keys: of names, weights, beta and smoothing, for what is said.

    Raises
        InputError: a loss that is not here; a recipe with another one would be another job.
    """
    listed = [names] if isinstance(names, str) else list(names)
    shares = [1.0] * len(listed) if weights is None else [float(one) for one in weights]
    parts = {name: _loss_of(job, name, beta, smoothing, keys) for name in listed}
    if len(parts) == 1:
        method, options = parts[listed[0]]
        job.put("method", method, keys[0])
        job.recipe["loss"] = options
    else:
        methods = [method for method, _ in parts.values()]
        if len(set(methods)) < len(listed):
            raise InputError(
                f"{keys[0]}: {', '.join(listed)} need one loss twice ({', '.join(methods)}), which a mix does not hold"
            )
        job.put("method", "mix", keys[0])
        job.recipe["loss"] = {
            "parts": {parts[name][0]: {"weight": weight, **parts[name][1]} for name, weight in zip(listed, shares, strict=True)}
        }
    for key in (keys[1], keys[2]):
        if key in job.values:
            job.carried[key] = "loss"


def _loss_of(job: Job, name: str, beta: float, smoothing: float, keys: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    from preftune.app.recipes import loss_options

    known = loss_options()
    if name not in LOSSES or LOSSES[name][0] not in known:
        raise InputError(f"{keys[0]}: loss {name!r} is not here; there is {', '.join(sorted(known))}; write the recipe by hand")
    method, option, more, note = LOSSES[name]
    options = dict(more)
    if option:
        options[option] = beta
    if note:
        job.note(f"{keys[0]} {name}: {note}")
    if method == "exo_pair" and not smoothing:
        job.note(f"{keys[0]} {name}: label_smoothing must be above 0, in the source too; 1e-3, the paper's, is used")
    if smoothing or method == "robust":  # its own default is not 0
        if "label_smoothing" in known[method]:
            options["label_smoothing"] = smoothing
            job.carried[keys[3]] = "loss.label_smoothing"
        elif keys[3] not in job.carried:
            job.leave(keys[3], f"loss {method} has no label smoothing")
    elif keys[3] in job.values:
        job.carried[keys[3]] = "as preftune does anyway"
    return method, options


def add_sft(job: Job, weight: float, key: str, note: str) -> None:
    """An NLL term beside the preference loss: rpo_alpha of dpo, a part of a mix for the others."""
    method, options = job.recipe["method"], job.recipe.get("loss", {})
    if weight == 0:
        job.carried[key] = "as preftune does anyway"
        return
    if method == "dpo":
        job.put("loss.rpo_alpha", weight, key)
    elif method == "mix":
        job.recipe["loss"]["parts"]["sft"] = {"weight": weight + options["parts"].get("sft", {}).get("weight", 0.0)}
        job.carried[key] = "loss.parts.sft"
    else:
        job.recipe["method"] = "mix"
        job.recipe["loss"] = {"parts": {method: {"weight": 1.0, **options}, "sft": {"weight": weight}}}
        job.carried[key] = "loss.parts.sft"
    job.note(f"{key}: {note}")


def number_or(job: Job, key: str, default: float) -> float:
    """A number of a key, or the source's own default."""
    return default if job.get(key) is None else required_number(job, key)
