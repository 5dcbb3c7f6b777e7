"""The ``tracking`` key of a recipe: which sinks a run tells, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from preftune.core.errors import RecipeError
from preftune.core.section import Section


class TrackingConfig(Section):
    """A sink that the run tells: TensorBoard, MLflow, W&B, trackio, or one of a third party.

    name: of the sink. options: its own, see docs/tracking.md. required: whether a run is refused where the sink's package or key
    is missing; else that is a warning and the run goes on without it. Written short: ``tracking: [tensorboard, {mlflow: {uri:
    ...}}]``.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    required: bool = True


def write_tracking(given: Any) -> Any:
    """The long form of what a recipe says: ``tensorboard``, ``[tensorboard, {mlflow: {uri: ...}}]`` or the long form itself.

    >>> write_tracking(["tensorboard", {"mlflow": {"uri": "x"}}])
    [{'name': 'tensorboard'}, {'name': 'mlflow', 'options': {'uri': 'x'}}]

    Raises
        RecipeError: an entry that is neither, or a sink that is there twice.
    """
    if given is None:
        return []
    entries = [given] if isinstance(given, (str, Mapping)) else given
    if not isinstance(entries, (list, tuple)):
        raise RecipeError(f"tracking: write a list of sinks, such as [tensorboard, mlflow], got {given!r}")
    written = [_entry(one, f"tracking.{index}") for index, one in enumerate(entries)]
    names = [one["name"] for one in written]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"tracking: {twice} is there twice; name each sink once")
    return written


def _entry(one: Any, where: str) -> dict[str, Any]:
    if isinstance(one, str):
        return {"name": one}
    if isinstance(one, Mapping) and isinstance(one.get("name"), str):
        return dict(one)
    if isinstance(one, Mapping) and len(one) == 1:
        name, options = next(iter(one.items()))
        if options is None or isinstance(options, Mapping):
            return {"name": str(name), "options": dict(options or {})}
    raise RecipeError(f"{where}: write the name of a sink, or one with options, such as {{mlflow: {{uri: URI}}}}, got {one!r}")
