"""Shapes that travel between the forward pass, the losses and the loop.

Axis names: ``completions`` is every completion of a pack in flat order (group by group, in each group by role),
``pairs`` every chosen/rejected pair. All log-probabilities are in nats and float32 (float64 in tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Unit: TypeAlias = Literal["pair", "completion", "token"]


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probability of each completion, summed over its scored tokens; ``num_tokens`` counts those."""

    logps: Float[Tensor, " completions"]
    num_tokens: Int[Tensor, " completions"]


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Sequence log-probabilities of pairs. Losses without a reference get zeros in the reference fields."""

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_tokens: Int[Tensor, " pairs"]
    rejected_tokens: Int[Tensor, " pairs"]

    @property
    def chosen_logratio(self) -> Float[Tensor, " pairs"]:
        """log pi(chosen) - log ref(chosen)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, " pairs"]:
        """log pi(rejected) - log ref(rejected)."""
        return self.policy_rejected - self.reference_rejected


@dataclass(frozen=True, slots=True)
class Term:
    """One named, unreduced part of a loss.

    The loop divides the sum of ``values`` by the number of ``unit`` s in the whole step (over all packs and
    ranks), known before the first backward pass: results do not depend on packing or accumulation.
    """

    values: Float[Tensor, " items"]
    unit: Unit


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a loss returns: its terms, which the loop adds up, and detached implicit rewards for the metrics."""

    terms: Mapping[str, Term]
    chosen_rewards: Float[Tensor, " pairs"] | None = None
    rejected_rewards: Float[Tensor, " pairs"] | None = None
