"""Robust DPO: an unbiased estimate of the loss without label noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Interval
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("robust")
@dataclass(frozen=True, slots=True)
class Robust(BaseLoss):
    r"""Robust DPO: from labels of which a known share is flipped, an unbiased estimate of the loss on clean ones.

    For a prompt x with chosen y_w and rejected y_l, let f' be the score of the divergence (the identity for reverse_kl), m
    the margin and e the probability that the label is flipped

        m = beta [f'(log pi(y_w|x) / ref(y_w|x)) - f'(log pi(y_l|x) / ref(y_l|x))]

        L = [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e)

    The rDPO loss of Chowdhury et al. 2024 (arXiv:2403.00409). Its mean over flips is the DPO loss of the true label. Gradient:
    dL/dm = -[(1 - e) sigmoid(-m) + e sigmoid(m)] / (1 - 2 e): the weight of dpo is in [0, 1], here a pair that the model
    contradicts pulls more and one that it agrees with never stops.
    A pair whose label came with a confidence c below 1 takes e = 1 - c. Its weight 1 / (2c - 1) has no bound near one half: with
    many votes of 51 % take ``dpo``, whose smoothing shrinks such a pair.
    Where implementations disagree: cDPO (``dpo`` with label_smoothing) adds the flipped term, this loss subtracts it; TRL
    warns of e outside [0, 0.5), here it is refused.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        label_smoothing: e, the share of flipped labels, in [0, 0.5), of pairs that say no confidence. Usual 0.1.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``robust`` (pairs,) nats, may be negative, unit pair; rewards beta * f', (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    At initialisation m = 0 and the loss is log 2, whatever e:

    >>> import torch
    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> Robust(label_smoothing=0.2)(PairLogps(z, z, z, z, n, n)).terms["robust"].values
    tensor([0.6931, 0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.1
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * divergence_score(logps.chosen_logratio, self.divergence, self.divergence_alpha)
        rejected = self.beta * divergence_score(logps.rejected_logratio, self.divergence, self.divergence_alpha)
        margins, e = chosen - rejected, flip_probability(logps, self.label_smoothing)
        values = (e * functional.logsigmoid(-margins) - (1 - e) * functional.logsigmoid(margins)) / (1 - 2 * e)
        return LossTerms({"robust": Term(values, "pair")}, chosen.detach(), rejected.detach())
