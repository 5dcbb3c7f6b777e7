"""One optimiser step over the packs of a step, and the same arithmetic on held-out examples.

Every term of a loss is divided by the number of its unit in the whole step, and that number is known before the first
backward pass. So how examples fall into packs changes nothing but rounding. A batchwise loss takes two passes: the
log-probabilities of all packs without a graph, the loss and its slopes on them all at once, then each pack again with
its slopes. It is exact, because dL/dweights = sum over tokens of dL/dlogp(token) * dlogp(token)/dweights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from preftune.core.errors import NonFiniteLoss
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, pack_of
from preftune.data.partners import partner_group
from preftune.maths.logps import sum_by_completion
from preftune.maths.losses.base import Loss, LossState, StatefulLoss
from preftune.maths.metrics import (
    CHANGES,
    PAIR_METRICS,
    UNPAIRED_METRICS,
    pair_means,
    pair_sums,
    reduce_terms,
    term_shares,
    unpaired_means,
    unpaired_sums,
)
from preftune.maths.types import LossTerms, PairLogps, Unit, UnpairedLogps
from preftune.modeling.forward import Scorer
from preftune.training.optim import Optimiser
from preftune.training.views import LossView, Mismatched, Scores, view_of

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

    def __call__(self, pack: Pack, mismatched: Mismatched | None = None) -> tuple[LossTerms, LossView]:
        """Terms of a pack, and the view of its log-probabilities that gave them.

        mismatched: the partners of the whole step; the pack's own where they are not given and the loss needs them.
        """
        partners = self.mismatched([pack]) if mismatched is None else mismatched
        view = view_of(self.loss, [pack], self.scores(pack), partners)
        return self.loss(view), view

    def at(self, state: LossState) -> Objective:
        """The objective whose loss stands at this state; itself for a loss without one."""
        if not isinstance(self.loss, StatefulLoss):
            return self
        return replace(self, loss=self.loss.at(state or self.loss.initial_state()))

    def scores(self, pack: Pack) -> Scores:
        """Log-probabilities of a pack's scored tokens and what else the loss reads of them."""
        needs, concentration = self.loss.needs, None
        if "concentration" in needs:
            policy, concentration = self.scorer.token_logps_and_concentration(pack, with_prompts="prompt" in needs)
            concentration = concentration[: len(pack.targets)]
        else:
            policy = self.scorer.token_logps(pack, with_prompts="prompt" in needs)
        reference = None if self.reference is None else self.reference(pack)
        prompts = policy[len(pack.targets) :] if "prompt" in needs else None
        return Scores(policy[: len(pack.targets)], reference, concentration, prompts)

    def mismatched(self, packs: Sequence[Pack]) -> Mismatched | None:
        """Log-probabilities of the partners of these packs, dropout off, without a graph; None if the loss needs none."""
        if "mismatched" not in self.loss.needs:
            return None
        was_training = self.scorer.model.training
        self.scorer.model.train(False)
        found: list[Tensor] = []
        frozen: list[Tensor] = []
        with torch.no_grad():
            for pack in map(partner_pack, packs):
                segments, counts = (torch.from_numpy(array).to(self.scorer.device) for array in (pack.segments, pack.num_tokens))
                found.append(sum_by_completion(self.scorer.token_logps(pack), segments, counts).logps)
                if self.reference is not None:
                    frozen.append(sum_by_completion(self.reference(pack), segments, counts).logps)
        self.scorer.model.train(was_training)
        return Mismatched(torch.cat(found), torch.cat(frozen) if frozen else None)

    def sums(self, terms: LossTerms, logps: LossView) -> Tensor:
        """What a pack adds to the metrics, on its device; (metrics,), empty for demonstrations."""
        if isinstance(logps, PairLogps):
            return pair_sums(logps, terms)
        if isinstance(logps, UnpairedLogps):
            return unpaired_sums(logps, terms)
        return torch.zeros(0, dtype=torch.float64, device=logps.logps.device)

    @property
    def num_sums(self) -> int:
        """Length of ``sums``."""
        return {"pairs": len(PAIR_METRICS), "unpaired": len(UNPAIRED_METRICS), "demonstrations": 0}[self.loss.view]


