"""Direct preference optimisation and the variants that share its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Interval
from torch.nn import functional

from preftune.core.errors import UsageError
from preftune.core.records import Need, View
from preftune.maths.divergence import Divergence, divergence_score, refuse_by_length
from preftune.maths.labels import flip_probability
from preftune.maths.losses.base import losses
from preftune.maths.types import LossTerms, PairLogps, Term


@losses.register("dpo")
@dataclass(frozen=True, slots=True)
class DPO:
    r"""Direct preference optimisation, with label smoothing, length normalisation, an NLL term, and without a reference.

    For a prompt x with chosen y_w and rejected y_l, let h be the difference of log-ratios and T_w, T_l the numbers of
    scored tokens; f' is the score of the divergence, the identity for reverse_kl

        h = f'(log pi(y_w|x) / ref(y_w|x)) / n_w - f'(log pi(y_l|x) / ref(y_l|x)) / n_l

        L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) - rpo_alpha log pi(y_w|x) / T_w

    n = 1, e = 0, rpo_alpha = 0 is Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290); e > 0 is the conservative form of
    Mitchell 2023 (cDPO, Eq. 3), and a pair whose label came with a confidence c below 1 takes e = 1 - c, which is cDPO
    pair by pair; ``length_normalised`` sets n_w = T_w and n_l = T_l (Eq. 6 of Tulu 3, Lambert et al. 2024,
    arXiv:2411.15124); rpo_alpha > 0 adds the chosen completion's NLL by its own length (Eq. 1 and 2 of Pang et al. 2024,
    arXiv:2404.19733): that is RPO, which has no name of its own here. ``reference_free`` sets log ref = 0, the reference that
    gives every completion the same probability: CPO's preference term (Xu et al. 2024, arXiv:2401.08417) without its NLL, and no
    reference is scored. Other divergences are f-DPO (Wang et al. 2023, arXiv:2309.16240). Gradient: dL/dh =
    beta (e - sigmoid(-beta h)), times that of f' on a log-ratio (``maths.divergence``), and the NLL term adds -rpo_alpha / T_w
    on log pi(y_w|x).
    Where implementations disagree: TRL averages the NLL over the tokens of a micro-batch, the paper and this loss over
    each completion's own; TRL logs rewards without the lengths even where its loss divides by them, here the rewards
    are the two sides of the margin that is trained, so accuracy and loss speak of the same thing. TRL takes other divergences
    with the lengths too; what cancels in the derivation does not cancel by length, so that is refused.

    Parameters
        beta: strength of the pull to the reference, > 0, per nat. Usual 0.01 to 0.5; with ``length_normalised`` 2 to 10.
        label_smoothing: e, the assumed share of flipped labels, in [0, 0.5), of pairs that say no confidence.
        length_normalised: divide each log-ratio by its completion's own number of tokens.
        reference_free: leave the reference out.
        rpo_alpha: weight of the NLL term, >= 0, pair. Usual 0 (off) or 0.1 to 1.
        divergence, divergence_alpha: what anchors the policy, see ``maths.divergence``; alpha in (0, 1).

    Shapes
        in:  four tensors of (pairs,), log-probs in nats summed over scored tokens, two counts of (pairs,), and
            confidences (pairs,) where there are any.
        out: terms ``dpo`` and, where it is on, ``nll``, (pairs,) nats, unit pair; rewards (pairs,), detached.

    Raises
        UsageError: built by name with an option out of range, or with ``length_normalised`` or ``reference_free`` beside another
            divergence than reverse_kl.
        UnknownName: built by name with an option that does not exist.

    At initialisation policy == reference, so h = 0 and the loss is log 2:

    >>> import torch
    >>> z, n = torch.zeros(2), torch.ones(2, dtype=torch.int)
    >>> DPO(beta=0.1)(PairLogps(z, z, z, z, n, n)).terms["dpo"].values
    tensor([0.6931, 0.6931])
    """

    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0
    length_normalised: bool = False
    rpo_alpha: Annotated[float, Ge(0)] = 0.0
    reference_free: bool = False
    divergence: Divergence = "reverse_kl"
    divergence_alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    view: ClassVar[View] = "pairs"
    needs: ClassVar[frozenset[Need]] = frozenset({"confidence"})
    is_batchwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        refuse_by_length("dpo", self.divergence, is_by_length=self.length_normalised)
        if self.reference_free and self.divergence != "reverse_kl":
            raise UsageError(
                f"loss 'dpo', option 'divergence': {self.divergence} is a divergence from the reference, and reference_free "
                "leaves that out; set one of the two back"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed."""
        return not self.reference_free

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of one pack."""
        chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
        if self.reference_free:  # a part of a mix may need the reference all the same
            chosen, rejected = logps.policy_chosen, logps.policy_rejected
        chosen = divergence_score(chosen, self.divergence, self.divergence_alpha)
        rejected = divergence_score(rejected, self.divergence, self.divergence_alpha)
        if self.length_normalised:
            chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        margins = chosen_rewards - rejected_rewards  # beta h
        e = flip_probability(logps, self.label_smoothing)
        terms = {"dpo": Term(-(1 - e) * functional.logsigmoid(margins) - e * functional.logsigmoid(-margins), "pair")}
        if self.rpo_alpha > 0:
            terms["nll"] = Term(-self.rpo_alpha * logps.policy_chosen / logps.chosen_tokens, "pair")
        return LossTerms(terms, chosen_rewards.detach(), rejected_rewards.detach())
