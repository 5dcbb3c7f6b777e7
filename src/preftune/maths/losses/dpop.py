"""DPO-positive: the chosen completion may not become less likely than the reference finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("dpop")
@dataclass(frozen=True, slots=True)
class DPOP(BaseLoss):
    r"""Direct preference optimisation, positive: a penalty on chosen completions that fall below the reference.

    For a prompt x with chosen y_w and rejected y_l, let r be the log-ratios and h the penalised difference

        r_w = log pi(y_w|x) - log ref(y_w|x),   r_l = log pi(y_l|x) - log ref(y_l|x)
        h(w, l) = r_w - r_l - lambda_p max(0, -r_w)

        L = -(1 - e) log sigmoid(beta h(w, l)) - e log sigmoid(beta h(l, w))

    e = 0 is the DPOP loss of Pal et al. 2024 (Smaug, arXiv:2402.13228), whose lambda is lambda_p; e = 1 - c for a pair whose
    label came with a confidence c below 1: the expectation over the label, in no paper. Gradient for e = 0: dL/dh = -beta
    sigmoid(-beta h), with dh/dr_w = 1 + lambda_p where r_w < 0 and 1 elsewhere, and dh/dr_l = -1.
    Where implementations disagree: nowhere known; the penalty stands inside beta, as in the paper. TRL has no DPOP. The rewards
    that are logged leave the penalty out, so they compare with those of dpo.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.1 to 0.3.
        lambda_p: weight of the penalty, >= 0. Usual 5 to 500; 50 in the paper; 0 is dpo.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``dpop`` (pairs,) nats, unit pair; rewards beta r, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too, because the penalty reads one log-ratio
            alone.

    A chosen completion that lost 1 nat, beside a rejected one that lost 1 too, costs log(1 + e^(beta lambda_p)):

    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> DPOP(beta=0.1, lambda_p=50.0)(PairLogps(z - 1, z - 1, z, z, n, n)).terms["dpop"].values
    tensor([5.0067])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_p: Annotated[float, Ge(0)] = 50.0
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
        of_label = self.beta * (chosen - rejected - self.lambda_p * torch.relu(-chosen))
        of_flip = self.beta * (rejected - chosen - self.lambda_p * torch.relu(-rejected))
        e = flip_probability(logps)
        values = -(1 - e) * functional.logsigmoid(of_label) - e * functional.logsigmoid(of_flip)
        return LossTerms({"dpop": Term(values, "pair")}, self.beta * chosen.detach(), self.beta * rejected.detach())
