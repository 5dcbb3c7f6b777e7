"""The option ``--probe / --no-probe`` of the verbs that plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from preftune.app.probes import ProbeMode

probe_option = click.option(
    "--probe/--no-probe",
    "probe",
    default=None,
    help="Rehearse the largest packs for memory and time, and ask the model. [default: where it pays]",
)


def probe_mode(given: bool | None, default: ProbeMode) -> ProbeMode:
    """What the option means; ``default`` where it was not given."""
    return default if given is None else "on" if given else "off"
