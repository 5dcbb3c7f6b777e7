"""How a model lies on several processes. The only place that calls DDP and FSDP2 (``fully_shard``).

Weights, gradients and moments of FSDP2 are DTensors, of which every rank holds its part; whatever reads or writes them
whole goes through here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from preftune.modeling.forward import Scorer, base_of
from preftune.training.ranks import ALONE, Ranks, Turn
from preftune.training.sharing_out import SpreadKind


@dataclass(frozen=True, slots=True)
class Spread:
    """How a model lies on the ranks, and what follows for gradients and for reading its weights.

    ``one``: a single process. ``ddp``: every rank holds the whole model, gradients are averaged (DistributedDataParallel).
    ``fsdp2``: every rank holds its part of each weight, gradient and moment (``fully_shard``).

    Parameters
        kind: which. ranks: the processes. entry: what the model is reached through.
        is_synced_each_pack: gradients meet after every pack, and no rank holds whole ones; else once a step.
        dtype: that weights are written in, where they are held in another one.
    """

    kind: SpreadKind = "one"
    ranks: Ranks = ALONE
    entry: nn.Module | None = None
    is_synced_each_pack: bool = False
    dtype: torch.dtype | None = None

    @contextmanager
    def turn(self, scorer: Scorer, turn: Turn, *, has_backward: bool = False) -> Iterator[None]:
        """Run a pack, and its backward pass where it has one: gradients meet with the last pack of a step."""
        is_synced = has_backward and (turn.is_last or self.is_synced_each_pack)
        if self.kind == "one":
            yield
            return
        scorer.peers = turn.peers if self.kind == "fsdp2" else ()
        try:
            if isinstance(self.entry, DistributedDataParallel):
                with nullcontext() if is_synced else self.entry.no_sync():
                    yield
            else:
                cast(FSDPModule, self.entry).set_requires_gradient_sync(is_synced)
                yield
        finally:
            scorer.peers = ()

    def backward(self, share: Tensor) -> None:
        """Add the gradient of this share of the step's loss.

        Torch averages gradients over ranks, and shares are divided by the step's own counts already: so times the ranks.
        """
        share = share if self.ranks.size == 1 else share * self.ranks.size
        share.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def backward_from(self, logps: Tensor, slopes: Tensor) -> None:
        """The same where the slopes of the step's loss by these log-probabilities are known."""
        logps.backward(slopes if self.ranks.size == 1 else slopes * self.ranks.size)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of these tensors on the CPU of the first rank; every rank must ask, the others get nothing."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.is_first:
                found[name] = full.detach().cpu()
        return found

    @staticmethod
    def one_value(value: Tensor) -> Tensor:
        """A number that was computed over all ranks, the same on each; every rank must ask."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    @staticmethod
    def like(whole: Tensor, target: Tensor) -> Tensor:
        """A tensor, the same on every rank or parted in any way, laid out as ``target`` is; every rank must ask."""
        if not isinstance(target, DTensor):
            return whole
        if isinstance(whole, DTensor):  # what was computed from parts may be parted another way
            return whole.redistribute(target.device_mesh, target.placements)
        return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)

    @contextmanager
    def gathered(self, *, is_adapter_enough: bool) -> Iterator[None]:
        """The first rank's modules hold plain whole tensors while this lasts; every rank must take part.

        Parameters
            is_adapter_enough: only those of trained weights.
        """
        if self.kind != "fsdp2" or self.entry is None:
            yield
            return
        known: dict[int, nn.Parameter] = {}
        swapped: list[tuple[nn.Module, str, Any]] = []
        for module in self.entry.modules():
            held: Mapping[str, Any] = module._parameters  # noqa: SLF001 -- setattr would register anew
            for name, parameter in held.items():
                if not isinstance(parameter, DTensor) or (is_adapter_enough and not parameter.requires_grad):
                    continue
                if id(parameter) not in known:  # tied weights stay tied
                    full = self.whole({name: parameter}).get(name, torch.empty(0)).to(self.dtype or parameter.dtype)
                    known[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
                swapped.append((module, name, parameter))
        if self.ranks.is_first:
            for module, name, parameter in swapped:
                module._parameters[name] = known[id(parameter)]  # noqa: SLF001 -- as above
        try:
            yield
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter  # noqa: SLF001 -- as above


ONE = Spread()


def spread_over(
    model: nn.Module, entry: nn.Module, kind: SpreadKind, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> Spread:
    """Lay a model on the ranks; its parameters are made anew by FSDP2, so an optimiser comes afterwards.

    Parameters
        model: adapters included, on the CPU or on ``device``. entry: its root. dtype: that it computes in.
    """
    if kind == "one":
        return ONE
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_full = len(trained) == sum(1 for _ in model.parameters())
    if kind == "ddp":
        held: nn.Module = DistributedDataParallel(entry.to(device), forward_sync_buffers=False)
        return Spread(kind, ranks, held)
    policy = MixedPrecisionPolicy()
    if is_full and dtype != torch.float32:  # weights are the float32 masters, the layers compute in ``dtype``
        model.float()
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (ranks.size,))
    names = set(base_of(model)._no_split_modules or ())  # noqa: SLF001 -- what transformers offers for this
    for module in reversed(list(model.modules())):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # True for the root too: after a pass without a backward one its weights would stay whole, and its part unreadable
    fully_shard(entry, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return Spread(kind, ranks, entry, is_synced_each_pack=is_full, dtype=dtype if is_full else None)


def local_part(tensor: Tensor) -> Tensor:
    """The storage of a tensor on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
