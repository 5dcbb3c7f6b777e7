"""Weighted preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.logps import sum_by_completion
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term, TokenLogps


@losses.register("wpo")
@dataclass(frozen=True, slots=True)
class WPO(BaseLoss):
    r"""Weighted preference optimisation: DPO in which a pair counts as much as the policy would write its completions.

    For a prompt x with chosen y_w and rejected y_l, let h be the difference of log-ratios and w(y) the weight of a completion
    of T scored tokens, where v runs over the vocabulary

        h = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]
        w(y) = exp( 1/T sum over t of [log pi(y_t|x, y_<t) - log sum over v of pi(v|x, y_<t)^2] ), detached

        L = -w(y_w) w(y_l) [(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)]

    e = 0, and e = 1 - c for a pair whose label came with a confidence c below 1: the expectation over the label, in no paper.
    The weighted DPO loss of Zhou et al. 2024 (arXiv:2406.11827) with weights by its sampled alignment: the sum of squares is the
    probability that a token drawn from the policy has on average, so completions of the policy's own weigh about 1. Gradient:
    dL/dh = w(y_w) w(y_l) beta [e - sigmoid(-beta h)]; the weights have none.
    Where implementations disagree: TRL's ``use_weighting`` multiplies any of its losses, a mix included; the paper's objective,
    and this loss, is DPO.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and the single tokens of both sides with
            their concentration log sum p^2, (tokens,) nats; confidences (pairs,) where there are any.
        out: term ``wpo`` (pairs,) nats, unit pair (the weights do not add up to the number of pairs); rewards beta *
            log-ratio (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.
        ValueError: called without the tokens or their concentration.

    A token of probability 1/2 where the policy hesitates between two has weight (1/2) / (1/2) = 1:

    >>> import torch
    >>> z, n, half = torch.zeros(1), torch.ones(1, dtype=torch.int), torch.tensor([0.5]).log()
    >>> token = TokenLogps(half, half, torch.tensor([0]), torch.tensor([0]), concentration=half)
    >>> WPO()(PairLogps(half, half, half, half, n, n, chosen=token, rejected=token)).terms["wpo"].values
    tensor([0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    needs: ClassVar[frozenset[Need]] = frozenset({"concentration", "confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        weights = _weight(logps.chosen, logps.chosen_tokens) * _weight(logps.rejected, logps.rejected_tokens)
        margins, e = chosen - rejected, flip_probability(logps)
        values = -weights * ((1 - e) * functional.logsigmoid(margins) + e * functional.logsigmoid(-margins))
        return LossTerms({"wpo": Term(values, "pair")}, chosen.detach(), rejected.detach())


def _weight(tokens: TokenLogps | None, num_tokens: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    if tokens is None or tokens.concentration is None:
        raise ValueError("wpo is given no concentration of single tokens, and its weights follow from it")
    aligned = (tokens.policy - tokens.concentration).detach()
    return (sum_by_completion(aligned, tokens.segments, num_tokens).logps / num_tokens).exp()
