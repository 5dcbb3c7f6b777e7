"""The auxiliary loss of a mixture of experts in a training step: of the policy alone, its weight and value logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from preftune.core.errors import UsageError
from preftune.core.recipe import StageConfig
from preftune.data.pack import Pack
from preftune.modeling.forward import Scorer, base_of
from preftune.modeling.routers import Routers, own_coefficient

if TYPE_CHECKING:
    from preftune.training.step import Objective


def balance_experts(config: StageConfig, scorer: Scorer) -> float:
    """Listen to the routers of the policy where the stage or the model's configuration asks for it; the weight.

    Raises
        UsageError: a weight for a model without routers.
    """
    asked = config.router_aux_loss_coef
    weight = own_coefficient(base_of(scorer.model)) if asked is None else asked
    if weight == 0.0:
        return 0.0
    routers = Routers(base_of(scorer.model))
    if routers.num == 0:
        if asked is None:
            return 0.0
        raise UsageError(
            f"stage {config.name}: router_aux_loss_coef: {asked:g} balances the experts of a mixture, and no router is known in "
            f"{type(base_of(scorer.model)).__name__}; leave the key out"
        )
    scorer.routers, scorer.router_weight = routers, weight
    return weight


class Balance:
    """The auxiliary losses of one step, pack by pack."""

    def __init__(self, objective: Objective, packs: Sequence[Pack]) -> None:
        self._objective = objective
        self._routers = objective.scorer.routers
        self._sizes = [len(pack.ids) for pack in packs]
        self._found: list[Tensor | None] = [None] * len(packs)

    @contextmanager
    def pack(self, index: int) -> Iterator[None]:
        """Around forward and backward of the pack with this index."""
        if self._routers is None:
            yield
            return
        share = self._sizes[index] / sum(self._sizes)
        # torch averages gradients over ranks, as in Spread.backward
        weight = self._objective.scorer.router_weight * share * self._objective.spread.ranks.size
        with self._routers.weighing(weight):
            yield
            if self._routers.last is not None:
                self._found[index] = self._routers.last.reshape(1) * share

    def values(self) -> tuple[Tensor, ...]:
        """The step's auxiliary loss, unweighted, in a tuple; an empty one for a dense model."""
        if self._routers is None:
            return ()
        return (self._objective.joined(self._found, [1] * len(self._found)).sum(),)
