"""Binary classifier optimisation on pairs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, LossState, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("bco_pair")
@dataclass(frozen=True, slots=True)
class BCOPair(BaseLoss):
    r"""Binary classifier optimisation, on pairs: the reward is the logit of a classifier, shifted by its running mean.

    For a prompt x with chosen y_w and rejected y_l, let r be the reward of a completion and d the mean of all rewards so far

        r(y) = beta [log pi(y|x) - log ref(y|x)]
        d = [sum of r over both completions of every pair of this step and of all steps before it] / their number

        L(y_w, y_l) = -log sigmoid(r(y_w) - d) - log sigmoid(-(r(y_l) - d))

    A pair whose label came with a confidence c below 1 costs c L(y_w, y_l) + (1 - c) L(y_l, y_w), in no paper; d knows no labels.
    Jung et al. 2024 (arXiv:2404.04656): the binary cross entropy bounds DPO's loss from above, and the shift d, without a
    gradient, tightens the bound. Gradient: dL/dr(y_w) = -sigmoid(d - r(y_w)), dL/dr(y_l) = sigmoid(r(y_l) - d).
    Where implementations disagree: the d of the paper is (E[r(y_w)] + E[r(y_l)]) / 2, estimated while training; TRL took the
    mean over all batches seen until it dropped it, so its ``bco_pair`` is this loss at d = 0. Here d is that mean again; it is a
    state of the run, kept in the checkpoint, and contains the whole step before its loss is taken (two passes).

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.

    Shapes
        in:  four tensors of (pairs,) of the whole step, log-probs in nats summed over scored tokens, and confidences
            (pairs,) where there are any.
        out: term ``bco`` (pairs,) nats, unit pair; rewards r (pairs,), detached, without the shift.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.

    At initialisation r = d = 0 and each completion costs log 2; a mean reward of 1 moves the point that divides them:

    >>> import torch
    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> loss = BCOPair(beta=1.0)
    >>> loss(PairLogps(z, z, z, z, n, n)).terms["bco"].values
    tensor([1.3863])
    >>> loss.advance(loss.initial_state(), PairLogps(z + 2, z, z, z, n, n))
    {'mean': 1.0, 'count': 2.0}
    """

    beta: Annotated[float, Gt(0)] = 0.1
    shift: float = field(init=False, repr=False, default=0.0)  # d; ``at`` sets it
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})
    is_batchwise: ClassVar[bool] = True

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one step."""
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        up, down, e = chosen - self.shift, self.shift - rejected, flip_probability(logps)
        right = -functional.logsigmoid(up) - functional.logsigmoid(down)
        values = (1 - e) * right + e * (-functional.logsigmoid(-up) - functional.logsigmoid(-down))
        return LossTerms({"bco": Term(values, "pair")}, chosen.detach(), rejected.detach())

    def initial_state(self) -> LossState:
        """No reward seen yet."""
        return {"mean": 0.0, "count": 0.0}

    def advance(self, state: LossState, logps: PairLogps, /) -> LossState:
        """The mean over the rewards so far and those of this step."""
        rewards = self.beta * (logps.chosen_logratio + logps.rejected_logratio).detach().double()
        new = 2.0 * len(rewards)
        count = state["count"] + new
        return {"mean": state["mean"] + (rewards.sum().item() - new * state["mean"]) / count, "count": count}

    def at(self, state: LossState, /) -> BCOPair:
        """The loss with the mean put in."""
        moved = copy.copy(self)
        object.__setattr__(moved, "shift", state["mean"])
        return moved
