"""What a plan says of several processes: what each of them holds, and what they cannot do together."""

from __future__ import annotations

from typing import Any

from preftune.core.errors import Finding
from preftune.core.launch import Launch
from preftune.core.recipe import Recipe


def check_processes(recipe: Recipe, model: str, shapes: Any, num_weights: int | None) -> tuple[list[Finding], dict[str, Any]]:
    """Findings about a recipe that torchrun started several processes for, and for each stage a line about them.

    Parameters
        model: that the first stage starts from. shapes, num_weights: of its weights, None where they are not known yet.
    """
    from preftune.modeling.machine import device_bytes
    from preftune.training.devices import choose_device, choose_precision
    from preftune.training.model_files import num_trainable, quantised_by
    from preftune.training.sharing_out import Sizes, check_distributed, describe, spread_kind

    launch = Launch.from_environment()
    if launch.size == 1:
        return [], {}
    findings: list[Finding] = []
    facts: dict[str, Any] = {}
    for config in recipe.stages:
        precision = choose_precision(recipe.model.dtype, config.adapter)
        sizes = None
        if shapes is not None and num_weights is not None:
            bytes_each = 2 if precision == "bfloat16" else 4
            sizes = Sizes(num_weights, num_trainable(config, shapes), bytes_each, device_bytes(choose_device()))
        kind = spread_kind(config, launch, sizes)
        quantised = quantised_by(model)
        findings += check_distributed(config, launch, kind, precision=precision, quantised_by=quantised)
        facts[f"stage {config.name}"] = describe(config, launch, kind, sizes)
    return findings, facts
