"""Groups to packs: one row of real tokens in which every prompt stands once.

    ids        p0 p1 p2 p3 | c0 c1 c2 | r0 r1     next group ...
    positions   0  1  2  3 |  4  5  6 |  4  5      0 ...

The first token of every completion is predicted from the last prompt position. A group is never split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from preftune.core.records import TokenisedExample


@dataclass(frozen=True, slots=True)
class Group:
    """Where a group lies in its pack: first token, prompt length, completion lengths (tokens)."""

    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole group."""
        return self.prompt + sum(self.completions)


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Examples laid out in one row.

    ids, positions: (tokens,). rows: (targets,) position whose hidden state predicts each scored token;
    targets: (targets,) its id; segments: (targets,) index of its completion. num_tokens: (completions,) scored
    tokens of each completion. Completions are flat: group by group, in each group by role.
    """

    examples: tuple[TokenisedExample, ...]
    groups: tuple[Group, ...]
    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]

    @property
    def num_completions(self) -> int:
        """Completions in the pack."""
        return len(self.num_tokens)

    @property
    def num_groups(self) -> int:
        """Prompts in the pack."""
        return len(self.groups)


def pack_of(examples: Sequence[TokenisedExample]) -> Pack:
    """Lay out whole groups in one row."""
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    num_tokens: list[int] = []
    groups: list[Group] = []
    for example in examples:
        start, prompt = len(ids), len(example.prompt_ids)
        ids.extend(example.prompt_ids)
        positions.extend(range(prompt))
        for completion in example.completions:
            at = len(ids)
            length = len(completion.ids)
            ids.extend(completion.ids)
            positions.extend(range(prompt, prompt + length))
            scored = [index for index, is_scored in enumerate(completion.scored) if is_scored]
            rows.extend(start + prompt - 1 if index == 0 else at + index - 1 for index in scored)
            targets.extend(completion.ids[index] for index in scored)
            segments.extend([len(num_tokens)] * len(scored))
            num_tokens.append(len(scored))
        groups.append(Group(start, prompt, tuple(len(completion.ids) for completion in example.completions)))
    return Pack(
        tuple(examples),
        tuple(groups),
        *(np.asarray(values, dtype=np.int64) for values in (ids, positions, rows, targets, segments, num_tokens)),
    )


def cropped(example: TokenisedExample, num_tokens: int) -> TokenisedExample:
    """An example of at most about ``num_tokens``: the end of its prompt and the beginning of each completion.

    Completions keep half of the tokens together and at least one each. An example that fits is returned as it is.
    """
    if example.num_tokens <= num_tokens:
        return example
    each = max(1, num_tokens // 2 // len(example.completions))
    completions = tuple(replace(one, ids=one.ids[:each], scored=one.scored[:each]) for one in example.completions)
    rest = max(1, num_tokens - sum(len(one.ids) for one in completions))
    return replace(example, prompt_ids=example.prompt_ids[-rest:], completions=completions)


def bins_of(examples: Iterable[TokenisedExample], tokens_per_pack: int) -> list[list[TokenisedExample]]:
    """The examples of each pack of one optimiser step: first-fit by decreasing size under a token budget.

    A group larger than the budget gets a pack of its own. Order inside a step carries no meaning: the loss is a sum
    over the step, so packing may reorder. Sorting is stable, hence deterministic.
    """
    bins: list[tuple[int, list[TokenisedExample]]] = []
    for example in sorted(examples, key=lambda one: -one.num_tokens):
        size = example.num_tokens
        for index, (used, members) in enumerate(bins):
            if used + size <= tokens_per_pack:
                members.append(example)
                bins[index] = (used + size, members)
                break
        else:
            bins.append((size, [example]))
    return [members for _, members in bins]


def pack_step(examples: Iterable[TokenisedExample], tokens_per_pack: int) -> list[Pack]:
    """Packs of one optimiser step, as ``bins_of`` fills them."""
    return [pack_of(members) for members in bins_of(examples, tokens_per_pack)]
