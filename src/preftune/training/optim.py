"""AdamW with float32 masters, its moments in 32 or 8 bits, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from preftune.core.errors import CheckpointError, UsageError
from preftune.core.memory import OptimizerName
from preftune.core.recipe import StageConfig
from preftune.core.records import View
from preftune.training.eight_bit import KINDS, adamw_8bit, restored
from preftune.training.order import Order

if TYPE_CHECKING:
    from preftune.training.spread import Spread

ScheduleName = Literal["linear", "cosine", "constant"]

# What is published (peers.md section 5 of the design notes): full DPO 5e-7 (Zephyr, Tulu 3, SimPO's grid, OpenRLHF),
# LoRA DPO 5e-6 to 1e-5 (TRL's advice, LLaMA-Factory, Together); SFT 2e-5 full (Zephyr, Tulu) and 2e-4 LoRA (TRL, QLoRA).
DEFAULT_LR: Mapping[tuple[View, Literal["lora", "full"]], float] = {
    ("pairs", "full"): 5e-7,
    ("pairs", "lora"): 1e-5,
    ("unpaired", "full"): 1e-6,  # KTO: TRL's default
    ("unpaired", "lora"): 1e-5,
    ("demonstrations", "full"): 2e-5,
    ("demonstrations", "lora"): 2e-4,
}

# methods whose published rates are not those of their view: SimPO's authors on Llama 3 base, ORPO's paper
METHOD_LR: Mapping[tuple[str, Literal["lora", "full"]], float] = {
    ("simpo", "full"): 6e-7,
    ("orpo", "full"): 8e-6,
    ("orpo", "lora"): 5e-5,  # no paper says; between those of DPO and of SFT, both of which it is
}

_MOMENTS = ("exp_avg", "exp_avg_sq", "step", *KINDS)


def num_steps_of(config: StageConfig, num_examples: int) -> int:
    """Optimiser steps of a stage over this many examples; 0 where there are none."""
    if num_examples == 0:
        return 0
    order = Order(num_examples, config.pairs_per_step, seed=0, is_shuffled=config.shuffle)
    return order.num_steps(config.epochs, config.max_steps)


def lr_of(config: StageConfig, view: View) -> float:
    """The peak learning rate: the recipe's, or the published default for the view and the adapter."""
    return default_lr(config, view) if config.lr is None else config.lr


def default_lr(config: StageConfig, view: View) -> float:
    """The published default for the method, or else for its view, and the adapter."""
    return METHOD_LR.get((config.method, config.adapter), DEFAULT_LR[view, config.adapter])


