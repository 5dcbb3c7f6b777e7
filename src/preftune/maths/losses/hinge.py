"""Hinge loss on the margin: SLiC as RSO normalised it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("hinge")
@dataclass(frozen=True, slots=True)
class Hinge(BaseLoss):
    r"""Hinge loss on the margin (SLiC): pairs that are apart by one already are left alone.

    For a prompt x with chosen y_w and rejected y_l, let f' be the score of the divergence (the identity for reverse_kl) and m
    the margin

        m = beta [f'(log pi(y_w|x) / ref(y_w|x)) - f'(log pi(y_l|x) / ref(y_l|x))]

        L = (1 - e) max(0, 1 - m) + e max(0, 1 + m)

    e = 0 is the hinge-norm loss of Liu et al. 2023 (RSO, arXiv:2309.06657), whose gamma is beta; it is the calibration loss of
    SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) with log-ratios to the reference in place of log-probabilities. e = 1 - c for a
    pair whose label came with a confidence c below 1: the expectation over the label, in no paper. Gradient: dL/dm = -(1 - e)
    where m < 1, plus e where m > -1.
    Where implementations disagree: SLiC itself has no reference in the margin and adds an NLL; TRL's ``hinge``, HALOs and this
    loss are RSO's, and a mix with ``sft`` adds the NLL.

    Parameters
        beta: scale of the log-ratios against the margin of 1, > 0, per nat. Usual 0.05 to 0.5.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``hinge`` (pairs,), unit pair; rewards beta * f', (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    At initialisation m = 0 and the loss is 1:

    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> Hinge()(PairLogps(z, z, z, z, n, n)).terms["hinge"].values
    tensor([1., 1.])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * divergence_score(logps.chosen_logratio, self.divergence, self.divergence_alpha)
        rejected = self.beta * divergence_score(logps.rejected_logratio, self.divergence, self.divergence_alpha)
        margins, e = chosen - rejected, flip_probability(logps)
        terms = {"hinge": Term((1 - e) * torch.relu(1 - margins) + e * torch.relu(1 + margins), "pair")}
        return LossTerms(terms, chosen.detach(), rejected.detach())
