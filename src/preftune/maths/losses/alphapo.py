"""AlphaPO: SimPO with a reward of another shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.divergence import MAX_EXPONENT
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("alphapo")
@dataclass(frozen=True, slots=True)
class AlphaPO(BaseLoss):
    r"""AlphaPO: SimPO whose reward is a power of the average likelihood instead of its logarithm.

    For a prompt x with chosen y_w and rejected y_l of T_w and T_l scored tokens, let a be the average log-probability of a
    token and r its reward

        a(y) = log pi(y|x) / T
        r(y) = beta (1 - e^(-alpha a(y))) / alpha,   beta a(y) for alpha = 0
        m = r(y_w) - r(y_l) - gamma

        L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    The loss of Gupta et al. 2025 (arXiv:2501.03884); alpha = 0 is SimPO. A pair whose label came with a confidence c below 1
    takes e = 1 - c. Gradients: dL/dm = e - sigmoid(-m) and dr/da = beta e^(-alpha a): alpha > 0 pulls harder at unlikely
    completions, alpha < 0 at likely ones.
    Where implementations disagree: gamma stands behind beta, as in TRL; the paper gives gamma / beta. TRL forms
    (e^a)^(-alpha), which loses a to underflow below -103 in float32; here the exponents are added, and end at 80. With its NLL
    (``cpo_alpha``,
    which ``loss_type="alphapo"`` sets to 0) it is a mix of this loss and ``sft``.

    Parameters
        beta: scale of the reward, > 0. Usual 2.5 to 10.
        alpha: shape of the reward, usual -0.25 to 0.25.
        gamma: target margin, >= 0. Usual 0.1 to 1 times beta.
        label_smoothing: e, the assumed share of flipped labels, in [0, 0.5), of pairs that say no confidence; 0 in the paper.

    Shapes
        in:  policy log-probs (pairs,) in nats, summed over scored tokens, counts (pairs,), and confidences (pairs,) where there
            are any; the reference is not read.
        out: term ``alphapo`` (pairs,) nats, unit pair; rewards r, (pairs,), detached, without gamma.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too: there is no reference to diverge from.

    Completions that are equally likely per token cost log(1 + e^gamma):

    >>> w, l, z = torch.tensor([-4.0]), torch.tensor([-2.0]), torch.zeros(1)
    >>> AlphaPO(gamma=0.0)(PairLogps(w, l, z, z, torch.tensor([4]), torch.tensor([2]))).terms["alphapo"].values
    tensor([0.6931])
    """

    beta: Annotated[float, Gt(0)] = 2.5
    alpha: Annotated[float, Interval(ge=-10, le=10)] = 0.25
    gamma: Annotated[float, Ge(0)] = 0.25
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    needs_reference: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self._reward(logps.policy_chosen / logps.chosen_tokens)
        rejected = self._reward(logps.policy_rejected / logps.rejected_tokens)
        m, e = chosen - rejected - self.gamma, flip_probability(logps, self.label_smoothing)
        terms = {"alphapo": Term(-(1 - e) * functional.logsigmoid(m) - e * functional.logsigmoid(-m), "pair")}
        return LossTerms(terms, chosen.detach(), rejected.detach())

    def _reward(self, average: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """r, from the average log-probability of a token."""
        if self.alpha == 0:
            return self.beta * average
        return -self.beta * torch.expm1((-self.alpha * average).clamp(max=MAX_EXPONENT)) / self.alpha