@dataclass(frozen=True, slots=True)
class LrSchedule:
    """Learning rate of each optimiser step; equal to transformers' ``get_scheduler``.

    The rate rises from 0 to ``peak`` over the warm-up and then stays (``constant``), falls in a line at
    ``num_steps`` (``linear``), or along a cosine (``cosine``; Loshchilov and Hutter 2017, arXiv:1608.03983), to
    ``min_ratio * peak``.

    Parameters
        warmup: share of the steps, rounded up, on which the rate rises.
        min_ratio: the least rate over ``peak``, in [0, 1]; not for ``constant``.
        num_cycles: periods of the cosine; 0.5 falls once, 1 falls and rises again.

    >>> schedule = LrSchedule("linear", peak=1.0, num_steps=8, warmup=0.25)
    >>> [round(schedule.at(step), 3) for step in range(8)]
    [0.0, 0.5, 1.0, 0.833, 0.667, 0.5, 0.333, 0.167]
    """

    shape: ScheduleName
    peak: float
    num_steps: int
    warmup: float
    min_ratio: float = 0.0
    num_cycles: float = 0.5

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the linear rise."""
        return math.ceil(self.num_steps * self.warmup)

    def at(self, step: int) -> float:
        """Learning rate of the step with this index, from 0."""
        rise = self.num_warmup_steps
        if step < rise:
            return self.peak * step / max(1, rise)
        if self.shape == "constant":
            return self.peak
        progress = (step - rise) / max(1, self.num_steps - rise)
        if self.shape == "linear":
            share = max(0.0, 1.0 - progress)
        else:
            share = max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * self.num_cycles * progress)))
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * share)


def schedule_of(config: StageConfig, view: View, num_steps: int) -> LrSchedule:
    """The schedule of a stage."""
    return LrSchedule(config.schedule, lr_of(config, view), num_steps, config.warmup, config.min_lr_ratio, config.num_cycles)


class Optimiser:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over named parameters, in float32 whatever their dtype.

    A parameter in a narrower dtype has a float32 master: its gradients are added up in float32 as each pack's backward
    produces them, the master takes the step, and the parameter is the master, rounded. Matrices decay, vectors (norms
    and biases) do not.

    Parameters
        parameters: trainable parameters by name.
        betas, eps, weight_decay: as in the paper.
        spread: how the parameters lie on several processes, where they do.
        kind: ``adamw``, or ``adamw_8bit`` for moments of 8 bits (:mod:`preftune.training.eight_bit`).

    Raises
        UsageError: the kind needs a package that is not installed, or does not go with sharded weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        spread: Spread | None = None,
        kind: OptimizerName = "adamw",
    ) -> None:
        if kind != "adamw" and spread is not None and spread.kind == "fsdp2":
            raise UsageError(f"optimizer: {kind} keeps moments of whole tensors and fsdp2 shards them; write distributed: ddp")
        self.parameters = dict(parameters)
        self._spread = spread
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.masters[name] = parameter if parameter.dtype == torch.float32 else self._master_of(parameter)
        groups = [
            {"params": [one for one in self.masters.values() if one.ndim >= 2], "weight_decay": weight_decay},
            {"params": [one for one in self.masters.values() if one.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw: torch.optim.Optimizer
        if kind == "adamw_8bit":
            self._adamw = adamw_8bit(groups, betas=betas, eps=eps)
        else:  # fused: one pass over memory instead of a dozen; other bits than the default, so never mixed within a run
            self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def _master_of(self, parameter: nn.Parameter) -> Tensor:
        master = parameter.detach().float().clone()
        master.requires_grad_(True)

        def add_up(narrow: Tensor) -> None:
            assert narrow.grad is not None
            if master.grad is None:
                master.grad = narrow.grad.float()
            else:
                master.grad.add_(narrow.grad)
            narrow.grad = None

        parameter.register_post_accumulate_grad_hook(add_up)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return master

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradients down to a Euclidean norm of at most ``max_norm``; the norm before, as a tensor."""
        gradients = [master for master in self.masters.values() if master.grad is not None]
        norm = nn.utils.clip_grad_norm_(gradients, math.inf if max_norm is None else max_norm, error_if_nonfinite=False)
        return norm if self._spread is None else self._spread.one_value(norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step at this learning rate and forget the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.zero_grad()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """First and second moments and the step count of each parameter, by ``NAME/KIND``."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state = self._adamw.state.get(master, {})
            found |= {f"{name}/{kind}": torch.as_tensor(state[kind]) for kind in _MOMENTS if kind in state}
        return found

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Put back what ``masters`` and ``tensors`` gave, each tensor whole.

        Raises
            CheckpointError: a parameter that is missing, left over or of another shape.
        """
        wrong = sorted(set(weights) ^ set(self.masters)) or [
            name for name, master in self.masters.items() if weights[name].shape != master.shape
        ]
        if wrong:
            raise CheckpointError(f"the checkpoint's parameters are not this model's: {wrong[0]} and {len(wrong) - 1} more")
        for name, master in self.masters.items():
            master.copy_(self._like(weights[name], master))
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
            state: dict[str, Any] = {
                kind: self._like(moments[f"{name}/{kind}"], master) for kind in _MOMENTS if f"{name}/{kind}" in moments
            }
            if state:
                self._adamw.state[master] = restored(state, self._adamw)

    def _like(self, whole: Tensor, master: Tensor) -> Tensor:
        """A whole tensor where and as its master lies; a step count as it is."""
        on_device = whole.to(master.device)
        return on_device if self._spread is None or whole.shape != master.shape else self._spread.like(on_device, master)
