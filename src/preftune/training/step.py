"""One optimiser step over the packs of a step, and the same arithmetic on held-out examples.

Every term of a loss is divided by the number of its unit in the whole step, and that number is known before the first
backward pass. So how examples fall into packs changes nothing but rounding. A batchwise loss takes two passes: the
log-probabilities of all packs without a graph, the loss and its slopes on them all at once, then each pack again with
its slopes. It is exact, because dL/dweights = sum over tokens of dL/dlogp(token) * dlogp(token)/dweights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
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
from preftune.maths.metrics import PAIR_METRICS, UNPAIRED_METRICS, pair_sums, reduce_terms, unpaired_sums
from preftune.maths.types import LossTerms, PairLogps, UnpairedLogps
from preftune.modeling.forward import Scorer
from preftune.training.balance import Balance
from preftune.training.devices import sent
from preftune.training.optim import Optimiser
from preftune.training.spread import ONE, Spread
from preftune.training.tally import Tally, counts_of
from preftune.training.views import LossView, Mismatched, Scores, view_of

ReferenceScores: TypeAlias = Callable[[Pack], Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: a loss on the log-probabilities of a model.

    Parameters
        scorer: the policy. loss: what its log-probabilities cost.
        reference: log-probabilities of a pack's scored tokens under the reference, (targets,) on the model's device;
            None where the loss needs none.
        spread: how the model lies on several processes. Packs that are given are those of the whole step, on every rank.
        meet_reference: what the reference does on a rank that has no pack while others are scored: passes must meet where
            its weights are parted.
    """

    scorer: Scorer
    loss: Loss
    reference: ReferenceScores | None
    spread: Spread = ONE
    meet_reference: Callable[[Pack], None] | None = None

    def run(
        self,
        packs: Sequence[Pack],
        work: Callable[[int, Pack], None],
        *,
        has_backward: bool = False,
        is_bare: bool = False,
        is_policy_alone: bool = False,
    ) -> None:
        """Do the work with those of the packs that are this rank's, by their index.

        Where the rank has fewer than others it runs a pass that counts nothing, backward too with ``has_backward``.
        is_bare: the work scores completions alone, even for a loss that reads prompts. is_policy_alone: it asks no reference.
        """
        with_prompts = "prompt" in self.loss.needs and not is_bare
        for turn in self.spread.ranks.turns(packs):
            with self.spread.turn(self.scorer, turn, has_backward=has_backward):
                if turn.index is not None:
                    work(turn.index, turn.pack)
                    continue
                if self.meet_reference is not None and not is_policy_alone:
                    self.meet_reference(turn.pack)  # first, as in ``scores``
                idle = self.scorer.token_logps(turn.pack, with_prompts=with_prompts).sum() * 0
                if has_backward:
                    self.spread.backward(idle)

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
        # first, while nothing of the policy's graph takes memory
        reference = None if self.reference is None else self.reference(pack)
        if "concentration" in needs:
            policy, concentration = self.scorer.token_logps_and_concentration(pack, with_prompts="prompt" in needs)
            concentration = concentration[: len(pack.targets)]
        else:
            policy = self.scorer.token_logps(pack, with_prompts="prompt" in needs)
        prompts = policy[len(pack.targets) :] if "prompt" in needs else None
        return Scores(policy[: len(pack.targets)], reference, concentration, prompts)

    def mismatched(self, packs: Sequence[Pack]) -> Mismatched | None:
        """Log-probabilities of the partners of these packs, dropout off, without a graph; None if the loss needs none."""
        if "mismatched" not in self.loss.needs:
            return None
        was_training = self.scorer.model.training
        self.scorer.model.train(False)
        partners = [partner_pack(pack) for pack in packs]
        found: list[Tensor | None] = [None] * len(packs)
        frozen: list[Tensor | None] = [None] * len(packs)

        def score(index: int, pack: Pack) -> None:
            segments, counts = (sent(array, self.scorer.device) for array in (pack.segments, pack.num_tokens))
            if self.reference is not None:
                frozen[index] = sum_by_completion(self.reference(pack), segments, counts).logps
            found[index] = sum_by_completion(self.scorer.token_logps(pack), segments, counts).logps

        with torch.no_grad():
            self.run(partners, score, is_bare=True)
        self.scorer.model.train(was_training)
        sizes = [pack.num_completions for pack in partners]
        return Mismatched(self.joined(found, sizes), None if self.reference is None else self.joined(frozen, sizes))

    def joined(self, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
        """One vector from those of all packs, each of its size and held by the rank that ran it; the same on every rank."""
        found = self.spread.ranks.joined(parts, sizes, self.scorer.device)
        return found if self.spread.ranks.size == 1 or self.scorer.dtype == torch.float64 else found.float()

    def together(self, found: Sequence[Scores | None], packs: Sequence[Pack]) -> Scores:
        """The scores of all packs in one, without a graph."""
        targets = [len(pack.targets) for pack in packs]
        prompts = [sum(len(one.prompt_ids) - 1 for one in pack.examples) for pack in packs]

        def joined(name: str, sizes: Sequence[int]) -> Tensor:
            values = (None if one is None else getattr(one, name) for one in found)
            return self.joined([None if value is None else value.detach() for value in values], sizes)

        return Scores(
            joined("policy", targets),
            None if self.reference is None else joined("reference", targets),
            joined("concentration", targets) if "concentration" in self.loss.needs else None,
            joined("prompts", prompts) if "prompt" in self.loss.needs else None,
        )

    def sums(self, terms: LossTerms, logps: LossView) -> Tensor:
        """What a pack adds to the metrics, on its device; (metrics,), empty for demonstrations."""
        if isinstance(logps, PairLogps):
            return pair_sums(logps, terms)
        if isinstance(logps, UnpairedLogps):
            return unpaired_sums(logps, terms)
        return torch.zeros(0, dtype=torch.float64, device=logps.logps.device)

    def term_names(self, pack: Pack) -> tuple[str, ...]:
        """The names of the loss's terms, for a rank that has no pack of its own; ``pack`` is anyone's."""
        device = self.scorer.device
        low = torch.full((len(pack.targets),), -1.0, device=device)
        prompts = torch.full((sum(len(one.prompt_ids) - 1 for one in pack.examples),), -1.0, device=device)
        needs = self.loss.needs
        scores = Scores(low, low, low if "concentration" in needs else None, prompts if "prompt" in needs else None)
        partners = torch.full((pack.num_groups,), -1.0, device=device)
        mismatched = Mismatched(partners, partners) if "mismatched" in needs else None
        return tuple(self.loss(view_of(self.loss, [pack], scores, mismatched)).terms)

    @property
    def num_sums(self) -> int:
        """Length of ``sums``."""
        return {"pairs": len(PAIR_METRICS), "unpaired": len(UNPAIRED_METRICS), "demonstrations": 0}[self.loss.view]


def partner_pack(pack: Pack) -> Pack:
    """The prompts of a pack, each with its partner alone."""
    return pack_of([partner_group(example) for example in pack.examples])


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
    balance = Balance(objective, packs)
    if objective.loss.is_batchwise:
        state = _two_passes(objective, packs, mismatched, tally, state, balance)
    else:

        def learn(index: int, pack: Pack) -> None:
            with balance.pack(index):
                objective.spread.backward(tally.add(*objective(pack, mismatched), index))

        objective.run(packs, learn, has_backward=True)
    norm = optimiser.clip(max_grad_norm)
    metrics, (grad_norm, *aux) = tally.read(norm, *balance.values())
    if aux:
        metrics["aux_loss"] = aux[0]
        metrics["loss"] += objective.scorer.router_weight * aux[0]
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        raise NonFiniteLoss(f"the loss is {metrics['loss']:.6g} and the norm of its gradient {grad_norm:.6g}")
    optimiser.step(lr)
    if loss_state is not None:
        loss_state.update(state)
    if margins is not None:
        margins[:] = tally.margins
    return {"loss": metrics.pop("loss"), "grad_norm": grad_norm, "learning_rate": lr} | metrics


def _two_passes(
    objective: Objective,
    packs: Sequence[Pack],
    mismatched: Mismatched | None,
    tally: Tally,
    state: LossState,
    balance: Balance,
) -> LossState:
    """The gradients of a batchwise loss; the state that the step leads to.

    Dropout draws the same masks in both passes, because the generators are put back before each pack.
    """
    device, spread = objective.scorer.device, objective.spread
    generators: dict[int, list[Tensor]] = {}
    found: list[Scores | None] = [None] * len(packs)

    def look(index: int, pack: Pack) -> None:
        generators[index] = _generators(device)
        found[index] = objective.scores(pack)

    with torch.no_grad():
        objective.run(packs, look)
    whole = objective.together(found, packs)
    leaves = [leaf.requires_grad_() for leaf in (whole.policy, whole.prompts) if leaf is not None]
    terms, view, state = _whole(objective, packs, whole, mismatched, state)
    tally.add(terms, view, None).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    sizes = [[len(pack.targets) for pack in packs], [sum(len(one.prompt_ids) - 1 for one in pack.examples) for pack in packs]]
    split = [torch.split(slope, size) for slope, size in zip(slopes, sizes, strict=False)]

    def learn(index: int, pack: Pack) -> None:
        _put_back(device, generators[index])
        with balance.pack(index):
            logps = objective.scorer.token_logps(pack, with_prompts=whole.prompts is not None)
            spread.backward_from(logps, torch.cat([parts[index] for parts in split]))

    objective.run(packs, learn, has_backward=True, is_policy_alone=True)
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
        found: list[Scores | None] = [None] * len(packs)

        def look(index: int, pack: Pack) -> None:
            found[index] = _detached(objective.scores(pack))

        objective.run(packs, look)
        view = view_of(objective.loss, packs, objective.together(found, packs), mismatched)
        tally.add(objective.loss(view), view, None)
    else:

        def hold(index: int, pack: Pack) -> None:
            tally.add(*objective(pack, mismatched), index)

        objective.run(packs, hold)
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
