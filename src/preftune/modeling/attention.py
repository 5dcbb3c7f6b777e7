"""Attention over packs in which every prompt stands once: the registered function and the path that it takes.

transformers passes unknown keyword arguments of a model's forward down to the attention function, so the layout
travels as ``model(..., pair_layout=layout)`` and there is no global state. No mask function is registered under the
name, which makes transformers pass ``attention_mask=None`` by itself.

In a group (prompt p, completions c_1 ... c_K) token i sees token j where j <= i in the row, j is of the prompt or of
the same completion, and position(j) > position(i) - window. Positions restart after the prompt for every completion.

Seven paths, one result:

* where the layout carries our own kernel and the tensors are for it, that (:mod:`preftune.modeling.native_attention`);
* groups up to ``KEPT_TOKENS`` on a CPU: batched products part by part (:mod:`preftune.modeling.group_parts`), in one
  autograd Function for the whole pack, probabilities kept for backward;
* up to ``EXPLICIT_TOKENS``: the same, probabilities computed again in backward;
* longer groups on a CPU: flash attention in two parts (:mod:`preftune.modeling.long_attention`), whose memory is flat;
* on CUDA in 16 bits: two variable-length calls over the whole pack (:mod:`preftune.modeling.varlen`);
* everywhere else: scaled_dot_product_attention per completion;
* soft caps, sinks, dropout, and windows of long groups: explicit softmax per completion, of long ones in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from preftune.core.errors import PreftuneError
from preftune.data.pack import Group
from preftune.modeling.group_attention import group_attention
from preftune.modeling.layout import Call, PairLayout
from preftune.modeling.long_attention import in_chunks, long_attention
from preftune.modeling.native_attention import native_attention
from preftune.modeling.varlen import takes, varlen_attention

L = TypeVar("L")
SHARED = "preftune_shared"
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
class Asked:
    """What a layer asks of its attention: the scale of its scores, and perhaps a window, a soft cap, sinks, dropout."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


def arrived(module: torch.nn.Module, layout: L | None, attention_mask: Tensor | None, others: Mapping[str, Any]) -> L:
    """The layout that a caller handed down through the model, where nothing came along that would be overlooked.

    Raises
        CannotShare: the layout did not arrive, or a mask, an unknown argument or a layer that is not causal did.
    """
    name = type(module).__name__
    if layout is None:
        raise CannotShare(f"{name} does not hand keyword arguments to its attention function")
    if attention_mask is not None:
        raise CannotShare(f"{name} passes a mask of its own to its attention function")
    unknown = sorted(key for key, given in others.items() if given is not None and key not in HARMLESS)
    if unknown:
        raise CannotShare(f"{name} passes {', '.join(unknown)} to its attention function")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CannotShare(f"{name} is not causal")
    return layout


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
    layout = arrived(module, pair_layout, attention_mask, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    asked = Asked(scale, sliding_window, softcap, s_aux, dropout)
    return attend(module, query, key, value, layout, asked), None


def attend(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, asked: Asked) -> Tensor:
    """The path for the device and for what is asked: q (1, H, T, D), k (1, K, T, D), v (1, K, T, E) -> (1, T, H, E)."""
    if layout.trace is not None:
        layout.trace.append(Call(type(module).__name__, asked.window, asked.softcap, asked.sinks is not None))
    if asked.softcap is not None or asked.sinks is not None or asked.dropout > 0.0:
        parts = _each_completion(q, k, v, layout, _Explicit(asked.scale, asked.window, asked.softcap, asked.sinks, asked.dropout))
    elif q.device.type == "cuda" and takes(q, v):
        return varlen_attention(q, k, v, layout, asked.scale, asked.window)
    elif q.device.type != "cpu":
        parts = _each_completion(q, k, v, layout, _Flat(asked.scale, asked.window))
    else:
        found = native_attention(q, k, v, layout.groups, asked.scale, asked.window, layout.kernels.attention)
        return _grouped(q, k, v, layout, asked.scale, asked.window) if found is None else found
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


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


def _grouped(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
    """The CPU path: short groups in one Function, long ones by scaled_dot_product_attention."""
    if all(group.num_tokens <= EXPLICIT_TOKENS for group in layout.groups):
        return group_attention(q, k, v, layout, scale, window)
    parts = []
    for group in layout.groups:
        span = slice(group.start, group.start + group.num_tokens)
        alone = replace(layout, groups=(Group(0, group.prompt, group.completions),), trace=None, places={})
        if group.num_tokens <= EXPLICIT_TOKENS:
            part = group_attention(q[:, :, span], k[:, :, span], v[:, :, span], alone, scale, window)
        else:
            part = _long_group(q[:, :, span], k[:, :, span], v[:, :, span], alone, scale, window).transpose(1, 2)
        parts.append(part)
    return torch.cat(parts, 1)


def _long_group(q: Tensor, k: Tensor, v: Tensor, alone: PairLayout, scale: float, window: int | None) -> Tensor:
    (group,) = alone.groups
    if window is not None and window < group.prompt + max(group.completions):
        return torch.cat(_each_completion(q, k, v, alone, _Explicit(scale, window, None, None, 0.0)), 2)
    return long_attention(q, k, v, group, scale)


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
