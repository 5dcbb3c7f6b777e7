"""Self-play preference optimisation with labels for probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("sppo_hard")
@dataclass(frozen=True, slots=True)
class SPPOHard(BaseLoss):
    r"""Self-play preference optimisation, hard: each log-ratio is drawn to a fixed value of its own, up or down.

    For a prompt x with chosen y_w and rejected y_l, let r be the log-ratios

        r_w = log pi(y_w|x) - log ref(y_w|x),   r_l = log pi(y_l|x) - log ref(y_l|x)

        L = (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2

    The squared loss on a winner and a loser of Wu et al. 2024 (arXiv:2405.00675), with 1 / beta for its eta and the
    probability that a completion wins set to 1 and 0. Gradients: dL/dr_w = 2 (r_w - 1 / (2 beta)) and dL/dr_l = 2 (r_l + 1 /
    (2 beta)). The reference is the policy of the round before: several rounds of generate and this loss are the paper's
    method.
    Where implementations disagree: the paper's code takes probabilities from a judge, which is ``sppo_soft``; TRL's
    ``sppo_hard`` is this loss. Confidences of pairs are not read here.

    Parameters
        beta: 1 / eta, strength of the pull to the reference, > 0, per nat. Usual 1e-3: targets of 500 nats.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens.
        out: term ``sppo_hard`` (pairs,) nats squared, unit pair; rewards beta r, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too, because the log-ratios are not read
            through their difference alone.

    At initialisation the loss is 1 / (2 beta^2):

    >>> import torch
    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> SPPOHard(beta=0.5)(PairLogps(z, z, z, z, n, n)).terms["sppo_hard"].values
    tensor([2.])
    """

    beta: Annotated[float, Gt(0)] = 1e-3

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected, target = logps.chosen_logratio, logps.rejected_logratio, 0.5 / self.beta
        terms = {"sppo_hard": Term((chosen - target) ** 2 + (rejected + target) ** 2, "pair")}  # P = 1 and 0
        return LossTerms(terms, self.beta * chosen.detach(), self.beta * rejected.detach())
