r"""f-divergences in place of the KL divergence: what a log-ratio is worth to the policy under each of them.

A policy that maximises reward minus beta D_f(pi || ref) has, for f with invertible f' and f'(0) undefined,

    r(x, y) = beta f'(u) + c(x),   u = pi(y|x) / ref(y|x)

(f-DPO, Wang et al. 2023, arXiv:2309.16240: the reward of the optimal policy). c(x) is the same for both completions, so it
cancels in a difference of two rewards and in nothing else: a loss takes the option only where it reads the rewards through
their plain difference.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from preftune.core.errors import UsageError

Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]
MAX_EXPONENT = 80.0  # e^80 = 5.5e34: a difference of two such scores is finite in float32 and in bfloat16


def divergence_score(logratio: Float[Tensor, " pairs"], divergence: Divergence, alpha: float) -> Float[Tensor, " pairs"]:
    r"""f'(u) - f'(1) for u = e^logratio: the implicit reward over beta, 0 where the policy equals its reference.

    With r the log-ratio (the derivatives of the paper's divergences, each f' moved by a constant, which cancels too)

        reverse_kl      r                          f(u) = u log u, plain DPO
        forward_kl      1 - e^-r                   f(u) = -log u
        jensen_shannon  log 2 + log sigmoid(r)     f(u) = u log u - (u + 1) log((u + 1) / 2)
        alpha           (1 - e^(-alpha r)) / alpha f(u) = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1))

    alpha in (0, 1): towards 0 it is reverse_kl, at 1 forward_kl. Gradients on r: 1, e^-r, sigmoid(-r), e^(-alpha r).
    Where implementations disagree: TRL's coefficient is 1 - alpha (its u^(a - 1) against the paper's u^-alpha). Exponents end at
    80, beyond which the gradient is 0; TRL ends them there for alpha, and its forward_kl overflows to NaN instead.

    >>> r = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> [round(float(divergence_score(r, name, 0.5)[1]), 4) for name in ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")]
    [1.0, 0.6321, 0.3799, 0.7869]
    """
    if divergence == "forward_kl":
        return -torch.expm1((-logratio).clamp(max=MAX_EXPONENT))
    if divergence == "jensen_shannon":
        return math.log(2) + functional.logsigmoid(logratio)
    if divergence == "alpha":
        return -torch.expm1((-alpha * logratio).clamp(max=MAX_EXPONENT)) / alpha
    return logratio


def refuse_by_length(loss: str, divergence: Divergence, *, is_by_length: bool) -> None:
    """Refuse a divergence beside log-ratios by length: c(x) divided by two different lengths does not cancel.

    Raises
        UsageError: both are asked for. TRL takes them together.
    """
    if is_by_length and divergence != "reverse_kl":
        raise UsageError(
            f"loss {loss!r}, option 'divergence': {divergence} is derived for log-ratios of whole completions; "
            "set length_normalised: false, or divergence: reverse_kl"
        )
