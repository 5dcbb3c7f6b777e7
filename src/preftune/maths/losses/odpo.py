"""DPO with an offset: how much better the chosen completion is sets the margin that it must reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("odpo")
@dataclass(frozen=True, slots=True)
class ODPO(BaseLoss):
    r"""Direct preference optimisation with an offset: strong preferences must be told further apart than weak ones.

    For a prompt x with chosen y_w and rejected y_l that is better by a strength d, let f' be the score of the divergence (the
    identity for reverse_kl), m the margin and D the offset

        m = beta [f'(log pi(y_w|x) / ref(y_w|x)) - f'(log pi(y_l|x) / ref(y_l|x))]
        D = alpha d  (scaling linear)   or   alpha log d  (scaling log);   0 where the data say no strength

        L = -(1 - e) log sigmoid(m - D) - e log sigmoid(-m - D)

    e = 0 is the ODPO loss of Amini et al. 2024 (arXiv:2402.10571), whose offset is alpha f(score(y_w) - score(y_l)) for a
    monotone f. e = 1 - c for a pair whose label came with a confidence c below 1: the expectation over the label, in no paper.
    Gradient: dL/dm = -(1 - e) sigmoid(D - m) + e sigmoid(m + D).
    Where implementations disagree: the authors take f = log of a reward model's score difference. Strengths here are steps of 0
    to 3, and log d would ask less of a pair with d < 1 than of one without a strength, so ``linear`` is the default and ``log``
    is the paper's. TRL has no ODPO.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        alpha: margin a step of strength, >= 0. Usual 0.5 to 1; 0 is dpo.
        scaling: ``linear``, or ``log``.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; its alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, strengths (pairs,) in [0, 3] and confidences
            (pairs,) where there are any.
        out: term ``odpo`` (pairs,) nats, unit pair; rewards beta * f', (pairs,), detached, without the offset.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    A pair that is better by 2 steps starts at log(1 + e^(alpha 2)):

    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> ODPO(alpha=0.5)(PairLogps(z, z, z, z, n, n, strength=torch.tensor([2.0, 0.0]))).terms["odpo"].values
    tensor([1.3133, 0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 1.0
    scaling: Literal["linear", "log"] = "linear"
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence", "strength"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * divergence_score(logps.chosen_logratio, self.divergence, self.divergence_alpha)
        rejected = self.beta * divergence_score(logps.rejected_logratio, self.divergence, self.divergence_alpha)
        margins, offsets, e = chosen - rejected, self._offsets(logps), flip_probability(logps)
        values = -(1 - e) * functional.logsigmoid(margins - offsets) - e * functional.logsigmoid(-margins - offsets)
        return LossTerms({"odpo": Term(values, "pair")}, chosen.detach(), rejected.detach())

    def _offsets(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        """D."""
        if logps.strength is None:
            return torch.zeros_like(logps.policy_chosen)
        if self.scaling == "linear":
            return self.alpha * logps.strength
        is_said = logps.strength > 0
        return self.alpha * torch.where(is_said, torch.where(is_said, logps.strength, 1.0).log(), 0.0)
