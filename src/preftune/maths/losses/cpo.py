"""Contrastive preference optimisation: DPO with a uniform reference, beside imitation of the chosen completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Interval
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("cpo")
@dataclass(frozen=True, slots=True)
class CPO(BaseLoss):
    r"""Contrastive preference optimisation: DPO's margin without a reference, plus the NLL of the chosen completion.

    For a prompt x with chosen y_w and rejected y_l, let m be the margin and T the scored tokens of all chosen completions of a
    step

        m = beta [log pi(y_w|x) - log pi(y_l|x)]

        L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)   per pair,   - alpha log pi(y_w|x)   per token of T

    e = 0 is the final objective of Xu et al. 2024 (arXiv:2401.08417), its preference term plus its NLL; a pair whose label
    came with a confidence c below 1 takes e = 1 - c in the first term. Gradients: dL/dm = e - sigmoid(-m), and -alpha on log
    pi(y_w|x).
    Where implementations disagree: the paper writes the NLL as a sum over tokens; its authors' code and TRL average over the
    tokens of a micro-batch, here over those of the whole step, which is the same for one micro-batch. TRL's ``hinge`` and
    ``ipo`` forms of CPO are not offered; its ``simpo`` form is ``simpo`` in a mix with ``sft``.

    Parameters
        beta: scale of the log-probabilities, > 0, per nat. Usual 0.1.
        alpha: weight of the NLL, >= 0. Usual 1; 0 leaves it out.
        label_smoothing: e, the assumed share of flipped labels, in [0, 0.5), of pairs that say no confidence.

    Shapes
        in:  policy log-probs (pairs,) in nats, summed over scored tokens, and confidences (pairs,) where there are any; the
            reference is not read.
        out: terms ``cpo`` (pairs,) nats, unit pair, and, where it is on, ``nll`` (pairs,) nats, unit chosen_token, weight alpha;
            rewards beta log pi, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too: there is no reference to diverge from.

    Completions that are equally likely cost log 2, and the NLL beside it:

    >>> import torch
    >>> w, z, n = torch.tensor([-4.0]), torch.zeros(1), torch.tensor([4])
    >>> {name: float(term.values) for name, term in CPO()(PairLogps(w, w, z, z, n, n)).terms.items()}
    {'cpo': 0.6931471824645996, 'nll': 4.0}
    """

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Ge(0)] = 1.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    needs_reference: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = self.beta * logps.policy_chosen, self.beta * logps.policy_rejected
        margins, e = chosen - rejected, flip_probability(logps, self.label_smoothing)
        terms = {"cpo": Term(-(1 - e) * functional.logsigmoid(margins) - e * functional.logsigmoid(-margins), "pair")}
        if self.alpha > 0:
            terms["nll"] = Term(-logps.policy_chosen, "chosen_token", self.alpha)
        return LossTerms(terms, chosen.detach(), rejected.detach())
