"""Find the setting that fits into memory: smaller packs, checkpointing, bfloat16, offloading, adapters, in that order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.app.context import Context
from preftune.app.plan import plan, task_of
from preftune.app.probes import Probed, ProbeTask, limit_or_machine, probe
from preftune.app.recipes import save_recipe
from preftune.core.errors import PreftuneError, UsageError
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.recipe import Recipe

_GB = 1e9
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# a rehearsal is not the run: what is proposed leaves a tenth of the limit free
ROOM = 0.9


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting that was rehearsed: the changes so far, and the peak in bytes (None: it ran out of memory)."""

    changes: Mapping[str, Any]
    peak_bytes: int | None
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"changes": dict(self.changes), "peak_memory_bytes": self.peak_bytes, "fits": self.fits}

    def __str__(self) -> str:
        words = " ".join(f"{key}={_yaml(value)}" for key, value in self.changes.items()) or "as it is"
        peak = "ran out of memory" if self.peak_bytes is None else f"{self.peak_bytes / _GB:.2f} GB"
        return f"{words}: {peak}{', fits' if self.fits else ''}"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What was tried, in order; the last one fits, or nothing does."""

    limit_bytes: int
    trials: list[Trial]
    written: Path | None

    @property
    def fits(self) -> bool:
        """Whether a setting was found."""
        return self.trials[-1].fits

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        changes = dict(self.trials[-1].changes) if self.fits else None
        return {
            "limit_bytes": self.limit_bytes,
            "trials": [one.to_dict() for one in self.trials],
            "proposal": changes,
            "written": None if self.written is None else str(self.written),
        }

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = [f"limit {self.limit_bytes / _GB:.2f} GB, of which a tenth stays free", *map(str, self.trials)]
        if not self.fits:
            return [*lines, "nothing that preftune can set fits; use a smaller model or shorter rows (data.max_length)"]
        words = " ".join(f"{key}={_yaml(value)}" for key, value in self.trials[-1].changes.items())
        lines.append(f"proposal: {words}" if words else "it fits as it is")
        return lines if self.written is None else [*lines, f"written to {self.written}"]


def propose(
    recipe: Recipe,
    memory: int | None,
    write: Path | None = None,
    *,
    sink: EventSink = ignore,
    context: Context | None = None,
) -> Proposal:
    """Rehearse one setting after the other until one fits.

    Parameters
        memory: bytes that the run may take; None for what the machine has.
        write: where the recipe that fits goes.

    Raises
        Blocked: something else than memory is in the way.
        PreftuneError: how much memory the machine has is not known, or a stage's data are made in the run.
    """
    limit = limit_or_machine(memory)
    if limit is None:
        raise PreftuneError("how much memory this machine has is not known here; give it with --memory SIZE")
    made = plan(recipe, sink, context=context)
    made.refuse()
    unknown = [config.name for config, data in zip(recipe.stages, made.stages, strict=True) if not data.train]
    if unknown:
        raise PreftuneError(
            f"stage {unknown[0]} has no examples before the run makes them, so it cannot be rehearsed; "
            "make pairs with `preftune generate` and plan a recipe that trains on them"
        )
    task = task_of(made, context)
    room = int(ROOM * limit.num_bytes)
    trials: list[Trial] = []
    kept: dict[str, Any] = {}
    best: int | None = None
    for number, change in enumerate(_ladder(task)):
        sink(Progress("rehearsing settings", number, 0))
        changes = {**kept, **change}
        peak = _peak(_changed(task, changes))
        trials.append(Trial(changes, peak, peak is not None and peak <= room))
        if trials[-1].fits:
            break
        if best is None or (peak is not None and peak < best):  # what does not help is not kept
            kept, best = changes, peak
    written = None
    if trials[-1].fits and write is not None:
        save_recipe(changed_recipe(recipe, trials[-1].changes), write)
        written = write
    return Proposal(limit.num_bytes, trials, written)


def changed_recipe(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with these settings in every stage; ``model.dtype`` belongs to the model."""
    stage = {key: value for key, value in changes.items() if not key.startswith("model.")}
    model = {key.removeprefix("model."): value for key, value in changes.items() if key.startswith("model.")}
    stages = tuple(config.model_copy(update=stage) for config in recipe.stages)
    return recipe.model_copy(update={"stages": stages, "model": recipe.model.model_copy(update=model)})


def read_size(text: str) -> int:
    """Bytes of a size as people write it.

    >>> read_size("2GB"), read_size("512 MiB"), read_size("1.5g")
    (2000000000, 536870912, 1500000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--memory {text!r}: write a size such as 2GB, 512MiB or 1.5G")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _ladder(task: ProbeTask) -> Iterator[dict[str, Any]]:
    """The changes to try, one after the other: packs are halved down to the longest example."""
    from preftune.training.devices import choose_device

    yield {}
    stages = task.recipe.stages
    longest = max(one.num_tokens for train, select in task.data for one in (*train, *select))
    tokens = max(config.tokens_per_pack for config in stages)
    while tokens // 2 >= longest:
        tokens //= 2
        yield {"tokens_per_pack": tokens}
    if tokens > longest:
        yield {"tokens_per_pack": longest}
    if not all(config.gradient_checkpointing == "on" for config in stages):
        yield {"gradient_checkpointing": "on"}
    if task.recipe.model.dtype != "bfloat16":
        yield {"model.dtype": "bfloat16"}
    if all(config.activation_offloading == "off" for config in stages):
        yield {"activation_offloading": "host" if choose_device().type == "cuda" else "disk"}
    if any(config.adapter == "full" for config in stages):
        yield {"adapter": "lora"}


def _changed(task: ProbeTask, changes: Mapping[str, Any]) -> ProbeTask:
    recipe = changed_recipe(task.recipe, changes)
    dtype = recipe.model.dtype
    starts = [None if start is None else start.model_copy(update={"dtype": dtype}) for start in task.starts]
    return ProbeTask(recipe, task.data, starts, task.shapes, task.context)


def _peak(task: ProbeTask) -> int | None:
    found: Probed = probe(task, "on", None, is_memory_only=True)
    other = [one for one in found.findings if one.code == "dry_run_failed"]
    if other:
        raise PreftuneError(f"{other[0].fact}; {other[0].way_out}")
    return None if any(one.code == "out_of_memory" for one in found.findings) else found.peak_bytes


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
