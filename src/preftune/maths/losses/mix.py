"""A weighted sum of losses over pairs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from preftune.core.errors import UsageError
from preftune.core.records import Need, View
from preftune.maths.losses.base import Loss, LossState, StatefulLoss, losses
from preftune.maths.types import LossTerms, PairLogps, SequenceLogps, Term, Unit


@dataclass(frozen=True, slots=True)
class Part:
    """One loss of a mix: its name, its weight and itself."""

    name: str
    weight: float
    loss: Loss


@losses.register("mix")
@dataclass(frozen=True, slots=True)
class Mix:
    r"""Mixed preference optimisation: a weighted sum of losses over the same pairs.

    For parts k with weights w_k and losses L_k

        L = sum over k of w_k L_k

    Eq. 1 of Wang et al. 2024 (MPO, arXiv:2411.10442), there with dpo, bco_pair and sft. The gradient is the weighted sum of
    theirs. A part over demonstrations (``sft``) takes the chosen completion, and its tokens are counted over the step.
    Where implementations disagree: TRL averages the SFT part over the tokens of a micro-batch; here every part is divided
    by its own count of the whole step.

    Parameters
        parts: for each loss by name its options and its ``weight`` (1 where it is not given), such as
            ``{dpo: {weight: 0.8, beta: 0.1}, sft: {weight: 0.2}}``.

    Shapes
        in:  the pairs view, with whatever the parts read.
        out: the terms of every part, named by it (``PART/TERM`` where a part has several), each with its weight; rewards
            of the first part that has them.

    Raises
        UsageError: no parts, a weight that is no positive number, a part over unpaired completions, a mix in a mix, no part
            over pairs, or parts of which some take ties and some do not.
        UnknownName: a part or an option that does not exist.

    Equal pairs cost DPO log 2, and the NLL of the chosen tokens beside it:

    >>> import torch
    >>> z, n = torch.zeros(1), torch.ones(1, dtype=torch.int)
    >>> out = Mix({"dpo": {"weight": 0.8}, "sft": {"weight": 0.2}})(PairLogps(z - 3, z, z - 3, z, n, n))
    >>> {name: (round(float(term.values), 4), term.weight, term.unit) for name, term in out.terms.items()}
    {'dpo': (0.6931, 0.8, 'pair'), 'sft': (3.0, 0.2, 'chosen_token')}
    """

    parts: Mapping[str, Mapping[str, Any]]
    built: tuple[Part, ...] = field(init=False, repr=False, compare=False)
    view: ClassVar[View] = "pairs"

    def __post_init__(self) -> None:
        object.__setattr__(self, "built", tuple(_part(name, options) for name, options in self.parts.items()))
        if not any(part.loss.view == "pairs" for part in self.built):
            raise UsageError("loss 'mix', option 'parts': name at least one loss over pairs, such as parts: {dpo: {weight: 1}}")
        takers = {"ties" in part.loss.needs for part in self.built if part.loss.view == "pairs"}
        if len(takers) > 1:
            raise UsageError("loss 'mix', option 'parts': some of them learn from ties and others cannot; mix one kind")

    @property
    def needs_reference(self) -> bool:
        """Whether any part needs it."""
        return any(part.loss.needs_reference for part in self.built)

    @property
    def needs(self) -> frozenset[Need]:
        """What any part reads."""
        return frozenset[Need]().union(*(part.loss.needs for part in self.built))

    @property
    def is_batchwise(self) -> bool:
        """Whether any part is."""
        return any(part.loss.is_batchwise for part in self.built)

    def __call__(self, logps: PairLogps, /) -> LossTerms:
        """Terms of all parts."""
        terms: dict[str, Term] = {}
        rewarding: LossTerms | None = None
        for part in self.built:
            out = part.loss(_view(part, logps))
            for name, term in out.terms.items():
                label = part.name if len(out.terms) == 1 else f"{part.name}/{name}"
                unit: Unit = "chosen_token" if term.unit == "token" else term.unit
                terms[label] = Term(term.values, unit, part.weight * term.weight)
            if rewarding is None and out.chosen_rewards is not None:
                rewarding = out
        if rewarding is None:
            return LossTerms(terms)
        return LossTerms(terms, rewarding.chosen_rewards, rewarding.rejected_rewards)

    def initial_state(self) -> LossState:
        """The states of the parts that have one, as ``PART/NAME``."""
        found: dict[str, float] = {}
        for part in self.built:
            if isinstance(part.loss, StatefulLoss):
                found |= {f"{part.name}/{name}": value for name, value in part.loss.initial_state().items()}
        return found

    def advance(self, state: LossState, logps: PairLogps, /) -> LossState:
        """The states that a whole step leads to."""
        found: dict[str, float] = {}
        for part in self.built:
            if isinstance(part.loss, StatefulLoss):
                after = part.loss.advance(_own(state, part.name), logps)
                found |= {f"{part.name}/{name}": value for name, value in after.items()}
        return found

    def at(self, state: LossState, /) -> Mix:
        """The mix with every part at its state."""
        if not state:
            return self
        moved = copy.copy(self)
        parts = tuple(
            Part(part.name, part.weight, part.loss.at(_own(state, part.name))) if isinstance(part.loss, StatefulLoss) else part
            for part in self.built
        )
        object.__setattr__(moved, "built", parts)
        return moved


def _part(name: str, options: Mapping[str, Any]) -> Part:
    given = dict(options)
    weight = given.pop("weight", 1.0)
    where = f"loss 'mix', option 'parts.{name}"
    if name == "mix":
        raise UsageError("loss 'mix', option 'parts': a mix has no mix in it; name its losses one beside the other")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UsageError(f"{where}.weight': write a number above 0, got {weight!r}")
    loss = losses.build(name, given)
    if loss.view == "unpaired":
        raise UsageError(f"{where}': it takes single completions with labels, and a mix takes pairs")
    return Part(name, float(weight), loss)


def _view(part: Part, logps: PairLogps) -> PairLogps | SequenceLogps:
    if part.loss.view == "demonstrations":
        return SequenceLogps(logps.policy_chosen, logps.chosen_tokens)
    return logps


def _own(state: LossState, name: str) -> LossState:
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
