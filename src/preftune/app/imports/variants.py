"""What trainers built on TRL's DPO have as switches beside the loss, and preftune as losses and options of their own."""

from __future__ import annotations

from typing import Any

from preftune.app.imports.base import CannotCarry, Job, flag, number

AS_ANYWAY = "as preftune does anyway"
# TRL's name -> ours
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon", "alpha_divergence": "alpha"}


def _parts(job: Job) -> dict[str, dict[str, Any]]:
    """The losses of the recipe so far with their options, those of a mix one by one."""
    options = job.recipe.setdefault("loss", {})
    if job.recipe["method"] == "mix":
        return dict(options["parts"])
    return {job.recipe["method"]: options}


def set_divergence(job: Job, key: str, coefficient: str) -> None:
    """``f_divergence_type`` of TRL and its coefficient, for every loss of the recipe that takes a divergence.

    The coefficient a of TRL stands for u^(a - 1), the paper's alpha for u^-alpha: alpha = 1 - a, with the KL divergences at its
    ends.
    """
    name = job.get(key)
    if name in {None, "reverse_kl"}:
        if name is not None:
            job.carried[key] = AS_ANYWAY
        if job.get(coefficient) is not None:
            job.leave(coefficient, "is of the alpha divergence, which the job does not name")
        return
    if name not in DIVERGENCES:
        job.leave(key, f"{name!r} has no counterpart; there is reverse_kl, {', '.join(DIVERGENCES)}")
        return
    changes: dict[str, Any] = {"divergence": DIVERGENCES[name]}
    if name == "alpha_divergence":
        changes = _alpha(number(0.5 if job.get(coefficient) is None else job.get(coefficient)))
    elif job.get(coefficient) is not None:
        job.leave(coefficient, f"is of the alpha divergence, and the job's is {name}")
    if not changes:
        job.leave(key, f"alpha_divergence with {coefficient} {job.get(coefficient)} is none; it lies in [0, 1]")
        return
    refusal = _refusal(_parts(job))
    if refusal and changes["divergence"] != "reverse_kl":
        job.leave(key, refusal)
        return
    for method, options in _parts(job).items():
        if method != "sft":
            options.update(changes)
    for one in (key, coefficient) if name == "alpha_divergence" else (key,):
        if one in job.values:
            job.carried[one] = "loss.divergence"
    if "divergence_alpha" in changes:
        job.note(f"{coefficient}: divergence_alpha is 1 minus it, as the paper has it")


def _alpha(coefficient: float) -> dict[str, Any]:
    """The options of TRL's alpha divergence; empty where there is none."""
    if coefficient in {0.0, 1.0}:
        return {"divergence": "reverse_kl" if coefficient else "forward_kl"}
    return {"divergence": "alpha", "divergence_alpha": round(1 - coefficient, 12)} if 0 < coefficient < 1 else {}


def _refusal(parts: dict[str, dict[str, Any]]) -> str:
    """Why a divergence cannot be taken by these losses; empty where it can."""
    from preftune.app.recipes import loss_options

    known = loss_options()
    others = [method for method in parts if method != "sft" and "divergence" not in known[method]]
    if others:
        return f"a divergence is derived for losses of the reward difference alone, which {', '.join(others)} is not"
    if any(options.get("length_normalised") for options in parts.values()):
        return "a divergence is derived for log-ratios of whole completions; what cancels there does not cancel by length"
    return ""


def set_tail(job: Job, key: str, note: str = "") -> None:
    """``ld_alpha``: plain DPO with it is the loss ``ld_dpo``."""
    value = job.get(key)
    if value is None:
        return
    alpha = number(value)
    if not 0 <= alpha <= 1:
        job.leave(key, f"is {value!r}, not a weight in [0, 1]")
    elif alpha == 1:
        job.carried[key] = AS_ANYWAY
    elif _plain_options(job, {"beta", "label_smoothing"}) is None:
        job.leave(key, "tails are weighted in plain DPO only, the loss ld_dpo")
    else:
        job.recipe["method"] = "ld_dpo"
        job.put("loss.alpha", alpha, key)
        if note:
            job.note(f"{key}: {note}")


def set_weighting(job: Job, key: str) -> None:
    """``use_weighting``: plain DPO with it is the loss ``wpo``."""
    value = job.get(key)
    if value is None:
        return
    if not flag(value):
        job.carried[key] = AS_ANYWAY
    elif _plain_options(job, {"beta"}) is None:
        job.leave(key, "pairs are weighted in plain DPO only, the loss wpo")
    else:
        job.put("method", "wpo", key)


def set_tau(job: Job, key: str) -> None:
    """``discopop_tau`` of TRL."""
    if job.get(key) is None:
        return
    parts = _parts(job)
    if "discopop" not in parts:
        job.leave(key, "is of the loss discopop, which the job does not name")
        return
    tau = number(job.get(key))
    if tau <= 0:
        raise CannotCarry(f"{key} is {tau:g}, not a width above 0")
    parts["discopop"]["tau"] = tau
    job.carried[key] = "loss.tau"


def _plain_options(job: Job, allowed: set[str]) -> dict[str, Any] | None:
    """The options of the recipe's loss where it is dpo with none beside ``allowed``; None where it is another."""
    options: dict[str, Any] = job.recipe.get("loss", {})
    return options if job.recipe["method"] == "dpo" and options.keys() <= allowed else None
