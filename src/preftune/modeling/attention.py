"""Attention over packs in which every prompt stands once: the registered function and its layout.

transformers passes unknown keyword arguments of a model's forward down to the attention function, so the layout
travels as ``model(..., pair_layout=layout)`` and there is no global state. No mask function is registered under the
name, which makes transformers pass ``attention_mask=None`` by itself.

In a group (prompt p, completions c_1 ... c_K) token i sees token j where j <= i in the row, j is of the prompt or of
the same completion, and position(j) > position(i) - window. Positions restart after the prompt for every completion.

Five paths, one result:

* groups up to ``KEPT_TOKENS`` on a CPU: three batched products a group, in one autograd Function for the whole pack,
  probabilities kept for backward;
* up to ``EXPLICIT_TOKENS``: the same, probabilities computed again in backward;
* longer groups on a CPU: flash attention in two parts (:mod:`preftune.modeling.long_attention`), whose memory is flat;
* every other device: scaled_dot_product_attention per completion;
* soft caps, sinks, dropout, and windows of long groups: explicit softmax per completion, of long ones in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from preftune.core.errors import PreftuneError
from preftune.data.pack import Group
from preftune.modeling.long_attention import in_chunks, long_attention

SHARED = "preftune_shared"
KEPT_TOKENS = 512
EXPLICIT_TOKENS = 1024
HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "cache_position",
        "output_router_logits",
        "is_causal",
    }
)


class CannotShare(PreftuneError):
    """The model asks its attention for something that shared prefixes do not provide, or never asks it at all."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one attention layer asked for, recorded while a probe runs."""

    module: str
    window: int | None
    softcap: float | None
    has_sinks: bool


MaskKey: TypeAlias = tuple[int, tuple[int, ...], int | None, int]


