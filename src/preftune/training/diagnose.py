"""What the metrics of a stage mean, in words: four faults of preference training, each with thresholds and a way out.

The loop tells, this thinks: ``Diagnosis.see`` takes the rows of ``metrics.jsonl`` as they are written and gives back what
is to be said. It is a function of those rows alone, so a resumed stage reads them again and says nothing twice.

* likelihood displacement (Razin et al. 2024, arXiv:2410.08847): the chosen completions lose probability too;
* length exploitation (Park et al. 2024, arXiv:2403.19159): the policy writes longer, or its margins follow the length;
* saturation: all pairs are ordered, gradients are gone and margins still grow; or, the reverse, nothing is learnt;
* collapse: entropy, distinct bigrams or the end token of the probe's completions break down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from preftune.core.events import Noted
from preftune.core.records import View

Row = Mapping[str, float]
WORSE = 1.5  # an alert that was given comes again when its figure is this many times as far beyond the threshold


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When an alert is given; docs/training.md shows them.

    Parameters
        chosen_fall: nats a token that the chosen completions lose against the reference.
        chosen_fall_free: the same without a reference, as a share of their log-probability at the first evaluation.
        length_ratio: length of the probe's completions over those of the start.
        length_correlation: Spearman's, between margin and difference of lengths (chosen - rejected).
        min_pairs, min_steps: what a rule over pairs or steps needs to say anything.
        accuracy, grad_share: saturation: accuracy of the last steps, and their gradient norm over that of the first ones.
        margin_growth: of the second half of the last steps over their first half. dead_margin: against a reference, a mean
            margin that is as good as none, where the log-ratios are less than dead_nats apart too (a beta of 1e-3, as SPPO has
            it, makes small margins of large differences).
        entropy_low, entropy_high, distinct: of the probe over the start's; distinct_sft: the same while imitating.
        eos_fall: share of completions that no longer end by themselves.
    """

    chosen_fall: float = 0.1
    chosen_fall_free: float = 0.1
    length_ratio: float = 1.3
    length_correlation: float = 0.8
    min_pairs: int = 64
    min_steps: int = 20
    accuracy: float = 0.99
    grad_share: float = 0.1
    margin_growth: float = 1.005
    dead_margin: float = 0.01
    dead_nats: float = 0.1
    entropy_low: float = 0.6
    entropy_high: float = 1.5
    distinct: float = 0.8
    distinct_sft: float = 0.5
    eos_fall: float = 0.4


@dataclass(frozen=True, slots=True)
class Alert:
    """One finding; ``excess`` is 1 at the threshold and grows with the fault."""

    code: str
    excess: float
    sentence: str