def partner_pack(pack: Pack) -> Pack:
    """The prompts of a pack, each with its partner alone."""
    return pack_of([partner_group(example) for example in pack.examples])


def counts_of(packs: Sequence[Pack]) -> dict[Unit, int]:
    """How many of each unit the packs hold together: the normalisers of a step."""
    examples = [example for pack in packs for example in pack.examples]
    return {
        "pair": sum(pack.num_groups for pack in packs),
        "completion": sum(pack.num_completions for pack in packs),
        "token": sum(len(pack.targets) for pack in packs),
        "chosen_token": sum(example.completions[0].num_scored for example in examples),
    }


class Tally:
    """What the packs of a step add up to, kept on the device until it is read once."""

    def __init__(self, objective: Objective, packs: Sequence[Pack], mismatched: Mismatched | None) -> None:
        self.counts = counts_of(packs)
        self._objective = objective
        self._mismatched = mismatched
        labels = [label for pack in packs for example in pack.examples for label in example.labels]
        self._num_desirable, self._num_undesirable = sum(labels), len(labels) - sum(labels)
        self._names: tuple[str, ...] = ()
        self._losses: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._margins: list[Tensor] = []
        self.margins: list[float] = []  # of every pair in the order of the packs, once read

    def add(self, terms: LossTerms, logps: LossView) -> Tensor:
        """Note the terms of a pack; its share of the step's loss, with its graph."""
        share = reduce_terms(terms, self.counts)
        self._names = tuple(terms.terms)
        self._losses.append(share.detach().double())
        self._shares.append(term_shares(terms, self.counts))
        self._sums.append(self._objective.sums(terms, logps))
        if isinstance(logps, PairLogps) and terms.chosen_rewards is not None and terms.rejected_rewards is not None:
            self._margins.append((terms.chosen_rewards - terms.rejected_rewards).detach().double())
        return share

    def read(self, *others: Tensor) -> tuple[dict[str, float], list[float]]:
        """The metrics, and the values of other scalars; the host waits for the device here and nowhere else."""
        shares, sums = torch.stack(self._shares).sum(0), torch.stack(self._sums).sum(0)
        extra = list(others) + ([] if self._mismatched is None else [self._mismatched.divergence])
        margins = torch.cat(self._margins) if self._margins else sums.new_zeros(0)
        first = [margins, torch.stack(self._losses).sum()[None], shares, sums]
        values = torch.cat([*first, *(one.double().reshape(1) for one in extra)]).tolist()
        self.margins, values = values[: len(margins)], values[len(margins) :]
        loss, rest = values[0], values[1:]
        at = len(self._names)
        metrics = {"loss": loss}
        if at > 1:
            metrics |= {f"loss/{name}": value for name, value in zip(self._names, rest[:at], strict=True)}
        metrics |= self._means(rest[at : at + len(sums)])
        read = rest[at + len(sums) :]
        if self._mismatched is not None:
            metrics["kl"] = read.pop()
        return metrics, read

    def _means(self, sums: Sequence[float]) -> Mapping[str, float]:
        view = self._objective.loss.view
        if view == "pairs":
            means = pair_means(sums, self.counts["pair"])
            has_reference = self._objective.reference is not None
            return means if has_reference else {name: value for name, value in means.items() if name not in CHANGES}
        return unpaired_means(sums, self._num_desirable, self._num_undesirable) if view == "unpaired" else {}


