"""Served completions that were kept, by consent, and what people said of them, as examples for the next round.

A completion is one record for each choice. Feedback is appended as events of that record, so that two who speak at once
both count; of one record's ratings and edits the last one holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from preftune.app.jobs.platform import Platform, event
from preftune.core.errors import UsageError
from preftune.store import base
from preftune.store.base import MAX_PAGE, Query
from preftune.store.records import Capture, Event, ModelVersion, Record, new_id

Kind: TypeAlias = Literal["preferences", "ratings"]
FEEDBACK = "feedback"
R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Spoken:
    """What somebody says of a completion.

    rating: 0 (bad) to 1 (good). over: the capture that it is better than (or as good as, ``is_tie``), ``strength`` 0 to 3.
    edit: what it should have been.
    """

    by: str
    rating: float | None = None
    over: Capture | None = None
    is_tie: bool = False
    strength: float = 0.0
    edit: str | None = None


def keep(
    platform: Platform,
    model: ModelVersion,
    project: str,
    request: str,
    messages: Sequence[Mapping[str, Any]],
    texts: Mapping[int, str],
    *,
    split: tuple[str, str] = ("", ""),
) -> None:
    """Keep the choices of an answer. Without messages only who answered is kept, for the count of a split.

    Parameters
        request: the id that the client was told. texts: of each choice. split: its id and the unit that was assigned.
    """
    for choice, text in texts.items():
        platform.store.insert(
            Capture(
                id=new_id("cap_"), project=project, model=model.id, request=request, messages=[dict(one) for one in messages],
                completion=text if messages else "", choice=choice, split=split[0], unit=split[1],
            )
        )  # fmt: skip


def captured(platform: Platform, project: str, request: str, choice: int = 0) -> Capture:
    """The record of a completion.

    Raises
        UsageError: none was kept under that id.
    """
    for one in every(platform, Capture, project, {"request": request}):
        if one.choice == choice:
            return one
    raise UsageError(
        f"no completion {request!r} (choice {choice}) was kept; send store: true with the request, on a server that allows it"
    )


def speak(platform: Platform, capture: Capture, said: Spoken) -> Event:
    """Add feedback to a completion.

    Raises
        UsageError: nothing was said; a text that was not kept is edited or compared; two prompts are compared.
    """
    if said.rating is None and said.over is None and said.edit is None:
        raise UsageError("the feedback says nothing; give rating, preference or edit")
    if (said.edit is not None or said.over is not None) and not capture.messages:
        raise UsageError("the text of this completion was not kept, so it can only be rated; send store: true with the request")
    if said.edit is not None and said.edit.strip() == capture.completion.strip():
        raise UsageError("edit is the completion itself; nothing was changed")
    data: dict[str, Any] = {"by": said.by}
    if said.rating is not None:
        data["rating"] = said.rating
    if said.edit is not None:
        data["edit"] = said.edit
    if said.over is not None:
        if said.over.id == capture.id:
            raise UsageError("preference: a completion is compared with itself")
        if said.over.messages != capture.messages:
            raise UsageError("preference: the two completions answer different prompts")
        data["over"] = {"capture": said.over.id, "is_tie": said.is_tie, "strength": said.strength}
    return platform.store.insert(event(capture.id, capture.project, FEEDBACK, "feedback was given", **data))


def every(platform: Platform, kind: type[R], project: str, where: Mapping[str, Any]) -> Iterator[R]:
    """All records of a list, oldest first, a page at a time."""
    return base.every(platform.store, kind, Query(project, where, limit=MAX_PAGE, is_newest_first=False))


def rows(platform: Platform, project: str, kind: Kind) -> Iterator[dict[str, Any]]:
    """Feedback as rows that ``preftune check`` reads.

    preferences: format ``comparison``; an edit is better than what it was made of. ratings: format ``trl-unpaired``, above
    one half desirable, below not, and one half is no label.
    """
    ratings: dict[str, float] = {}
    edits: dict[str, str] = {}
    pairs: list[tuple[str, dict[str, Any]]] = []
    for one in every(platform, Event, project, {"type": FEEDBACK}):
        if "rating" in one.data:
            ratings[one.subject] = float(one.data["rating"])
        if "edit" in one.data:
            edits[one.subject] = str(one.data["edit"])
        if "over" in one.data:
            pairs.append((one.subject, one.data["over"]))
    if kind == "ratings":
        for subject, rating in ratings.items():
            capture = platform.store.get(Capture, subject, project)
            if capture is not None and capture.messages and rating != 0.5:
                answer = [{"role": "assistant", "content": capture.completion}]
                yield {"prompt": capture.messages, "completion": answer, "label": rating > 0.5, "model": capture.model}
        return
    for subject, over in pairs:
        better, other = platform.store.get(Capture, subject, project), platform.store.get(Capture, over["capture"], project)
        if better is not None and other is not None and better.completion.strip() != other.completion.strip():
            row = {"prompt": better.messages, "first": better.completion, "second": other.completion}
            row |= {"label": "tie" if over["is_tie"] else "first", "models": [better.model, other.model]}
            yield {**row, "strength": over["strength"]} if over["strength"] else row
    for subject, edit in edits.items():
        capture = platform.store.get(Capture, subject, project)
        if capture is not None:
            first = {"prompt": capture.messages, "first": edit, "second": capture.completion, "label": "first"}
            yield {**first, "models": ["edit", capture.model]}
