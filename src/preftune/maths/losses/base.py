"""The loss contract: a frozen dataclass, pure, that returns named unreduced terms.

A loss never averages, never looks at a model and holds no state. It declares the view that it takes:

* ``pairs``: ``__call__(PairLogps) -> LossTerms``
* ``demonstrations``: ``__call__(SequenceLogps) -> LossTerms`` (SFT: one completion a group)

and whether it needs the reference. The loop divides each term by the step's global count of its unit.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

from preftune.core.registry import Registry
from preftune.maths.types import LossTerms


class Loss(Protocol):
    """What the loop calls."""

    view: ClassVar[Literal["pairs", "demonstrations"]]
    needs_reference: ClassVar[bool]

    def __call__(self, logps: Any, /) -> LossTerms:
        """Terms of the loss for one pack."""


losses: Registry[Loss] = Registry("loss", "preftune.maths.losses", "preftune.losses")
