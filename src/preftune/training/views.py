"""From the log-probabilities of packs to the view that a loss takes: of one pack, or of all packs of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack
from preftune.maths.logps import pair_index, pairs_of, sum_by_completion
from preftune.maths.losses.base import Loss
from preftune.maths.types import PairLogps, SequenceLogps, TokenLogps, UnpairedLogps
from preftune.training.devices import sent

LossView: TypeAlias = PairLogps | UnpairedLogps | SequenceLogps
Index: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the scored tokens of one or several packs, in the order of their targets; (targets,) nats.

    Parameters
        policy: with a graph where there is one. reference: None for losses without one.
        concentration: log sum p^2 under the policy, for losses that need it.
        prompts: under the policy, of the tokens of every prompt behind its first one, (prompt tokens,), likewise.
    """

    policy: Tensor
    reference: Tensor | None = None
    concentration: Tensor | None = None
    prompts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Log-probabilities of every partner of a step, behind the prompt of its example; (partners,) nats, no graph."""

    policy: Tensor
    reference: Tensor | None

    @property
    def divergence(self) -> Tensor:
        """max(0, mean log-ratio): the estimate of KL(policy || reference) that KTO takes."""
        frozen = torch.zeros_like(self.policy) if self.reference is None else self.reference
        return (self.policy - frozen).double().mean().clamp(min=0)


def view_of(loss: Loss, packs: Sequence[Pack], scores: Scores, mismatched: Mismatched | None = None) -> LossView:
    """What a loss is called with, for the examples of these packs in their order."""
    device = scores.policy.device
    segments, num_tokens = _joined(packs)
    counts, at = sent(num_tokens, device), sent(segments, device)
    policy = sum_by_completion(scores.policy, at, counts)
    if loss.view == "demonstrations":
        return policy
    reference = None if scores.reference is None else sum_by_completion(scores.reference, at, counts)
    examples = [example for pack in packs for example in pack.examples]
    if loss.view == "unpaired":
        return _unpaired(examples, policy, reference, mismatched)
    chosen, rejected = pair_index([len(example.completions) for example in examples])
    pairs = pairs_of(policy, reference, chosen.to(device, non_blocking=True), rejected.to(device, non_blocking=True))
    dtype = pairs.policy_chosen.dtype
    strengths = torch.tensor([example.strength for example in examples], dtype=dtype)
    confidences = torch.tensor([1.0 if one.confidence is None else one.confidence for one in examples], dtype=dtype)
    pairs = replace(pairs, strength=strengths.to(device, non_blocking=True), confidence=confidences.to(device, non_blocking=True))
    if "ties" in loss.needs:
        pairs = replace(pairs, is_tie=sent(np.array([example.is_tie for example in examples]), device))
    if "tokens" in loss.needs or "concentration" in loss.needs:
        sides = (_tokens_of(scores, segments, num_tokens, side) for side in (0, 1))
        pairs = replace(pairs, chosen=next(sides), rejected=next(sides))
    if scores.prompts is not None:
        lengths = torch.tensor([len(example.prompt_ids) - 1 for example in examples], dtype=torch.int64)
        owners = torch.repeat_interleave(torch.arange(len(examples)), lengths).to(device)
        pairs = replace(pairs, prompt=sum_by_completion(scores.prompts, owners, lengths.to(device)))
    return pairs


def _unpaired(
    examples: Sequence[TokenisedExample], policy: SequenceLogps, reference: SequenceLogps | None, mismatched: Mismatched | None
) -> UnpairedLogps:
    for example in examples:
        if len(example.labels) != len(example.completions):
            raise ValueError(
                f"example {example.example_id} has {len(example.completions)} completions and {len(example.labels)} labels"
            )
    labels = [label for example in examples for label in example.labels]
    frozen = torch.zeros_like(policy.logps) if reference is None else reference.logps
    partners = None
    if mismatched is not None:
        partners = torch.zeros_like(mismatched.policy) if mismatched.reference is None else mismatched.reference
    return UnpairedLogps(
        policy=policy.logps,
        reference=frozen.detach(),
        num_tokens=policy.num_tokens,
        is_desirable=sent(np.array(labels, dtype=np.bool_), policy.logps.device),
        mismatched_policy=None if mismatched is None else mismatched.policy,
        mismatched_reference=partners,
    )


def _tokens_of(scores: Scores, segments: Index, num_tokens: Index, side: int) -> TokenLogps:
    """The single tokens of the chosen (side 0) or the rejected (side 1) completions."""
    kept = np.flatnonzero(segments % 2 == side)
    first = np.cumsum(num_tokens) - num_tokens  # of each completion, the place of its first scored token
    device = scores.policy.device
    at = sent(kept, device)
    policy = scores.policy.index_select(0, at)
    return TokenLogps(
        policy=policy,
        reference=torch.zeros_like(policy) if scores.reference is None else scores.reference.index_select(0, at),
        segments=sent(segments[kept] // 2, device),
        places=sent(kept - first[segments[kept]], device),
        concentration=None if scores.concentration is None else scores.concentration.index_select(0, at),
    )


def _joined(packs: Sequence[Pack]) -> tuple[Index, Index]:
    """Completion of every scored token and scored tokens of every completion, counted over all packs."""
    starts = np.cumsum([0, *(pack.num_completions for pack in packs)])
    segments = np.concatenate([pack.segments + start for pack, start in zip(packs, starts[:-1], strict=True)])
    return segments, np.concatenate([pack.num_tokens for pack in packs])
