"""The judge that is a reward model: a Hugging Face sequence classifier that scores one completion at a time.

{name: reward_model, model: path/or/hub-id}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import Field

from preftune.core.ids import digest_json
from preftune.core.records import Messages
from preftune.judging.base import Candidate, OnProgress, Request, Verdict, judges

if TYPE_CHECKING:
    from preftune.modeling.reward import RewardScorer

SCORING = 1  # part of a judge's identity: raise it when the same weights come to score otherwise


@judges.register("reward_model")
@dataclass(frozen=True)
class RewardModelJudge:
    """Bradley-Terry: the first wins with probability 1 / (1 + exp(r2 - r1)), r being the rewards.

    Parameters
        model: a folder or hub id of a sequence classifier. revision: of a hub id.
        label: index of the output that is the reward, where there are several.
        batch_size, max_length: completions at once; tokens of prompt and completion, the beginning is cut.
        tie_margin: a difference of rewards below this is a tie.
        title: what the judge is called in reports.
    """

    model: Annotated[str, MinLen(1)]
    revision: str | None = None
    label: Annotated[int, Ge(0)] | None = None
    batch_size: Annotated[int, Ge(1)] = 16
    max_length: Annotated[int, Ge(1)] = 2048
    tie_margin: Annotated[float, Ge(0), Field(allow_inf_nan=False)] = 0.0
    title: str = ""

    @cached_property
    def weights(self) -> str:
        """Digest of the model's files."""
        from preftune.modeling.reward import reward_digest, reward_folder

        return reward_digest(reward_folder(self.model, self.revision))

    @cached_property
    def identity(self) -> str:
        """Digest of what decides a verdict: weights, output, length limit and margin, not where the model lies."""
        told = [self.weights, self.label, self.max_length, self.tie_margin]
        return digest_json({"name": "reward_model", "scoring": SCORING, "settings": told})

    def describe(self) -> dict[str, Any]:
        """Name, title, identity, weights and settings in JSON values."""
        title = self.title or self.model.rstrip("/").rpartition("/")[2]
        told = {"name": "reward_model", "title": self.title, "label": f"reward model '{title}'", "identity": self.identity}
        return {
            **told,
            "weights": self.weights,
            "output": self.label,
            "max_length": self.max_length,
            "tie_margin": self.tie_margin,
        }

    def score(self, prompt: Messages, candidate: Candidate) -> float:
        """The reward of one completion."""
        return self._scorer.scores([(prompt, candidate.text)])[0]

    def __call__(self, prompt: Messages, first: Candidate, second: Candidate) -> Verdict:
        """The verdict of two rewards."""
        return self._verdict(*self._scorer.scores([(prompt, first.text), (prompt, second.text)]))

    def judge_many(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Verdict | None]:
        """Every verdict; each completion of a prompt is scored once, in batches of about one length."""
        wanted = list(dict.fromkeys((prompt, one.text) for prompt, *pair in requests for one in pair))
        wanted.sort(key=lambda one: len(one[1]))
        rewards: dict[tuple[Messages, str], float] = {}
        for start in range(0, len(wanted), self.batch_size):
            part = wanted[start : start + self.batch_size]
            rewards.update(zip(part, self._scorer.scores(part), strict=True))
            if on_progress is not None:
                on_progress(min(start + self.batch_size, len(wanted)), len(wanted))
        return [self._verdict(rewards[prompt, first.text], rewards[prompt, second.text]) for prompt, first, second in requests]

    @cached_property
    def _scorer(self) -> RewardScorer:
        from preftune.modeling.reward import RewardScorer, reward_folder

        folder = reward_folder(self.model, self.revision)
        return RewardScorer(folder, label=self.label, batch_size=self.batch_size, max_length=self.max_length)

    def _verdict(self, first: float, second: float) -> Verdict:
        difference = first - second
        detail = {"first": first, "second": second}
        if difference == 0 or abs(difference) < self.tie_margin:
            return Verdict(0.5, "tie", detail)
        share = 0.5 * (1.0 + math.tanh(difference / 2))  # the logistic function, without overflow
        return Verdict(share, "first" if difference > 0 else "second", detail)
