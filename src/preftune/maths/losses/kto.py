"""Kahneman-Tversky optimisation: completions that are each desirable or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt

from preftune.core.records import Need, View
from preftune.maths.label_weights import Weight, doubt_weights, fitted_weights
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, Term, UnpairedLogps


@losses.register("kto")
@dataclass(frozen=True, slots=True)
class KTO(BaseLoss):
    r"""Kahneman-Tversky optimisation: a saturating gain or loss of each completion against a common reference point.

    For a prompt x with completion y, let r be the log-ratio and z0 the reference point

        r = log pi(y|x) - log ref(y|x)
        z0 = max(0, mean over the partners (x, y') of the step of log pi(y'|x) - log ref(y'|x)), detached

        L = lambda_d [1 - sigmoid(beta (r - z0))]    where y is desirable
        L = lambda_u [1 - sigmoid(beta (z0 - r))]    where it is not

    Eq. 8 of Ethayarajh et al. 2024 (arXiv:2402.01306), whose v is lambda - L. A partner y' is a completion of another
    prompt. With s = sigmoid of the bracket, the gradient on r is -lambda_d beta s (1 - s), and +lambda_u beta s (1 - s).
    Where implementations disagree: the paper and TRL take the partner from the neighbours in the batch, so TRL needs
    unshuffled batches of two or more and z0 is that of a micro-batch; here partners follow from the content of the data
    (docs/adr/0016) and z0 is the mean over the whole step, so order, batch size and accumulation change nothing.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        lambda_d, lambda_u: weights of desirable and undesirable completions, > 0, or ``auto``: the rarer label is weighted
            up until lambda_d n_d = lambda_u n_u, where n counts the completions of each label in the data. The paper keeps
            lambda_d n_d / (lambda_u n_u) in [1, 4/3]; weights outside it are warned about.

    Shapes
        in:  policy and reference log-probs (completions,) in nats, summed over scored tokens, labels (completions,), and
            mismatched log-probs (partners,) of the whole step.
        out: term ``kto`` (completions,), unit completion; rewards beta * r of the desirable and of the undesirable
            completions, detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.
        ValueError: called without mismatched log-probs, or with ``auto`` weights that no data were fitted to.

    At initialisation r = z0 = 0 and every completion costs half its weight:

    >>> z, label = torch.zeros(2), torch.tensor([True, False])
    >>> x = UnpairedLogps(z, z, torch.ones(2, dtype=torch.int), label, z, z)
    >>> KTO(lambda_d=1.2)(x).terms["kto"].values
    tensor([0.6000, 0.5000])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    lambda_d: Weight = 1.0
    lambda_u: Weight = 1.0
    view: ClassVar[View] = "unpaired"
    needs: ClassVar[frozenset[Need]] = frozenset({"mismatched"})

    def __call__(self, logps: UnpairedLogps, /) -> LossTerms:
        """Terms of one pack; the mismatched log-probabilities are those of the whole step."""
        if logps.mismatched_policy is None or logps.mismatched_reference is None:
            raise ValueError("kto is given no mismatched completions, and its reference point is their mean log-ratio")
        if self.lambda_d == "auto" or self.lambda_u == "auto":
            raise ValueError("auto weights follow from the data: call fitted with the counts of both labels first")
        z0 = (logps.mismatched_policy - logps.mismatched_reference).detach().mean().clamp(min=0)
        desirable = logps.is_desirable
        gain = torch.where(desirable, logps.logratio - z0, z0 - logps.logratio)
        desired, undesired = torch.full_like(gain, self.lambda_d), torch.full_like(gain, self.lambda_u)
        weight = torch.where(desirable, desired, undesired)
        terms = {"kto": Term(weight * torch.sigmoid(-self.beta * gain), "completion")}  # 1 - sigmoid(x) = sigmoid(-x)
        rewards = self.beta * logps.logratio.detach()
        return LossTerms(terms, rewards[desirable], rewards[~desirable])

    def fitted(self, num_desirable: int, num_undesirable: int) -> KTO:
        """The loss with ``auto`` weights put to numbers for data with these counts.

        >>> KTO(lambda_d="auto", lambda_u="auto").fitted(50, 200)
        KTO(beta=0.1, lambda_d=4.0, lambda_u=1.0)
        """
        d, u = fitted_weights(self.lambda_d, self.lambda_u, (num_desirable, num_undesirable))
        return replace(self, lambda_d=d, lambda_u=u)

    def doubt(self, num_desirable: int, num_undesirable: int) -> str:
        """What is unusual about the weights of the fitted loss on data with these counts; empty where nothing is."""
        return doubt_weights(self.lambda_d, self.lambda_u, (num_desirable, num_undesirable))
