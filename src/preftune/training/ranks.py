"""The processes that train together: what each has to do, and what they tell one another.

The packs of a step are the same on every rank. Each rank runs some of them, all run equally many: a rank that has none
left in a turn runs a filler that counts nothing, because collective calls must meet. Everything that is told travels as
numbers or text (gloo and NCCL), never as a pickle. With one process nothing here does anything.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from preftune.core.errors import RankLost, UsageError
from preftune.core.launch import Launch
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Pack, bins_of, pack_of

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another that is alive and silent; one that ended is noticed at once."""

LONE = Launch()
FILLER = TokenisedExample("filler", (0,), (TokenisedCompletion((0, 0), (True, True)),))


@dataclass(frozen=True, slots=True)
class Turn:
    """What a rank does while the others do theirs.

    Parameters
        index: of the pack in the step; None for the filler. pack: what to run.
        peers: the packs that run in this turn on all ranks. is_last: no turn follows in this step.
    """

    index: int | None
    pack: Pack
    peers: tuple[Pack, ...]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Parameters
        launch: which one this is. processes: host and process number of each, where there are several.
    """

    launch: Launch = LONE
    processes: tuple[tuple[str, int], ...] = ()

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.launch.rank

    @property
    def size(self) -> int:
        """How many processes train together."""
        return self.launch.size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run."""
        return self.launch.is_first

    # ---- who does what ------------------------------------------------------------------------------------------------

    def packs(self, examples: Sequence[TokenisedExample], tokens_per_pack: int) -> list[Pack]:
        """The packs of a step, the same on every rank: for one process those of ``pack_step``.

        For several there are as many as fill all turns, where examples and budget allow that: no rank waits.
        """
        bins = bins_of(examples, tokens_per_pack)
        return [pack_of(members) for members in (bins if self.size == 1 else _evened(bins, tokens_per_pack, self.size))]

    def turns(self, packs: Sequence[Pack]) -> Iterator[Turn]:
        """What this rank runs of these packs, turn by turn; every rank has equally many turns.

        Packs of one turn are of similar size, so that nobody waits long; the order alternates, so that totals are even.
        """
        if self.size == 1:
            for index, pack in enumerate(packs):
                yield Turn(index, pack, (pack,), is_last=index == len(packs) - 1)
            return
        order = sorted(range(len(packs)), key=lambda index: (-len(packs[index].ids), index))
        rows = list(zip_longest(*[iter(order)] * self.size))
        filler = pack_of([FILLER])
        for number, row in enumerate(rows):
            dealt = row if number % 2 == 0 else row[::-1]
            peers = tuple(filler if index is None else packs[index] for index in dealt)
            yield Turn(dealt[self.rank], peers[self.rank], peers, is_last=number == len(rows) - 1)

    # ---- what they tell one another -----------------------------------------------------------------------------------

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all ranks, in place; the tensor itself for one process."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def joined(self, parts: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> Tensor:
        """One vector from the parts of all packs, each held by the rank that ran it; the same on every rank.

        Parameters
            parts: None where another rank has it. sizes: of all.
        """
        held = [part for part in parts if part is not None]
        if self.size == 1:
            return torch.cat(held)
        # zeros elsewhere, and wider than any part, so the sum over ranks moves no bit
        whole = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        for part, place in zip(parts, torch.split(whole, list(sizes)), strict=True):
            if part is not None:
                place.copy_(part)
        return self.add_up(whole)

    def highest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all ranks."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def any(self, *, is_so: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.highest(float(is_so))[0])

    def from_first(self, value: Any) -> Any:
        """A JSON value as the first rank has it."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.is_first else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0)
        held = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_first:
            held.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(held, src=0)
        return json.loads(held.numpy().tobytes())

    def gather(self, content: bytes) -> list[bytes]:
        """What every rank gives, in the order of the ranks."""
        if self.size == 1:
            return [content]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        longest = max(1, *(int(size) for size in sizes))
        mine = torch.zeros(longest, dtype=torch.uint8)
        if content:
            mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        held = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(held, mine)
        return [one[: int(size)].numpy().tobytes() for one, size in zip(held, sizes, strict=True)]

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.highest(0.0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say which rank is gone where a collective call fails while this lasts.

        Raises
            RankLost: another process ended, or did not answer for ``PATIENCE``.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_from_others(error):
                raise
            if threading.current_thread() is threading.main_thread():
                # torchrun ends the others as soon as it sees that one is gone, and the reason has to be told first
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise RankLost(
                f"{self._who_is_gone(error)}; all ranks end, resume the run to go on from its last checkpoint"
            ) from error

    def _who_is_gone(self, error: RuntimeError) -> str:
        here = socket.gethostname()
        others = [(rank, pid) for rank, (host, pid) in enumerate(self.processes) if host == here and rank != self.rank]
        until = time.monotonic() + 2.0  # the kernel closes a process's connections a moment before it is gone
        while True:
            gone = [f"rank {rank} (process {pid} on {here})" for rank, pid in others if _has_ended(pid)]
            if gone or time.monotonic() > until:
                break
            time.sleep(0.05)
        said = " ".join(str(error).split())[:160]
        return f"{', '.join(gone)} ended" if gone else f"another rank of {self.size} ended or does not answer ({said})"


ALONE = Ranks()


@contextmanager
def joined(launch: Launch) -> Iterator[Ranks]:
    """The processes of this launch, connected while the block runs; one alone connects to nobody.

    A process group that the caller made is used and left as it is.

    Raises
        UsageError: more processes on a host than it has GPUs.
        RankLost: the others do not come.
    """
    if launch.size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started {launch.local_size} processes on a host with {torch.cuda.device_count()} GPUs; "
                "give --nproc-per-node as many as there are GPUs"
            )
        torch.cuda.set_device(launch.local_rank)
    is_ours = not dist.is_initialized()
    if is_ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise RankLost(
                f"rank {launch.rank} of {launch.size} cannot reach the others: {said}; look at --rdzv-endpoint"
            ) from error
    with Ranks(launch).watched():
        told = Ranks(launch).gather(json.dumps([socket.gethostname(), os.getpid()]).encode())
    ranks = Ranks(launch, tuple((str(host), int(pid)) for host, pid in map(json.loads, told)))
    with ranks.watched():
        yield ranks
    if is_ours:  # not after an error: the others may be gone, and waiting for them would hang
        ranks.wait()
        dist.destroy_process_group()


def check_shared(ranks: Ranks, *folders: Path) -> None:
    """Every rank must see what the first one writes into these folders.

    Raises
        UsageError: a folder that is not the same on all hosts.
    """
    if ranks.size == 1:
        return
    for folder in folders:
        mark = folder / f".shared-{os.getpid()}"
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        name = ranks.from_first(mark.name)
        deadline = time.monotonic() + 10.0  # network file systems show a new file with some delay
        while not (folder / name).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        is_hidden = ranks.any(is_so=not (folder / name).exists())
        if ranks.is_first:
            mark.unlink(missing_ok=True)
        if is_hidden:
            raise UsageError(
                f"{folder}: not every host sees what rank 0 writes there; put it on a file system that all hosts share"
            )


def _evened(bins: Sequence[Sequence[TokenisedExample]], tokens_per_pack: int, size: int) -> Sequence[Sequence[TokenisedExample]]:
    """The same examples in as many bins as fill all turns: longest first, each into the emptiest bin."""
    examples = sorted((one for members in bins for one in members), key=lambda one: -one.num_tokens)
    wanted = min(len(examples), -(-len(bins) // size) * size)
    if wanted == len(bins):
        return bins
    made: list[list[TokenisedExample]] = [[] for _ in range(wanted)]
    used = [0] * wanted
    for one in examples:
        least = used.index(min(used))
        made[least].append(one)
        used[least] += one.num_tokens
    is_over = any(total > tokens_per_pack and len(members) > 1 for total, members in zip(used, made, strict=True))
    return bins if is_over else made


def _is_from_others(error: RuntimeError) -> bool:
    """Whether an error came out of a collective call: torch has classes for some, gloo's are known by where they arose."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def _has_ended(pid: int) -> bool:
    """Whether a process of this host is gone, or dead and not yet collected by its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in {"Z", "X"}
