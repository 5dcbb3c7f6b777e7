"""A transformer block of the Llama kind as three autograd Functions, in place of the forward of a verified layer class.

    q, k, v = rotate(norm(x) W_qkv)          PreAttention
    o       = attention(q, k, v)             whatever :mod:`preftune.modeling.attention` takes
    m = x + o W_o,   y = m + swiglu(norm(m) W_gate_up) W_down        PostAttention

What it gains over the layer's own forward: merged products, no cast of activations, no gradient of frozen weights, the
elementwise work in few passes (compiled where that is on), and of every activation only what backward cannot cheaply form
again. In the last block only the rows whose log-probabilities are wanted go on after attention.

Nothing is assumed of a class because of its name. A layer is taken for one of this kind if its children have these names
and types (:func:`read_block`), and stays so only if it gives the numbers and the gradients of its own forward on a probe
(:class:`Trial`). Any other layer keeps its own forward; both may stand in one model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from preftune.modeling import linears
from preftune.modeling.attention import Asked, attend
from preftune.modeling.kernels import Kernels, wide
from preftune.modeling.laid_out import LaidOut, base_linear, lay_out
from preftune.modeling.layout import PairLayout
from preftune.modeling.linears import Side, Tensors, lay_together, read_side

BLOCK = "_preftune_block"
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
HEADS = ("q_proj", "k_proj", "v_proj")
INNER = ("gate_proj", "up_proj")
NOT_LAID: tuple[LaidOut | None, ...] = (None,) * 4
RELATIVE = 1e-4  # of what a layer adds to its input


@dataclass(frozen=True, slots=True)
class Block:
    """What a layer's forward needs besides its parameters.

    heads, kv_heads, width: of attention. eps: of the norms before attention and before the inner layers. scale: of the
    scores. window: tokens that a query sees back, None for all. is_last: after it come the final norm and the head.
    """

    heads: int
    kv_heads: int
    width: int
    eps: tuple[float, float]
    scale: float
    window: int | None
    is_last: bool


class PreAttention(torch.autograd.Function):
    """Norm, merged projections, rotary positions.

    x (T, d), cos and sin (T, D), norm (d,), tensors of q, k, v -> q (T, H, D), k and v (T, K, D), and x itself, so that
    the gradient which reaches it past the block is added where that of the norm is formed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, how: _How, norm: Tensor, *tensors: Tensor | None) -> Any:
        """Keeps x, the norm's scale and x A^T."""
        block = how.block
        normed, scale = how.kernels.rms(x, norm, block.eps[0])
        y, inner, low = linears.forward(normed, Side(tensors, how.scales, how.laid[0], how.kernels.low_rank))
        rotated, heads = block.heads + block.kv_heads, y.view(len(y), -1, block.width)
        heads = how.kernels.rotate(heads[:, :rotated], heads[:, rotated:], cos, sin)
        ctx.how, ctx.num_low = how, len(low)
        ctx.save_for_backward(x, cos, sin, norm, scale, inner, *low, *tensors)
        return heads[:, : block.heads], heads[:, block.heads : rotated], heads[:, rotated:], x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, the norm and the projections."""
        x, cos, sin, norm, scale, inner, *rest = ctx.saved_tensors
        kernels, needs = ctx.how.kernels, ctx.needs_input_grad
        low = tuple(rest[: ctx.num_low])
        side = Side(tuple(rest[ctx.num_low :]), ctx.how.scales, ctx.how.laid[0], kernels.low_rank)
        grad = kernels.rotate_backward(*grads[:3], cos, sin)
        of_normed, pulled = linears.input_grad(grad, side, inner, low, is_wanted=needs[0] or needs[4])
        if of_normed is not None:
            dx, normed = kernels.rms_backward(of_normed, x, scale, norm, grads[3])
        else:  # nothing below trains
            dx, normed = None, kernels.rms(x, norm, ctx.how.block.eps[0])[0]
        of_norm = _norm_grad(cast(Tensor, of_normed), x, scale, norm) if needs[4] else None
        found = linears.parameter_grads(grad, normed, (inner, low), pulled, side, needs[5:])
        return (dx if needs[0] else None, None, None, None, of_norm, *found)


class PostAttention(torch.autograd.Function):
    """Output projection, residual, norm, inner layers, residual.

    x (T, d), o (T, H D), norm (d,), tensors of o, then of gate and up, then of down -> (T, d).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, o: Tensor, how: _How, norm: Tensor, *tensors: Tensor | None) -> Tensor:
        """Keeps o, x after attention and its norm's scale, gate and up, and what the adapters' first factors gave."""
        kernels = how.kernels
        out, both, down = _split(tensors, how)
        branch, *kept_out = cast(tuple[Any, ...], linears.forward(o, out))
        middle, normed, scale = kernels.add_rms(x, branch, norm, how.block.eps[1])
        gates, *kept_both = cast(tuple[Any, ...], linears.forward(normed, both))
        y, *kept_down = cast(tuple[Any, ...], linears.forward(kernels.swiglu(gates), down))
        y.add_(middle)
        kept = [one for inner, low in (kept_out, kept_both, kept_down) for one in (inner, *low)]
        ctx.how, ctx.num_kept = how, [1 + len(low) for _, low in (kept_out, kept_both, kept_down)]
        ctx.save_for_backward(o, middle, norm, scale, gates, *kept, *tensors)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, o, the norm and the projections."""
        o, middle, norm, scale, gates, *rest = ctx.saved_tensors
        kernels, needs, grad = ctx.how.kernels, ctx.needs_input_grad, grads[0]
        kept: list[tuple[Tensor | None, Tensors]] = []
        for count in ctx.num_kept:
            kept.append((rest[0], tuple(rest[1:count])))
            rest = rest[count:]
        out, both, down = _split(tuple(rest), ctx.how)
        n = linears.PER_LAYER
        wants_out, wants_both, wants_down = needs[4 : 4 + n], needs[4 + n : 4 + 3 * n], needs[4 + 3 * n :]

        of_act, pulled = linears.input_grad(grad, down, *kept[2])
        of_gates, act = kernels.swiglu_backward(gates, cast(Tensor, of_act))
        found_down = linears.parameter_grads(grad, act, kept[2], pulled, down, wants_down)
        del act, of_act

        of_normed, pulled = linears.input_grad(of_gates, both, *kept[1])
        dx, normed = kernels.rms_backward(cast(Tensor, of_normed), middle, scale, norm, grad)
        found_both = linears.parameter_grads(of_gates, normed, kept[1], pulled, both, wants_both)
        of_norm = _norm_grad(cast(Tensor, of_normed), middle, scale, norm) if needs[3] else None

        of_o, pulled = linears.input_grad(dx, out, *kept[0], is_wanted=needs[1])
        found_out = linears.parameter_grads(dx, o, kept[0], pulled, out, wants_out)
        return (dx, of_o, None, of_norm, *found_out, *found_both, *found_down)


@dataclass(frozen=True, slots=True)
class _How:
    """What does not change from token to token in one call: the block, the arithmetic, the adapters' scales, each side's
    weights where they are laid out."""

    block: Block
    kernels: Kernels
    scales: tuple[float, ...]
    laid: tuple[LaidOut | None, ...]


def _split(tensors: tuple[Any, ...], how: _How) -> tuple[Side, Side, Side]:
    """The sides of o, of gate and up, and of down."""
    n, scales = linears.PER_LAYER, how.scales
    parts = ((tensors[:n], scales[:1]), (tensors[n : 3 * n], scales[1:3]), (tensors[3 * n :], scales[3:]))
    out, both, down = (Side(*part, laid, how.kernels.low_rank) for part, laid in zip(parts, how.laid, strict=True))
    return out, both, down


def _norm_grad(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a norm's weight: sum over tokens of grad times x over its root mean square."""
    return (wide(grad) * wide(x) * scale).sum(0).to(weight.dtype)


