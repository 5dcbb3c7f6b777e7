"""Preference optimisation with ties, after Davidson."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("davidson")
@dataclass(frozen=True, slots=True)
class Davidson(BaseLoss):
    r"""Preference optimisation with ties, the Davidson model: ties are likely in proportion to the mean of both strengths.

    For a prompt x with completions y_1 and y_2, let d be the margin of their rewards

        d = beta [log pi(y_1|x) - log ref(y_1|x)] - beta [log pi(y_2|x) - log ref(y_2|x)]
        P(y_1 is better) = e^(d/2) / Z        P(tie) = 2 nu / Z        Z = e^(d/2) + e^(-d/2) + 2 nu

        L = -log P(y_w is better)    where y_1 = y_w is chosen
        L = -log P(tie)              where neither is

    A pair whose label came with a confidence c below 1 costs -c log P(y_w is better) - (1 - c) log P(y_l is better), in no paper;
    a tie has no order, so nothing changes for it.

    DPO-D of Chen et al. 2024 (arXiv:2409.17431) on the model of Davidson 1970; without ties, nu to 0 is DPO. Gradient on d, with
    g = [e^(d/2) - e^(-d/2)] / (2 Z): g - 1/2, and g for a tie, which draws the margin to 0.
    Where implementations disagree: other trainers drop ties or count them as wins of the first completion. The order of the
    two does not matter in a tie. Against ``rao_kupper`` a tie between unequals is less unlikely here: its log falls as |d| / 2
    and not as |d|.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        nu: how readily two equals are called a tie, > 0; nu / (nu + 1) of them. Usual 1: half.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, which pairs are ties (pairs,), and confidences
            (pairs,) where there are any.
        out: term ``davidson`` (pairs,) nats, unit pair; rewards beta * log-ratio (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.
        ValueError: called without saying which pairs are ties.

    With nu = 1 equals tie half of the time, so a tie costs log 2 and a win log 4:

    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> Davidson()(PairLogps(z, z, z, z, n, n, is_tie=torch.tensor([True, False]))).terms["davidson"].values
    tensor([0.6931, 1.3863])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    nu: Annotated[float, Gt(0)] = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"ties", "confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        if logps.is_tie is None:
            raise ValueError("davidson is not told which pairs are ties, and their loss is another one")
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        half, tie = (chosen - rejected) / 2, torch.full_like(chosen, math.log(2 * self.nu))
        log_z = torch.logsumexp(torch.stack([half, -half, tie]), 0)
        won = (1 - 2 * flip_probability(logps)) * half
        values = log_z - torch.where(logps.is_tie, tie, won)
        return LossTerms({"davidson": Term(values, "pair")}, chosen.detach(), rejected.detach())
