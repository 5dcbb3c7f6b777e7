"""What published recipes use, loss by loss, and findings about settings far outside of it.

The table is data: a loss that is added gets one row for each option that can be set wrong. Sources are papers, or the
recipes that their authors ship; values are on models of a billion parameters and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from preftune.core.errors import Finding
from preftune.core.recipe import StageConfig
from preftune.core.records import View
from preftune.maths.losses.base import Loss, losses
from preftune.maths.losses.mix import Mix
from preftune.training.optim import default_lr, lr_of

Adapter: TypeAlias = Literal["lora", "full"]
Span: TypeAlias = tuple[float, float]

# lowest and highest peak learning rate in published recipes, by view and adapter
LR_RANGE: Mapping[tuple[View, Adapter], Span] = {
    ("pairs", "full"): (5e-8, 5e-6),  # Olmo 3 8e-8, NeMo-RL 5e-6
    ("pairs", "lora"): (5e-7, 1e-4),  # Zephyr QLoRA 5e-6, ms-swift 1e-4
    ("unpaired", "full"): (1e-7, 5e-6),  # TRL 1e-6, HALOs 5e-6
    ("unpaired", "lora"): (5e-7, 1e-4),
    ("demonstrations", "full"): (1e-6, 1e-4),
    ("demonstrations", "lora"): (1e-5, 1e-3),
}
# losses that imitate the chosen completion as well, with learning rates between those of DPO and of SFT
LR_OF_LOSS: Mapping[tuple[str, Adapter], Span] = {
    ("orpo", "full"): (1e-6, 5e-5),  # Zephyr-141B 5e-6, ORPO paper 8e-6
    ("orpo", "lora"): (5e-6, 5e-4),
    ("cpo", "full"): (1e-7, 5e-5),
    ("cpo", "lora"): (1e-6, 1e-3),  # ALMA-R 1e-4
}
MAX_LR_OF_SMALL = 0.01
"""AdamW moves each weight by about the learning rate a step, and weights are about 0.02."""
MAX_EPOCHS: Mapping[View, float] = {"pairs": 5.0, "unpaired": 5.0, "demonstrations": 10.0}


@dataclass(frozen=True, slots=True)
class Published:
    """Values of an option in published recipes.

    Parameters
        low, high: the range. usual: the value to name as the way out. source: who published it.
        scale: what is multiplied, for the sentence; empty where the option's name says enough.
        when: options that must have these values for the row to apply; one that a loss does not have counts as off.
    """

    low: float
    high: float
    usual: float
    source: str
    scale: str = ""
    when: tuple[tuple[str, Any], ...] = ()


_SUMMED = "log-ratios summed over tokens"
_DIVIDED = "log-ratios divided by length"
_BETA = Published(0.01, 0.9, 0.1, "DPO paper, handbook's scan", _SUMMED, (("length_normalised", False),))
_BETA_BY_LENGTH = Published(1.0, 10.0, 5.0, "Tulu 3, OLMo 2", _DIVIDED, (("length_normalised", True),))
_LENGTH_AWARE = (_BETA, _BETA_BY_LENGTH)
_PLAIN = (Published(0.01, 0.9, 0.1, "DPO paper, handbook's scan", _SUMMED),)
_SMOOTHING = (Published(0.0, 0.3, 0.1, "cDPO and robust DPO papers"),)
_LIKE_DPO: Mapping[str, tuple[Published, ...]] = {"beta": _LENGTH_AWARE, "label_smoothing": _SMOOTHING}

PUBLISHED: Mapping[str, Mapping[str, tuple[Published, ...]]] = {
    **dict.fromkeys(("hinge", "aot", "aot_unpaired", "bco_pair", "nca_pair", "wpo"), _LIKE_DPO),
    **dict.fromkeys(("apo_zero", "apo_down", "apo_zero_unpaired", "rao_kupper", "davidson"), _LIKE_DPO),
    "dpo": {**_LIKE_DPO, "rpo_alpha": (Published(0.0, 2.0, 1.0, "RPO paper 1, ms-swift 0.1"),)},
    "exo_pair": {"beta": _PLAIN, "label_smoothing": (Published(1e-5, 0.3, 1e-3, "EXO 1e-3"),)},
    "ld_dpo": {**_LIKE_DPO, "alpha": (Published(0.1, 1.0, 0.5, "LD-DPO .3 to .6"),)},
    "odpo": {"beta": _PLAIN, "alpha": (Published(0.0, 2.0, 1.0, "ODPO .5 to 1"),)},
    "robust": {"beta": _LENGTH_AWARE, "label_smoothing": (Published(0.0, 0.4, 0.1, "robust DPO paper"),)},
    "ipo": {
        "tau": (Published(0.01, 1.0, 0.1, "IPO paper, handbook's scan"),),
        "beta": (Published(0.01, 1.0, 0.1, "IPO paper, handbook's scan", "the tau of IPO"),),
    },
    "simpo": {
        "beta": (Published(1.0, 20.0, 2.0, "SimPO 2 to 10", "average log-probs"),),
        "gamma": (Published(0.0, 10.0, 1.0, "SimPO, gamma / beta .1 to .8"),),
        "gamma_ratio": (Published(0.0, 1.6, 0.5, "SimPO .1 to .8"),),
    },
    "alphapo": {
        "beta": (Published(1.0, 25.0, 2.5, "AlphaPO 2.5 to 10", "shaped average log-probs"),),
        "alpha": (Published(-1.0, 1.0, 0.25, "AlphaPO -.25 to .25"),),
        "gamma": (Published(0.0, 10.0, 0.25, "AlphaPO, gamma / beta .1 to 1"),),
    },
    "orpo": {
        "lambda_or": (Published(0.01, 1.0, 0.1, "ORPO .1, Zephyr-141B .05"),),
        "beta": (Published(0.01, 1.0, 0.1, "ORPO .1, Zephyr-141B .05", "the lambda of ORPO"),),
    },
    "cpo": {
        "beta": (Published(0.01, 0.9, 0.1, "CPO .1", "log-probs summed over tokens"),),
        "alpha": (Published(0.0, 2.0, 1.0, "CPO 1"),),
    },
    "kto": {
        "beta": (Published(0.01, 0.9, 0.1, "KTO .1", _SUMMED),),
        "lambda_d": (Published(0.1, 10.0, 1.0, "KTO, weights times counts in 1 to 4/3"),),
        "lambda_u": (Published(0.1, 10.0, 1.0, "KTO, weights times counts in 1 to 4/3"),),
    },
    "apo_zero_unpaired": {
        "beta": _PLAIN,
        "lambda_d": (Published(0.1, 10.0, 1.0, "KTO, weights times counts in 1 to 4/3"),),
        "lambda_u": (Published(0.1, 10.0, 1.0, "KTO, weights times counts in 1 to 4/3"),),
    },
    **{key: {"beta": _PLAIN, "label_smoothing": _SMOOTHING} for key in ("aot", "aot_unpaired", "bco_pair", "wpo")},
    "rao_kupper": {"beta": _PLAIN, "nu": (Published(1.05, 20.0, 3.0, "DPO with ties 3"),)},
    "davidson": {"beta": _PLAIN, "nu": (Published(0.05, 10.0, 1.0, "DPO with ties 1"),)},
    "r_dpo": {"beta": _PLAIN, "alpha": (Published(0.0, 1.0, 0.01, "R-DPO .005 to .1"),)},
    "dpop": {"beta": _PLAIN, "lambda_p": (Published(0.1, 500.0, 50.0, "DPOP 5 to 500"),)},
    "discopop": {
        "beta": _PLAIN,
        "tau": (Published(0.01, 1.0, 0.05, "DiscoPOP .05"),),
    },
    "sppo_hard": {"beta": (Published(1e-4, 0.1, 1e-3, "SPPO 1e-3", _SUMMED),)},
    "sppo_soft": {
        "beta": (Published(1e-4, 0.1, 1e-3, "SPPO 1e-3", _SUMMED),),
        "slope": (Published(0.0, 4.0, 1.0, "log-odds a step of strength"),),
    },
}


def check_published(config: StageConfig, *, is_small: bool) -> list[Finding]:
    """Warnings about a stage's settings that no published recipe is near to.

    is_small: published learning rates say nothing of models below some millions of weights.
    """
    view = losses.factory(config.method).view
    findings: list[Finding] = []
    peak = lr_of(config, view)
    if is_small and peak > MAX_LR_OF_SMALL:
        fact = f"stage {config.name}: lr {peak:g} is above {MAX_LR_OF_SMALL:g}, which the smallest models do not survive either"
        findings.append(Finding("warning", "unusual_lr", fact, "1e-4 to 1e-3 is usual for a model this small"))
    low, high = LR_OF_LOSS.get((config.method, config.adapter), LR_RANGE[view, config.adapter])
    if not low <= peak <= high and not is_small:
        usual = f"what is published for {config.method} with {config.adapter} ({low:g} to {high:g})"
        fact = f"stage {config.name}: lr {peak:g} is outside {usual}"
        findings.append(Finding("warning", "unusual_lr", fact, f"{default_lr(config, view):g} is the default"))
    findings += _check_options(config)
    if config.epochs > MAX_EPOCHS[view]:
        fact = f"stage {config.name}: {config.epochs:g} epochs; more than {MAX_EPOCHS[view]:g} mostly memorise the data"
        findings.append(Finding("warning", "many_epochs", fact, "hold out a share (data.select) and watch eval_loss"))
    if losses.build(config.method, config.loss).needs_reference and config.adapter == "lora" and config.lora.dropout > 0:
        fact = f"stage {config.name}: dropout {config.lora.dropout:g} acts on the policy and not on its reference"
        findings.append(Finding("warning", "dropout", fact, "set lora.dropout: 0 for margins without that noise"))
    return findings


def _check_options(config: StageConfig) -> list[Finding]:
    built = losses.build(config.method, config.loss)
    named = [(part.name, part.loss) for part in built.built] if isinstance(built, Mix) else [(config.method, built)]
    return [finding for name, loss in named for finding in _check_loss(config, name, loss)]


def _check_loss(config: StageConfig, name: str, built: Loss) -> list[Finding]:
    findings: list[Finding] = []
    for option, rows in PUBLISHED.get(name, {}).items():
        given = getattr(built, option, None)
        if not isinstance(given, int | float) or isinstance(given, bool):
            continue
        for row in rows:
            if not row.low <= given <= row.high and _applies(row, built):
                what = f" for {row.scale}" if row.scale else f" for {name}"
                fact = (
                    f"stage {config.name}: {option} {given:g} is outside what is published{what} "
                    f"({row.low:g} to {row.high:g}; {row.source})"
                )
                way_out = f"{option} {row.usual:g} is usual"
                findings.append(Finding("warning", "unusual_beta" if option == "beta" else "unusual_option", fact, way_out))
    return findings


def _applies(row: Published, built: object) -> bool:
    return all(getattr(built, option, False) == value for option, value in row.when)
