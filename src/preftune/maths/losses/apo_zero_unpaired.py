"""Anchored preference optimisation of completions that are each desirable or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from preftune.core.records import View
from preftune.maths.label_weights import Weight, doubt_weights, fitted_weights
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, Term, UnpairedLogps


@losses.register("apo_zero_unpaired")
@dataclass(frozen=True, slots=True)
class APOZeroUnpaired(BaseLoss):
    r"""Anchored preference optimisation (APO-zero), for single completions: KTO with its reference point held at zero.

    For a prompt x with completion y, let r be the log-ratio

        r = log pi(y|x) - log ref(y|x)

        L = lambda_d [1 - sigmoid(beta r)]    where y is desirable
        L = lambda_u sigmoid(beta r)          where it is not

    With weights of 1 these are the two terms of APO-zero of D'Oosterlinck et al. 2024 (arXiv:2408.06266), each on completions
    of its own. Gradient on r, with s = sigmoid(beta r): -lambda_d beta s (1 - s), and +lambda_u beta s (1 - s).
    Where implementations disagree: the paper has no weights; TRL multiplies by KTO's, and so does this loss, with the same
    ``auto``. Use it where the desirable completions are better than what the model writes: their likelihood rises, that of
    the undesirable ones falls, and no partner completions are scored.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        lambda_d, lambda_u: weights of desirable and undesirable completions, > 0, or ``auto``: the rarer label is weighted
            up until lambda_d n_d = lambda_u n_u, where n counts the completions of each label in the data.

    Shapes
        in:  policy and reference log-probs (completions,) in nats, summed over scored tokens, and labels (completions,).
        out: term ``apo`` (completions,), unit completion; rewards beta * r of the desirable and of the undesirable
            completions, detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.
        ValueError: called with ``auto`` weights that no data were fitted to.

    At initialisation r = 0 and every completion costs half its weight:

    >>> z, label = torch.zeros(2), torch.tensor([True, False])
    >>> x = UnpairedLogps(z, z, torch.ones(2, dtype=torch.int), label)
    >>> APOZeroUnpaired(lambda_d=1.2)(x).terms["apo"].values
    tensor([0.6000, 0.5000])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_d: Weight = 1.0
    lambda_u: Weight = 1.0
    view: ClassVar[View] = "unpaired"

    def __call__(self, logps: UnpairedLogps, /) -> LossTerms:
        """Terms of one pack."""
        if self.lambda_d == "auto" or self.lambda_u == "auto":
            raise ValueError("auto weights follow from the data: call fitted with the counts of both labels first")
        rewards = self.beta * logps.logratio
        desirable = logps.is_desirable
        signed = torch.where(desirable, -rewards, rewards)  # 1 - sigmoid(x) = sigmoid(-x)
        desired, undesired = torch.full_like(rewards, self.lambda_d), torch.full_like(rewards, self.lambda_u)
        terms = {"apo": Term(torch.where(desirable, desired, undesired) * torch.sigmoid(signed), "completion")}
        rewards = rewards.detach()
        return LossTerms(terms, rewards[desirable], rewards[~desirable])

    def fitted(self, num_desirable: int, num_undesirable: int) -> APOZeroUnpaired:
        """The loss with ``auto`` weights put to numbers for data with these counts."""
        d, u = fitted_weights(self.lambda_d, self.lambda_u, (num_desirable, num_undesirable))
        return replace(self, lambda_d=d, lambda_u=u)

    def doubt(self, num_desirable: int, num_undesirable: int) -> str:
        """What is unusual about the weights of the fitted loss on data with these counts; empty where nothing is."""
        return doubt_weights(self.lambda_d, self.lambda_u, (num_desirable, num_undesirable))
