"""Identity preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Interval

from preftune.core.records import Need
from preftune.maths.divergence import Divergence, divergence_score, refuse_by_length
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("ipo")
@dataclass(frozen=True, slots=True)
class IPO(BaseLoss):
    r"""Identity preference optimisation: the margin is drawn to a fixed target, so it cannot grow without end.

    For a prompt x with chosen y_w and rejected y_l, let h be the difference of log-ratios, f' the score of the divergence (the
    identity for reverse_kl) and e the probability that the label is wrong

        h = f'(log pi(y_w|x) / ref(y_w|x)) / n_w - f'(log pi(y_l|x) / ref(y_l|x)) / n_l

        L = (1 - e) (h - 1 / (2 tau))^2 + e (h + 1 / (2 tau))^2

    n = 1, e = 0 is Eq. 17 of Azar et al. 2023 (arXiv:2310.12036). A pair whose label came with a confidence c below 1 takes
    e = 1 - c: the target is then (2c - 1) / (2 tau), which is what the paper's population form asks of a preference of
    probability c.
    Gradient: dL/dh = 2 (h - (1 - 2e) / (2 tau)).
    Where implementations disagree: the paper's h, and OpenRLHF's, is over whole completions; TRL and LLaMA-Factory divide
    each log-ratio by its completion's number of tokens, which the authors told them to do. Here the printed equation is
    the default and ``length_normalised`` sets n_w = T_w and n_l = T_l, which is TRL's ``loss_type="ipo"`` with its beta as
    tau; the target 1 / (2 tau) is then per token, so a tau that fits one form is far off for the other. TRL takes other
    divergences by length; what cancels in their derivation does not cancel there, so that is refused.

    Parameters
        tau: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.9; larger with ``length_normalised``.
        length_normalised: divide each log-ratio by its completion's own number of tokens.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, two counts of (pairs,), and confidences
            (pairs,) where there are any.
        out: term ``ipo`` (pairs,) nats squared, unit pair; rewards tau * f' (by length where it is on), detached.

    Raises
        UsageError: built by name with an option out of range, or with ``length_normalised`` beside another divergence than
            reverse_kl.
        UnknownName: built by name with an option that does not exist.

    At initialisation h = 0 and the loss is 1 / (2 tau)^2:

    >>> import torch
    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> IPO(tau=0.5)(PairLogps(z, z, z, z, n, n)).terms["ipo"].values
    tensor([1., 1.])
    """

    tau: Annotated[float, Gt(0)] = 0.1
    length_normalised: bool = False
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})

    def __post_init__(self) -> None:
        refuse_by_length("ipo", self.divergence, is_by_length=self.length_normalised)

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
        chosen = divergence_score(chosen, self.divergence, self.divergence_alpha)
        rejected = divergence_score(rejected, self.divergence, self.divergence_alpha)
        if self.length_normalised:
            chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
        h = chosen - rejected
        target, e = 1 / (2 * self.tau), flip_probability(logps)
        terms = {"ipo": Term((1 - e) * (h - target) ** 2 + e * (h + target) ** 2, "pair")}  # Eq. 17
        return LossTerms(terms, self.tau * chosen.detach(), self.tau * rejected.detach())
