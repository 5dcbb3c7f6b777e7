"""The loss contract: a frozen dataclass, pure, that returns named unreduced terms.

A loss never averages over the data, never looks at a model and holds no state. It derives from ``BaseLoss`` and declares

* ``view``, what it is called with: ``pairs`` (PairLogps), ``unpaired`` (UnpairedLogps) or ``demonstrations``
  (SequenceLogps: one completion a group);
* ``needs_reference``: whether the reference's log-probabilities are computed;
* ``needs``: what else it reads: ``tokens`` (per-token log-probabilities), ``concentration`` (log sum p^2 of each token),
  ``prompt`` (the policy's log-probability of the prompt's own tokens),
  ``ties`` (pairs without a winner are kept), ``confidence`` and ``strength`` of labels (always there; a stage counts the pairs
  whose own are not read), ``mismatched`` (completions of other prompts; every pack is given those of
  the whole step, because they are scored before the first pass);
* ``is_batchwise``: a term of one pair depends on other pairs of the step (a sorted margin, a running mean). Such a loss is
  called once with the whole step, gathered over packs and ranks, and its gradient is taken in a second pass. Held-out
  examples are one such batch.

The loop divides each term by the step's global count of its unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from preftune.core.records import Need, View
from preftune.core.registry import Registry
from preftune.maths.types import LossTerms

LossState: TypeAlias = Mapping[str, float]


@runtime_checkable
class Loss(Protocol):
    """What the loop calls."""

    view: ClassVar[View]

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed."""

    @property
    def needs(self) -> frozenset[Need]:
        """What else it reads."""

    @property
    def is_batchwise(self) -> bool:
        """Whether a term depends on other items of the step."""

    def __call__(self, logps: Any, /) -> LossTerms:
        """Terms of the loss for one pack, or for the whole step where it is batchwise."""


class BaseLoss:
    """Defaults of the declarations; a loss overrides those that differ."""

    __slots__ = ()

    view: ClassVar[View] = "pairs"
    needs_reference: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()
    is_batchwise: ClassVar[bool] = False


@runtime_checkable
class StatefulLoss(Protocol):
    """A batchwise loss with something to remember between steps, such as a running mean.

    The loop keeps the state in the checkpoint: before a step it asks for the state that the step's log-probabilities
    lead to, and then for the loss at that state. ``initial_state`` is what the first step starts from.
    """

    def initial_state(self) -> LossState:
        """The state before the first step."""

    def advance(self, state: LossState, logps: Any, /) -> LossState:
        """The state that a whole step leads to; nothing here has a gradient."""

    def at(self, state: LossState, /) -> Loss:
        """The loss with this state put in."""


@runtime_checkable
class DataAwareLoss(Protocol):
    """A loss of unpaired completions whose weights may follow from how many there are of each label."""

    def fitted(self, num_desirable: int, num_undesirable: int) -> Loss:
        """The loss for data with these counts."""

    def doubt(self, num_desirable: int, num_undesirable: int) -> str:
        """What is unusual about the weights of the fitted loss on such data, in a sentence; empty where nothing is."""


losses: Registry[Loss] = Registry("loss", "preftune.maths.losses", "preftune.losses")
