"""Shared-prefix attention against a mask written out, on every path."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from preftune.data.pack import Group
from preftune.modeling import attention, group_attention
from preftune.modeling.attention import CannotShare, shared_attention
from preftune.modeling.layout import Call, PairLayout

GROUPS = (Group(0, 5, (4, 3)), Group(12, 2, (6,)), Group(20, 6, (1, 2, 5)))
TOKENS = 34


def visible(groups: tuple[Group, ...], window: int | None) -> Tensor:
    """The rule of the module's docstring, token by token."""
    owner: list[tuple[int, int, int]] = []  # group, completion (0 = prompt), position
    for number, group in enumerate(groups):
        owner += [(number, 0, i) for i in range(group.prompt)]
        for k, length in enumerate(group.completions, 1):
            owner += [(number, k, group.prompt + i) for i in range(length)]
    seen = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for (i, (g, c, p)), (j, (h, d, r)) in itertools.product(enumerate(owner), enumerate(owner)):
        seen[i, j] = g == h and j <= i and d in (0, c) and (window is None or r > p - window)
    return seen


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, cap: float | None, sinks: Tensor | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    z = q @ k.transpose(2, 3) * scale
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    z = z.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.view(1, -1, 1, 1).expand(1, -1, z.shape[2], 1)], -1)
        return (torch.softmax(z, -1)[..., :-1] @ v).transpose(1, 2)
    return (torch.softmax(z, -1) @ v).transpose(1, 2)


def tensors(value_width: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((1, 4, TOKENS, 8), (1, 2, TOKENS, 8), (1, 2, TOKENS, value_width))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("kept", "explicit"), [(512, 1024), (0, 1024), (0, 0), (10, 12)])
@pytest.mark.parametrize("cells", [12_000, 0, 12])
@pytest.mark.parametrize("value_width", [8, 12])
def test_every_path_equals_the_written_out_mask(
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    cells: int,
    cap: float | None,
    has_sinks: bool,
    kept: int,
    explicit: int,
    value_width: int,
) -> None:
    """Kept and recomputed probabilities, flat memory for long groups, and packs that mix both; caps and sinks."""
    monkeypatch.setattr(group_attention, "KEPT_TOKENS", kept)
    monkeypatch.setattr(group_attention, "PART_CELLS", cells)
    monkeypatch.setattr(attention, "EXPLICIT_TOKENS", explicit)
    q, k, v = tensors(value_width)
    sinks = torch.linspace(-1, 1, 4).double() if has_sinks else None
    upstream = torch.randn(1, TOKENS, 4, value_width).double()
    expected = written_out(q, k, v, visible(GROUPS, window), 0.4, cap, sinks)
    theirs = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    got, _ = shared_attention(
        nn.Module(), q, k, v, None, scaling=0.4, sliding_window=window, softcap=cap, s_aux=sinks, pair_layout=PairLayout(GROUPS)
    )
    ours = torch.autograd.grad((got * upstream).sum(), (q, k, v))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    cells=st.sampled_from([12_000, 40, 8, 2, 0]),
)
@settings(max_examples=100)
def test_any_groups(shapes: list[tuple[int, list[int]]], window: int | None, heads: tuple[int, int], cells: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_attention, "PART_CELLS", cells)
        _compare_any_groups(shapes, window, heads)


def _compare_any_groups(shapes: list[tuple[int, list[int]]], window: int | None, heads: tuple[int, int]) -> None:
    groups, start = [], 0
    for prompt, lengths in shapes:
        groups.append(Group(start, prompt, tuple(lengths)))
        start += groups[-1].num_tokens
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, count, start, 4, dtype=torch.float64, requires_grad=True) for count in (heads[0], heads[1], heads[1])
    )
    layout = PairLayout(tuple(groups))
    got, _ = shared_attention(nn.Module(), q, k, v, None, sliding_window=window, pair_layout=layout)
    expected = written_out(q, k, v, visible(layout.groups, window), 0.5, None, None)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    flat = torch.cat(attention._each_completion(q, k, v, layout, attention._Flat(0.5, window)), 2).transpose(1, 2)
    torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad((got * upstream).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_rule_matters() -> None:
    q, k, v = tensors()
    with_window = written_out(q, k, v, visible(GROUPS, 4), 0.4, None, None)
    full = written_out(q, k, v, visible(GROUPS, None), 0.4, None, None)
    causal = written_out(q, k, v, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), 0.4, None, None)
    assert float((with_window - full).detach().abs().max()) > 1e-2
    assert float((causal - full).detach().abs().max()) > 1e-2


def test_dropout_follows_the_random_state() -> None:
    q, k, v = tensors()

    def run(seed: int, dropout: float) -> Tensor:
        torch.manual_seed(seed)
        return shared_attention(nn.Module(), q, k, v, None, dropout=dropout, pair_layout=PairLayout(GROUPS))[0]

    assert torch.equal(run(1, 0.3), run(1, 0.3))
    assert not torch.equal(run(1, 0.3), run(2, 0.3))
    torch.testing.assert_close(run(1, 0.0), shared_attention(nn.Module(), q, k, v, None, pair_layout=PairLayout(GROUPS))[0])


def test_calls_are_traced() -> None:
    q, k, v = tensors()
    trace: list[Call] = []
    shared_attention(nn.Module(), q, k, v, None, sliding_window=3, pair_layout=PairLayout(GROUPS, trace))
    assert trace == [Call("Module", 3, None, False)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pair_layout": None}, "does not hand keyword arguments"),
        ({"attention_mask": torch.zeros(1)}, "mask of its own"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_it_does_not_know_is_refused(arguments: dict[str, object], says: str) -> None:
    q, k, v = tensors()
    call: dict[str, object] = {"attention_mask": None, "pair_layout": PairLayout(GROUPS), **arguments}
    with pytest.raises(CannotShare, match=says):
        shared_attention(nn.Module(), q, k, v, **call)  # type: ignore[arg-type]
