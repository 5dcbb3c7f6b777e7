"""Length-desensitised DPO: tokens beyond the length of the shorter completion count less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term, TokenLogps


@losses.register("ld_dpo")
@dataclass(frozen=True, slots=True)
class LDDPO(BaseLoss):
    r"""Length-desensitised direct preference optimisation: the tail of the longer completion counts alpha times.

    For a prompt x with chosen y_w and rejected y_l of T_w and T_l scored tokens, let T = min(T_w, T_l), w_t the weight of the
    t-th token and r the weighted log-ratio

        w_t = 1 for t <= T, alpha beyond
        r(y) = sum over t of w_t [log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t)]

        L = -(1 - e) log sigmoid(beta [r(y_w) - r(y_l)]) - e log sigmoid(-beta [r(y_w) - r(y_l)])

    The modified likelihood of Liu et al. 2024 (LD-DPO, arXiv:2409.06411) in Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290);
    alpha = 1 is dpo. A pair whose label came with a confidence c below 1 takes e = 1 - c. Gradient on the log-probability of the
    t-th token of y_w: w_t beta [e - sigmoid(-beta (r(y_w) - r(y_l)))], and of y_l with the other sign.
    Where implementations disagree: TRL weights policy and reference alike, as the paper's derivation does and this loss;
    LLaMA-Factory and ms-swift weight the policy alone, so that at the start, where policy equals reference, their margin is not
    0. Rewards are those of the margin here; TRL's are too. ``logps/chosen`` in the metrics stays the whole completion's.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.
        alpha: weight of the tail, in [0, 1]; 0 leaves it out. Usual 0.3 to 0.6.
        label_smoothing: e, the assumed share of flipped labels, in [0, 0.5), of pairs that say no confidence.

    Shapes
        in:  single tokens of both sides (tokens,), nats, with the pair and the place of each; counts (pairs,), and confidences
            (pairs,) where there are any.
        out: term ``ld_dpo`` (pairs,) nats, unit pair; rewards beta r, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too: a weighted likelihood is no
            distribution to diverge from.
        ValueError: called without the single tokens.

    A chosen completion of 1 + 1 tokens beside a rejected one of 1: with alpha = 0 its second token does not count:

    >>> one, both = torch.tensor([0]), torch.tensor([0, 0])
    >>> chosen = TokenLogps(torch.tensor([-1.0, -9.0]), torch.tensor([-1.0, -2.0]), both, torch.tensor([0, 1]))
    >>> rejected = TokenLogps(torch.tensor([-3.0]), torch.tensor([-3.0]), one, one)
    >>> w, l, counts = torch.tensor([-10.0]), torch.tensor([-3.0]), (torch.tensor([2]), torch.tensor([1]))
    >>> logps = PairLogps(w, l, torch.tensor([-3.0]), l, *counts, chosen=chosen, rejected=rejected)
    >>> LDDPO(alpha=0.0)(logps).terms["ld_dpo"].values
    tensor([0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({"tokens", "confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        if logps.chosen is None or logps.rejected is None:
            raise ValueError("ld_dpo is given no log-probabilities of single tokens, and it weights them by their place")
        shared = torch.minimum(logps.chosen_tokens, logps.rejected_tokens)
        chosen, rejected = self.beta * self._logratio(logps.chosen, shared), self.beta * self._logratio(logps.rejected, shared)
        margins, e = chosen - rejected, flip_probability(logps, self.label_smoothing)
        values = -(1 - e) * functional.logsigmoid(margins) - e * functional.logsigmoid(-margins)
        return LossTerms({"ld_dpo": Term(values, "pair")}, chosen.detach(), rejected.detach())

    def _logratio(self, tokens: TokenLogps, shared: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """r of one side; summed in float64 and rounded once, as every sum over tokens is."""
        is_tail = tokens.places >= shared.index_select(0, tokens.segments)
        ratios = (tokens.policy - tokens.reference).double()
        weighted = ratios * torch.ones_like(ratios).masked_fill(is_tail, self.alpha)
        sums = torch.zeros(shared.shape[0], dtype=torch.float64, device=weighted.device).index_add(0, tokens.segments, weighted)
        return sums.to(tokens.policy.dtype)
