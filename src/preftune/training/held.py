"""Weights that take the place of a model's own while something is scored: its start, or a reference that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from preftune.core.errors import CheckpointError, UsageError
from preftune.modeling.adapters import adapted_matrices, adapter_off
from preftune.training.spread import ONE, Spread, local_part


class HeldWeights:
    """A copy of some of a model's weights in their own dtype; ``num_bytes`` says how much memory that is.

    Parameters
        parameters: those that are kept, by name; none of them where adapters are all that moves and these are off.
        is_adapter_off: whether fresh adapters are off while the copy is in place.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, is_adapter_off: bool, spread: Spread = ONE
    ) -> None:
        self._model = model
        self.spread = spread
        self._is_adapter_off = is_adapter_off
        self._parameters = dict(parameters)
        self.kept = {name: local_part(parameter.detach()).clone() for name, parameter in self._parameters.items()}

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(kept.numel() * kept.element_size() for kept in self.kept.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the kept weights while this lasts."""
        if self.spread.kind == "fsdp2":  # FSDP2 reads the storage itself, so contents change places, not tensors
            self._exchange()
            try:
                with self._adapter():
                    yield
            finally:
                self._exchange()
            return
        now = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self.kept[name]
        try:
            with self._adapter():
                yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = now[name]

    def _adapter(self) -> AbstractContextManager[None]:
        return adapter_off(self._model) if self._is_adapter_off else nullcontext()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            held = local_part(parameter.detach())
            now = held.clone()
            held.copy_(self.kept[name])
            self.kept[name].copy_(now)


class FollowingWeights:
    """Weights of a reference that follows the policy (TR-DPO): float32 means, rounded to the dtype that scores.

        m <- alpha p + (1 - alpha) m            after every ``every`` steps

    Where weights are parted over processes (FSDP2) m and p are parted as they are, and every process follows with its part.

    m is kept for each name; p is what ``current`` gives under that name: the policy's trained weights, or for adapters
    under a soft update what they add to each matrix, because the mean of two products of factors is not the product of
    the factors' means.

    Parameters
        held: what is put in place of the model's weights. start: m before the first update, by name, float32.
        current: p now. whole: the weight to be put in place from m.
    """

    def __init__(
        self,
        held: HeldWeights,
        start: Mapping[str, Tensor],
        current: Callable[[], Mapping[str, Tensor]],
        whole: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.held = held
        self.means = {name: tensor.detach().float().clone() for name, tensor in start.items()}
        self._current, self._whole = current, whole

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """One update; alpha 1 copies the policy bit for bit."""
        for name, current in self._current().items():
            mean = self.means[name]
            value = self.held.spread.like(current, mean)
            if alpha == 1.0:
                mean.copy_(value)
            else:
                mean.mul_(1 - alpha).add_(value, alpha=alpha)
        self._put()

    @torch.no_grad()
    def load(self, means: Mapping[str, Tensor]) -> None:
        """Put back the ``means`` of a checkpoint, each whole.

        Raises
            CheckpointError: a tensor that is missing, left over or of another shape.
        """
        wrong = sorted(set(means) ^ set(self.means))
        wrong = wrong or [name for name, mean in self.means.items() if means[name].shape != mean.shape]
        if wrong:
            raise CheckpointError(f"the checkpoint's reference is not this model's: {wrong[0]} and {len(wrong) - 1} more")
        for name, mean in self.means.items():
            mean.copy_(self.held.spread.like(means[name].to(mean.device), mean))
        self._put()

    def _put(self) -> None:
        for name, kept in self.held.kept.items():
            kept.copy_(local_part(self._whole(name, self.means[name])))


def following(
    model: nn.Module,
    masters: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    spread: Spread = ONE,
    *,
    is_soft_adapter: bool,
) -> FollowingWeights:
    """The weights of a reference that follows, as the policy stands.

    Parameters
        parameters: trained ones. masters: their float32 values, as the optimiser holds them.
        spread: how they lie on several processes. is_soft_adapter: the trained weights are adapters and the update is a soft one.

    Raises
        UsageError: adapters whose part of a matrix cannot be told, under a soft update.
    """
    if not is_soft_adapter:
        held = HeldWeights(model, parameters, is_adapter_off=False, spread=spread)
        return FollowingWeights(held, masters, lambda: masters, lambda _, mean: mean)
    matrices = adapted_matrices(model)
    if matrices is None:
        raise UsageError("reference.sync.alpha: below 1 it needs plain LoRA on float weights; write alpha: 1 or lora.dora: false")
    base = {name: one.weight for name, one in matrices.items()}
    origin = {name: weight.detach() for name, weight in base.items()}
    start = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in origin.items()}
    return FollowingWeights(
        HeldWeights(model, base, is_adapter_off=True, spread=spread),
        start,
        lambda: {name: one.added() for name, one in matrices.items()},
        lambda name, mean: origin[name].float() + mean,
    )
