"""Alignment by optimal transport, the paired form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Interval
from torch.nn import functional

from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("aot")
@dataclass(frozen=True, slots=True)
class AOT(BaseLoss):
    r"""Alignment by optimal transport: the sorted margins of the policy against those of the reference, quantile by quantile.

    Over the n pairs (x, y_w, y_l) of a step, let u and v be the pairs' log-ratios between completions, and u_(i), v_(i) the
    i-th smallest of each

        u = log pi(y_w|x) - log pi(y_l|x)        v = log ref(y_w|x) - log ref(y_l|x)
        d_i = u_(i) - v_(i)

        L_i = -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i)

    e = 0 is AOT for paired data with the logistic loss of Melnyk et al. 2024 (arXiv:2406.05882): the distribution of u is made
    to dominate that of v in the first order, and sorting is the optimal transport between them. Gradient:
    dL_i/du_(i) = beta (e - sigmoid(-beta d_i)), on the pair whose u stands at rank i.
    Where implementations disagree: TRL sorts the pairs of a micro-batch, so its result depends on accumulation and ranks;
    here a term belongs to a rank of the whole step (two passes), and the step's size is part of the objective: with one
    pair a step it is DPO.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        label_smoothing: e, in [0, 0.5); not in the paper, 0 there.

    Shapes
        in:  four tensors of (pairs,) of the whole step, log-probs in nats summed over scored tokens.
        out: term ``aot`` (pairs,) nats in the order of ranks, unit pair; rewards beta * log-ratio (pairs,) in the order of
            the pairs, detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    Margins of 1 and 3 under the policy and the same the other way round under the reference are one distribution:

    >>> import torch
    >>> w, ref, z, n = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]), torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> AOT()(PairLogps(w, z, ref, z, n, n)).terms["aot"].values
    tensor([0.6931, 0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    is_batchwise: ClassVar[bool] = True

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one step."""
        u = (logps.policy_chosen - logps.policy_rejected).sort().values
        v = (logps.reference_chosen - logps.reference_rejected).sort().values
        margins = self.beta * (u - v)
        e = self.label_smoothing
        terms = {"aot": Term(-(1 - e) * functional.logsigmoid(margins) - e * functional.logsigmoid(-margins), "pair")}
        rewards = (self.beta * ratio.detach() for ratio in (logps.chosen_logratio, logps.rejected_logratio))
        return LossTerms(terms, next(rewards), next(rewards))
