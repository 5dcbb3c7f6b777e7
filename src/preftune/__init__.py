"""preftune: preference tuning end to end on your own machines.

>>> import preftune
>>> examples = preftune.read("pairs.jsonl").examples                                   # doctest: +SKIP
>>> result = preftune.train(model="starter", method="dpo", beta=0.1, data="pairs.jsonl")  # doctest: +SKIP
>>> preftune.evaluate(result.run, prompts="prompts.jsonl", judge="judge.yaml").summary()  # doctest: +SKIP

Importing the package imports no torch; the functions do so when they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from preftune.core.events import Stop
from preftune.core.version import __version__

if TYPE_CHECKING:
    from preftune.app.evaluate import EvaluationResult
    from preftune.app.hooks import Callback
    from preftune.app.reference import ReferenceResult
    from preftune.app.train import TrainResult
    from preftune.core.events import EventSink
    from preftune.core.recipe import Recipe
    from preftune.data.pipeline import ReadResult
    from preftune.sdk import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Stop", "__version__", "evaluate", "read", "reference", "train"]


def __getattr__(name: str) -> Any:
    """The clients of a server, which are imported when they are named."""
    if name in {"AsyncClient", "Client"}:
        from preftune import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module 'preftune' has no attribute {name!r}")


def read(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    format: str | None = None,  # noqa: A002 -- the word of the recipe and of the command line
    strict: bool = False,
) -> ReadResult:
    """Examples from files, with every row that was left out and why.

    Raises
        InputError: a file cannot be read at all, or a row is bad and ``strict`` is set.
    """
    from preftune.data.pipeline import read_examples

    given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    return read_examples([str(path) for path in given], format=format, strict=strict)


def train(
    recipe: str | PathLike[str] | Mapping[str, Any] | None = None,
    *,
    sink: EventSink | None = None,
    loss: object = None,
    callbacks: Sequence[Callback] = (),
    **keys: Any,
) -> TrainResult:
    """Train a recipe: a file, a mapping, or its keys as keyword arguments; all three are the same thing.

    Parameters
        recipe: a YAML file or a mapping; keyword arguments are laid over it.
        sink: takes the events of the run; silent by default.
        loss: a mapping of the method's options, as in a recipe; or an object with the loss contract, or a function of
            ``PairLogps``, that stands in for the method's formula (data, defaults and view stay the method's).
        callbacks: functions of an event (``preftune.core.events``); one that returns ``preftune.Stop(reason)`` ends the
            stage after the step at hand, and its model is saved. One that raises is told as a warning and not called again.
        keys: recipe keys, such as ``model="starter", method="dpo", beta=0.1, data="pairs.jsonl"``.

    Raises
        RecipeError: an unknown key or a value out of range.
        Blocked: preflight refuses; ``findings`` says what and the way out.
    """
    from dataclasses import replace

    from preftune.app.context import Context
    from preftune.app.hooks import Hooks
    from preftune.app.train import train as train_recipe
    from preftune.core.events import ignore

    if isinstance(loss, Mapping):
        keys["loss"], loss = loss, None
    made = _recipe(recipe, keys)
    hooks = Hooks(loss, callbacks)
    for stage in made.stages:
        if stage.kind == "train":
            hooks.loss_for(stage)
    return train_recipe(made, sink or ignore, replace(Context.from_environment(), hooks=hooks))


def reference(
    recipe: str | PathLike[str] | Mapping[str, Any] | None = None, *, sink: EventSink | None = None, **keys: Any
) -> ReferenceResult:
    """Score what a recipe's reference will be asked, and train nothing; runs and sweeps on it then cost no such forward.

    Parameters
        recipe, keys: as for ``train``. sink: takes the progress; silent by default.

    Raises
        RecipeError: an unknown key or a value out of range.
        Blocked: preflight refuses; ``findings`` says what and the way out.
    """
    from preftune.app.reference import score_references
    from preftune.core.events import ignore

    return score_references(_recipe(recipe, keys), sink or ignore)


def evaluate(
    model: str | PathLike[str],
    *,
    baseline: str | PathLike[str] | None = None,
    sink: EventSink | None = None,
    output: str | PathLike[str] = "runs",
    **keys: Any,
) -> EvaluationResult:
    """The win rate of a run or model on unseen prompts, with its interval, and the report.

    Parameters
        model: a run, ``RUN@STEP`` or a model folder.
        baseline: what to compare with; by default the model that the run's last stage started from.
        keys: keys of the recipe's ``evaluation`` section, such as ``prompts="p.jsonl", judge="judge.yaml"``.
    """
    from pathlib import Path

    from preftune.app.evaluate import evaluate_with
    from preftune.core.events import ignore

    return evaluate_with(
        str(model), keys, baseline=None if baseline is None else str(baseline), output=Path(output), sink=sink or ignore
    )


def _recipe(recipe: str | PathLike[str] | Mapping[str, Any] | None, keys: Mapping[str, Any]) -> Recipe:
    """The recipe in a file or a mapping, with keys laid over it; paths in a file are relative to it."""
    from pathlib import Path

    from preftune.app.recipes import make_recipe, read_mapping

    given: dict[str, Any] = {}
    folder = Path.cwd()
    if isinstance(recipe, Mapping):
        given = dict(recipe)
    elif recipe is not None:
        given, folder = read_mapping(Path(recipe)), Path(recipe).resolve().parent
        given.setdefault("name", Path(recipe).stem)
    return make_recipe({**given, **keys}, folder)
