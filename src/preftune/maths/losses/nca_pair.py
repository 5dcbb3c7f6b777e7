"""Noise-contrastive alignment of pairs: each completion's own likelihood matters, not only their difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt
from torch.nn import functional

from preftune.core.records import Need
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("nca_pair")
@dataclass(frozen=True, slots=True)
class NCAPair(BaseLoss):
    r"""Noise-contrastive alignment on pairs: which completion is better, and neither drifts far from the reference.

    For a prompt x with chosen y_w and rejected y_l, let r be the rewards

        r_w = beta [log pi(y_w|x) - log ref(y_w|x)],   r_l = beta [log pi(y_l|x) - log ref(y_l|x)]

        L = -(1 - e) log sigmoid(r_w) - e log sigmoid(r_l) - [log sigmoid(-r_w) + log sigmoid(-r_l)] / 2

    The NCA loss of Chen et al. 2024 (arXiv:2402.05369) for K = 2, where 1 - e and e are the softmax of the completions' scores;
    e = 0 is its pairwise form. A pair whose label came with a confidence c below 1 takes e = 1 - c. Gradients: dL/dr_w =
    sigmoid(r_w) / 2 - (1 - e) sigmoid(-r_w) and dL/dr_l = sigmoid(r_l) / 2 - e sigmoid(-r_l). With e = 0 the chosen reward is
    drawn to log 2, where the likelihood of DPO's chosen completion may fall without end.
    Where implementations disagree: nowhere; TRL and Liger have e = 0.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5.

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, and confidences (pairs,) where there are any.
        out: term ``nca_pair`` (pairs,) nats, unit pair; rewards r, (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range.
        UnknownName: built by name with an option that does not exist; ``divergence`` too, because the rewards are not read
            through their difference alone.

    At initialisation all rewards are 0 and the loss is 2 log 2:

    >>> import torch
    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> NCAPair()(PairLogps(z, z, z, z, n, n)).terms["nca_pair"].values
    tensor([1.3863])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = self.beta * logps.chosen_logratio, self.beta * logps.rejected_logratio
        e = flip_probability(logps)
        better = -(1 - e) * functional.logsigmoid(chosen) - e * functional.logsigmoid(rejected)
        noise = -0.5 * functional.logsigmoid(-chosen) - 0.5 * functional.logsigmoid(-rejected)
        return LossTerms({"nca_pair": Term(better + noise, "pair")}, chosen.detach(), rejected.detach())
