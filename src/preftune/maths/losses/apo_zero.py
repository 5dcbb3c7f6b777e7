"""Anchored preference optimisation, zero: chosen completions more likely, rejected ones less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("apo_zero")
@dataclass(frozen=True, slots=True)
class APOZero(BaseLoss):
    r"""Anchored preference optimisation, zero: chosen up and rejected down, for chosen ones better than the model.

    For a prompt x with chosen y_w and rejected y_l, let r be the rewards

        r_w = beta [log pi(y_w|x) - log ref(y_w|x)],   r_l = beta [log pi(y_l|x) - log ref(y_l|x)]

        L = (1 - e) [1 - sigmoid(r_w) + sigmoid(r_l)] + e [1 - sigmoid(r_l) + sigmoid(r_w)]

    e = 0 is the APO-zero loss of D'Oosterlinck et al. 2024 (arXiv:2408.06266) plus 1; e = 1 - c for a pair whose label came
    with a confidence c below 1: the expectation over the label, which shrinks the gradient by 2c - 1. With s(r) = sigmoid(r)
    sigmoid(-r) the gradients are dL/dr_w = -(1 - 2e) s(r_w) and dL/dr_l = (1 - 2e) s(r_l).
    Where implementations disagree: the constant 1, in TRL and here, changes no gradient; the loss is then in (0, 2).

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``apo_zero`` (pairs,), unit pair; rewards r, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too, because the rewards are not read
            through their difference alone.

    At initialisation both sigmoids are one half and the loss is 1:

    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> APOZero()(PairLogps(z, z, z, z, n, n)).terms["apo_zero"].values
    tensor([1.])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        e = flip_probability(logps)
        # 1 - sigmoid(r) = sigmoid(-r), which keeps its digits where r is large
        of_label = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
        of_flip = torch.sigmoid(-rejected) + torch.sigmoid(chosen)
        return LossTerms({"apo_zero": Term((1 - e) * of_label + e * of_flip, "pair")}, chosen.detach(), rejected.detach())