@dataclass(slots=True)
class History:
    """The rows so far, by kind, and what the stage is."""

    view: View
    num_steps: int
    pairs_per_step: int
    limits: Thresholds
    steps: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    probes: list[Row] = field(default_factory=list)

    def window(self) -> Sequence[Row]:
        """The last fifth of the steps, ten at least."""
        return self.steps[-max(10, len(self.steps) // 5) :]

    def mean(self, name: str, rows: Sequence[Row]) -> float | None:
        """Mean of a metric over rows, None where none of them has it."""
        values = [row[name] for row in rows if name in row]
        return fmean(values) if values else None

    def newest(self, name: str) -> float | None:
        """The newest held-out value of a metric, or its mean over the last steps."""
        if self.held_out and f"eval_{name}" in self.held_out[-1]:
            return self.held_out[-1][f"eval_{name}"]
        return self.mean(name, self.window())


class Diagnosis:
    """The alerts of one stage.

    Parameters
        view: what the stage's loss takes. num_steps, pairs_per_step: of the stage.
    """

    def __init__(self, view: View, num_steps: int, pairs_per_step: int, limits: Thresholds | None = None) -> None:
        self.history = History(view, num_steps, pairs_per_step, limits or Thresholds())
        self._said: dict[str, float] = {}

    def see(self, row: Row) -> list[Noted]:
        """Take a row and say what is new; a row of a step is only remembered."""
        if "loss" in row:
            self.history.steps.append(row)
            return []
        if any(name.startswith("eval_") for name in row):
            self.history.held_out.append(row)
        if "probe/entropy" in row:
            self.history.probes.append(row)
        found = [alert for rule in RULES if (alert := rule(self.history)) is not None]
        return [self._say(alert) for alert in found if alert.excess >= WORSE * self._said.get(alert.code, 1 / WORSE)]

    def _say(self, alert: Alert) -> Noted:
        is_again = alert.code in self._said
        self._said[alert.code] = alert.excess
        step = int(max((rows[-1]["step"] for rows in (self.history.steps, self.history.probes) if rows), default=0))
        return Noted("warning", alert.code, f"step {step}{', worse than before' if is_again else ''}: {alert.sentence}")


def displacement(history: History) -> Alert | None:
    """The chosen completions lose probability while the margin grows, because the rejected ones lose more."""
    limits = history.limits
    chosen, rejected = (history.newest(f"logps/{side}_change_per_token") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return _displacement_without_reference(history)
    if chosen > -limits.chosen_fall or rejected > chosen:
        return None
    return Alert(
        "likelihood_displacement",
        -chosen / limits.chosen_fall,
        f"the chosen completions have become less likely: {chosen:+.2f} nats a token against the reference, the rejected ones "
        f"{rejected:+.2f}; the margin grows by pushing both down, and the probability goes to texts that nobody rated; "
        "add an NLL term on the chosen (rpo_alpha), try dpop, lower lr, or drop pairs whose two answers are nearly the same",
    )


def _displacement_without_reference(history: History) -> Alert | None:
    rows = [row for row in history.held_out if "eval_logps/chosen" in row]
    if history.view != "pairs" or len(rows) < 2:
        return None
    (first, chosen), (before, rejected) = (
        (rows[0][f"eval_logps/{side}"], rows[-1][f"eval_logps/{side}"]) for side in ("chosen", "rejected")
    )
    fall = (first - chosen) / abs(first) if first else 0.0
    if fall < history.limits.chosen_fall_free or rejected > before:
        return None
    return Alert(
        "likelihood_displacement",
        fall / history.limits.chosen_fall_free,
        f"the chosen completions have become less likely: {first:.1f} to {chosen:.1f} nats a completion since the first "
        f"evaluation, the rejected ones {before:.1f} to {rejected:.1f}; lower lr, or add an NLL term on the chosen",
    )


def length_exploitation(history: History) -> Alert | None:
    """The policy writes longer than its start did, or its margins are the difference of lengths."""
    limits = history.limits
    if history.view == "demonstrations" or not history.probes:
        return None
    last = history.probes[-1]
    ratio, correlation = last["probe/length_ratio"], last.get("margins/length_correlation", 0.0)
    way_out = (
        "balance the lengths of chosen and rejected, use a length-normalised loss (simpo, or dpo with length_normalized), "
        "and read the length-controlled win rate, not the raw one"
    )
    if ratio > limits.length_ratio:
        unended = 1 - last["probe/eos_rate"]
        return Alert(
            "length_exploitation",
            (ratio - 1) / (limits.length_ratio - 1),
            f"completions of the probe are {ratio:.2f} times as long as at the start ({last['probe/length']:.0f} tokens, "
            f"{unended:.0%} of them cut at the limit); the margins of the last pairs correlate with their difference of lengths "
            f"by {correlation:+.2f}; {way_out}",
        )
    if correlation > limits.length_correlation:
        return Alert(
            "length_exploitation",
            1.0,
            f"the margin follows the length: over the last pairs its rank correlation with the difference of lengths (chosen - "
            f"rejected) is {correlation:+.2f}, so 'longer' explains most of what was learnt; {way_out}",
        )
    return None


def saturation(history: History) -> Alert | None:
    """All pairs are ordered and the gradient is gone, yet the margins grow."""
    limits, window = history.limits, history.window()
    accuracy, margins = history.mean("rewards/accuracies", window), [row.get("rewards/margins", 0.0) for row in window]
    if accuracy is None or len(history.steps) < limits.min_steps or accuracy < limits.accuracy:
        return None
    half = len(margins) // 2
    before, after = fmean(margins[:half]), fmean(margins[half:])
    early = median(row["grad_norm"] for row in history.steps[: max(5, len(history.steps) // 5)])
    share = median(row["grad_norm"] for row in window) / early if early else 0.0
    if after < limits.margin_growth * before or share > limits.grad_share:
        return None
    return Alert(
        "saturation",
        1.0,
        f"accuracy is {accuracy:.2f}, the gradient is {share:.1%} of what it was at the start and the margin still grows "
        f"({before:.2f} to {after:.2f}): the pairs are learnt, more steps only move the policy away from its reference; "
        "use fewer epochs, early_stopping, a higher beta, or ipo, whose margin has a target",
    )


def no_learning(history: History) -> Alert | None:
    """Half of the stage has passed, and the pairs are ordered no better than by a coin or the margins are still next to 0."""
    limits = history.limits
    rows = history.steps[len(history.steps) // 2 :]
    accuracy, num_pairs = history.mean("rewards/accuracies", rows), len(rows) * history.pairs_per_step
    is_early = len(history.steps) < max(limits.min_steps, history.num_steps // 2)
    if accuracy is None or is_early or num_pairs < limits.min_pairs:
        return None
    noise = 2 * math.sqrt(0.25 / num_pairs)
    margin = history.mean("rewards/margins", rows) or 0.0
    changes = [history.mean(f"logps/{side}_change", rows) for side in ("chosen", "rejected")]
    apart = None if changes[0] is None or changes[1] is None else abs(changes[0] - changes[1])
    is_dead = apart is not None and abs(margin) < limits.dead_margin and apart < limits.dead_nats
    if accuracy > 0.5 + noise and not is_dead:
        return None
    return Alert(
        "no_learning",
        1.0,
        f"over the last {num_pairs} pairs the mean margin is {margin:+.4f} and the accuracy {accuracy:.2f} (a coin gives one "
        f"half ± {noise:.2f}): nothing worth the name has been learnt; raise lr, train longer, or look whether the labels are "
        "right (`preftune show RUN --suspects`)",
    )


def collapse(history: History) -> Alert | None:
    """The probe's completions have become uniform, repetitive, noisy or endless."""
    limits = history.limits
    if len(history.probes) < 2:
        return None
    first, last = history.probes[0], history.probes[-1]
    faults: list[tuple[float, str]] = []
    distinct = last["probe/distinct_2"] / max(first["probe/distinct_2"], 1e-9)
    if distinct < (limits.distinct_sft if history.view == "demonstrations" else limits.distinct):
        words = f"distinct bigrams {first['probe/distinct_2']:.2f} to {last['probe/distinct_2']:.2f}"
        faults.append((limits.distinct / max(distinct, 1e-9), words))
    entropy = last["probe/entropy"] / max(first["probe/entropy"], 1e-9)
    if history.view != "demonstrations" and not limits.entropy_low <= entropy <= limits.entropy_high:
        excess = limits.entropy_low / max(entropy, 1e-9) if entropy < 1 else entropy / limits.entropy_high
        faults.append((excess, f"entropy {first['probe/entropy']:.2f} to {last['probe/entropy']:.2f} nats a token"))
    fall = first["probe/eos_rate"] - last["probe/eos_rate"]
    if fall > limits.eos_fall:
        words = f"completions that end by themselves {first['probe/eos_rate']:.0%} to {last['probe/eos_rate']:.0%}"
        faults.append((fall / limits.eos_fall, words))
    if not faults:
        return None
    kl = last.get("probe/kl", last.get("kl", 0.0))
    return Alert(
        "collapse",
        max(excess for excess, _ in faults),
        f"the policy no longer writes as it did at the start: {', '.join(words for _, words in faults)}, kl {kl:.1f} nats a "
        "completion; lower lr or raise beta, and take an earlier checkpoint (keep: best)",
    )


RULES: tuple[Callable[[History], Alert | None], ...] = (displacement, length_exploitation, saturation, no_learning, collapse)
