"""Preference optimisation with ties, after Rao and Kupper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("rao_kupper")
@dataclass(frozen=True, slots=True)
class RaoKupper(BaseLoss):
    r"""Preference optimisation with ties, the Rao-Kupper model: a pair is judged better only beyond a threshold.

    For a prompt x with completions y_1 and y_2, let d be the margin of their rewards and a the threshold

        d = beta [log pi(y_1|x) - log ref(y_1|x)] - beta [log pi(y_2|x) - log ref(y_2|x)]        a = log nu
        P(y_1 is better) = sigmoid(d - a)
        P(tie) = (nu^2 - 1) sigmoid(d - a) sigmoid(-d - a)

        L = -log P(y_w is better)    where y_1 = y_w is chosen
        L = -log P(tie)              where neither is

    A pair whose label came with a confidence c below 1 costs -c log P(y_w is better) - (1 - c) log P(y_l is better), in no paper;
    a tie has no order, so nothing changes for it.

    DPO-RK of Chen et al. 2024 (arXiv:2409.17431) on the model of Rao & Kupper 1967; the three probabilities add up to 1, and
    nu = 1 without ties is DPO. Gradient on d: -sigmoid(a - d), and of a tie sigmoid(d + a) - sigmoid(a - d), which draws the
    margin to 0.
    Where implementations disagree: other trainers drop ties or count them as wins of the first completion. The order of the
    two does not matter in a tie.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        nu: how readily two equals are called a tie, > 1; (nu - 1) / (nu + 1) of them. Usual 3: half.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, which pairs are ties (pairs,), and confidences
            (pairs,) where there are any.
        out: term ``rao_kupper`` (pairs,) nats, unit pair; rewards beta * log-ratio (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.
        ValueError: called without saying which pairs are ties.

    With nu = 3 equals tie half of the time, so a tie costs log 2 and a win log 4:

    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> RaoKupper()(PairLogps(z, z, z, z, n, n, is_tie=torch.tensor([True, False]))).terms["rao_kupper"].values
    tensor([0.6931, 1.3863])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    nu: Annotated[float, Gt(1)] = 3.0
    needs: ClassVar[frozenset[Need]] = frozenset({"ties", "confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        if logps.is_tie is None:
            raise ValueError("rao_kupper is not told which pairs are ties, and their loss is another one")
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        d, a = chosen - rejected, math.log(self.nu)
        first, second = -functional.logsigmoid(d - a), -functional.logsigmoid(-d - a)
        e = flip_probability(logps)
        win = (1 - e) * first + e * second
        tie = first + second - math.log(self.nu**2 - 1)
        return LossTerms({"rao_kupper": Term(torch.where(logps.is_tie, tie, win), "pair")}, chosen.detach(), rejected.detach())
