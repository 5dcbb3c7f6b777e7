"""The ``reference`` section of a stage: what the policy is compared with, and which settings go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Interval

from preftune.core.errors import RecipeError
from preftune.core.section import Positive, Section

ReferencePolicy: TypeAlias = Literal["cached", "adapter_off", "frozen", "none"]


class SyncConfig(Section):
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): after every ``every`` steps ref = alpha policy + (1 - alpha) ref.

    The mean is of the weights themselves. alpha 1 is the paper's hard update, below 1 its soft one; 0.6 and 512 are TRL's.
    """

    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.6
    every: Positive = 512


class ReferenceConfig(Section):
    """What the log-probabilities of a policy are compared with.

    policy ``cached``: the reference scores each completion once, and the scores are kept by content for every run.
    ``adapter_off``: in every step, by the model with its fresh adapters off. ``frozen``: in every step, by a copy of the
    weights. ``none``: no reference, log ref = 0 (the reference-free form of DPO). model: a run, ``RUN@STEP``, a folder or a
    hub id to be the reference instead of the model that the stage starts from. sync: let a frozen reference follow.
    """

    policy: ReferencePolicy = "cached"
    model: str | None = None
    sync: SyncConfig | None = None


def short_reference(value: Any) -> Any:
    """``reference: frozen`` is short for ``{policy: frozen}``; what is synchronised is a copy without saying so."""
    if isinstance(value, str):
        return {"policy": value}
    if isinstance(value, Mapping) and value.get("sync") is not None and "policy" not in value:
        return {**value, "policy": "frozen"}
    return value


def check_reference(reference: ReferenceConfig | None, adapter: str, where: str, *, has_dora: bool) -> None:
    """RecipeError, naming the field, for settings that contradict one another.

    Parameters
        where: of the stage in its recipe, such as ``stages.1.``, for messages. has_dora: its adapters are DoRA's.
    """
    if reference is None:
        return
    policy, name = reference.policy, f"{where}reference"
    if policy == "adapter_off" and adapter != "lora":
        raise RecipeError(f"{name}.policy: adapter_off needs adapter: lora, got adapter: {adapter}; write frozen or cached")
    if reference.model is not None and policy not in {"cached", "frozen"}:
        raise RecipeError(f"{name}.model: policy {policy} has no model of its own; write policy: cached or frozen")
    if reference.sync is None:
        return
    if policy != "frozen":
        raise RecipeError(f"{name}.sync: a reference that follows is a copy, got policy: {policy}; write policy: frozen")
    if reference.model is not None:
        raise RecipeError(f"{name}.model: a reference that follows the policy starts where it starts; leave out model, or sync")
    if has_dora and adapter == "lora" and reference.sync.alpha < 1:
        raise RecipeError(
            f"{name}.sync.alpha: below 1 it averages what plain adapters add to a matrix, got {reference.sync.alpha:g} with "
            f"{where}lora.dora: true; write alpha: 1, or lora.dora: false"
        )


def check_reference_of_loss(
    reference: ReferenceConfig | None, method: str, *, needs_reference: bool, view: str, where: str
) -> None:
    """RecipeError, naming the field, where a stage's reference does not suit its loss."""
    if reference is None or (reference.policy == "none" and not needs_reference):
        return
    if not needs_reference:
        raise RecipeError(f"{where}reference: {method} takes no reference, got policy: {reference.policy}; leave it out")
    if reference.policy == "none" and view != "pairs":
        raise RecipeError(
            f"{where}reference.policy: none is for losses over pairs, and {method} measures how far the policy is from its "
            "reference; write cached, or leave it out"
        )
