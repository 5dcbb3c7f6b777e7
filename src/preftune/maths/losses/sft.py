"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from preftune.core.records import View
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, SequenceLogps, Term


@losses.register("sft")
@dataclass(frozen=True, slots=True)
class SFT(BaseLoss):
    r"""Supervised fine-tuning: negative log-likelihood of the completion, per token.

    For a prompt x with completion y of T scored tokens, let

        l = log pi(y|x) = sum over t of log pi(y_t | x, y_<t)

        L = -l

    The term's unit is the token, so the loop divides the sum of L by the number of scored tokens of the whole step:
    every token weighs the same, whatever the packing and the accumulation (Eq. 1 of Ouyang et al. 2022,
    arXiv:2203.02155, is the sum; the division is the usual cross entropy per token). Gradient on l: -1.
    Where implementations disagree: trainers that average each micro-batch by its own token count weigh tokens of
    short batches more (TRL's ``loss_type="sft"`` does); here there is one count for the step.

    Shapes
        in:  logps (completions,) nats, summed over scored tokens; num_tokens (completions,).
        out: term ``sft`` (completions,) nats, unit token; no rewards.

    Raises
        UnknownName: built by name with an option; it has none.

    Two completions of 1 and 3 tokens at -2 nats each cost (2 + 6) / 4 = 2 nats a token:

    >>> import torch
    >>> out = SFT()(SequenceLogps(torch.tensor([-2.0, -6.0]), torch.tensor([1, 3])))
    >>> float(out.terms["sft"].values.sum() / 4)
    2.0
    """

    view: ClassVar[View] = "demonstrations"
    needs_reference: ClassVar[bool] = False

    def __call__(self, logps: SequenceLogps, /) -> LossTerms:
        """Terms of one pack."""
        return LossTerms({"sft": Term(-logps.logps, "token")})