@dataclass(frozen=True, slots=True, eq=False)
class PairLayout:
    """Where the groups of a pack lie, and the masks that its layers share.

    trace: a list that every attention call is written to (certificates); None in normal work.
    """

    groups: tuple[Group, ...]
    trace: list[Call] | None = None
    masks: dict[MaskKey, Tensor] = field(default_factory=dict)

    def mask(self, group: Group, window: int | None, repeats: int, like: Tensor) -> Tensor:
        """Additive mask of one group, for ``repeats`` heads: (repeats * tokens, tokens), 0 where seen, -inf where hidden."""
        if window is not None and window >= group.prompt + max(group.completions):
            window = None  # a window that hides nothing shares the mask of the full layers
        key = (group.prompt, group.completions, window, repeats)
        if key not in self.masks:
            seen = torch.ones(group.num_tokens, group.num_tokens, dtype=torch.bool).tril_()
            starts = _starts(group)
            for start, length in zip(starts, group.completions, strict=True):
                seen[start + length :, start : start + length] = False
            if window is not None:
                position = torch.cat(
                    [torch.arange(group.prompt), *(group.prompt + torch.arange(length) for length in group.completions)]
                )
                seen &= position[None, :] > position[:, None] - window
            hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            self.masks[key] = hidden.repeat(repeats, 1).to(dtype=like.dtype, device=like.device)
        return self.masks[key]


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pair_layout: PairLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: query (1, heads, tokens, D), key and value (1, kv_heads, tokens, D).

    Returns (1, tokens, heads, D). CannotShare where the layout did not arrive or an argument is unknown.
    """
    if pair_layout is None:
        raise CannotShare(f"{type(module).__name__} does not hand keyword arguments to its attention function")
    if attention_mask is not None:
        raise CannotShare(f"{type(module).__name__} passes a mask of its own to its attention function")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if unknown:
        raise CannotShare(f"{type(module).__name__} passes {', '.join(unknown)} to its attention function")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CannotShare(f"{type(module).__name__} is not causal")
    if pair_layout.trace is not None:
        pair_layout.trace.append(Call(type(module).__name__, sliding_window, softcap, s_aux is not None))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if softcap is not None or s_aux is not None or dropout > 0.0:
        parts = _each_completion(query, key, value, pair_layout, _Explicit(scale, sliding_window, softcap, s_aux, dropout))
    elif query.device.type != "cpu":
        parts = _each_completion(query, key, value, pair_layout, _Flat(scale, sliding_window))
    else:
        return _grouped(query, key, value, pair_layout, scale, sliding_window), None
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHARED, cast(Callable[..., Any], shared_attention))


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Make a model use a named attention implementation; CannotShare where it does not take the shared one."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise CannotShare(str(error).splitlines()[0]) from None


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run a model with its own attention (generation, plain forwards) and give the shared one back afterwards."""
    before = attention_name(model)
    if before != SHARED:
        yield
        return
    model.set_attn_implementation(plain_name(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_name(model: PreTrainedModel) -> str:
    """The attention implementation in use."""
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def plain_name(model: PreTrainedModel) -> str:
    """The attention implementation of plain rows: the one in use, or the model's default while the shared one is."""
    name = str(getattr(model.config, "_attn_implementation", None) or "eager")
    if name != SHARED:
        return name
    return "sdpa" if getattr(type(model), "_supports_sdpa", False) else "eager"


def _starts(group: Group) -> list[int]:
    """First token of each completion, counted from the start of the group."""
    starts, at = [], group.prompt
    for length in group.completions:
        starts.append(at)
        at += length
    return starts


def _grouped(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
    """The CPU path: short groups in one Function, long ones by scaled_dot_product_attention."""
    if all(group.num_tokens <= EXPLICIT_TOKENS for group in layout.groups):
        return _group_attention(q, k, v, layout, scale, window)
    parts = []
    for group in layout.groups:
        span = slice(group.start, group.start + group.num_tokens)
        alone = PairLayout((Group(0, group.prompt, group.completions),), None, layout.masks)
        if group.num_tokens <= EXPLICIT_TOKENS:
            part = _group_attention(q[:, :, span], k[:, :, span], v[:, :, span], alone, scale, window)
        else:
            part = _long_group(q[:, :, span], k[:, :, span], v[:, :, span], alone, scale, window).transpose(1, 2)
        parts.append(part)
    return torch.cat(parts, 1)


def _long_group(q: Tensor, k: Tensor, v: Tensor, alone: PairLayout, scale: float, window: int | None) -> Tensor:
    (group,) = alone.groups
    if window is not None and window < group.prompt + max(group.completions):
        return torch.cat(_each_completion(q, k, v, alone, _Explicit(scale, window, None, None, 0.0)), 2)
    return long_attention(q, k, v, group, scale)


def _group_attention(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
    return cast(Tensor, GroupAttention.apply(q, k, v, layout, scale, window))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class GroupAttention(torch.autograd.Function):
    """Softmax attention of every group by three batched products over the kv heads.

    q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, T, H, E). One Function for all groups of a pack and none per
    slice: autograd's copies for slices cost as much as the products themselves on a CPU. Softmax sums in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
        """Outputs of every group, and its probabilities where they will be wanted again."""
        _, heads, tokens, width = q.shape
        kv_heads, out_width = k.shape[1], v.shape[3]
        is_training = any(ctx.needs_input_grad[:3])
        out = q.new_empty(tokens, heads, out_width)
        kept: list[Tensor | None] = []
        for group in layout.groups:
            n, span = group.num_tokens, slice(group.start, group.start + group.num_tokens)
            rows = q[0, :, span].reshape(kv_heads, -1, width)  # heads that share a key head are rows of one product
            p = _probabilities(rows, k[0, :, span], layout.mask(group, window, heads // kv_heads, q), scale)
            out[span] = torch.bmm(p, v[0, :, span]).view(heads, n, out_width).transpose(0, 1)
            kept.append(p if is_training and n <= KEPT_TOKENS else None)
        ctx.save_for_backward(q, k, v)
        ctx.layout, ctx.scale, ctx.window, ctx.kept = layout, scale, window, kept
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        q, k, v = ctx.saved_tensors
        _, heads, tokens, width = q.shape
        kv_heads, out_width = k.shape[1], v.shape[3]
        grad = grads[0][0]
        # laid out (tokens, heads, D), as the projections that made q, k and v want their gradients
        dq, dk, dv = (x.new_empty(tokens, x.shape[1], x.shape[3]) for x in (q, k, v))
        for group, kept in zip(ctx.layout.groups, ctx.kept, strict=True):
            n, span = group.num_tokens, slice(group.start, group.start + group.num_tokens)
            rows, keys, values = q[0, :, span].reshape(kv_heads, -1, width), k[0, :, span], v[0, :, span]
            p = kept
            if p is None:
                p = _probabilities(rows, keys, ctx.layout.mask(group, ctx.window, heads // kv_heads, q), ctx.scale)
            do = grad[span].transpose(0, 1).reshape(kv_heads, -1, out_width)
            dv[span] = torch.bmm(p.transpose(1, 2), do).transpose(0, 1)
            ds = _softmax_backward(p, torch.bmm(do, values.transpose(1, 2)), ctx.scale)
            dq[span] = torch.bmm(ds, keys).view(heads, n, width).transpose(0, 1)
            dk[span] = torch.bmm(ds.transpose(1, 2), rows).transpose(0, 1)
        ctx.kept = None  # probabilities are the largest part of a pack's memory
        return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None], None, None, None


def _probabilities(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(rows keys^T * scale + mask): (kv_heads, heads per kv head * n, n) in the dtype of rows; sums in float32."""
    scores = torch.baddbmm(mask.expand(rows.shape[0], -1, -1), rows, keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)


def _softmax_backward(p: Tensor, dp: Tensor, scale: float) -> Tensor:
    """(p * (dp - sum(p * dp))) * scale, summed in float32, in the dtype of p."""
    return torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # noqa: SLF001 (the operator behind softmax)


@dataclass(frozen=True, slots=True)
class _Flat:
    """scaled_dot_product_attention of one completion: never a (tokens, tokens) matrix of its own."""

    scale: float
    window: int | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        length = k.shape[2]
        if q.device.type != "cpu" and groups > 1:  # on CUDA a mask together with enable_gqa takes the slow path
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        if offset == 0 and (self.window is None or length <= self.window):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=groups > 1)
        seen = _seen(length, offset, self.window, q.device)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=groups > 1)


@dataclass(frozen=True, slots=True)
class _Explicit:
    """Softmax written out: soft caps (Gemma 2), sinks (gpt-oss) and dropout."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = (q @ k.transpose(2, 3)).to(wide) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~_seen(k.shape[2], offset, self.window, q.device), float("-inf"))
        if self.sinks is None:
            p = torch.softmax(scores, -1)
        else:  # a sink is one more key per head that takes probability and gives no value
            sinks = self.sinks.to(wide).reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
            p = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
        return functional.dropout(p.to(q.dtype), self.dropout) @ v


def _seen(length: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """(length - offset, length) bool: query offset + i sees keys up to itself and inside the window."""
    at = torch.arange(length, device=device)
    seen = at[None, :] <= at[offset:, None]
    if window is not None:
        seen &= at[None, :] > at[offset:, None] - window
    return seen


def _each_completion(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, core: _Flat | _Explicit) -> list[Tensor]:
    """Outputs in row order: prompt with the first completion, then every other completion against prompt + itself."""
    parts = []
    for group in layout.groups:
        start, at = group.start, group.start + group.prompt
        for number, length in enumerate(group.completions):
            if number == 0:
                span = slice(start, at + length)
                parts.append(in_chunks(core, q[:, :, span], k[:, :, span], v[:, :, span], 0, core.window))
            else:
                own = slice(at, at + length)
                keys = torch.cat([k[:, :, start : start + group.prompt], k[:, :, own]], 2)
                values = torch.cat([v[:, :, start : start + group.prompt], v[:, :, own]], 2)
                parts.append(in_chunks(core, q[:, :, own], keys, values, group.prompt, core.window))
            at += length
    return parts