def run_block(layer: nn.Module, block: Block, x: Tensor, where: tuple[Tensor, Tensor], layout: PairLayout) -> Tensor | None:
    """The forward of a layer on one packed row: x (1, T, d) -> (1, T, d), or the rows asked for in the last layer.

    where: cos and sin, (1, T, D). None where its linear layers are no longer such that this module can run them.
    """
    attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
    before = read_side([getattr(attention, name) for name in HEADS])
    after = read_side([attention.o_proj, *(getattr(mlp, name) for name in INNER), mlp.down_proj])
    if before is None or after is None:
        return None
    norms = cast(Tensor, cast(Any, layer.input_layernorm).weight), cast(Tensor, cast(Any, layer.post_attention_layernorm).weight)
    laid = [one if one is not None and one.is_current else None for one in layout.laid.get(layer, NOT_LAID)]
    how = _How(block, layout.kernels, before.scales, tuple(laid[:1]))
    q, k, v, x = PreAttention.apply(x[0], where[0][0], where[1][0], how, norms[0], *before.tensors)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    heads = [one.transpose(0, 1)[None] for one in (q, k, v)]
    o = attend(attention, heads[0], heads[1], heads[2], layout, Asked(block.scale, block.window))[0].flatten(1)
    if block.is_last and layout.rows is not None:
        x, o = x.index_select(0, layout.rows), o.index_select(0, layout.rows)
        layout.taken.append(len(layout.rows))
    how = _How(block, layout.kernels, after.scales, tuple(laid[1:]))
    return cast(Tensor, PostAttention.apply(x, o, how, norms[1], *after.tensors))[None]  # type: ignore[no-untyped-call]  # torch leaves it untyped


