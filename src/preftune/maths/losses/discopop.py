"""DiscoPOP: a blend of the logistic and the exponential loss, found by a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("discopop")
@dataclass(frozen=True, slots=True)
class DiscoPOP(BaseLoss):
    r"""Discovered preference optimisation (log-ratio modulated loss): logistic below a margin of 0, exponential above it.

    For a prompt x with chosen y_w and rejected y_l, let f' be the score of the divergence (the identity for reverse_kl), m
    the margin and s the share of the exponential part

        m = beta [f'(log pi(y_w|x) / ref(y_w|x)) - f'(log pi(y_l|x) / ref(y_l|x))],  s = sigmoid(m / tau)

        l(m) = -(1 - s) log sigmoid(m) + s e^-m

        L = (1 - e) l(m) + e l(-m)

    l is the log-ratio modulated loss of Lu et al. 2024 (arXiv:2406.08414); e = 1 - c for a pair whose label came with a
    confidence c below 1: the expectation over the label, in no paper. Gradient: dl/dm = -(1 - s) sigmoid(-m) - s e^-m + s (1
    - s) [e^-m + log sigmoid(m)] / tau; between m = 0 and about m = tau l rises with m: it is not convex, which the paper
    finds and keeps.
    Where implementations disagree: s and e^-m are multiplied here as e^(log sigmoid(m / tau) - m), which is bounded where tau
    <= 1; TRL multiplies them, which is infinity times 0 from m = -88 on in float32.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5; the paper has 0.05.
        tau: width of the change from one part to the other, in margin, > 0. Usual 0.05.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``discopop`` (pairs,), unit pair; rewards beta * f', (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    At initialisation m = 0 and the loss is the mean of log 2 and 1:

    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> DiscoPOP()(PairLogps(z, z, z, z, n, n)).terms["discopop"].values
    tensor([0.8466])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    tau: Annotated[float, Gt(0)] = 0.05
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * divergence_score(logps.chosen_logratio, self.divergence, self.divergence_alpha)
        rejected = self.beta * divergence_score(logps.rejected_logratio, self.divergence, self.divergence_alpha)
        margins, e = chosen - rejected, flip_probability(logps)
        values = (1 - e) * self._modulated(margins) + e * self._modulated(-margins)
        return LossTerms({"discopop": Term(values, "pair")}, chosen.detach(), rejected.detach())

    def _modulated(self, margins: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """l(m)."""
        logistic = -torch.sigmoid(-margins / self.tau) * functional.logsigmoid(margins)
        return logistic + torch.exp(functional.logsigmoid(margins / self.tau) - margins)
