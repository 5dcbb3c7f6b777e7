"""What the packs of a step add up to: counts known before, sums known after, over all packs and all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from preftune.data.pack import Pack
from preftune.maths.metrics import CHANGES, pair_means, reduce_terms, term_shares, unpaired_means
from preftune.maths.types import LossTerms, PairLogps, Unit
from preftune.training.views import LossView, Mismatched

if TYPE_CHECKING:
    from preftune.training.step import Objective


def counts_of(packs: Sequence[Pack]) -> dict[Unit, int]:
    """How many of each unit the packs hold together: the normalisers of a step."""
    examples = [example for pack in packs for example in pack.examples]
    return {
        "pair": sum(pack.num_groups for pack in packs),
        "completion": sum(pack.num_completions for pack in packs),
        "token": sum(len(pack.targets) for pack in packs),
        "chosen_token": sum(example.completions[0].num_scored for example in examples),
    }


class Tally:
    """What the packs of a step add up to, kept on the device until it is read once."""

    def __init__(self, objective: Objective, packs: Sequence[Pack], mismatched: Mismatched | None) -> None:
        self.counts = counts_of(packs)
        self._objective = objective
        self._packs = packs
        self._mismatched = mismatched
        labels = [label for pack in packs for example in pack.examples for label in example.labels]
        self._num_desirable, self._num_undesirable = sum(labels), len(labels) - sum(labels)
        self._names: tuple[str, ...] = ()
        self._is_whole = False
        self._losses: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._margins: list[Tensor | None] = [None] * len(packs)
        self.margins: list[float] = []  # of every pair in the order of the packs, once read

    def add(self, terms: LossTerms, logps: LossView, index: int | None) -> Tensor:
        """Note the terms of a pack, by its index; its share of the step's loss, with its graph.

        index: None where the terms are those of all packs, known to every rank.
        """
        share = reduce_terms(terms, self.counts)
        self._names = tuple(terms.terms)
        self._losses.append(share.detach().double())
        self._shares.append(term_shares(terms, self.counts))
        self._sums.append(self._objective.sums(terms, logps))
        if isinstance(logps, PairLogps) and terms.chosen_rewards is not None and terms.rejected_rewards is not None:
            margins = (terms.chosen_rewards - terms.rejected_rewards).detach().double()
            self._margins[0 if index is None else index] = margins
        self._is_whole = index is None
        return share

    def _totals(self) -> list[Tensor]:
        """Margins of all pairs, the loss, its terms and the sums of the metrics; over all ranks."""
        ranks = self._objective.spread.ranks
        if ranks.size == 1 or self._is_whole:
            held = [margins for margins in self._margins if margins is not None]
            sums = torch.stack(self._sums).sum(0)
            margins = torch.cat(held) if held else sums.new_zeros(0)
            return [margins, torch.stack(self._losses).sum()[None], torch.stack(self._shares).sum(0), sums]
        self._names = self._names or self._objective.term_names(self._packs[0])
        has_margins = self._objective.loss.view == "pairs"
        sizes = [pack.num_groups if has_margins else 0 for pack in self._packs]
        device = self._objective.scorer.device
        parts = [
            torch.zeros(size, dtype=torch.float64, device=device)
            for size in (sum(sizes), 1, len(self._names), self._objective.num_sums)
        ]
        for margins_of, place in zip(self._margins, torch.split(parts[0], sizes), strict=True):
            if margins_of is not None:
                place.copy_(margins_of)
        for found, part in zip((self._losses, self._shares, self._sums), parts[1:], strict=True):
            for one in found:
                part.add_(one)
        total = ranks.add_up(torch.cat(parts))
        return list(torch.split(total, [len(part) for part in parts]))

    def read(self, *others: Tensor) -> tuple[dict[str, float], list[float]]:
        """The metrics, and the values of other scalars; the host waits for the device here and nowhere else."""
        first = self._totals()
        margins, sums = first[0], first[-1]
        extra = list(others) + ([] if self._mismatched is None else [self._mismatched.divergence])
        values = torch.cat([*first, *(one.double().reshape(1) for one in extra)]).tolist()
        self.margins, values = values[: len(margins)], values[len(margins) :]
        loss, rest = values[0], values[1:]
        at = len(self._names)
        metrics = {"loss": loss}
        if at > 1:
            metrics |= {f"loss/{name}": value for name, value in zip(self._names, rest[:at], strict=True)}
        metrics |= self._means(rest[at : at + len(sums)])
        read = rest[at + len(sums) :]
        if self._mismatched is not None:
            metrics["kl"] = read.pop()
        return metrics, read

    def _means(self, sums: Sequence[float]) -> Mapping[str, float]:
        view = self._objective.loss.view
        if view == "pairs":
            means = pair_means(sums, self.counts["pair"])
            has_reference = self._objective.reference is not None
            return means if has_reference else {name: value for name, value in means.items() if name not in CHANGES}
        return unpaired_means(sums, self._num_desirable, self._num_undesirable) if view == "unpaired" else {}
