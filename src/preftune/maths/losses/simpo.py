"""Simple preference optimisation: no reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Interval
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("simpo")
@dataclass(frozen=True, slots=True)
class SimPO(BaseLoss):
    r"""Simple preference optimisation, a margin between length-normalised log-probabilities without a reference.

    For a prompt x with chosen y_w and rejected y_l of T_w and T_l scored tokens, let

        m = beta [log pi(y_w|x) / T_w - log pi(y_l|x) / T_l] - gamma

        L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    e = 0 is Eq. 6 of Meng et al. 2024 (arXiv:2405.14734); a pair whose label came with a confidence c below 1 takes e = 1 - c.
    Gradient: dL/dm = e - sigmoid(-m).
    Where implementations disagree: gamma stands behind beta, as in the paper and in TRL's ``simpo_gamma``; the authors'
    code names the ratio gamma / beta. TRL's ``loss_type="simpo"`` adds the NLL of the chosen completion with weight 1
    unless ``cpo_alpha=0`` (CPO-SimPO); here that is a mix of ``simpo`` and ``sft``. A hosted job's ``simpo_gamma`` (Together)
    means this whole loss: margin, length normalisation and no reference.

    Parameters
        beta: scale of the average log-probability, > 0, per nat and token. Usual 2 to 10.
        gamma: target margin, >= 0. Usual 0.3 to 0.8 times beta.
        label_smoothing: e, the assumed share of flipped labels, in [0, 0.5), of pairs that say no confidence; 0 in the paper.

    Shapes
        in:  policy log-probs (pairs,) in nats, summed over scored tokens, counts (pairs,), and confidences (pairs,) where there
            are any; the reference is not read.
        out: term ``simpo`` (pairs,) nats, unit pair; rewards beta * log pi / T, (pairs,), detached, without gamma.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    Completions that are equally likely per token cost log(1 + e^gamma):

    >>> import torch
    >>> w, l, z = torch.tensor([-4.0]), torch.tensor([-2.0]), torch.zeros(1)
    >>> SimPO(beta=2.0, gamma=0.0)(PairLogps(w, l, z, z, torch.tensor([4]), torch.tensor([2]))).terms["simpo"].values
    tensor([0.6931])
    """

    beta: Annotated[float, Gt(0)] = 2.0
    gamma: Annotated[float, Ge(0)] = 1.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    needs_reference: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen = self.beta * logps.policy_chosen / logps.chosen_tokens
        rejected = self.beta * logps.policy_rejected / logps.rejected_tokens
        m = chosen - rejected - self.gamma
        e = flip_probability(logps, self.label_smoothing)
        terms = {"simpo": Term(-(1 - e) * functional.logsigmoid(m) - e * functional.logsigmoid(-m), "pair")}  # Eq. 6
        return LossTerms(terms, chosen.detach(), rejected.detach())
