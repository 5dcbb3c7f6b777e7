"""What a Python caller hands to a run: a loss, and functions that are told its events and may end a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from preftune.core.events import Event, EventSink, Noted, StageStarted, Stop

if TYPE_CHECKING:
    from preftune.core.recipe import StageConfig
    from preftune.maths.losses.base import Loss

Callback: TypeAlias = Callable[[Event], object]


class Hooks:
    """A loss and callbacks for one run.

    A callback is called with every event, in the order given. Where it returns ``Stop(reason)``, the stage ends after the
    step at hand as early stopping would end it: its model is saved and the next stage goes on. One that raises is told as a
    warning and not called again: the run is worth more than what watches it.
    """

    def __init__(self, loss: object = None, callbacks: Sequence[Callback] = ()) -> None:
        self._loss = loss
        self._callbacks = list(callbacks)
        self._reason = ""

    def loss_for(self, config: StageConfig) -> Loss | None:
        """The loss of a stage, None for that which its method names; UsageError where it is none."""
        if self._loss is None:
            return None
        from preftune.training.passed import passed_loss

        return passed_loss(self._loss, config.method)

    def stop_reason(self) -> str:
        """Why the stage is to end, or the empty string."""
        return self._reason

    def telling(self, sink: EventSink) -> EventSink:
        """The sink, and every callback after it."""

        def tell(event: Event, /) -> None:
            """Hand an event on, and see where a stage starts and what it did."""
            sink(event)
            if isinstance(event, StageStarted):
                self._reason = ""
            for callback in list(self._callbacks):
                name = getattr(callback, "__name__", type(callback).__name__)
                try:
                    answer = callback(event)
                except Exception as error:  # noqa: BLE001 - whatever a caller's code raises
                    self._callbacks.remove(callback)
                    what = f"callback {name} failed on {type(event).__name__}: {type(error).__name__}: {error}"
                    sink(Noted("warning", "callback_failed", f"{what}; it is not called again"))
                    continue
                if isinstance(answer, Stop):
                    self._reason = f"callback {name}: {answer.reason}"

        return tell
