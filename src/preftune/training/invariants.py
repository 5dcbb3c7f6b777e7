"""What must hold before the first step, checked on the first pack of every run.

A policy that starts as its own reference has margin 0 on every pair, and a packed forward pass gives the numbers of a
plain one. Where that fails, everything after it is wrong in a way that no curve shows.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from preftune.core.errors import PreftuneError
from preftune.data.pack import Pack, cropped, pack_of
from preftune.modeling.forward import TOLERANCE, Scorer
from preftune.training.spread import local_part
from preftune.training.step import Objective

PLAIN_TOKENS = 4096
COMPARED_TOKENS = 1024
"""Tokens of a pack that are scored both ways: a difference of layouts shows in a few groups, and plain rows repeat prompts."""


class InvariantBroken(PreftuneError):
    """A check at run start failed; the message holds the numbers. The run must not go on."""


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that hold a NaN or an infinity, and of buffers that hold a NaN; every rank sees its own part."""
    found = []
    for name, parameter in model.named_parameters():
        held = local_part(parameter.detach())
        if held.is_floating_point() and not bool(torch.isfinite(held).all()):
            found.append(name)
    for name, buffer in model.named_buffers():  # such as the bias that routes experts; masks among them may be infinite
        if buffer.is_floating_point() and bool(torch.isnan(local_part(buffer)).any()):
            found.append(name)
    return found


def check_weights(model: nn.Module, name: str) -> None:
    """InvariantBroken where a model that was loaded has weights that are not finite: no row of any data would be at fault."""
    broken = not_finite(model)
    if broken:
        raise InvariantBroken(
            f"model {name!r}: {len(broken)} of its weights hold NaN or infinity, first {broken[0]}; its files are damaged or its "
            "training diverged: restore it, or start from an earlier checkpoint"
        )


def check_packed_equals_plain(scorer: Scorer, pack: Pack) -> float:
    """Compare the shared layout with one plain row per completion; the largest gap in nats per token.

    The first groups of the pack are compared, two at least where it has them, up to ``COMPARED_TOKENS``.
    Of a long example the end of its prompt is compared: the model's own attention may take memory with the square of a row.
    Nothing to compare, and 0, where the scorer does not share prefixes.

    Raises
        InvariantBroken: the gap is more than rounding.
    """
    if not scorer.is_shared:
        return 0.0
    plain = scorer.plain()
    compared = [cropped(one, PLAIN_TOKENS) for one in pack.examples]
    reached = itertools.accumulate(one.num_tokens for one in compared)
    pack = pack_of(
        [one for at, (one, total) in enumerate(zip(compared, reached, strict=True)) if at < 2 or total <= COMPARED_TOKENS]
    )
    with torch.no_grad():
        gap = (scorer.token_logps(pack) - plain.token_logps(pack)).abs()
    mean, most = TOLERANCE[scorer.dtype]
    if gap.numel() and not (gap.mean() <= mean and gap.max() <= most):
        raise InvariantBroken(
            f"packed log-probabilities differ from plain ones by {gap.max():.3g} nats at most and {gap.mean():.3g} on average "
            f"(allowed {most:g} and {mean:g}); write shared_prefix: 'off' and report this"
        )
    return float(gap.max()) if gap.numel() else 0.0


def check_start_is_reference(objective: Objective, pack: Pack, *, is_exact: bool) -> float:
    """Compare the policy with its reference before any step; the largest gap in nats per token.

    Parameters
        is_exact: the reference was scored just now, by this pack, on a CPU: then the gap is exactly 0, so every margin
            is 0 and the loss of DPO is log 2. Otherwise packs may differ, and rounding with them.

    Raises
        InvariantBroken: the policy does not start as its reference.
    """
    if objective.reference is None:
        return 0.0
    was_training = objective.scorer.model.training
    objective.scorer.model.eval()  # dropout would be the policy's alone
    policy = objective.scorer.token_logps(pack).detach()
    objective.scorer.model.train(was_training)
    gap = (policy - objective.reference(pack)).abs()
    mean, most = (0.0, 0.0) if is_exact else TOLERANCE[objective.scorer.dtype]
    if gap.numel() and not (gap.mean() <= mean and gap.max() <= most):
        raise InvariantBroken(
            f"the policy does not start as its reference: log-probabilities differ by {gap.max():.3g} nats at most and "
            f"{gap.mean():.3g} on average (allowed {most:g} and {mean:g}); delete the reference cache and report this"
        )
    return float(gap.max()) if gap.numel() else 0.0