def train_step(
    objective: Objective,
    packs: Sequence[Pack],
    optimiser: Optimiser,
    *,
    lr: float,
    max_grad_norm: float | None,
    loss_state: MutableMapping[str, float] | None = None,
    margins: list[float] | None = None,
) -> dict[str, float]:
    """Accumulate the packs' gradients, check them, step, and return the metrics (TRL's names).

    The host waits for the device once, when the loss and the norm are read before the optimiser moves anything.

    Parameters
        loss_state: of a stateful loss; changed in place once the step is taken.
        margins: filled with the margin of every pair before this update, in the order of the packs.

    Raises
        NonFiniteLoss: the loss or a gradient is not finite; no weight has changed and the gradients are still there.
    """
    mismatched = objective.mismatched(packs)
    tally = Tally(objective, packs, mismatched)
    state: LossState = loss_state or {}
    if objective.loss.is_batchwise:
        state = _two_passes(objective, packs, mismatched, tally, state)
    else:
        for pack in packs:
            tally.add(*objective(pack, mismatched)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    norm = optimiser.clip(max_grad_norm)
    metrics, (grad_norm,) = tally.read(norm)
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        raise NonFiniteLoss(f"the loss is {metrics['loss']:.6g} and the norm of its gradient {grad_norm:.6g}")
    optimiser.step(lr)
    if loss_state is not None:
        loss_state.update(state)
    if margins is not None:
        margins[:] = tally.margins
    return {"loss": metrics.pop("loss"), "grad_norm": grad_norm, "learning_rate": lr} | metrics


def _two_passes(
    objective: Objective, packs: Sequence[Pack], mismatched: Mismatched | None, tally: Tally, state: LossState
) -> LossState:
    """The gradients of a batchwise loss; the state that the step leads to.

    Dropout draws the same masks in both passes, because the generators are put back before each pack.
    """
    device = objective.scorer.device
    generators: list[list[Tensor]] = []
    found: list[Scores] = []
    for pack in packs:
        generators.append(_generators(device))
        with torch.no_grad():
            found.append(objective.scores(pack))
    whole = _together(found)
    leaves = [leaf.requires_grad_() for leaf in (whole.policy, whole.prompts) if leaf is not None]
    terms, view, state = _whole(objective, packs, whole, mismatched, state)
    tally.add(terms, view).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    sizes = [[len(one.policy) for one in found], [0 if one.prompts is None else len(one.prompts) for one in found]]
    split = [torch.split(slope, size) for slope, size in zip(slopes, sizes, strict=False)]
    for pack, before, *parts in zip(packs, generators, *split, strict=True):
        _put_back(device, before)
        logps = objective.scorer.token_logps(pack, with_prompts=whole.prompts is not None)
        logps.backward(torch.cat(parts))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return state


def _whole(
    objective: Objective, packs: Sequence[Pack], scores: Scores, mismatched: Mismatched | None, state: LossState
) -> tuple[LossTerms, LossView, LossState]:
    """A batchwise loss on the whole step: its terms, their view, and the state that it leads to."""
    view = view_of(objective.loss, packs, scores, mismatched)
    loss = objective.loss
    if isinstance(loss, StatefulLoss):
        with torch.no_grad():
            state = loss.advance(state or loss.initial_state(), view)
        loss = loss.at(state)
    return loss(view), view, state


def evaluate(objective: Objective, packs: Sequence[Pack]) -> dict[str, float]:
    """Exact held-out metrics with the prefix ``eval_``: one division at the end, never a mean of batch means.

    A batchwise loss sees all held-out examples as one batch, and a stateful one stands where ``Objective.at`` put it.
    The graph is built and dropped: a forward pass without it takes other kernels, and in bfloat16 its log-probabilities
    would differ from the reference's, which were scored with it.
    """
    mismatched = objective.mismatched(packs)
    tally = Tally(objective, packs, mismatched)
    if objective.loss.is_batchwise:
        scores = _together([_detached(objective.scores(pack)) for pack in packs])
        view = view_of(objective.loss, packs, scores, mismatched)
        tally.add(objective.loss(view), view)
    else:
        for pack in packs:
            tally.add(*objective(pack, mismatched))
    metrics, _ = tally.read()
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


def _together(found: Sequence[Scores]) -> Scores:
    """The scores of all packs in one."""

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known) if known else None

    return Scores(
        torch.cat([one.policy for one in found]),
        joined([one.reference for one in found]),
        joined([one.concentration for one in found]),
        joined([one.prompts for one in found]),
    )


def _detached(scores: Scores) -> Scores:
    prompts = None if scores.prompts is None else scores.prompts.detach()
    return replace(scores, policy=scores.policy.detach(), prompts=prompts)


def _generators(device: torch.device) -> list[Tensor]:
    """The state of the generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _put_back(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
