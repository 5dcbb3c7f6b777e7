"""``preftune generate``: pairs from a model and a judge, outside a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.context import Context
from preftune.app.recipes import STARTER, apply_override, make_recipe
from preftune.app.runs import RUN_FILE, find_model
from preftune.core.errors import PreftuneError, UsageError
from preftune.core.events import EventSink, ignore
from preftune.core.recipe import GenerateConfig, ModelConfig, Recipe
from preftune.core.rounds import GENERATE

if TYPE_CHECKING:
    from preftune.curation.making import MadePairs
    from preftune.modeling.load import LoadedModel

RECORD_SUFFIX = "-record"


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """The pairs that a model and a judge made."""

    pairs: Path
    samples: Path
    summary_file: Path
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, made: MadePairs) -> GenerateResult:
        """The result of a making."""
        return cls(made.out, made.folder / "samples.jsonl", made.folder / "summary.json", made.summary)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"out": str(self.pairs), "samples_file": str(self.samples), "summary_file": str(self.summary_file), **self.facts}

    def summary(self) -> list[str]:
        """What a person reads."""
        return [*summary_lines(self.facts), f"pairs {self.pairs}", f"samples {self.samples}"]


def summary_lines(facts: Mapping[str, Any]) -> list[str]:
    """The account of a making in a few lines."""
    score = facts["score"]
    lines = [
        f"{facts['pairs']} pairs of {facts['samples']} samples of {facts['prompts']} prompts ({facts['pairing']})",
        (
            f"scores: mean {score['mean']:.3f}, from {score['min']:.3f} to {score['max']:.3f}, the middle half "
            f"{score['quarter']:.3f} to {score['three_quarters']:.3f}; {facts['complete_share']:.1%} ended by themselves"
        ),
    ]
    if facts["pairs"]:
        lines.append(
            f"chosen over rejected: margin {facts['margin']:.3f}, {facts['length_ratio']:.2f} x as long, "
            f"the longer one chosen in {facts['chosen_longer_share']:.1%}"
        )
    if facts["left_out"]:
        lines.append("left out: " + ", ".join(f"{reason} {count}" for reason, count in facts["left_out"].items()))
    return lines


def generate_pairs(
    model: str,
    keys: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    out: Path,
    output: Path = Path("runs"),
    verdict: Path | None = None,
    sink: EventSink = ignore,
) -> GenerateResult:
    """Sample, judge and pair in a process of its own; the same call again goes on where the last one stopped.

    Parameters
        model: ``starter``, a folder, a hub id, a run in ``output`` or ``RUN@STEP``.
        keys: ``prompts``, ``judge`` and other keys of a generate stage, and ``seed``. overrides: ``key=value``, laid over them.
        out: the file of pairs; beside it stands the folder of the record.
        verdict: a file of prompts that prove results; none of them is used.

    Raises
        UsageError: ``out`` exists and was not made here.
        PreftuneError: not one pair was made; the message counts the reasons.
    """
    given: dict[str, Any] = {"model": _model_name(model, output), "method": GENERATE, **keys}
    for override in overrides:
        apply_override(given, override)
    recipe = make_recipe(given)
    config = recipe.stages[0].generate
    assert config is not None
    out = out.expanduser().absolute()
    folder = out.with_name(out.name.split(".")[0] + RECORD_SUFFIX)
    if out.exists() and not folder.is_dir():
        raise UsageError(f"{out} exists and was not made by this command; name another file with --out")
    made = run_task(
        recipe, config, recipe.model, folder=folder, out=out, seed=recipe.seed, sink=sink, verdict=_verdict_prompts(verdict)
    )
    if made.num_pairs == 0:
        raise PreftuneError(nothing_made(made.summary))
    return GenerateResult.of(made)


def run_task(
    recipe: Recipe,
    config: GenerateConfig,
    model: ModelConfig,
    *,
    folder: Path,
    out: Path,
    seed: int,
    sink: EventSink = ignore,
    verdict: Sequence[str] = (),
) -> MadePairs:
    """Make the pairs of one section with one model; the same for the verb and for a stage.

    Parameters
        recipe: says how precise the model is. folder: of the record. verdict: prompts that are not to be used.
    """
    from preftune.curation.making import PairTask, make_pairs
    from preftune.curation.prompts import choose_prompts
    from preftune.judging.base import prepared_judge
    from preftune.training.stopping import StopRequest

    prompts, left_out = choose_prompts(config, verdict)

    def load() -> LoadedModel:
        from preftune.modeling.load import load_model
        from preftune.training.devices import choose_device, choose_precision

        loaded = load_model(model, precision=choose_precision(model.dtype, recipe.stages[-1].adapter))
        loaded.model.to(choose_device())  # type: ignore[arg-type] # transformers' stub of .to hides torch's
        return loaded

    judge = prepared_judge(config.judge, Path.cwd(), Context.from_environment().cache)
    task = PairTask(config, load, label_of(model.name), judge, prompts, Counter(left_out), seed, folder, out)
    with StopRequest() as stop:
        return make_pairs(task, sink, lambda: bool(stop))


def label_of(name: str) -> str:
    """A model's name as rows carry it: no path of the machine; a run's stage by its folder.

    >>> label_of("starter"), label_of("org/model"), label_of("/runs/a-1/stages/2-dpo-r1/final")
    ('starter', 'org/model', '2-dpo-r1')
    """
    path = Path(name)
    if not path.is_absolute():
        return name
    return path.parent.name if path.name in {"final", "model"} else path.name


def nothing_made(summary: Mapping[str, Any]) -> str:
    """Why a making gave no pair."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["left_out"].items())
    return f"no pair was made of {summary['samples']} samples of {summary['prompts']} prompts: {reasons}"


def _model_name(given: str, output: Path) -> str:
    """A run or one of its steps as the model folder that it means; every other name as it is."""
    if given == STARTER:
        return given
    path = Path(given).expanduser()
    is_run = any((one / RUN_FILE).is_file() for one in (path, output / given))
    return str(find_model(given, output)) if is_run or "@" in given else given


def _verdict_prompts(path: Path | None) -> list[str]:
    from preftune.curation.prompts import text_of_prompt
    from preftune.data.pipeline import read_prompts

    return [] if path is None else [text_of_prompt(row) for row in read_prompts(str(path))]
