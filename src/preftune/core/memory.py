"""The keys of a recipe that trade memory for time, and the arithmetic of the optimiser's state."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator

from preftune.core.section import Section

Checkpointing: TypeAlias = Literal["auto", "on", "off"]
Offloading: TypeAlias = Literal["off", "host", "disk"]


def _switch(value: Any) -> Any:
    """YAML reads on, off, yes, no and true as truth values."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


class MemoryOptions(Section):
    """What a stage keeps in memory while it trains.

    gradient_checkpointing: ``on`` keeps only the inputs of layers and computes the rest again in backward; ``auto`` does so
    where the largest pack would not fit otherwise. activation_offloading: where those inputs go until backward wants
    them: ``host``, the pinned memory of the machine (GPU only), or ``disk``, a file in the run's folder; implies
    checkpointing.
    """

    gradient_checkpointing: Annotated[Checkpointing, BeforeValidator(_switch)] = "auto"
    activation_offloading: Annotated[Offloading, BeforeValidator(_switch)] = "off"
