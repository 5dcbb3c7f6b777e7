"""Efficient exact optimisation of pairs: the reverse KL divergence between what is preferred and what the policy prefers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("exo_pair")
@dataclass(frozen=True, slots=True)
class EXOPair(BaseLoss):
    r"""Efficient exact optimisation on pairs: the policy's preference is drawn into the label's mode, not over its mass.

    For a prompt x with chosen y_w and rejected y_l, let f' be the score of the divergence (the identity for reverse_kl), m
    the margin, q the policy's own probability that y_w is better and e that the label is wrong

        m = beta [f'(log pi(y_w|x) / ref(y_w|x)) - f'(log pi(y_l|x) / ref(y_l|x))],  q = sigmoid(m)

        L = KL(q || 1 - e) = q [log q - log(1 - e)] + (1 - q) [log(1 - q) - log e]

    The EXO loss of Ji et al. 2024 (arXiv:2402.00856) on preferences, with smoothed labels. Gradient: dL/dm = q (1 - q) [m -
    log((1 - e) / e)]: it is 0 at the margin log((1 - e) / e), so e sets how far apart pairs are driven, and it vanishes for
    pairs that are far off either way. A pair whose label came with a confidence c below 1 takes e = 1 - c.
    Where implementations disagree: TRL refuses e = 0, as this loss does, and Liger sets 1e-3, the paper's value, in its stead.

    Parameters
        beta: scale of the log-ratios, > 0, per nat. Usual 0.01 to 0.5.
        label_smoothing: e in (0, 0.5), of pairs that say no confidence. Usual 1e-3.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``exo_pair`` (pairs,) nats, unit pair; rewards beta * f', (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    At initialisation q = 1/2 and the loss is log(1/2) - log(e (1 - e)) / 2:

    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> EXOPair(label_smoothing=0.1)(PairLogps(z, z, z, z, n, n)).terms["exo_pair"].values
    tensor([0.5108])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Interval(gt=0, lt=0.5)] = 1e-3
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * divergence_score(logps.chosen_logratio, self.divergence, self.divergence_alpha)
        rejected = self.beta * divergence_score(logps.rejected_logratio, self.divergence, self.divergence_alpha)
        margins, e = chosen - rejected, flip_probability(logps, self.label_smoothing)
        won = torch.sigmoid(margins) * (functional.logsigmoid(margins) - torch.log1p(-e))
        lost = torch.sigmoid(-margins) * (functional.logsigmoid(-margins) - torch.log(e))
        return LossTerms({"exo_pair": Term(won + lost, "pair")}, chosen.detach(), rejected.detach())
