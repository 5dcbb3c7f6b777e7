"""Length-regularised DPO: what the labels owe to length is told apart from quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Interval
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("r_dpo")
@dataclass(frozen=True, slots=True)
class RDPO(BaseLoss):
    r"""Length-regularised direct preference optimisation (R-DPO): every token of a completion costs alpha.

    For a prompt x with chosen y_w and rejected y_l of T_w and T_l scored tokens, let f' be the score of the divergence (the
    identity for reverse_kl) and m the margin

        m = beta [f'(log pi(y_w|x) / ref(y_w|x)) - f'(log pi(y_l|x) / ref(y_l|x))] + alpha (T_w - T_l)

        L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    e = 0 is the regularised objective of Park et al. 2024 (arXiv:2403.19159). The policy that maximises reward minus alpha T
    minus beta KL has reward beta log(pi / ref) + alpha T + c(x), hence the sign: a longer chosen completion has part of its
    margin already, so that length is not learnt as quality. e = 1 - c for a pair whose label came with a confidence c below 1.
    Gradient: dL/dm = e - sigmoid(-m); lengths have none.
    Where implementations disagree: TRL has no R-DPO. The derivation above decides the sign of the length term; the other one
    would pay for length. Lengths are in scored tokens, so alpha depends on the tokenizer.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        alpha: cost of a token, >= 0, in reward. Usual 0.005 to 0.1; 0 is dpo.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; its alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, two counts of (pairs,), and confidences
            (pairs,) where there are any.
        out: term ``r_dpo`` (pairs,) nats, unit pair; rewards beta * f', (pairs,), detached, without the length.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    At initialisation a chosen completion that is 10 tokens longer costs log(1 + e^(-10 alpha)):

    >>> import torch
    >>> z, long, short = torch.zeros(1), torch.tensor([30]), torch.tensor([20])
    >>> RDPO(alpha=0.1)(PairLogps(z, z, z, z, long, short)).terms["r_dpo"].values
    tensor([0.3133])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 0.01
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * divergence_score(logps.chosen_logratio, self.divergence, self.divergence_alpha)
        rejected = self.beta * divergence_score(logps.rejected_logratio, self.divergence, self.divergence_alpha)
        margins = chosen - rejected + self.alpha * (logps.chosen_tokens - logps.rejected_tokens).to(chosen.dtype)
        e = flip_probability(logps)
        values = -(1 - e) * functional.logsigmoid(margins) - e * functional.logsigmoid(-margins)
        return LossTerms({"r_dpo": Term(values, "pair")}, chosen.detach(), rejected.detach())
