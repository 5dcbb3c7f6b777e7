"""Which step is the best one on ``select``, and when a stage has stopped getting better."""

from __future__ import annotations

from collections.abc import Mapping

from preftune.core.errors import UsageError
from preftune.core.recipe import StageConfig
from preftune.core.watching import EarlyStoppingConfig
from preftune.training.state import TrainState

SMALLER_IS_BETTER = frozenset({"eval_loss"})


def is_wanted(config: StageConfig) -> bool:
    """Whether a stage needs held-out examples to decide something."""
    return config.early_stopping is not None or config.keep == "best"


def check_selectable(config: StageConfig, num_select: int) -> None:
    """UsageError where early stopping or the best checkpoint is asked for and nothing is held out to choose by."""
    if not is_wanted(config) or (num_select and config.evals):
        return
    what = "early_stopping" if config.early_stopping is not None else "keep: best"
    missing = "data.select holds no examples" if config.evals else "evals is 0"
    raise UsageError(
        f"stage {config.name}: {what} needs held-out examples, and {missing}; set data.select to a share such as 0.1 or a file, "
        "and evals to 1 or more"
    )


def note_evaluation(config: StageConfig, state: TrainState, held_out: Mapping[str, float]) -> bool:
    """Put an evaluation into the state: best value and step, evaluations without a gain, the end; True for a new best.

    A gain is an improvement by more than ``min_delta`` over the best value so far; the first evaluation is one. The
    ``warmup_evals`` after the first can be the best, and do not count against ``patience``.

    Raises
        UsageError: the stage's loss does not give the metric.
    """
    if not is_wanted(config):
        return False
    rule = config.early_stopping or EarlyStoppingConfig()
    if rule.metric not in held_out:
        known = ", ".join(sorted(held_out))
        raise UsageError(
            f"stage {config.name}: early_stopping.metric: {config.method} gives no {rule.metric!r} on select; it gives {known}"
        )
    value = held_out[rule.metric]
    state.num_evals += 1
    better = -value if rule.metric in SMALLER_IS_BETTER else value
    best = state.best_value if rule.metric not in SMALLER_IS_BETTER or state.best_value is None else -state.best_value
    if best is None or better > best + rule.min_delta:
        state.best_step, state.best_value, state.evals_without_gain = state.step, value, 0
        return True
    if state.num_evals <= 1 + rule.warmup_evals:
        return False
    state.evals_without_gain += 1
    if config.early_stopping is not None and state.evals_without_gain >= rule.patience:
        state.ended = (
            f"{rule.metric} has not improved for {state.evals_without_gain} evaluations: best {state.best_value:.6g} at step "
            f"{state.best_step}, now {value:.6g}"
        )
    return False
