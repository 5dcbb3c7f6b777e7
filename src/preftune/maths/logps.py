"""From the log-probabilities of tokens to those of completions, and from completions to the view that a loss takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preftune.maths.types import PairLogps, SequenceLogps


def sum_by_completion(
    token_logps: Float[Tensor, " tokens"], segments: Int[Tensor, " tokens"], num_tokens: Int[Tensor, " completions"]
) -> SequenceLogps:
    """Log-probability of each completion: the sum over its scored tokens, in nats.

    ``segments`` names the completion of each token. Sums run in float64 and are rounded once, so that the same token
    log-probabilities give the same sum whatever stands before them in the pack: policy and reference then cancel exactly.

    >>> sum_by_completion(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 1, 1]), torch.tensor([1, 2])).logps
    tensor([-1., -6.])
    """
    zeros = torch.zeros(num_tokens.shape[0], dtype=torch.float64, device=token_logps.device)
    sums = zeros.index_add(0, segments, token_logps.double())
    return SequenceLogps(sums.to(token_logps.dtype), num_tokens)


def pair_index(completions_per_group: Sequence[int]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Flat places of the chosen and the rejected completion of each group of a pack.

    Groups hold their completions by role, chosen then rejected.

    Raises
        ValueError: a group that is not a pair.

    >>> pair_index([2, 2])
    (tensor([0, 2]), tensor([1, 3]))
    """
    for group, count in enumerate(completions_per_group):
        if count != 2:
            raise ValueError(f"group {group} holds {count} completions, and a pair holds 2")
    chosen = torch.arange(len(completions_per_group), dtype=torch.int64) * 2
    return chosen, chosen + 1


def pairs_of(
    policy: SequenceLogps,
    reference: SequenceLogps | None,
    chosen: Int[Tensor, " pairs"],
    rejected: Int[Tensor, " pairs"],
) -> PairLogps:
    """The pairs view of a pack's completions; without a reference its fields are zeros.

    ``index_select``, not indexing: the backward of indexing adds in an order that varies from run to run.
    """

    def of(values: Tensor, index: Tensor) -> Tensor:
        return values.index_select(0, index)

    frozen = torch.zeros_like(policy.logps) if reference is None else reference.logps
    return PairLogps(
        policy_chosen=of(policy.logps, chosen),
        policy_rejected=of(policy.logps, rejected),
        reference_chosen=of(frozen, chosen).detach(),
        reference_rejected=of(frozen, rejected).detach(),
        chosen_tokens=of(policy.num_tokens, chosen),
        rejected_tokens=of(policy.num_tokens, rejected),
    )
