"""What each round of generate and train was worth: against the start, and against the round before, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from preftune.evaluation.showing import clean, interval_text, percent
from preftune.evaluation.winrate import WinRate, prompt_key
from preftune.statistics.intervals import Interval, mean_by_cluster, mean_interval
from preftune.statistics.paired import sign_flip

SAID = {
    "better": "raises the win rate",
    "worse": "lowers the win rate",
    "equivalent": "does not raise the win rate (the two models are equivalent)",
    "inconclusive": "does not show a higher win rate (the interval holds one half)",
}


@dataclass(frozen=True, slots=True)
class RoundResult:
    """One round: its model against the model before the first round, and against the round before.

    gain: mean over prompts of this round's score against the start minus that of the round before, in [-1, 1].
    interval: 95 %, of the gain. p_value: that it is zero, by flipping signs. All None in the first round, whose round
    before is the start.
    """

    number: int
    stage: str
    against_start: WinRate
    against_before: WinRate
    gain: float | None = None
    interval: Interval | None = None
    p_value: float | None = None

    @property
    def sentence(self) -> str:
        """What the round did, in plain words."""
        rate = self.against_before
        before = "the start" if self.number == 1 else f"round {self.number - 1}"
        text = (
            f"Round {self.number} {SAID[rate.verdict]}: its model wins {percent(rate.rate)} {interval_text(rate.interval)} of "
            f"{rate.num_prompts:,} unseen prompts against {before}, judged by {rate.judge_label} in both orders"
        )
        if self.gain is not None and self.interval is not None:
            text += (
                f"; against the start it wins {percent(self.against_start.rate)}, {100 * self.gain:+.1f} points "
                f"[{100 * self.interval.low:+.1f}, {100 * self.interval.high:+.1f}] over {before} on the same prompts"
            )
        return clean(text + ".")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "round": self.number,
            "stage": self.stage,
            "sentence": self.sentence,
            "verdict": self.against_before.verdict,
            "against_start": self.against_start.to_dict(),
            "against_before": self.against_before.to_dict(),
            "gain": self.gain,
            "gain_interval": None if self.interval is None else asdict(self.interval),
            "gain_p_value": self.p_value,
        }


def compare(rounds: Sequence[tuple[str, WinRate, WinRate]], seed: int = 0) -> tuple[RoundResult, ...]:
    """Every round with its gain over the one before.

    Parameters
        rounds: the stage's name, the win rate against the start and that against the round before, in order; all on
            the same prompts. seed: of the bootstrap and the flips.
    """
    results: list[RoundResult] = []
    for place, (stage, start, before) in enumerate(rounds):
        if place == 0:
            results.append(RoundResult(1, stage, start, before))
            continue
        differences = score_differences(start, rounds[place - 1][1])
        gain = float(differences.mean())
        half = mean_interval((differences + 1) / 2, seed=seed)  # the interval is made for scores in [0, 1]
        interval = Interval(2 * half.low - 1, 2 * half.high - 1, half.method)
        results.append(RoundResult(place + 1, stage, start, before, gain, interval, sign_flip(differences, seed=seed)))
    return tuple(results)


def score_differences(one: WinRate, other: WinRate) -> Any:
    """(prompts,): the score of each prompt in one comparison minus that in the other, of the prompts that both judged."""
    sides = []
    for rate in (one, other):
        keys = [prompt_key(judged.prompt) for judged in rate.judged]
        scores = mean_by_cluster([judged.score for judged in rate.judged], keys)
        sides.append(dict(zip(dict.fromkeys(keys), scores, strict=True)))
    shared = [key for key in sides[0] if key in sides[1]]
    return np.asarray([sides[0][key] - sides[1][key] for key in shared])
