"""Settings of a stage that need something of this machine: a package, a GPU. Told before a model is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from preftune.core.errors import Finding
from preftune.core.recipe import StageConfig


def check_available(config: StageConfig) -> list[Finding]:
    """Blockers of a stage whose settings ask for what is not here."""
    findings: list[Finding] = []
    if config.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        fact = f"stage {config.name}: optimizer: adamw_8bit needs the package bitsandbytes, which is not installed"
        findings.append(
            Finding("blocker", "missing_dependency", fact, "pip install 'preftune[quant]', or write optimizer: adamw")
        )
    if config.activation_offloading == "host" and not _has_gpu():
        fact = f"stage {config.name}: activation_offloading: host moves activations off a GPU, and this machine has none"
        findings.append(Finding("blocker", "no_gpu_to_offload", fact, "write activation_offloading: disk, or 'off'"))
    return findings


def _has_gpu() -> bool:
    from preftune.training.devices import choose_device

    return choose_device().type == "cuda"
