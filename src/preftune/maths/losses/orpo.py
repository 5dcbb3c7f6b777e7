"""Odds-ratio preference optimisation: SFT and preference in one stage, no reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from preftune.core.records import Need, View
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import losses
from preftune.maths.types import LossTerms, PairLogps, Term


def log1mexp(x: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    """log(1 - e^x) for x < 0, exact to rounding at both ends (Maechler 2012); x within one rounding of 0 counts as that.

    >>> log1mexp(torch.tensor([-1e-6, -50.0], dtype=torch.float64)).exp()
    tensor([1.0000e-06, 1.0000e+00], dtype=torch.float64)
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_near = x > -math.log(2)
    # each branch is given a harmless value where the other one holds: where() would pass a NaN gradient on
    near, far = torch.where(is_near, x, -1.0), torch.where(is_near, -1.0, x)
    return torch.where(is_near, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


@losses.register("orpo")
@dataclass(frozen=True, slots=True)
class ORPO:
    r"""Odds-ratio preference optimisation: NLL of the chosen completion plus a log odds ratio, without a reference.

    For a prompt x with chosen y_w and rejected y_l of T_w and T_l scored tokens, let a be the average log-probability of a
    token and odds(y) = p / (1 - p) with p = e^a

        a(y) = log pi(y|x) / T
        o = a(y_w) - log(1 - e^a(y_w)) - a(y_l) + log(1 - e^a(y_l))

        L = -a(y_w) - lambda_or [(1 - e) log sigmoid(o) + e log sigmoid(-o)]

    e = 0 is Eq. 6 and 7 of Hong et al. 2024 (arXiv:2403.07691); a pair whose label came with a confidence c below 1 takes e = 1
    - c in the second term, while the first one imitates what was chosen. Gradient for e = 0: d log sigmoid(o) / da(y_w) =
    sigmoid(-o) / (1 - p_w), and for y_l the same with the other sign and p_l. Both parts come from one forward pass.
    Where implementations disagree: the NLL is over the answer, as in the paper and LLaMA-Factory, and by each completion's
    own length; TRL's is over prompt and answer, which ``nll_scope`` chooses, and averages the tokens of a micro-batch,
    which is this one for micro-batches of one pair. LLaMA-Factory forms log1p(-exp(a)), which loses its digits near a = 0;
    here both ends are exact.

    Parameters
        lambda_or: weight of the odds-ratio term, > 0; TRL calls it beta. Usual 0.05 to 0.25.
        nll_scope: ``answer``, or ``prompt_and_answer``: then the first term is
            -[log pi(x) + log pi(y_w|x)] / (T_x + T_w) with T_x tokens of the prompt behind its first one.

    Shapes
        in:  policy log-probs (pairs,) in nats, summed over scored tokens, counts (pairs,), and confidences (pairs,) where there
            are any; the reference is not read; the prompts' log-probs and counts (pairs,) for that scope.
        out: terms ``nll`` and ``odds_ratio`` (weight lambda_or), (pairs,) nats, unit pair; rewards lambda_or * a, detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist.
        ValueError: called without the prompts' log-probabilities where the scope is ``prompt_and_answer``.

    Equal averages have an odds ratio of 1, whose term is log 2:

    >>> w, l, z = torch.tensor([-4.0]), torch.tensor([-2.0]), torch.zeros(1)
    >>> out = ORPO()(PairLogps(w, l, z, z, torch.tensor([4]), torch.tensor([2])))
    >>> [round(float(out.terms[name].values), 4) for name in ("nll", "odds_ratio")]
    [1.0, 0.6931]
    """

    lambda_or: Annotated[float, Gt(0)] = 0.1
    nll_scope: Literal["answer", "prompt_and_answer"] = "answer"
    view: ClassVar[View] = "pairs"
    needs_reference: ClassVar[bool] = False
    is_batchwise: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        """Confidences; and the prompt's tokens, where the NLL counts them."""
        return frozenset({"confidence", "prompt"} if self.nll_scope == "prompt_and_answer" else {"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = logps.policy_chosen / logps.chosen_tokens, logps.policy_rejected / logps.rejected_tokens
        o = chosen - log1mexp(chosen) - (rejected - log1mexp(rejected))
        nll = -chosen
        if self.nll_scope == "prompt_and_answer":
            if logps.prompt is None:
                raise ValueError("orpo is given no log-probabilities of the prompts, and its NLL is over prompt and answer")
            nll = -(logps.prompt.logps + logps.policy_chosen) / (logps.prompt.num_tokens + logps.chosen_tokens)
        e = flip_probability(logps)
        odds = -(1 - e) * functional.logsigmoid(o) - e * functional.logsigmoid(-o)
        terms = {
            "nll": Term(nll, "pair"),  # Eq. 2, the paper's L_SFT
            "odds_ratio": Term(odds, "pair", self.lambda_or),  # Eq. 7
        }
        return LossTerms(terms, self.lambda_or * chosen.detach(), self.lambda_or * rejected.detach())
