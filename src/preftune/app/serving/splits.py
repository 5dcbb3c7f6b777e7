"""Traffic of one name split between two versions, and the live result.

Who asks with the same ``user`` always gets the same version; without one every request is drawn anew. The unit of the
result is the user (or the request): ratings of one user are averaged first.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preftune.app.jobs.models import list_models
from preftune.app.jobs.platform import Platform
from preftune.app.serving.capture import FEEDBACK, every
from preftune.app.serving.names import served_model
from preftune.core.errors import UsageError
from preftune.statistics.intervals import Interval, difference_interval, mean_interval
from preftune.store.base import Query
from preftune.store.records import Capture, Event, ModelVersion, Resource, new_id

SPLIT = "split"


@dataclass(frozen=True, slots=True)
class Chosen:
    """Who answers a request: the model, and of a split its id and the unit that was assigned."""

    model: ModelVersion
    split: str = ""
    unit: str = ""


def open_split(platform: Platform, project: str, name: str, models: Sequence[str], weight: float) -> Resource:
    """Split the traffic of a new name: the second model gets the share ``weight``.

    Raises
        UsageError: not two different models, a name that is taken, a share outside (0, 1).
    """
    if not 0 < weight < 1:
        raise UsageError(f"weight is {weight}: the share of the second model lies between 0 and 1")
    found = [served_model(platform, project, one) for one in models]
    if len(found) != 2 or found[0].id == found[1].id:
        raise UsageError("a split is between two different models")
    if name in {one.name for one in list_models(platform, project)} or find_split(platform, project, name) is not None:
        raise UsageError(f"the name {name!r} is taken; a split needs one of its own")
    body = {"models": [one.id for one in found], "names": list(models), "weight": weight, "salt": secrets.token_hex(8)}
    return platform.store.insert(Resource(id=new_id("split_"), project=project, type=SPLIT, name=name, body=body))


def find_split(platform: Platform, project: str, name: str) -> Resource | None:
    """The open split of that name."""
    found = platform.store.page(Resource, Query(project, {"type": SPLIT, "name": name}, limit=1)).items
    return found[0] if found else None


def choose_model(platform: Platform, project: str, name: str, user: str | None) -> Chosen:
    """The model that answers to a name.

    Raises
        UsageError: no such model.
    """
    split = find_split(platform, project, name)
    if split is None:
        return Chosen(served_model(platform, project, name))
    # what is kept of a user is a hash that only this split can make
    unit = hashlib.sha256(f"{split.body['salt']}|{user or secrets.token_hex(16)}".encode()).hexdigest()
    is_second = int(unit[:12], 16) / 16**12 < split.body["weight"]
    return Chosen(served_model(platform, project, split.body["models"][int(is_second)]), split.id, unit[12:36])


def result(platform: Platform, split: Resource) -> dict[str, Any]:
    """Requests, ratings and preferences of both versions so far, with 95 % intervals.

    difference: mean rating of the second minus that of the first. win_rate: of the second over the first, where completions
    of both were compared. verdict: better or worse where the interval of the difference leaves out 0 (of the win rate .5,
    where there are no ratings), else inconclusive.
    """
    captures = {
        one.id: one
        for one in every(platform, Capture, split.project, {"model": tuple(split.body["models"])})
        if one.split == split.id
    }  # fmt: skip
    ratings: dict[str, float] = {}
    wins: dict[str, list[float]] = defaultdict(list)
    second = split.body["models"][1]
    for one in every(platform, Event, split.project, {"type": FEEDBACK}):
        capture = captures.get(one.subject)
        if capture is None:
            continue
        if "rating" in one.data:
            ratings[one.subject] = float(one.data["rating"])
        other = captures.get(one.data.get("over", {}).get("capture", ""))
        if other is not None and other.model != capture.model:
            score = 0.5 if one.data["over"]["is_tie"] else float(capture.model == second)
            wins[capture.unit].append(score)
    arms = []
    for model, name in zip(split.body["models"], split.body["names"], strict=True):
        own = [kept for kept in captures.values() if kept.model == model]
        by_unit: dict[str, list[float]] = defaultdict(list)
        for kept in own:
            if kept.id in ratings:
                by_unit[kept.unit].append(ratings[kept.id])
        scores = [sum(values) / len(values) for values in by_unit.values()]
        requests = len({kept.request for kept in own})
        arms.append((name, requests, sum(len(values) for values in by_unit.values()), scores))
    shown = [
        {"model": name, "requests": requests, "ratings": count, "units": len(scores), **_mean(scores)}
        for name, requests, count, scores in arms
    ]  # fmt: skip
    row: dict[str, Any] = {"object": "split", "id": split.id, "name": split.name, "weight": split.body["weight"], "arms": shown}
    first_scores, second_scores = arms[0][3], arms[1][3]
    verdict = "inconclusive"
    if first_scores and second_scores:
        value, interval = difference_interval(second_scores, first_scores)
        row["difference"] = {"value": value, **_shown(interval)}
        verdict = "better" if interval.low > 0 else "worse" if interval.high < 0 else verdict
    averaged = [sum(values) / len(values) for values in wins.values()]
    if averaged:
        row["win_rate"] = {**_mean(averaged), "comparisons": sum(len(values) for values in wins.values()), "units": len(averaged)}
        if "difference" not in row:
            low, high = row["win_rate"]["interval"]
            verdict = "better" if low > 0.5 else "worse" if high < 0.5 else verdict
    return {**row, "verdict": verdict}


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        return {"mean": None}
    return {"mean": sum(scores) / len(scores), **_shown(mean_interval(scores))}


def _shown(interval: Interval) -> dict[str, Any]:
    return {"interval": [interval.low, interval.high], "method": interval.method}
