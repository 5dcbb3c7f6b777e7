"""The sections of a stage that say how it is watched: its probe, and when it stops early."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge

from preftune.core.section import Positive, Section


class ProbeConfig(Section):
    """Completions sampled while a stage trains, for a few fixed prompts: how far the policy has moved and how it writes now.

    prompts: how many, drawn by the seed from ``select`` (from ``train`` where that is empty). samples: of each prompt.
    max_new_tokens ``None``: a quarter more than nine in ten completions of the data have, at most 192. evals ``None``: at
    the stage's own ``evals``, but no more often than about a tenth of the stage's work allows, and always at the end.
    """

    prompts: Positive = 16
    samples: Positive = 1
    max_new_tokens: Positive | None = None
    evals: Positive | None = None


class EarlyStoppingConfig(Section):
    """Stop a stage when a metric on ``select`` has not improved by more than ``min_delta`` for ``patience`` evaluations.

    warmup_evals: evaluations after the first one that are not counted against ``patience``.
    """

    metric: Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"] = "eval_loss"
    patience: Positive = 2
    min_delta: Annotated[float, Ge(0)] = 0.0
    warmup_evals: Annotated[int, Ge(0)] = 0


def on_or_off(value: Any) -> Any:
    """``probe: off`` is False in YAML; ``probe: on`` means the defaults."""
    if value is False or value == "off":
        return None
    return {} if value is True or value == "on" else value
