"""Log-probabilities of target tokens from hidden states, without the full matrix of logits.

    z = cap(scale * (h W^T + b)),    cap(x) = c tanh(x / c)  or the identity
    logp = z[t] - logsumexp(z)

z is (tokens, vocabulary), formed for a few tokens at a time; logsumexp is float32 whatever the dtype of h. Since
d logp / dh does not depend on what comes after, training forms it once in forward (two products with W rather than
three) and scales it in backward; evaluation forms none. A trained W gets a gradient that is summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.modeling.head_blocks import BlockedTokenLogps
from preftune.modeling.laid_out import LaidOut

LOGITS_PER_CHUNK = 1 << 23  # 32 MB of float32: larger chunks leave the cache, smaller ones starve the product
MIN_TOKENS = 64
BLOCKS_FROM, BLOCK = 1 << 18, 1 << 13
"""Where 64 tokens make 64 MB of logits the vocabulary comes in blocks: on two cores at V = 262,144 (640 tokens, width 1,024,
bfloat16) 105 MB instead of 235 for 6 % more time, and at 151,936 100 MB instead of 153 for 35 % more."""
SMALL = 1e-30  # below it float32 probabilities lose digits
WEIGHT_CHUNKS = 4  # a weight gradient is read and written once a chunk, so its chunks are larger


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What a model does to its logits: multiply by ``scale``, then cap softly at ``cap``.

    chunk: tokens at a time. block: ids of the vocabulary at a time, 0 for all of them. softmax: a compiled one of raw logits
    (:func:`preftune.modeling.kernels.token_softmax`), if any. laid: the weight of the head laid out for products, if it is.
    """

    scale: float = 1.0
    cap: float | None = None
    chunk: int = 512
    block: int = 0
    softmax: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    laid: LaidOut | None = None

    @property
    def rows(self) -> int:
        """Tokens at a time where the vocabulary comes in blocks."""
        return max(MIN_TOKENS, LOGITS_PER_CHUNK // max(1, self.block))


def head_spec(model: PreTrainedModel, chunk: int | None = None) -> HeadSpec:
    """The logit scale and cap that a configuration names (Gemma, Cohere, Granite); the caller verifies them once."""
    config: Any = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    vocabulary = int(config.vocab_size)
    tokens = chunk or max(MIN_TOKENS, min(4096, LOGITS_PER_CHUNK // vocabulary))
    return HeadSpec(scale / divisor, None if cap is None else float(cap), tokens, BLOCK if vocabulary >= BLOCKS_FROM else 0)


def token_logps(hidden: Tensor, head: nn.Module, targets: Tensor, spec: HeadSpec) -> Tensor:
    """log p(target | hidden): hidden (tokens, width), targets (tokens,) ids -> (tokens,) nats, float32.

    A head that is a plain linear layer takes the fused path; any other module (an adapter on the head) is called.
    """
    if type(head) is not nn.Linear:
        return _module_logps(hidden, head, targets, spec)
    wants_grad = torch.is_grad_enabled()
    function = BlockedTokenLogps if spec.block else TokenLogps
    applied = function.apply(hidden, head.weight, head.bias, targets, spec, wants_grad)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return cast(Tensor, applied)


class TokenLogps(torch.autograd.Function):
    """The fused path of :func:`token_logps`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec, wants_grad: bool
    ) -> Tensor:
        """Log-probabilities, and with ``wants_grad`` their derivative by the hidden states."""
        forms_unit = wants_grad and ctx.needs_input_grad[0]
        unit = torch.empty_like(hidden) if forms_unit else None
        logps = torch.empty(len(hidden), dtype=_wide(hidden.dtype), device=hidden.device)
        laid = spec.laid if bias is None and spec.laid is not None and spec.laid.is_current else None
        for start in range(0, len(hidden), spec.chunk):
            rows = slice(start, start + spec.chunk)
            chosen = targets[rows, None]
            if spec.softmax is not None and spec.scale == 1.0 and spec.cap is None:
                probabilities, logps[rows] = spec.softmax(_raw(hidden[rows], weight, bias, laid), chosen)
                logits = probabilities
            else:
                logits = _shape(_raw(hidden[rows], weight, bias, laid), spec)
                probabilities = torch.softmax(logits, -1)
                logps[rows] = _log_of_chosen(logits, probabilities, chosen)
            if unit is not None:
                slope = _slopes(logits, spec)
                pull = probabilities
                at_target = weight.index_select(0, targets[rows])
                if slope is not None:
                    pull = pull.mul_(slope)
                    at_target = (at_target * slope.gather(1, chosen)).to(hidden.dtype)
                pull = pull.to(hidden.dtype)
                torch.sub(at_target, torch.mm(pull, weight) if laid is None else laid.backward(pull), out=unit[rows])
        if wants_grad:
            ctx.save_for_backward(unit, hidden, weight, bias, targets)
        ctx.spec = spec
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The unit gradient scaled by the upstream weights, and the gradients of a trained head."""
        unit, hidden, weight, bias, targets = ctx.saved_tensors
        spec, grad = ctx.spec, grads[0]
        dh = None if unit is None else (unit * (grad * spec.scale)[:, None]).to(hidden.dtype)
        dw, db = _weight_grads(ctx, hidden, weight, bias, targets, grad) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return dh, dw, db, None, None, None


@torch.no_grad()
def token_concentration(hidden: Tensor, head: nn.Module, spec: HeadSpec) -> Tensor:
    """log sum over the vocabulary of p(v)^2 at each hidden state, in chunks: (tokens,) nats, float32, never with a graph.

    It is 0 where all probability is on one token and -log(vocabulary) where it is spread evenly (the negative Renyi
    entropy of order 2).
    """
    parts = []
    for rows in torch.split(hidden, spec.chunk):
        every = torch.log_softmax(_shape(head(rows), spec), -1)
        parts.append(torch.logsumexp(2 * every, -1))
    return torch.cat(parts)


def _weight_grads(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a trained head, from probabilities computed again, summed in float32."""
    spec, wide = ctx.spec, _wide(weight.dtype)
    dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
    db = torch.zeros(bias.shape, dtype=wide, device=weight.device) if bias is not None and ctx.needs_input_grad[2] else None
    size = spec.chunk * WEIGHT_CHUNKS
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        chosen = targets[rows, None]
        logits = _logits(hidden[rows], weight, bias, spec)
        pull = torch.softmax(logits, -1).neg_()
        pull.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=pull.dtype))
        slope = _slopes(logits, spec)
        if slope is not None:
            pull.mul_(slope)
        pull.mul_(grad[rows, None] * spec.scale)
        if dw is not None:
            dw += pull.to(hidden.dtype).t() @ hidden[rows]
        if db is not None:
            db += pull.sum(0)
    return None if dw is None else dw.to(weight.dtype), None if db is None or bias is None else db.to(bias.dtype)


def _log_of_chosen(logits: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """log p of the chosen ids: (tokens,). One fused softmax is half the price of log_softmax and exp on a CPU.

    Its logarithm is as exact (relative error of p is absolute error of log p) unless p comes near the smallest float.
    """
    at_chosen = probabilities.gather(1, chosen)
    if bool((at_chosen < SMALL).any()):
        return (logits.gather(1, chosen) - torch.logsumexp(logits, -1, keepdim=True)).squeeze(1)
    return at_chosen.log().squeeze(1)


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None, laid: LaidOut | None) -> Tensor:
    """h W^T + b of a chunk, in the dtype of h."""
    return nn.functional.linear(hidden, weight, bias) if laid is None else laid.forward(hidden)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec) -> Tensor:
    """Scaled and capped logits of a chunk in float32."""
    return _shape(nn.functional.linear(hidden, weight, bias), spec)


def _shape(raw: Tensor, spec: HeadSpec) -> Tensor:
    logits = raw.to(_wide(raw.dtype))
    if spec.scale != 1.0:
        logits = logits * spec.scale
    if spec.cap is not None:
        logits = torch.tanh(logits / spec.cap) * spec.cap
    return logits


def _slopes(logits: Tensor, spec: HeadSpec) -> Tensor | None:
    """d cap(x) / dx at each capped logit: 1 - (z / c)^2. None without a cap."""
    return None if spec.cap is None else 1.0 - (logits / spec.cap) ** 2


def _module_logps(hidden: Tensor, head: nn.Module, targets: Tensor, spec: HeadSpec) -> Tensor:
    """Any head module, in chunks whose logits are computed again in backward."""

    def chunk_logps(rows: Tensor, ids: Tensor) -> Tensor:
        return torch.log_softmax(_shape(head(rows), spec), -1).gather(1, ids[:, None]).squeeze(1)

    parts = []
    for rows, ids in zip(torch.split(hidden, spec.chunk), torch.split(targets, spec.chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(cast(Tensor, torch.utils.checkpoint.checkpoint(chunk_logps, rows, ids, use_reentrant=False)))
        else:
            parts.append(chunk_logps(rows, ids))
    return torch.cat(parts)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
