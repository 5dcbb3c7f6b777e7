"""The next steps' packs and reference scores, prepared by a thread while the model works on this one.

Which examples a step sees follows from its number alone (``training.order``), and laying them out draws nothing at random,
so what is prepared early is what would be prepared late. Where a run stands is counted by the steps that were taken, never
by those that are prepared: a resumed run prepares again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preftune.data.pack import Pack
from preftune.training.devices import sent
from preftune.training.prepare import Trainee
from preftune.training.reference import CachedReference
from preftune.training.state import StagePlan
from preftune.training.step import Objective, ReferenceScores

DEPTH = 2
"""Steps that are prepared before they are asked for; 0 prepares each when it is asked for, without a thread."""

Numpy = TypeVar("Numpy", bound=np.generic)


class Prepared(NamedTuple):
    """What one step needs.

    Parameters
        packs: the same on every rank. objective: reads the reference's scores of these packs from memory.
    """

    packs: list[Pack]
    objective: Objective


@dataclass(frozen=True, slots=True)
class _Held:
    """Reference scores by pack, and where those of any other pack come from (KTO's partners are packed in the step)."""

    device: torch.device
    others: ReferenceScores
    values: Mapping[Pack, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, pack: Pack) -> Tensor:
        values = self.values.get(pack)
        return self.others(pack) if values is None else sent(values, self.device)


class Ahead:
    """The steps of a stage in their order, at most ``DEPTH`` of them prepared before they are asked for.

    Use as a context manager: the thread ends with the block, however that ends.

    Parameters
        prepare: what a step needs, by its number; called by one thread, for one step after the other.
        step, end: the first step, and the one behind the last.
        enter: called first in the thread, such as to choose its device.
    """

    def __init__(
        self, prepare: Callable[[int], Prepared], step: int, end: int, *, enter: Callable[[], None] = lambda: None
    ) -> None:
        self._prepare, self._enter, self._end, self._depth = prepare, enter, end, DEPTH
        self._next = step  # the step that is asked for next
        self._ready: deque[Prepared | BaseException] = deque()
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(step,), name="preftune-ahead", daemon=True)

    def __enter__(self) -> Self:
        if self._depth:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._changed:
            self._is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def take(self, step: int) -> Prepared:
        """What this step needs, waiting for it where it is not there yet; steps are asked for one after the other.

        Raises
            Exception: whatever preparing this step raised, from where it was raised.
        """
        if step != self._next:
            raise ValueError(f"step {step} was asked for and {self._next} is next")
        self._next += 1
        if not self._depth:
            return self._prepare(step)
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_closed)
            if not self._ready:
                raise ValueError(f"step {step} was asked for after the end")
            found = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self, step: int) -> None:
        is_first = True
        for number in range(step, self._end):
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._is_closed)
                if self._is_closed:
                    return
            found: Prepared | BaseException
            try:
                if is_first:
                    self._enter()
                    is_first = False
                found = self._prepare(number)
            except BaseException as error:  # noqa: BLE001 -- the thread that asks for this step raises it
                found = error
            with self._changed:
                self._ready.append(found)
                self._changed.notify_all()
            if isinstance(found, BaseException):
                return


def ahead_of(stage: StagePlan, trainee: Trainee, step: int) -> Ahead:
    """The steps of a stage from this one on. On CUDA their arrays lie in pinned memory, from where copying waits for nobody."""
    device, reference = trainee.device, trainee.reference

    def prepare(number: int) -> Prepared:
        examples = [stage.train[index] for index in trainee.order.indices(number)]
        packs = [pinned(pack, device) for pack in stage.ranks.packs(examples, stage.config.tokens_per_pack)]
        if not isinstance(reference, CachedReference):
            return Prepared(packs, trainee.objective)
        values = {pack: _in_reach(reference.values(pack), device) for pack in packs}
        return Prepared(packs, replace(trainee.objective, reference=_Held(device, reference.scores, values)))

    def enter() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own, and pinned memory belongs to one

    return Ahead(prepare, step, trainee.num_steps, enter=enter)


def pinned(pack: Pack, device: torch.device) -> Pack:
    """A pack whose arrays lie in pinned memory where the device is a CUDA one; else the pack itself."""
    if device.type != "cuda":
        return pack
    arrays: dict[str, Any] = {one.name: getattr(pack, one.name) for one in fields(pack)}
    moved: dict[str, Any] = {name: _in_reach(array, device) for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return replace(pack, **moved)


def _in_reach(array: npt.NDArray[Numpy], device: torch.device) -> npt.NDArray[Numpy]:
    if device.type != "cuda":
        return array
    held: npt.NDArray[Numpy] = torch.from_numpy(array).pin_memory().numpy()  # the array keeps the tensor's memory
    return held
