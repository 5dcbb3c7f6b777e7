"""The judge of the result may not be one that made the pairs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from preftune.core.errors import Blocked, Finding, PreftuneError
from preftune.core.recipe import EvaluationConfig, Recipe

if TYPE_CHECKING:
    from preftune.judging.base import Judge

WAY_OUT = "judge the result by another judge, or say why it may in evaluation.same_judge_reason"


def refuse_same_judge(recipe: Recipe, evaluation: EvaluationConfig) -> None:
    """Raise Blocked where a judge that the recipe names for its pairs is to judge the result, and no reason is given."""
    found = check_judges(recipe, evaluation)
    if found:
        raise Blocked(found)


def check_judges(recipe: Recipe, evaluation: EvaluationConfig, rows: Collection[str] = ()) -> list[Finding]:
    """A blocker for every judge of pairs that the judge of the result is not independent of.

    Looked at are ``pairs_judge``, the judges of generate stages, and ``rows``: the names that the rows carry of who labelled
    them. Judges that cannot be read have findings of their own; ``same_judge_reason`` lets everything pass.
    """
    from preftune.app.stages.generating import maker_judges
    from preftune.judging.base import load_judge, names_of

    if evaluation.same_judge_reason is not None:
        return []
    try:
        judge = load_judge(evaluation.judge, Path.cwd())
        specs = [one for _, one in maker_judges(recipe)]
        if evaluation.pairs_judge is not None:
            specs.append(evaluation.pairs_judge)
        makers = {maker.identity: maker for maker in (load_judge(one, Path.cwd()) for one in specs)}
    except PreftuneError:
        return []
    facts = [fact for maker in makers.values() for fact in _shared(judge, maker)]
    named = [name for name in names_of(judge) if name in rows]
    if named and not facts:
        facts = [f"the judge of the result ({named[-1]}) is named in the rows' field judges: it labelled pairs"]
    return [Finding("blocker", "judge_not_independent", fact, WAY_OUT) for fact in facts]


def _shared(judge: Judge, maker: Judge) -> list[str]:
    """What two judges share: everything, a model, or words; empty where they are independent."""
    from preftune.judging.base import names_of
    from preftune.judging.rules import RulesJudge, independence

    if judge.identity == maker.identity:
        return ["the judge of the result is the one that made the pairs"]
    both = [name for name in names_of(judge) if name in names_of(maker)]
    if both:
        return [f"the judge of the result asks the model that made the pairs ({both[0]})"]
    if isinstance(judge, RulesJudge) and isinstance(maker, RulesJudge):
        shared = independence(maker, judge)
        if shared:
            words = ", ".join(shared[:5])
            return [f"the judge of the result shares {len(shared)} words with the judge that made the pairs ({words})"]
    return []
