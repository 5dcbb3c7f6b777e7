"""SeekrFlow: the body of POST /v1/flow/fine-tune, or its TrainingConfig alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.app.imports.base import Job, Table, To, count, flag, flat, job_sources, leave, number, positive, read, whole
from preftune.app.imports.trl import set_files
from preftune.core.errors import InputError

KINDS = {"PREFERENCE": "dpo", "STANDARD": "sft"}
MACHINE = "belongs to the service's machines; one machine is used here"


@job_sources.register("seekrflow")
@dataclass(frozen=True, slots=True)
class SeekrFlow:
    """A job of SeekrFlow, as JSON: fine_tune_type PREFERENCE or STANDARD."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    table: ClassVar[Table] = {
        "model": To("model.name", str),
        "n_epochs": To("epochs", positive),
        "learning_rate": To("lr", positive),
        "n_checkpoints": To("checkpoints", whole),
        "batch_size": To("pairs_per_step", count),
        "experiment_name": To("name", str),
        "max_length": To("data.max_length", count),
        "gradient_checkpointing": To("gradient_checkpointing", flag),
        "lora_config.r": To("lora.rank", count),
        "lora_config.alpha": To("lora.alpha", number),
        "lora_config.dropout": To(
            "lora.dropout", number, "acts on the policy and not on its reference; 0 is usual for preferences"
        ),
        **read("loss", "fine_tune_type beta"),
        **read("data", "training_files validation_files"),
        **leave("biases are not trained with LoRA here", "lora_config.bias", "none"),
        **leave("further options of the service's adapters", "lora_config.extras", {}),
        **leave("supervised training on plain text is not offered", "pre_train", False),
        **leave("rewards of reinforcement learning are not offered", "reward_components"),
        **leave(MACHINE, "accel_type n_accel n_node project_id"),
    }

    def matches(self, given: Mapping[str, Any]) -> bool:
        """A body with training_config, or a TrainingConfig."""
        return "training_config" in given or "fine_tune_type" in given or "training_files" in given

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The two configurations side by side, the adapter's options dotted."""
        both: dict[str, Any] = {}
        for key, value in given.items():
            both.update(
                value if key in {"training_config", "infrastructure_config"} and isinstance(value, Mapping) else {key: value}
            )
        if isinstance(both.get("lora_config"), Mapping):
            both["lora_config"] = {"r": 8, "alpha": 32, "dropout": 0.1, **both["lora_config"]}
        return flat(both, ("lora_config",))

    def finish(self, job: Job) -> None:
        """Method, adapter and files."""
        kind = str(job.get("fine_tune_type", "STANDARD"))
        if kind not in KINDS:
            raise InputError(f"fine_tune_type: {kind!r} is not here; there is {', '.join(KINDS)}")
        job.put("method", KINDS[kind], "fine_tune_type")
        if job.get("beta") is not None:
            if kind == "PREFERENCE":
                job.put("loss.beta", number(job.get("beta")), "beta")
            else:
                job.leave("beta", "sft has no beta")
        is_lora = "lora" in job.recipe
        job.recipe["adapter"] = "lora" if is_lora else "full"
        if not is_lora:
            job.note("no lora_config: the service trains all weights, so adapter: full is written")
        files = job.get("training_files")
        if files:
            set_files(job, [str(one) for one in (files if isinstance(files, list) else [files])], "training_files")
        held_out = job.get("validation_files")
        if held_out:
            listed = held_out if isinstance(held_out, list) else [held_out]
            job.put("data.select", str(listed[0]), "validation_files")
            job.note("validation_files: are files of the service; download them and give a path (data.select takes one)")
