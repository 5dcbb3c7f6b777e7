"""The head over blocks of the vocabulary: memory that depends on neither the tokens nor the vocabulary.

For a large vocabulary a chunk of few tokens is still a large matrix, and a product with few rows reads all of W for
little work. Here a chunk has many tokens and the vocabulary comes in blocks. One pass over the blocks gives

    lse = log sum_v exp z_v        by a running maximum m and a running sum of exp(z - m)

and, where a gradient is wanted, a second pass forms p = exp(z - lse) block by block: three products with W instead of
two, and one instead of one without a gradient. A trained W gets its gradient block by block from the same lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from preftune.modeling.head import HeadSpec


class BlockedTokenLogps(torch.autograd.Function):
    """log p(target | hidden), (tokens,), as :func:`preftune.modeling.head.token_logps` gives it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec, wants_grad: bool
    ) -> Tensor:
        """Log-probabilities, and with ``wants_grad`` their derivative by the hidden states."""
        forms_unit = wants_grad and ctx.needs_input_grad[0]
        unit = torch.empty_like(hidden) if forms_unit else None
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        at_target = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        lse = torch.empty_like(at_target)
        for rows in _slices(len(hidden), spec.rows):
            chosen = targets[rows]
            at_target[rows], lse[rows] = _scores(hidden[rows], weight, bias, chosen, spec)
            if unit is not None:
                unit[rows] = _unit(hidden[rows], weight, bias, (at_target[rows], lse[rows], chosen), spec)
        if wants_grad:
            ctx.save_for_backward(unit, hidden, weight, bias, targets, at_target, lse)
        ctx.spec = spec
        return at_target - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The unit gradient scaled by the upstream weights, and the gradients of a trained head."""
        unit, hidden, weight, bias, targets, at_target, lse = ctx.saved_tensors
        spec, grad = ctx.spec, grads[0]
        dh = None if unit is None else (unit * (grad * spec.scale)[:, None]).to(hidden.dtype)
        wants_weight, wants_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        if not (wants_weight or wants_bias):
            return dh, None, None, None, None, None
        upstream = grad * spec.scale
        at_chosen = upstream if spec.cap is None else upstream * (1.0 - (at_target / spec.cap) ** 2)
        dw = torch.empty_like(weight) if wants_weight else None
        db = torch.empty_like(bias) if wants_bias else None
        for block in _slices(len(weight), spec.block):
            part_w = torch.zeros(weight[block].shape, dtype=lse.dtype, device=weight.device)
            part_b = torch.zeros(len(part_w), dtype=lse.dtype, device=weight.device)
            for rows in _slices(len(hidden), spec.rows):
                pull = _probabilities(hidden[rows], weight, bias, block, lse[rows], spec).mul_(-upstream[rows, None])
                inside = (targets[rows] >= block.start) & (targets[rows] < block.stop)
                where = (targets[rows] - block.start).clamp(0, len(part_w) - 1)[:, None]
                pull.scatter_add_(1, where, (at_chosen[rows] * inside)[:, None].to(pull.dtype))
                part_w += pull.to(hidden.dtype).t() @ hidden[rows]
                part_b += pull.sum(0)
            if dw is not None:
                dw[block] = part_w.to(weight.dtype)
            if db is not None:
                db[block] = part_b.to(db.dtype)
        return dh, dw, db, None, None, None


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, spec: HeadSpec) -> tuple[Tensor, Tensor]:
    """The chosen tokens' logits and the log-sum-exp of all, (tokens,) each."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    most = torch.full((len(hidden),), -torch.inf, dtype=wide, device=hidden.device)
    total, at_target = torch.zeros_like(most), torch.zeros_like(most)
    for block in _slices(len(weight), spec.block):
        logits = _logits(hidden, weight, bias, block, spec)
        inside = (chosen >= block.start) & (chosen < block.stop)
        found = logits.gather(1, (chosen - block.start).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        at_target = torch.where(inside, found, at_target)
        higher = torch.maximum(most, logits.amax(1))
        total = total * (most - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(1)
        most = higher
    return at_target, most + total.log()


def _unit(hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: tuple[Tensor, Tensor, Tensor], spec: HeadSpec) -> Tensor:
    """d logp / d (scale * h W^T + b): the target's row less the mean of all rows under p, each times its cap's slope."""
    at_target, lse, chosen = scored
    mean = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device)
    for block in _slices(len(weight), spec.block):
        mean += _probabilities(hidden, weight, bias, block, lse, spec).to(hidden.dtype) @ weight[block]
    own = weight.index_select(0, chosen).to(lse.dtype)
    if spec.cap is not None:
        own = own * (1.0 - (at_target / spec.cap) ** 2)[:, None]
    return (own - mean).to(hidden.dtype)


def _probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, lse: Tensor, spec: HeadSpec) -> Tensor:
    """p of a block's ids times the slope of the cap."""
    logits = _logits(hidden, weight, bias, block, spec)
    slope = None if spec.cap is None else 1.0 - (logits / spec.cap) ** 2
    p = logits.sub_(lse[:, None]).exp_()
    return p if slope is None else p.mul_(slope)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, spec: HeadSpec) -> Tensor:
    raw = nn.functional.linear(hidden, weight[block], None if bias is None else bias[block])
    logits = raw if raw.dtype == torch.float64 else raw.float()
    if spec.scale != 1.0:
        logits = logits * spec.scale
    return logits if spec.cap is None else torch.tanh(logits / spec.cap) * spec.cap


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))