def read_block(layer: nn.Module, *, is_last: bool = False) -> Block | None:
    """What a layer's forward needs, if its children have the names and types of this kind of block; else None."""
    if {name for name, _ in layer.named_children()} != set(PARTS) or _has_own(layer):
        return None
    parts = {name: cast(Any, child) for name, child in layer.named_children()}
    attention, mlp = parts["self_attn"], parts["mlp"]
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    eps = [getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms]
    is_known = (
        {name for name, _ in attention.named_children()} == {*HEADS, "o_proj"}
        and {name for name, _ in mlp.named_children()} == {*INNER, "down_proj", "act_fn"}
        and type(mlp.act_fn).__name__ in {"SiLU", "SiLUActivation"}
        and not _has_own(attention)
        and not _has_own(mlp)
        and all([name for name, _ in norm.named_parameters()] == ["weight"] for norm in norms)
        and all(isinstance(one, float) for one in eps)
        and isinstance(getattr(attention, "head_dim", None), int)
        and isinstance(getattr(attention, "scaling", None), float)
        and not getattr(attention, "attention_dropout", 0.0)
    )
    linear = [base_linear(getattr(attention, name, attention)) for name in (*HEADS, "o_proj")]
    if not is_known or any(one is None for one in linear):
        return None
    width = int(attention.head_dim)
    window = getattr(attention, "sliding_window", getattr(getattr(attention, "config", None), "sliding_window", None))
    outs = [cast(nn.Linear, one).out_features for one in linear[:3]]
    return Block(
        heads=outs[0] // width,
        kv_heads=outs[1] // width,
        width=width,
        eps=(cast(float, eps[0]), cast(float, eps[1])),
        scale=float(attention.scaling),
        window=None if window is None else int(window),
        is_last=is_last,
    )


def _has_own(module: nn.Module) -> bool:
    """Whether a module holds parameters or buffers itself, beside its children."""
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def use_blocks(layers: Sequence[nn.Module]) -> int:
    """Give the layers that look like one of this kind the forward of this module; how many. Their weights move together.

    They still have to pass :class:`Trial` before they may be used.
    """
    found = 0
    for layer in layers:
        block = read_block(layer, is_last=layer is layers[-1])
        if block is None or read_side([getattr(layer.self_attn, name) for name in HEADS]) is None:
            continue
        lay_together([getattr(layer.self_attn, name) for name in HEADS])
        lay_together([getattr(layer.mlp, name) for name in INNER])
        layer.__dict__[BLOCK] = block
        if not hasattr(type(layer), "plain_forward"):
            layer.__class__ = _with_block(cast(Any, type(layer)))
        found += 1
    return found


