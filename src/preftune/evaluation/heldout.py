"""Held-out preference accuracy: how often the policy's implicit reward puts the chosen completion first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from preftune.statistics.intervals import Floats, Interval, mean_by_cluster, mean_interval


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the held-out pairs: how many, the accuracy with its interval, and the mean margin in nats."""

    name: str
    num_pairs: int
    accuracy: float
    interval: Interval
    margin: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out preference accuracy, over all pairs and by slice; slices without a pair are left out."""

    whole: Slice
    slices: tuple[Slice, ...]
    beta: float

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON values."""
        return {"beta": self.beta, **asdict(self.whole), "slices": [asdict(one) for one in self.slices]}


@dataclass(frozen=True, slots=True)
class PairScores:
    """Log-probs of held-out pairs under policy and reference.

    Parameters
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: (pairs,) nats, summed over scored tokens.
        chosen_tokens, rejected_tokens: (pairs,) scored tokens, for the slices by length.
        prompts: one key per pair; pairs of one prompt are one unit of the interval.
    """

    policy_chosen: ArrayLike
    policy_rejected: ArrayLike
    reference_chosen: ArrayLike
    reference_rejected: ArrayLike
    chosen_tokens: Sequence[int]
    rejected_tokens: Sequence[int]
    prompts: Sequence[Hashable]


def held_out_accuracy(scores: PairScores, *, beta: float, seed: int = 0) -> HeldOut:
    r"""Accuracy and margin of the implicit reward on pairs that were not trained on.

        margin = beta ([log pi(y_w) - log ref(y_w)] - [log pi(y_l) - log ref(y_l)])

    A pair is right where its margin is positive and half right where it is zero (Rafailov et al. 2023,
    arXiv:2305.18290, section 4). Accuracy and margin are means over pairs; the interval resamples prompts.

    Raises
        ValueError: no pairs, lists of different sizes, or a log-prob that is not finite.
    """
    chosen = _array(scores.policy_chosen) - _array(scores.reference_chosen)
    rejected = _array(scores.policy_rejected) - _array(scores.reference_rejected)
    lengths = np.asarray(scores.chosen_tokens) - np.asarray(scores.rejected_tokens)
    if chosen.ndim != 1 or not chosen.shape == rejected.shape == lengths.shape or len(scores.prompts) != len(chosen):
        raise ValueError(
            f"log-probs, lengths and prompts must have one size, got {chosen.shape}, {rejected.shape}, {lengths.shape}"
        )
    if not len(chosen):
        raise ValueError("held-out accuracy needs at least one pair")
    margins = beta * (chosen - rejected)
    if not np.isfinite(margins).all():
        raise ValueError("a held-out log-prob is not finite")
    groups = {
        "chosen is longer": lengths > 0,
        "equally long": lengths == 0,
        "chosen is shorter": lengths < 0,
    }
    whole = _slice("all pairs", margins, scores.prompts, np.ones(len(margins), dtype=bool), seed)
    slices = (_slice(name, margins, scores.prompts, mask, seed) for name, mask in groups.items() if mask.any())
    return HeldOut(whole, tuple(slices), beta)


def _slice(
    name: str, margins: Floats, prompts: Sequence[Hashable], mask: np.ndarray[Any, np.dtype[np.bool_]], seed: int
) -> Slice:
    own = margins[mask]
    right = np.where(own > 0, 1.0, np.where(own == 0, 0.5, 0.0))
    keys = [prompt for prompt, is_in in zip(prompts, mask, strict=True) if is_in]
    interval = mean_interval(mean_by_cluster(right, keys), seed=seed)
    return Slice(name, len(own), float(right.mean()), interval, float(own.mean()))


def _array(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)
