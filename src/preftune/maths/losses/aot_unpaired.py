"""Alignment by optimal transport, the unpaired form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Interval
from torch.nn import functional

from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("aot_unpaired")
@dataclass(frozen=True, slots=True)
class AOTUnpaired(BaseLoss):
    r"""Alignment by optimal transport: sorted rewards of chosen completions against those of rejected ones.

    Over the n pairs of a step, let r_w and r_l be the log-ratios of the chosen and of the rejected completions, and (i) the
    i-th smallest of each

        r_w = log pi(y_w|x) - log ref(y_w|x)        r_l = log pi(y_l|x) - log ref(y_l|x)
        d_i = r_w(i) - r_l(i)

        L_i = -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i)

    e = 0 is AOT for unpaired data with the logistic loss of Melnyk et al. 2024 (arXiv:2406.05882): the distribution of chosen
    rewards is made to dominate that of rejected ones in the first order; which two answer the same prompt is not used.
    Gradient: dL_i/dr_w(i) = beta (e - sigmoid(-beta d_i)) = -dL_i/dr_l(i).
    Where implementations disagree: TRL sorts the completions of a micro-batch, so its result depends on accumulation and
    ranks; here a term belongs to a rank of the whole step (two passes). As in TRL the data are pairs, so there are as many
    of each.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        label_smoothing: e, in [0, 0.5); not in the paper, 0 there.

    Shapes
        in:  four tensors of (pairs,) of the whole step, log-probs in nats summed over scored tokens.
        out: term ``aot_unpaired`` (pairs,) nats in the order of ranks, unit pair; rewards beta * log-ratio (pairs,) in the
            order of the pairs, detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    Chosen rewards of 1 and 3 and rejected ones of 3 and 1 are one distribution:

    >>> import torch
    >>> w, l, z, n = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]), torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> AOTUnpaired()(PairLogps(w, l, z, z, n, n)).terms["aot_unpaired"].values
    tensor([0.6931, 0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    is_batchwise: ClassVar[bool] = True

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one step."""
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        margins = chosen.sort().values - rejected.sort().values
        e = self.label_smoothing
        values = -(1 - e) * functional.logsigmoid(margins) - e * functional.logsigmoid(-margins)
        return LossTerms({"aot_unpaired": Term(values, "pair")}, chosen.detach(), rejected.detach())
