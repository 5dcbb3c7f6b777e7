"""The models that the rounds of a run left behind, compared on the prompts of its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from preftune.app.contest import Contest
from preftune.core.recipe import ModelConfig

if TYPE_CHECKING:
    from preftune.evaluation.rounds import RoundResult
    from preftune.evaluation.winrate import Completion, WinRate


def models_of_rounds(contest: Contest) -> list[tuple[str, str]]:
    """(stage, model) of the start and of every round; empty where the contest is not about the last of two or more rounds."""
    if contest.run is None:
        return []
    found: dict[int, tuple[str, str]] = {}
    for stage, record in zip(contest.recipe.stages, contest.run.read()["stages"], strict=False):
        if stage.round == 1 and 0 not in found:
            found[0] = ("the start", str(record["start"]))
        if stage.round and "final" in record:
            found[stage.round] = (stage.name, str(contest.run.path / record["final"]))
    if max(found, default=0) < 2 or found[max(found)][1] != contest.policy.name:
        return []
    return [found[number] for number in sorted(found)]


def compare_rounds(
    contest: Contest,
    written: Mapping[str, Sequence[Completion]],
    judged: Mapping[tuple[str, str], WinRate],
    write: Callable[[ModelConfig, str], Sequence[Completion]],
    judge: Callable[[Sequence[Completion], Sequence[Completion]], WinRate],
) -> tuple[RoundResult, ...]:
    """Each round against the start and against the round before; none where the run has no rounds.

    Parameters
        written: completions that are there already, by model. judged: win rates that are, by (policy, baseline).
        write: completions of a model, with the role to show. judge: the win rate of two models' completions.
    """
    from preftune.evaluation.rounds import compare

    models = models_of_rounds(contest)
    if not models:
        return ()
    answers = dict(written)
    rates = dict(judged)
    for number, (_, name) in enumerate(models):
        if name not in answers:
            config = contest.policy.model_copy(update={"name": name, "revision": None})
            if name == contest.recipe.model.name:
                config = contest.recipe.model
            answers[name] = write(config, "start" if number == 0 else f"model of round {number}")

    def rate(one: str, other: str) -> WinRate:
        if (one, other) not in rates:
            rates[one, other] = judge(answers[one], answers[other])
        return rates[one, other]

    start = models[0][1]
    rows = [(stage, rate(name, start), rate(name, models[number][1])) for number, (stage, name) in enumerate(models[1:])]
    return compare(rows, seed=contest.recipe.seed)
