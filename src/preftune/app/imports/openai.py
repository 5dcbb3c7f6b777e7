"""OpenAI: the body of POST /v1/fine_tuning/jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from preftune.app.imports.base import Job, Table, To, flat, job_sources, leave, number, read, whole
from preftune.app.imports.trl import set_files
from preftune.core.errors import InputError

NAMES = ("beta", "batch_size", "learning_rate_multiplier", "n_epochs")
PLACES = ("hyperparameters.", "method.dpo.hyperparameters.", "method.supervised.hyperparameters.")
AUTO = "'auto' is chosen by the service and not published; preftune's own default is used"
CLOSED = ("gpt-", "ft:gpt-", "o1", "o3", "o4")


@job_sources.register("openai")
@dataclass(frozen=True, slots=True)
class OpenAI:
    """A job of OpenAI, as JSON: method dpo or supervised."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    table: ClassVar[Table] = {
        "seed": To("seed", whole, "the same seed draws other numbers in another program: results are not the same"),
        "suffix": To("name", str),
        "validation_file": To("data.select", str, "is a file of the service; download it and give its path"),
        **read("model", "model"),
        **read("data", "training_file"),
        **read("method", "method.type"),
        **{f"{place}{name}": rule for place in PLACES for name, rule in read("hyperparameters", " ".join(NAMES)).items()},
        **leave("belongs to the service", "metadata integrations"),
    }

    def matches(self, given: Mapping[str, Any]) -> bool:
        """A training file with a method's object, or with hyperparameters."""
        method = given.get("method")
        return "training_file" in given and (isinstance(method, Mapping) or "hyperparameters" in given or set(given) <= PLAIN)

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The method's objects taken apart."""
        deep = ["method", *(place.rstrip(".") for place in PLACES), "method.dpo", "method.supervised"]
        return flat(given, tuple(deep))

    def finish(self, job: Job) -> None:
        """Method, hyperparameters, model and file."""
        kind = job.get("method.type", "supervised")
        if kind not in {"dpo", "supervised"}:
            raise InputError(f"method.type: {kind!r} is not here; there is dpo and supervised")
        job.put("method", "dpo" if kind == "dpo" else "sft", "method.type")
        job.recipe["adapter"] = "lora"
        job.note("the body cannot say LoRA or full; adapter: lora is written")
        place = f"method.{kind}.hyperparameters." if "method.type" in job.values else "hyperparameters."
        for name in NAMES:
            _set(job, f"{place}{name}", name, kind)
        model = str(job.get("model", ""))
        if model:
            job.put("model.name", model, "model")
            if model.startswith(CLOSED):
                job.note(f"model: {model!r} cannot be had; set model to an open one (--model)")
        if job.get("training_file") is not None:
            set_files(job, [str(job.get("training_file"))], "training_file")


PLAIN = {"model", "training_file", "validation_file", "seed", "suffix", "metadata", "integrations"}


def _set(job: Job, key: str, name: str, kind: str) -> None:
    value = job.get(key)
    if value is None:
        return
    if value == "auto":
        job.leave(key, AUTO)
        return
    if name == "beta" and kind != "dpo":
        job.leave(key, "sft has no beta")
    elif name == "beta":
        job.put("loss.beta", number(value), key)
    elif name == "batch_size":
        job.put("pairs_per_step", int(value), key)
    elif name == "n_epochs":
        job.put("epochs", number(value), key)
    else:
        job.put("lr", _base_lr(job.recipe["method"]) * number(value), key)
        job.note(f"{name} {value}: multiplies a rate that is not published; here it multiplies preftune's own default")


def _base_lr(method: str) -> float:
    from preftune.core.recipe import StageConfig
    from preftune.maths.losses.base import losses
    from preftune.training.optim import default_lr

    return default_lr(StageConfig(method=method), losses.factory(method).view)
