"""Exact metrics: sums over pairs that are divided once, never means of batch means.

A pack gives one vector of sums; vectors of packs, micro-batches and ranks add up; the division by the number of
pairs comes at the end. Names are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.maths.types import LossTerms, PairLogps, Unit

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def reduce_terms(terms: LossTerms, counts: Mapping[Unit, int]) -> Float[Tensor, ""]:
    """The loss of a pack as its share of the step: each term's sum over the step's count of its unit.

    Shares of the packs of a step add up to the step's loss, however the step is packed.
    """
    shares = [term.values.sum() / counts[term.unit] for term in terms.terms.values()]
    return torch.stack(shares).sum()


def pair_sums(logps: PairLogps, terms: LossTerms) -> Float[Tensor, " metrics"]:
    """Sums over the pairs of a pack in the order of ``PAIR_METRICS``, in float64 on the pack's device.

    Accuracy counts a margin above zero as one and a margin of exactly zero as one half.

    Raises
        ValueError: terms without rewards (a loss over demonstrations).
    """
    if terms.chosen_rewards is None or terms.rejected_rewards is None:
        raise ValueError("these terms carry no rewards: metrics over pairs need a loss over pairs")
    chosen, rejected = terms.chosen_rewards.double(), terms.rejected_rewards.double()
    margins = chosen - rejected
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    columns = (chosen, rejected, margins, wins, logps.policy_chosen.detach().double(), logps.policy_rejected.detach().double())
    return torch.stack([column.sum() for column in columns])


def pair_means(sums: Sequence[float], num_pairs: int) -> dict[str, float]:
    """Named means from summed vectors of ``pair_sums``.

    >>> pair_means([2.0, -2.0, 4.0, 1.5, -20.0, -30.0], 2)["rewards/accuracies"]
    0.75
    """
    return {name: value / num_pairs for name, value in zip(PAIR_METRICS, sums, strict=True)}
