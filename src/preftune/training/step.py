"""One optimiser step over the packs of a step, and the same arithmetic on held-out pairs.

Every term of a loss is divided by the number of its unit in the whole step, and that number is known before the first
backward pass. So how examples fall into packs changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from preftune.core.errors import NonFiniteLoss
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, pack_of
from preftune.maths.logps import pair_index, pairs_of, sum_by_completion
from preftune.maths.losses.base import Loss
from preftune.maths.metrics import PAIR_METRICS, pair_means, pair_sums, reduce_terms
from preftune.maths.types import LossTerms, PairLogps, SequenceLogps, Unit
from preftune.modeling.forward import Scorer
from preftune.training.optim import Optimiser

ReferenceScores: TypeAlias = Callable[[Pack], Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: a loss on the log-probabilities of a model.

    Parameters
        scorer: the policy. loss: what its log-probabilities cost.
        reference: log-probabilities of a pack's scored tokens under the reference, (targets,) on the model's device;
            None where the loss needs none.
    """

    scorer: Scorer
    loss: Loss
    reference: ReferenceScores | None

    def __call__(self, pack: Pack) -> tuple[LossTerms, PairLogps | SequenceLogps]:
        """Terms of a pack, and the view of its log-probabilities that gave them."""
        device = self.scorer.device
        segments, counts = (torch.from_numpy(array).to(device) for array in (pack.segments, pack.num_tokens))
        policy = sum_by_completion(self.scorer.token_logps(pack), segments, counts)
        if self.loss.view == "demonstrations":
            return self.loss(policy), policy
        frozen = None if self.reference is None else sum_by_completion(self.reference(pack), segments, counts)
        chosen, rejected = (index.to(device) for index in pair_index([len(group.completions) for group in pack.groups]))
        pairs = pairs_of(policy, frozen, chosen, rejected)
        return self.loss(pairs), pairs

    def sums(self, terms: LossTerms, logps: PairLogps | SequenceLogps) -> Tensor:
        """What a pack adds to the metrics, on its device; (metrics,), empty for demonstrations."""
        if isinstance(logps, PairLogps):
            return pair_sums(logps, terms)
        return torch.zeros(0, dtype=torch.float64, device=logps.logps.device)

    @property
    def num_sums(self) -> int:
        """Length of ``sums``."""
        return len(PAIR_METRICS) if self.loss.view == "pairs" else 0


def counts_of(packs: Sequence[Pack]) -> dict[Unit, int]:
    """How many of each unit the packs hold together: the normalisers of a step."""
    return {
        "pair": sum(pack.num_groups for pack in packs),
        "completion": sum(pack.num_completions for pack in packs),
        "token": sum(len(pack.targets) for pack in packs),
    }


def train_step(
    objective: Objective, packs: Sequence[Pack], optimiser: Optimiser, *, lr: float, max_grad_norm: float | None
) -> dict[str, float]:
    """Accumulate the packs' gradients, check them, step, and return the metrics (TRL's names).

    The host waits for the device once, when the loss and the norm are read before the optimiser moves anything.

    Raises
        NonFiniteLoss: the loss or a gradient is not finite; no weight has changed and the gradients are still there.
    """
    counts = counts_of(packs)
    losses: list[Tensor] = []
    sums: list[Tensor] = []
    for pack in packs:
        terms, logps = objective(pack)
        share = reduce_terms(terms, counts)
        share.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        losses.append(share.detach().double())
        sums.append(objective.sums(terms, logps))
    norm = optimiser.clip(max_grad_norm)
    read = torch.cat([torch.stack(losses).sum()[None], norm.double()[None], torch.stack(sums).sum(0)]).tolist()
    loss, grad_norm = read[0], read[1]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLoss(f"the loss is {loss:.6g} and the norm of its gradient {grad_norm:.6g}")
    optimiser.step(lr)
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": lr}
    return metrics | _means(objective, read[2:], counts)


def evaluate(objective: Objective, packs: Sequence[Pack]) -> dict[str, float]:
    """Exact held-out metrics with the prefix ``eval_``: one division at the end, never a mean of batch means.

    The graph is built and dropped: a forward pass without it takes other kernels, and in bfloat16 its log-probabilities
    would differ from the reference's, which were scored with it.
    """
    counts = counts_of(packs)
    losses, sums = [], []
    for pack in packs:
        terms, logps = objective(pack)
        losses.append(reduce_terms(terms, counts).detach().double())
        sums.append(objective.sums(terms, logps))
    read = torch.cat([torch.stack(losses).sum()[None], torch.stack(sums).sum(0)]).tolist()
    metrics = {"loss": read[0]} | _means(objective, read[1:], counts)
    return {f"eval_{name}": value for name, value in metrics.items()}


def find_culprits(objective: Objective, packs: Sequence[Pack], optimiser: Optimiser) -> list[tuple[TokenisedExample, str]]:
    """The examples whose own loss or gradient is not finite, each with what it gave. Gradients are dropped on the way.

    Slow (one pass for each example) and only for a run that is about to stop.
    """
    found: list[tuple[TokenisedExample, str]] = []
    for example in (example for pack in packs for example in pack.examples):
        optimiser.zero_grad()
        pack = pack_of([example])
        terms, _ = objective(pack)
        loss = reduce_terms(terms, counts_of([pack]))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        value, norm = loss.item(), optimiser.clip(None).item()
        if not math.isfinite(value):
            found.append((example, f"loss {value}"))
        elif not math.isfinite(norm):
            found.append((example, f"loss {value:.6g}, gradient norm {norm}"))
    optimiser.zero_grad()
    return found


def _means(objective: Objective, sums: Sequence[float], counts: Mapping[Unit, int]) -> dict[str, float]:
    return pair_means(sums, counts["pair"]) if objective.loss.view == "pairs" else {}
