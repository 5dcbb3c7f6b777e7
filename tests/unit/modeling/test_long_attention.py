"""Attention of long groups: the same numbers as the written-out mask, and memory that does not grow with the square."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from preftune.data.pack import Group
from preftune.modeling import attention, long_attention
from preftune.modeling.attention import shared_attention
from preftune.modeling.layout import PairLayout


def reference(q: Tensor, k: Tensor, v: Tensor, group: Group, window: int | None, cap: float | None) -> Tensor:
    """One completion after the other, as rows of their own: prompt + completion, plain causal softmax."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    prompt = torch.arange(group.prompt)
    rows, at = [prompt], group.prompt
    for length in group.completions:
        rows.append(torch.arange(at, at + length))
        at += length
    parts = []
    for number, own in enumerate(rows):
        keys = prompt if number == 0 else torch.cat([prompt, own])
        z = q[:, :, own] @ k[:, :, keys].transpose(2, 3) * 0.3
        z = z if cap is None else cap * torch.tanh(z / cap)
        first = 0 if number == 0 else group.prompt
        distance = (first + torch.arange(len(own)))[:, None] - torch.arange(len(keys))[None]
        seen = (distance >= 0) & (distance < (window or len(keys)))
        parts.append(torch.softmax(z.masked_fill(~seen, -torch.inf), -1) @ v[:, :, keys])
    return torch.cat(parts, 2)


CASES = [
    (group, heads, width, window, cap)
    for group, heads, width, window, cap in itertools.product(
        (Group(0, 40, (9, 7)), Group(0, 3, (30, 1, 20)), Group(0, 25, (12,))),
        ((4, 2), (3, 3)),
        ((8, 8), (8, 12), (12, 8)),
        (None, 11),
        (None, 2.0),
    )
]


@pytest.mark.parametrize(("group", "heads", "width", "window", "cap"), CASES)
def test_long_groups_equal_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
    group: Group,
    heads: tuple[int, int],
    width: tuple[int, int],
    window: int | None,
    cap: float | None,
) -> None:
    monkeypatch.setattr(attention, "EXPLICIT_TOKENS", 0)
    monkeypatch.setattr(long_attention, "SCORES_PER_CHUNK", 1)  # chunks of 16 queries
    torch.manual_seed(1)
    n = group.num_tokens
    shapes = ((1, heads[0], n, width[0]), (1, heads[1], n, width[0]), (1, heads[1], n, width[1]))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    upstream = torch.randn(1, heads[0], n, width[1], dtype=torch.float64)
    expected = reference(q, k, v, group, window, cap)
    got, _ = shared_attention(
        nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, softcap=cap, pair_layout=PairLayout((group,))
    )
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad((got.transpose(1, 2) * upstream).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def held_and_peak(n: int, window: int | None, cap: float | None) -> tuple[int, int]:
    """Bytes that one attention call keeps for backward, and the largest tensor that any operator makes."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3))
    layout = PairLayout((Group(0, n - 200, (100, 100)),))
    kept: dict[int, int] = {}
    largest = Largest()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with largest, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out, _ = shared_attention(nn.Module(), q, k, v, None, sliding_window=window, softcap=cap, pair_layout=layout)
        torch.autograd.backward(out.sum())
    return sum(kept.values()), largest.num_bytes


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest storage that an operator returns while this is on."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, Tensor):
                self.num_bytes = max(self.num_bytes, one.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize(("window", "cap"), [(None, None), (300, None), (None, 5.0), (300, 5.0)])
def test_memory_grows_with_the_tokens(monkeypatch: pytest.MonkeyPatch, window: int | None, cap: float | None) -> None:
    """Four times the tokens: four times the memory, where a matrix of scores would take sixteen times."""
    monkeypatch.setattr(long_attention, "SCORES_PER_CHUNK", 1 << 16)
    few, few_peak = held_and_peak(1500, window, cap)
    many, many_peak = held_and_peak(6000, window, cap)
    assert many <= 4.5 * few
    assert many_peak <= 4.5 * few_peak
    assert many_peak < 6000 * 6000  # bytes: a quarter of one head's scores in float32
