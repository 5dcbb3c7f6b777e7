"""Segments of the variable-length kernel, with its meaning written out in plain torch, against the CPU's path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preftune.data.pack import Group
from preftune.modeling.attention import shared_attention
from preftune.modeling.layout import PairLayout
from preftune.modeling.varlen import kernel, segments_of, varlen_attention

PACKS = {
    "pairs": (Group(0, 5, (4, 3)), Group(12, 2, (6, 1)), Group(21, 1, (2, 2))),
    "lists": (Group(0, 3, (1, 2, 5)), Group(11, 4, (2, 2, 2, 2))),
    "single": (Group(0, 4, (3,)), Group(7, 2, (6,))),
}


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What the kernel is documented to do: q (T, H, D), causal masks aligned at the lower right of every segment."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    parts = []
    for at in range(len(cu_q) - 1):
        rows, keys, values = q[cu_q[at] : cu_q[at + 1]], k[cu_k[at] : cu_k[at + 1]], v[cu_k[at] : cu_k[at + 1]]
        assert len(rows) <= max_q
        assert len(keys) <= max_k
        keys, values = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (keys, values))
        distance = (torch.arange(len(rows)) + len(keys) - len(rows))[:, None] - torch.arange(len(keys))[None, :]
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
        scores = torch.einsum("ihd,jhd->hij", rows, keys) * scale
        parts.append(torch.einsum("hij,jhd->ihd", torch.softmax(scores.masked_fill(hidden, float("-inf")), -1), values))
    return torch.cat(parts)


@pytest.mark.parametrize("groups", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_segments_give_the_attention_of_the_cpu(groups: tuple[Group, ...], window: int | None, kv_heads: int) -> None:
    tokens = groups[-1].start + groups[-1].num_tokens
    torch.manual_seed(0)
    shapes = ((1, 4, tokens, 8), (1, kv_heads, tokens, 8), (1, kv_heads, tokens, 8))
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    other = [one.detach().clone().requires_grad_() for one in ours]
    layout = PairLayout(groups)

    got = varlen_attention(ours[0], ours[1], ours[2], layout, 0.4, window, core=flash)
    wanted, _ = shared_attention(
        nn.Module(), other[0], other[1], other[2], None, scaling=0.4, sliding_window=window, pair_layout=PairLayout(groups)
    )
    torch.testing.assert_close(got, wanted)
    pull = torch.randn_like(got)
    for one, same in zip(torch.autograd.grad(got, ours, pull), torch.autograd.grad(wanted, other, pull), strict=True):
        torch.testing.assert_close(one, same)
    assert list(layout.segments) == [torch.device("cpu")]  # made once, for all layers


def test_a_torch_without_grouped_queries_is_given_every_head() -> None:
    """As in torch 2.11, whose kernel has no ``enable_gqa``."""

    def older(*given: Any, scale: float, window_size: tuple[int, int]) -> Tensor:
        assert given[0].shape[1] == given[1].shape[1] == given[2].shape[1]
        return flash(*given, scale=scale, window_size=window_size)

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 26, 8, dtype=torch.float64) for heads in (4, 2, 2))
    layout = PairLayout(PACKS["pairs"])
    got, wanted = (varlen_attention(q, k, v, layout, 0.4, 4, core=core) for core in (older, flash))
    torch.testing.assert_close(got, wanted)


def test_rows_of_one_completion_are_not_gathered() -> None:
    found = segments_of(PACKS["single"], torch.device("cpu"))
    assert found.keys is None
    assert found.cu_q.tolist() == found.cu_k.tolist() == [0, 7, 15]
    pairs = segments_of(PACKS["pairs"], torch.device("cpu"))
    assert pairs.cu_q.tolist() == [0, 9, 12, 20, 21, 24, 26]
    assert pairs.cu_k.tolist() == [0, 9, 17, 25, 28, 31, 34]
    assert pairs.cu_q.dtype == pairs.cu_k.dtype == torch.int32


def test_torch_here_has_the_kernel() -> None:
    assert kernel() is not None
