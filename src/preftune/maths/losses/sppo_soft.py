"""Self-play preference optimisation with the probability that a completion wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("sppo_soft")
@dataclass(frozen=True, slots=True)
class SPPOSoft(BaseLoss):
    r"""Self-play preference optimisation, soft: each log-ratio is drawn to how much more often its completion wins than not.

    For a prompt x with chosen y_w and rejected y_l, let r be the log-ratios and p the probability that y_w is the better one

        r_w = log pi(y_w|x) - log ref(y_w|x),   r_l = log pi(y_l|x) - log ref(y_l|x)

        L = (r_w - (p - 1/2) / beta)^2 + (r_l + (p - 1/2) / beta)^2

    The squared loss on a winner and a loser of Wu et al. 2024 (arXiv:2405.00675), with 1 / beta for its eta and p for the
    probability that y_w wins, 1 - p that y_l does. p is the pair's confidence where that is below 1; else sigmoid(slope d)
    where ``slope`` is above 0 and the data say a strength d, which is the Bradley-Terry probability of a score difference of
    slope d; else 1, as in ``sppo_hard``. Gradients: dL/dr_w = 2 (r_w - (p - 1/2) / beta) and dL/dr_l = 2 (r_l + (p - 1/2) /
    beta).
    Where implementations disagree: the paper's p is a completion's mean win rate against all samples of its prompt by PairRM;
    pairs hold one opponent, so p is against that one. TRL has the hard form only.

    Parameters
        beta: 1 / eta, strength of the pull to the reference, > 0, per nat. Usual 1e-3: targets of up to 500 nats.
        slope: log-odds a step of strength, >= 0; 0: strengths are not read. 1 makes steps of 1, 2, 3 win 73, 88, 95 %.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences and strengths (pairs,) where
            there are any.
        out: term ``sppo_soft`` (pairs,) nats squared, unit pair; rewards beta r, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too, because the log-ratios are not read
            through their difference alone.

    At initialisation the loss is 2 ((p - 1/2) / beta)^2:

    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> SPPOSoft(beta=0.5)(PairLogps(z, z, z, z, n, n, confidence=torch.tensor([0.75, 1.0]))).terms["sppo_soft"].values
    tensor([0.5000, 2.0000])
    """

    beta: Annotated[float, Gt(0)] = 1e-3
    slope: Annotated[float, Ge(0)] = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence", "strength"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
        target = (self._probability(logps) - 0.5) / self.beta
        terms = {"sppo_soft": Term((chosen - target) ** 2 + (rejected + target) ** 2, "pair")}
        return LossTerms(terms, self.beta * chosen.detach(), self.beta * rejected.detach())

    def _probability(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        """p."""
        p = 1 - flip_probability(logps)
        if self.slope == 0 or logps.strength is None:
            return p
        return torch.where((p == 1) & (logps.strength > 0), torch.sigmoid(self.slope * logps.strength), p)
