"""The recipe: everything that decides a run, as frozen pydantic sections.

A YAML file and a Python mapping are the same thing. Unknown keys are errors that name the nearest known key. The
short form puts the keys of one stage at the top level (``method: dpo``); with ``stages`` the same keys at the top
level are defaults for every stage. Nothing named in a recipe is imported or executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

from annotated_types import Ge, Gt, Interval
from pydantic import BaseModel, BeforeValidator, Field, Strict, ValidationError, model_validator

from preftune.core.errors import RecipeError
from preftune.core.memory import MemoryOptions, check_quantised
from preftune.core.references import ReferenceConfig, check_reference, short_reference
from preftune.core.registry import suggest
from preftune.core.rounds import GENERATE, MAX_ROUNDS, fill_previous, generate_stage, write_rounds
from preftune.core.section import Positive, Section, Seed, Share, explain
from preftune.core.tracking import TrackingConfig, write_tracking
from preftune.core.watching import EarlyStoppingConfig, ProbeConfig, on_or_off


class ModelConfig(Section):
    """The model to start from.

    name: ``starter`` (the embedded one), a folder, or a hub id. dtype ``auto``: bfloat16 where the hardware
    multiplies it natively and training is LoRA, else float32. chat_template: ``chatml``, ``plain`` or a file,
    for models without a template of their own (or to replace it). load_in_4bit, load_in_8bit: round the base under adapters
    (QLoRA's NF4, LLM.int8()), through bitsandbytes.
    """

    name: str
    revision: str | None = None
    chat_template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False


class DataConfig(Section):
    """Where examples come from and what fits.

    train: one file or several; ``previous`` is the file that the nearest generate stage before makes. style: ``text``
    for raw text or ``chat`` for the chat template, where the format leaves it open. select: a file, or the share of
    prompt groups to hold out for choosing checkpoints.
    max_length: prompt + completion, in tokens, ``None`` = what the model's positions allow, at most 2,048.
    too_long: ``exclude`` the row, or ``cut`` the completions (never the prompt; a cut one has no end token).
    columns: which column holds what, for files of no known format (``{prompt: question, chosen: good}``); labels: what the
    values of the label column mean (``{"1": first, "2": second, "0": tie}``). rankings: which pairs a ranking of several
    completions gives: the best against the worst, all, or each against those of the next rank.
    """

    train: tuple[str, ...]
    select: str | Share = 0.0
    format: str | None = None
    style: Literal["chat", "text"] | None = None
    max_length: Positive | None = None
    too_long: Literal["exclude", "cut"] = "exclude"
    limit: Positive | None = None
    strict: bool = False
    columns: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    rankings: Literal["best_worst", "all", "adjacent"] = "best_worst"


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the named linear layers.

    scaling is alpha / rank, or alpha / sqrt(rank) with ``rslora`` (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: Positive = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    dropout: Share = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False


class DecodingConfig(Section):
    """How completions are sampled for an evaluation; the same for policy and reference. temperature 0 = greedy."""

    temperature: Annotated[float, Ge(0)] = 0.7
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    batch_size: Positive = 32


class GuardsConfig(Section):
    """What a pair must be to be kept; each one that is not is counted by its reason.

    min_margin: the least difference of the two scores; a difference of 0 is never kept. max_length_ratio: characters of
    the longer completion over those of the shorter one, none for any. require_complete: the chosen completion ended by
    itself.
    """

    min_margin: Annotated[float, Ge(0)] = 0.0
    max_length_ratio: Annotated[float, Gt(1)] | None = 2.0
    require_complete: bool = True


class GenerateConfig(Section):
    """Making pairs: sample completions of each prompt from the model, judge them, pair them.

    prompts: a file of prompts, or of pairs, whose prompts are taken. judge: a file or a mapping with a ``name``.
    samples: completions a prompt. pairing: ``best_worst`` the pair of the largest difference that passes the guards,
    ``best_random`` the best one with another drawn at random, ``all`` every pair, ``threshold`` every pair whose scores
    differ by ``threshold`` at least. comparisons: of a judge that compares two, ``all`` pairs or a ``knockout``; both
    orders each time. limit, skip: how many prompts, after how many.
    """

    prompts: str
    judge: str | dict[str, Any]
    samples: Annotated[int, Ge(2)] = 4
    pairing: Literal["best_worst", "best_random", "all", "threshold"] = "best_worst"
    threshold: Annotated[float, Gt(0)] | None = None
    comparisons: Literal["all", "knockout"] = "all"
    guards: GuardsConfig = GuardsConfig()
    decoding: DecodingConfig = DecodingConfig()
    limit: Positive | None = None
    skip: Annotated[int, Ge(0)] = 0

    @model_validator(mode="after")
    def _threshold_is_given(self) -> Self:
        if (self.pairing == "threshold") != (self.threshold is not None):
            raise ValueError("pairing: threshold and the key threshold belong together")
        return self


def _switch(value: Any) -> Any:
    """``on`` and ``off`` without quotes are True and False in YAML."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class StageConfig(MemoryOptions):
    """One stage: a method on a model and data.

    method names a loss (``sft``, ``dpo`` ...); ``loss`` holds its options. from_checkpoint: a run, ``RUN@STEP`` or a
    folder to start from (the model before this stage otherwise). reference: that model, scored once and cached, unless
    it is said otherwise. adapter: ``lora``, ``full`` or the options of LoRA. lr ``None``: the published default for the
    method and adapter. schedule: the shape after the warm-up, ending at ``min_lr_ratio`` of the peak; ``num_cycles`` of a
    cosine (0.5 falls once). pairs_per_step counts examples of an optimiser step; accumulation is derived. keep: the weights
    of the ``last`` step, or of the ``best`` evaluation on ``select`` by the metric of ``early_stopping`` (``eval_loss``).
    probe: ``off`` samples nothing. distributed: under torchrun each process holds the model (``ddp``) or its part of every
    weight, gradient and moment (``fsdp2``); ``auto`` takes fsdp2 for full fine-tuning and models that fill half of a device.
    compile: attention and elementwise work by compiled kernels on one process: ours for bfloat16 on CPUs with AVX512-BF16,
    by ``auto`` from 50 steps on; elsewhere torch.compile, by ``auto`` from 1,000 steps on.
    What is kept in memory: gradient_checkpointing and activation_offloading (see MemoryOptions).
    method ``generate`` makes pairs instead (see GenerateConfig, whose keys may stand beside it); ``round`` is written by
    ``rounds``.
    """

    name: str = ""
    method: str = "dpo"
    loss: dict[str, Any] = Field(default_factory=dict)
    data: DataConfig | None = None
    from_checkpoint: str | None = None
    reference: Annotated[ReferenceConfig | None, BeforeValidator(short_reference)] = None
    adapter: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    epochs: Annotated[float, Gt(0)] = 1.0
    max_steps: Positive | None = None
    pairs_per_step: Positive = 16
    tokens_per_pack: Positive = 2048
    lr: Annotated[float, Gt(0)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    min_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    num_cycles: Annotated[float, Gt(0)] = 0.5
    warmup: Share = 0.1
    weight_decay: Annotated[float, Ge(0)] = 0.0
    adam_betas: tuple[Share, Share] = (0.9, 0.999)
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    shuffle: bool = True
    evals: Annotated[int, Ge(0)] = 4
    checkpoints: Annotated[int, Ge(0)] = 2
    keep_checkpoints: Positive = 2
    keep: Literal["last", "best"] = "last"
    early_stopping: EarlyStoppingConfig | None = None
    probe: Annotated[ProbeConfig | None, BeforeValidator(on_or_off)] = ProbeConfig()
    shared_prefix: Literal["auto", "off"] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    deterministic: bool = True
    distributed: Literal["auto", "ddp", "fsdp2"] = "auto"
    generate: GenerateConfig | None = None
    round: Annotated[int, Ge(0)] = 0

    @property
    def kind(self) -> str:
        """What the stage does: ``generate`` or ``train``."""
        return GENERATE if self.method == GENERATE else "train"


class EvaluationConfig(Section):
    """The proof: prompts nobody trained on, a judge that did not make the pairs, and what counts as equivalent.

    judge and pairs_judge are files, inline mappings with a ``name``, or ``llm:MODEL@URL``. margin: half-width around one half
    within which two models count as equivalent. same_judge_reason: why a judge that made the pairs may judge all the same.
    """

    prompts: str
    judge: str | dict[str, Any]
    pairs_judge: str | dict[str, Any] | None = None
    pairs: str | None = None
    limit: Positive | None = None
    decoding: DecodingConfig = DecodingConfig()
    margin: Annotated[float, Interval(gt=0, lt=0.5)] = 0.05
    baseline: Literal["reference", "base"] = "reference"
    same_judge_reason: str | None = None


class Recipe(Section):
    """A whole run: one model, its stages, and the evaluation at the end.

    sweep: keys and the values that `preftune sweep` tries; every other verb uses the recipe as it stands.
    tracking: the sinks that are told what the run says (docs/tracking.md).
    rounds: how often the stages from the first generate stage on are repeated, each round from the model of the one
    before; the resolved recipe lists every stage. prompts_per_round: prompts of each round, no prompt in two of them.
    """

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    name: str = ""
    seed: Seed = 0
    output: str = "runs"
    evaluation: EvaluationConfig | None = None
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    tracking: tuple[TrackingConfig, ...] = ()
    rounds: Annotated[int, Strict(), Interval(ge=1, le=MAX_ROUNDS)] = 1  # strict: written out before it is read
    prompts_per_round: Annotated[int, Strict(), Gt(0)] | None = None


def build_recipe(given: Mapping[str, Any], loss_options: Mapping[str, Sequence[str]]) -> Recipe:
    """A checked recipe from a mapping in the long or the short form.

    Parameters
        given: what the user wrote.
        loss_options: for every registered loss the names of its options; an option written beside ``method`` moves
            into ``loss``.

    Raises
        RecipeError: an unknown key (with the nearest known one), a missing one, or a value out of range.
    """
    left = dict(given)
    recipe = {key: left.pop(key) for key in list(left) if key in Recipe.model_fields}
    stages = recipe.get("stages")
    options = sorted({option for names in loss_options.values() for option in names})
    if left.get("method") == GENERATE and stages is None:
        options += GenerateConfig.model_fields
    for key in left:
        if key not in StageConfig.model_fields and key not in options:
            known = [*Recipe.model_fields, *StageConfig.model_fields, *options]
            raise RecipeError(f"unknown key {key!r}: {suggest(key, sorted(set(known)))}")
    if stages is None:
        recipe["stages"] = [_stage({}, left, loss_options, "")]
    elif not isinstance(stages, (list, tuple)) or not all(isinstance(stage, Mapping) for stage in stages):
        raise RecipeError("stages: write a list of mappings, one for each stage")
    else:
        recipe["stages"] = [_stage(stage, left, loss_options, f"stages.{index}.") for index, stage in enumerate(stages)]
    recipe["stages"] = fill_previous(recipe["stages"])
    recipe = write_rounds(recipe)
    if isinstance(recipe.get("model"), str):
        recipe["model"] = {"name": recipe["model"]}
    if "model" not in recipe:
        raise RecipeError("model is missing: write model: starter, a folder, or a hub id")
    recipe["tracking"] = write_tracking(recipe.get("tracking"))
    short = "stages.0." if stages is None else ""  # what a user who wrote the short form did not write
    _check_keys(Recipe, recipe, "", short)
    try:
        built = Recipe.model_validate(recipe)
    except ValidationError as error:
        place, hint = _place_of(Recipe, error.errors()[0]["loc"])
        about = [one for one in error.errors() if _place_of(Recipe, one["loc"])[0] == place]
        raise RecipeError(f"{place.removeprefix(short)}: {explain(about, hint)}") from None
    check_quantised(built.model, built.stages)
    for index, stage in enumerate(built.stages):
        where = "" if stages is None else f"stages.{index}."
        check_reference(stage.reference, stage.adapter, where, has_dora=stage.lora.dora)
    return built.model_copy(update={"stages": _named(built.stages)})


def _stage(
    stage: Mapping[str, Any], defaults: Mapping[str, Any], loss_options: Mapping[str, Sequence[str]], where: str
) -> dict[str, Any]:
    """One stage with the top level's defaults, loss options moved into ``loss`` and short data forms spelt out."""
    method = stage.get("method", defaults.get("method", "dpo"))
    if method == GENERATE:
        return generate_stage(stage, defaults, where, (StageConfig, GenerateConfig))
    if not isinstance(method, str) or method not in loss_options:
        raise RecipeError(f"{where}method: no loss {method!r}: {suggest(str(method), sorted([*loss_options, GENERATE]))}")
    own = loss_options[method]
    anyones = {option for names in loss_options.values() for option in names}
    merged: dict[str, Any] = {"method": method}
    loss: dict[str, Any] = {}
    for is_default, source in ((True, defaults), (False, stage)):
        for key, value in source.items():
            if key in StageConfig.model_fields:
                if key == "loss":
                    loss.update(_mapping(value, f"{where}loss"))
                else:
                    merged[key] = value
            elif key in own:
                loss[key] = value
            elif key in anyones and is_default and where:
                continue  # a default for the stages whose loss has this option
            elif key in anyones:
                raise RecipeError(f"{where}{key}: loss {method!r} has no option {key!r}; it has {', '.join(own) or 'none'}")
            else:
                raise RecipeError(f"unknown key '{where}{key}': {suggest(key, sorted({*StageConfig.model_fields, *own}))}")
    for key in loss:
        if key not in own:
            raise RecipeError(f"{where}loss: loss {method!r} has no option {key!r}: {suggest(key, list(own))}")
    if loss:
        merged["loss"] = loss
    if "data" in merged:
        merged["data"] = _data(merged["data"], f"{where}data")
    if isinstance(merged.get("adapter"), Mapping):
        if "lora" in merged:
            raise RecipeError(f"{where}adapter: the options of LoRA stand here and under lora as well; write them in one place")
        merged["lora"], merged["adapter"] = merged["adapter"], "lora"
    return merged


def _data(value: Any, where: str) -> Any:
    """``data: FILE`` and ``data: [FILE, ...]`` are short for ``data: {train: [...]}``."""
    if isinstance(value, str):
        return {"train": [value]}
    if isinstance(value, (list, tuple)):
        return {"train": list(value)}
    given = dict(_mapping(value, where))
    if isinstance(given.get("train"), str):
        given["train"] = [given["train"]]
    return given


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: write a mapping of keys and values, got {value!r}")
    return value


def _check_keys(section: type[BaseModel], given: Any, where: str, short: str) -> None:
    """Refuse unknown keys at every depth, with the nearest known one; ``short`` is left out of the places named."""
    if not isinstance(given, Mapping):
        return
    for key, value in given.items():
        if key not in section.model_fields:
            place = f"{where}{key}".removeprefix(short)
            raise RecipeError(f"unknown key {place!r}: {suggest(str(key), sorted(section.model_fields))}")
        inner = _section_of(section.model_fields[key].annotation)
        if inner is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            for index, one in enumerate(values):
                place = f"{where}{key}.{index}." if isinstance(value, (list, tuple)) else f"{where}{key}."
                _check_keys(inner, one, place, short)


def _place_of(section: type[BaseModel], loc: Sequence[str | int]) -> tuple[str, Any]:
    """A place as a user would write it, without the member of a union that pydantic names, and the annotation there."""
    place: list[str] = []
    hint: Any = None
    for part in loc:
        if part not in section.model_fields if isinstance(part, str) else _section_of(hint) is None:
            break  # the member of a union, a key of a mapping, or an entry of a list of plain values
        place.append(str(part))
        if isinstance(part, str):
            hint = get_type_hints(section, include_extras=True)[part]
            section = _section_of(hint) or section
    return ".".join(place), hint


def _section_of(annotation: Any) -> type[Section] | None:
    """The section inside ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in get_args(annotation):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def _named(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    """Stages with names: their method, numbered where one method comes twice."""
    if not stages:
        raise RecipeError("stages is empty: write at least one stage")
    names: list[str] = []
    for stage in stages:
        name = stage.name or stage.method
        if not all(letter.isalnum() or letter in "-_" for letter in name):
            raise RecipeError(f"stage name {name!r}: use letters, digits, '-' and '_', because it names a folder")
        if name in names:
            if stage.name:
                raise RecipeError(f"two stages are named {name!r}: give each its own name")
            name = f"{name}-{len(names) + 1}"
        names.append(name)
    return tuple(stage.model_copy(update={"name": name}) for stage, name in zip(stages, names, strict=True))