def lay_out_block(layer: nn.Module) -> tuple[LaidOut | None, ...]:
    """The frozen weights of a block, laid out for products: of q, k and v; of o; of gate and up; of down."""
    attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
    inputs = [[getattr(attention, name) for name in HEADS], [attention.o_proj], [getattr(mlp, name) for name in INNER]]
    return tuple(map(lay_out, [*inputs, [mlp.down_proj]]))


def drop_block(layer: nn.Module) -> None:
    """The layer's own forward from here on."""
    layer.__dict__.pop(BLOCK, None)


def has_block(layer: nn.Module) -> bool:
    """Whether a layer runs as a block of this module."""
    return BLOCK in layer.__dict__


@cache
def _with_block(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class, under its name, that takes packed rows by :func:`run_block`."""
    plain = cast(Any, kind.forward)

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A packed row through the block; everything else through the layer's own forward."""
        block: Any = self.__dict__.get(BLOCK)
        layout: Any = kwargs.get("pair_layout")
        where: Any = kwargs.get("position_embeddings")
        is_packed = block is not None and layout is not None and where is not None and not args and hidden_states.shape[0] == 1
        if not is_packed or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
            return plain(self, hidden_states, *args, **kwargs)
        if layout.trial is not None:
            layout.trial.see(self, block, hidden_states, kwargs)
            return plain(self, hidden_states, **kwargs)
        found = run_block(self, block, hidden_states, where, layout)
        return plain(self, hidden_states, **kwargs) if found is None else found

    return type(kind.__name__, (kind,), {"forward": forward, "plain_forward": plain, "__module__": kind.__module__})


class Trial:
    """Compares blocks with their layers' own forward on a probe, in float32, gradients included.

    Put into a layout, it sees every layer's input once. Of each class and each Block one layer is copied, its adapters
    are given values that count, and the copy runs both ways; where the outputs or the gradient of the input differ by more
    than ``RELATIVE`` of what the layer adds, all layers of the kind go back to their own forward.
    """

    def __init__(self) -> None:
        self.gaps: dict[tuple[type, Block], float] = {}

    def see(self, layer: nn.Module, block: Block, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Compare, if the kind is new; take the block away from the layer where its kind has failed."""
        kind = (type(layer), replace(block, is_last=False))
        if kind not in self.gaps:
            self.gaps[kind] = self._gap(layer, kind[1], x, kwargs)
        if not self.gaps[kind] <= RELATIVE:
            drop_block(layer)

    @staticmethod
    def _gap(layer: nn.Module, block: Block, x: Tensor, kwargs: dict[str, Any]) -> float:
        copied = copy.deepcopy(layer).float()
        kept = [one.detach().clone() for one in (x, *kwargs["position_embeddings"])]
        x, cos, sin = (one.float() for one in kept)
        layout = replace(kwargs["pair_layout"], trial=None, trace=None, rows=None, masks={}, places={})
        given = {**kwargs, "position_embeddings": (cos, sin), "pair_layout": layout}
        made = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in copied.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=made) * 0.02)
        pull = torch.randn(x.shape, generator=made).to(x.device)
        sides = []
        with torch.enable_grad():
            for is_block in (False, True):
                leaf = x.clone().requires_grad_()
                if is_block:
                    y = run_block(copied, block, leaf, (cos, sin), layout)
                else:
                    y = cast(Any, copied).plain_forward(leaf, **given)
                if not isinstance(y, Tensor):
                    return float("inf")
                added = (y.detach() - x, torch.autograd.grad(y, leaf, pull)[0] - pull)
                sides.append(added)
        return max(float((one - other).norm() / one.norm().clamp_min(1e-12)) for one, other in zip(*sides, strict=True))
