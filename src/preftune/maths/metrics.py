"""Exact metrics: sums over pairs that are divided once, never means of batch means.

A pack gives one vector of sums; vectors of packs, micro-batches and ranks add up; the division by the number of
pairs, or of completions of each label, comes at the end. Names are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.maths.types import LossTerms, PairLogps, Unit, UnpairedLogps

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_change",
    "logps/rejected_change",
    "logps/chosen_change_per_token",
    "logps/rejected_change_per_token",
)
CHANGES = PAIR_METRICS[6:]  # against the reference: they mean nothing where a loss has none
UNPAIRED_METRICS = ("rewards/chosen", "logps/chosen", "rewards/rejected", "logps/rejected")


def reduce_terms(terms: LossTerms, counts: Mapping[Unit, int]) -> Float[Tensor, ""]:
    """The loss of a pack as its share of the step: each term's weight times its sum over the step's count of its unit.

    Shares of the packs of a step add up to the step's loss, however the step is packed.
    """
    shares = [term.weight * term.values.sum() / counts[term.unit] for term in terms.terms.values()]
    return torch.stack(shares).sum()


def term_shares(terms: LossTerms, counts: Mapping[Unit, int]) -> Float[Tensor, " terms"]:
    """Each term's share of the step without its weight, detached, in float64: what is logged of a loss of several terms."""
    return torch.stack([term.values.detach().double().sum() / counts[term.unit] for term in terms.terms.values()])


def pair_sums(logps: PairLogps, terms: LossTerms) -> Float[Tensor, " metrics"]:
    """Sums over the pairs of a pack in the order of ``PAIR_METRICS``, in float64 on the pack's device.

    Accuracy counts a margin above zero as one, and a margin of exactly zero and a tie as one half. A change is
    log pi - log ref of a completion, per token divided by its scored tokens before the mean over pairs is taken.

    Raises
        ValueError: terms without rewards (a loss over demonstrations).
    """
    if terms.chosen_rewards is None or terms.rejected_rewards is None:
        raise ValueError("these terms carry no rewards: metrics over pairs need a loss over pairs")
    chosen, rejected = terms.chosen_rewards.double(), terms.rejected_rewards.double()
    margins = chosen - rejected
    wins = (margins > 0).double() + 0.5 * (margins == 0).double()
    if logps.is_tie is not None:
        wins = torch.where(logps.is_tie, 0.5, wins)
    policy = (logps.policy_chosen.detach().double(), logps.policy_rejected.detach().double())
    changes = (logps.chosen_logratio.detach().double(), logps.rejected_logratio.detach().double())
    per_token = (changes[0] / logps.chosen_tokens.clamp(min=1), changes[1] / logps.rejected_tokens.clamp(min=1))
    columns = (chosen, rejected, margins, wins, *policy, *changes, *per_token)
    return torch.stack([column.sum() for column in columns])


def pair_means(sums: Sequence[float], num_pairs: int) -> dict[str, float]:
    """Named means from summed vectors of ``pair_sums``.

    >>> pair_means([2.0, -2.0, 4.0, 1.5, -20.0, -30.0, 1.0, -1.0, 0.1, -0.1], 2)["rewards/accuracies"]
    0.75
    """
    return {name: value / num_pairs for name, value in zip(PAIR_METRICS, sums, strict=True)}


def unpaired_sums(logps: UnpairedLogps, terms: LossTerms) -> Float[Tensor, " metrics"]:
    """Sums over the desirable and over the undesirable completions of a pack in the order of ``UNPAIRED_METRICS``, float64.

    Raises
        ValueError: terms without rewards.
    """
    if terms.chosen_rewards is None or terms.rejected_rewards is None:
        raise ValueError("these terms carry no rewards: metrics over completions need a loss over labelled ones")
    policy, desirable = logps.policy.detach().double(), logps.is_desirable.double()
    sums = (
        terms.chosen_rewards.double().sum(),
        (policy * desirable).sum(),
        terms.rejected_rewards.double().sum(),
        (policy * (1 - desirable)).sum(),
    )
    return torch.stack(sums)


def unpaired_means(sums: Sequence[float], num_desirable: int, num_undesirable: int) -> dict[str, float]:
    """Named means from summed vectors of ``unpaired_sums``; a label that nothing has gives no metric.

    >>> unpaired_means([2.0, -8.0, -3.0, -9.0], 2, 3)["rewards/margins"]
    2.0
    >>> sorted(unpaired_means([2.0, -8.0, 0.0, 0.0], 2, 0))
    ['logps/chosen', 'rewards/chosen']
    """
    counts = (num_desirable, num_desirable, num_undesirable, num_undesirable)
    means = {name: value / count for name, value, count in zip(UNPAIRED_METRICS, sums, counts, strict=True) if count}
    if num_desirable and num_undesirable:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means
