"""The recipe: everything that decides a run, as frozen pydantic sections.

A YAML file and a Python mapping are the same thing. Unknown keys are errors that name the nearest known key. The
short form puts the keys of one stage at the top level (``method: dpo``); with ``stages`` the same keys at the top
level are defaults for every stage. Nothing named in a recipe is imported or executed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval
from pydantic import BaseModel, ConfigDict, Field

Positive: TypeAlias = Annotated[int, Gt(0)]
Share: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """The model to start from.

    name: ``starter`` (the embedded one), a folder, or a hub id. dtype ``auto``: bfloat16 where the hardware
    multiplies it natively and training is LoRA, else float32. chat_template: ``chatml``, ``plain`` or a file,
    for models without a template of their own (or to replace it).
    """

    name: str
    revision: str | None = None
    chat_template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class DataConfig(Section):
    """Where examples come from and what fits.

    train: one file or several. select: a file, or the share of prompt groups to hold out for choosing
    checkpoints. max_length: prompt + completion, in tokens, ``None`` = what the model's positions allow, at most
    2,048. too_long: ``exclude`` the row, or ``cut`` the completions (never the prompt; a cut one has no end token).
    """

    train: tuple[str, ...]
    select: str | Share = 0.0
    format: str | None = None
    max_length: Positive | None = None
    too_long: Literal["exclude", "cut"] = "exclude"
    limit: Positive | None = None
    strict: bool = False


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


class StageConfig(Section):
    """One stage: a method on a model and data.

    method names a loss (``sft``, ``dpo`` ...); ``loss`` holds its options. from_checkpoint: a run, ``RUN@STEP`` or a
    folder to start from (the model before this stage otherwise); the reference is always the model that the stage
    starts from. adapter: ``lora``, ``full`` or the options of LoRA. lr ``None``: the published default for the
    method and adapter. pairs_per_step counts examples of an optimiser step; accumulation is derived.
    """

    name: str = ""
    method: str = "dpo"
    loss: dict[str, Any] = Field(default_factory=dict)
    data: DataConfig | None = None
    from_checkpoint: str | None = None
    adapter: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    epochs: Annotated[float, Gt(0)] = 1.0
    max_steps: Positive | None = None
    pairs_per_step: Positive = 16
    tokens_per_pack: Positive = 2048
    lr: Annotated[float, Gt(0)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.1
    weight_decay: Annotated[float, Ge(0)] = 0.0
    adam_betas: tuple[Share, Share] = (0.9, 0.999)
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    shuffle: bool = True
    evals: Annotated[int, Ge(0)] = 4
    checkpoints: Annotated[int, Ge(0)] = 2
    keep_checkpoints: Positive = 2
    shared_prefix: Literal["auto", "off"] = "auto"
    gradient_checkpointing: bool = False
    deterministic: bool = True


class DecodingConfig(Section):
    """How completions are sampled for an evaluation; the same for policy and reference. temperature 0 = greedy."""

    temperature: Annotated[float, Ge(0)] = 0.7
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    batch_size: Positive = 32


class EvaluationConfig(Section):
    """The proof: prompts nobody trained on, a judge that did not make the pairs, and what counts as equivalent.

    judge and pairs_judge are rule files or inline mappings with a ``name``. margin: half-width around one half
    within which two models count as equivalent.
    """

    prompts: str
    judge: str | dict[str, Any]
    pairs_judge: str | dict[str, Any] | None = None
    pairs: str | None = None
    limit: Positive | None = None
    decoding: DecodingConfig = DecodingConfig()
    margin: Annotated[float, Interval(gt=0, lt=0.5)] = 0.05
    baseline: Literal["reference", "base"] = "reference"


class Recipe(Section):
    """A whole run: one model, its stages, and the evaluation at the end."""

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    name: str = ""
    seed: int = 0
    output: str = "runs"
    evaluation: EvaluationConfig | None = None
