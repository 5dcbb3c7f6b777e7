"""The routers of a mixture of experts: their logits while a policy is scored, and the auxiliary loss that balances them.

With n experts of which each token takes k, over all layers and tokens of a pack (Fedus et al. 2021, arXiv:2101.03961,
equations 4 to 6, as transformers generalises it to k > 1):

    aux = n sum_e f_e P_e,    f_e = share of tokens that take expert e,  P_e = mean probability of e

It is 1 times k where all experts are used alike. The loss of a step is the mean of its packs' aux, weighted by their tokens.
A product of means is no mean of products, so unlike every other term it depends on which tokens share a pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


class Routers:
    """The routers of a model, listened to while somebody asks.

    Parameters
        base: the model.

    Attributes
        num: how many there are; 0 for a dense model. last: aux of the pack that was scored last, a detached scalar.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        config: Any = base.config.get_text_config()
        self._top_k = int(getattr(config, "num_experts_per_tok", 0) or 0)
        self.num = 0
        self.last: Tensor | None = None
        self._weight: float | None = None
        self._heard: list[Tensor] | None = None
        recorder = None
        for part in (base, base.base_model):
            recorder = recorder or (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is None or not self._top_k:
            return
        kind, index = getattr(recorder, "target_class", recorder), int(getattr(recorder, "index", 0))
        where = getattr(recorder, "layer_name", None)
        for name, module in base.named_modules():
            if isinstance(module, kind) and (where is None or where in name):
                self.num += 1
                module.register_forward_hook(lambda _module, _given, found, index=index: self._hear(found, index))

    @contextmanager
    def weighing(self, weight: float) -> Iterator[None]:
        """Packs that are scored with a graph meanwhile add ``weight * d aux`` to every backward pass through them."""
        self._weight, self.last = weight, None
        try:
            yield
        finally:
            self._weight = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around the forward passes of one pack: checkpointed layers, which run again in backward, are heard once."""
        self._heard = [] if self._weight is not None and torch.is_grad_enabled() else None
        try:
            yield
        finally:
            self._heard = None

    def attached(self, logps: Tensor) -> Tensor:
        """The same log-probabilities, whose backward pass also carries the auxiliary loss of what was heard."""
        if not self._heard:
            return logps
        # rows that ran one after the other are one batch: the routers of a layer are every num-th
        layers = tuple(torch.cat(self._heard[at :: self.num]) for at in range(self.num))
        experts = layers[0].shape[-1]
        aux = cast(Tensor, load_balancing_loss_func(cast(Any, layers), experts, self._top_k))
        self.last = aux.detach()
        return cast(Tensor, _Attached.apply(logps, aux, self._weight))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _hear(self, found: Any, index: int) -> None:
        if self._heard is not None:
            logits = found[index] if isinstance(found, (tuple, list)) else found
            self._heard.append(logits.reshape(-1, logits.shape[-1]))


class _Attached(torch.autograd.Function):
    """Log-probabilities unchanged; backward gives the auxiliary loss its own constant slope."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, aux: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, aux.dtype
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], torch.tensor(ctx.weight, dtype=ctx.dtype, device=grads[0].device), None


OUTPUTS_ROUTERS = "preftune_outputs_routers"


def quieten_routers(base: PreTrainedModel) -> None:
    """Stop a model from forming its own auxiliary loss in every forward pass, which fails in generation; remember that it did."""
    config: Any = base.config.get_text_config()
    setattr(base, OUTPUTS_ROUTERS, bool(getattr(config, "output_router_logits", False)))
    if getattr(base, OUTPUTS_ROUTERS):
        config.output_router_logits = False


@contextmanager
def as_loaded(base: PreTrainedModel) -> Iterator[None]:
    """The configuration as it was before ``quieten_routers``, while the model is saved."""
    config: Any = base.config.get_text_config()
    if not getattr(base, OUTPUTS_ROUTERS, False):
        yield
        return
    config.output_router_logits = True
    try:
        yield
    finally:
        config.output_router_logits = False


def own_coefficient(base: PreTrainedModel) -> float:
    """The weight that a model's configuration asks for: its coefficient where it outputs router logits at all, else 0."""
    config: Any = base.config.get_text_config()
    is_wanted = getattr(base, OUTPUTS_ROUTERS, getattr(config, "output_router_logits", False))
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if is_wanted else 0.0
