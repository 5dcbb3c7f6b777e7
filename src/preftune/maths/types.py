"""Shapes that travel between the forward pass, the losses and the loop.

Axis names: ``completions`` is every completion of a pack in flat order (group by group, in each group by role),
``pairs`` every chosen/rejected pair. All log-probabilities are in nats and float32 (float64 in tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Unit: TypeAlias = Literal["pair", "completion", "token", "chosen_token"]


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probability of each completion, summed over its scored tokens; ``num_tokens`` counts those."""

    logps: Float[Tensor, " completions"]
    num_tokens: Int[Tensor, " completions"]


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-probabilities of single tokens, for losses that declare the need ``tokens``.

    Parameters
        policy, reference: (tokens,) nats; reference is zeros for losses without one.
        segments: which completion (in a side of pairs: which pair) a token belongs to, ascending.
        places: place of the token among the scored tokens of its completion, from 0.
        concentration: log sum over the vocabulary of p(v)^2 under the policy, for the need ``concentration``; else None.
    """

    policy: Float[Tensor, " tokens"]
    reference: Float[Tensor, " tokens"]
    segments: Int[Tensor, " tokens"]
    places: Int[Tensor, " tokens"]
    concentration: Float[Tensor, " tokens"] | None = None


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Sequence log-probabilities of pairs. Losses without a reference get zeros in the reference fields.

    Parameters
        strength: 0 to 3, how much better the chosen one is; 0 where it was not said.
        confidence: probability in (0.5, 1] that the label is right; 1 where it was not said.
        is_tie: neither is better; then chosen and rejected stand in the order of the data. Only losses that declare the
            need ``ties`` are given ties.
        chosen, rejected: single tokens, for losses that declare the need ``tokens``; else None.
        prompt: the policy's log-probability of the prompt behind its first token, for the need ``prompt``; else None.
    """

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_tokens: Int[Tensor, " pairs"]
    rejected_tokens: Int[Tensor, " pairs"]
    strength: Float[Tensor, " pairs"] | None = None
    confidence: Float[Tensor, " pairs"] | None = None
    is_tie: Bool[Tensor, " pairs"] | None = None
    chosen: TokenLogps | None = None
    rejected: TokenLogps | None = None
    prompt: SequenceLogps | None = None

    @property
    def chosen_logratio(self) -> Float[Tensor, " pairs"]:
        """log pi(chosen) - log ref(chosen)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, " pairs"]:
        """log pi(rejected) - log ref(rejected)."""
        return self.policy_rejected - self.reference_rejected


@dataclass(frozen=True, slots=True)
class UnpairedLogps:
    """Completions that are each desirable or not (KTO and its relatives).

    Parameters
        policy, reference: (completions,) nats; num_tokens: scored tokens of each.
        is_desirable: the label of each.
        mismatched_policy, mismatched_reference: (partners,) log-probabilities of completions of *other* prompts behind
            each prompt, never with a gradient, for losses that declare the need ``mismatched``; else None.
    """

    policy: Float[Tensor, " completions"]
    reference: Float[Tensor, " completions"]
    num_tokens: Int[Tensor, " completions"]
    is_desirable: Bool[Tensor, " completions"]
    mismatched_policy: Float[Tensor, " partners"] | None = None
    mismatched_reference: Float[Tensor, " partners"] | None = None

    @property
    def logratio(self) -> Float[Tensor, " completions"]:
        """log pi - log ref."""
        return self.policy - self.reference


@dataclass(frozen=True, slots=True)
class Term:
    """One named, unreduced part of a loss.

    The loop divides the sum of ``values`` by the number of ``unit`` s in the whole step (over all packs and
    ranks), known before the first backward pass: results do not depend on packing or accumulation. ``weight`` is that of
    the term in a mix; a step of several terms logs each without it. ``chosen_token`` counts those of chosen completions.
    """

    values: Float[Tensor, " items"]
    unit: Unit
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a loss returns: its terms, which the loop adds up, and detached implicit rewards for the metrics.

    chosen_rewards, rejected_rewards: of pairs. For unpaired completions those of the desirable and of the undesirable
    ones, each in their order, so the two may differ in size.
    """

    terms: Mapping[str, Term]
    chosen_rewards: Float[Tensor, " chosen"] | None = None
    rejected_rewards: Float[Tensor, " rejected"] | None = None
