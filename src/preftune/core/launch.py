"""How this process was started: alone, or by ``torchrun`` as one of several that train together. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from preftune.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Launch:
    """The place of a process among those that train together.

    Parameters
        rank: its number among all, from 0. size: of them. local_rank, local_size: the same on its own host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """What ``torchrun`` left in the environment; a process that it did not start is alone.

        >>> Launch.from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).is_first
        False
        >>> Launch.from_environment({}).size
        1

        Raises
            UsageError: only some of its variables are there, or they are no numbers.
        """
        if "WORLD_SIZE" not in environment or "RANK" not in environment:
            return cls()
        try:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local = int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", size))
        except ValueError as error:
            raise UsageError(f"RANK, WORLD_SIZE, LOCAL_RANK: {error}; start several processes with torchrun") from None
        return cls(rank, size, *local)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run and speaks for all."""
        return self.rank == 0

    @property
    def is_one_host(self) -> bool:
        """Whether all processes run on one host."""
        return self.local_size == self.size
