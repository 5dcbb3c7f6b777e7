"""Which examples a step sees: a function of the seed, the epoch and the step alone, so that resuming needs no replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of the examples for one epoch; what the examples hold does not matter.

    >>> epoch_order(4, 0, 0).tolist() == epoch_order(4, 0, 0).tolist()
    True
    """
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass(frozen=True, slots=True)
class Order:
    """The examples of every optimiser step.

    Parameters
        num_examples: examples of an epoch. pairs_per_step: examples of a step; the last step of an epoch may hold fewer.
        seed: of the shuffling. is_shuffled: False keeps the file's order.
    """

    num_examples: int
    pairs_per_step: int
    seed: int
    is_shuffled: bool

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that see every example once."""
        return math.ceil(self.num_examples / self.pairs_per_step)

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimiser steps of a stage; ``max_steps`` is an upper bound, never more epochs than asked."""
        steps = max(1, math.ceil(round(self.steps_per_epoch * epochs, 6)))
        return steps if max_steps is None else min(steps, max_steps)

    def position(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and the place of its first example in that epoch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, index * self.pairs_per_step

    def indices(self, step: int) -> list[int]:
        """The examples of a step, counted from 0 over all epochs.

        >>> Order(5, 2, seed=0, is_shuffled=False).indices(5)
        [4]
        """
        epoch, start = self.position(step)
        places = range(start, min(start + self.pairs_per_step, self.num_examples))
        if not self.is_shuffled:
            return list(places)
        order = epoch_order(self.num_examples, self.seed, epoch)
        return [int(order[place]) for place in places]


def evenly_spaced(num_steps: int, count: int, *, with_end: bool) -> frozenset[int]:
    """``count`` steps spread over a stage, counted as done: with the end, or between start and end.

    >>> sorted(evenly_spaced(10, 2, with_end=True)), sorted(evenly_spaced(9, 2, with_end=False))
    ([5, 10], [3, 6])
    """
    parts = count if with_end else count + 1
    points = {round(num_steps * k / parts) for k in range(1, count + 1)}
    return frozenset(point for point in points if point > 0 and (with_end or point < num_steps))
