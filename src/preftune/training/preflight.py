"""Facts that stop a run before it costs anything, and facts worth a warning; each with its way out.

Ranges of hyper-parameters are those of published recipes on models of a billion parameters and more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors import SafetensorError, safe_open

from preftune.core.errors import Finding, InputError
from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedExample, View
from preftune.data.split import Leak
from preftune.maths.losses.base import losses
from preftune.modeling.load import STARTER, model_path
from preftune.training.optim import DEFAULT_LR, lr_of, num_steps_of, schedule_of

# lowest and highest peak learning rate in published recipes, by view and adapter
LR_RANGE: Mapping[tuple[View, Literal["lora", "full"]], tuple[float, float]] = {
    ("pairs", "full"): (5e-8, 5e-6),  # Olmo 3 8e-8, NeMo-RL 5e-6
    ("pairs", "lora"): (5e-7, 1e-4),  # Zephyr QLoRA 5e-6, ms-swift 1e-4
    ("unpaired", "full"): (1e-7, 5e-6),  # TRL 1e-6, HALOs 5e-6
    ("unpaired", "lora"): (5e-7, 1e-4),
    ("demonstrations", "full"): (1e-6, 1e-4),
    ("demonstrations", "lora"): (1e-5, 1e-3),
}
SMALL = 50_000_000  # parameters; smaller models want learning rates that no published recipe has
BETA_RANGE = {False: (0.01, 0.9), True: (1.0, 10.0)}  # by length_normalised: handbook's scan; Tulu 3, OLMo and SimPO
MAX_EPOCHS: Mapping[View, float] = {"pairs": 5.0, "unpaired": 5.0, "demonstrations": 10.0}
_QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
}


class StageFacts(Protocol):
    """What is known of a stage's data."""

    @property
    def train(self) -> Sequence[TokenisedExample]:
        """Tokenised examples to train on."""

    @property
    def select(self) -> Sequence[TokenisedExample]:
        """Tokenised examples that are held out."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows left out, by reason."""

    @property
    def has_chat_rows(self) -> bool:
        """Whether rows need a chat template."""


def check_model(name: str) -> list[Finding]:
    """Blockers of a model's folder: weights that are missing or truncated, a package that it needs. Hub ids pass."""
    try:
        folder = Path(model_path(name))
    except InputError as error:
        return [Finding("blocker", "no_model", str(error), "name a model folder, a hub id, or model: starter")]
    if not folder.is_dir():
        return []
    findings: list[Finding] = []
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = set(_json(index).get("weight_map", {}).values())
        absent = sorted(named - {file.name for file in files})
        if absent:
            fact = f"model {name!r} lacks {len(absent)} of its {len(named)} weight files, first {absent[0]}"
            findings.append(Finding("blocker", "missing_file", fact, "copy or download the model again"))
    if not files:
        others = sorted(file.name for suffix in ("*.bin", "*.pt", "*.gguf") for file in folder.glob(suffix))
        held = f"only {others[0]}, which is not read" if others else "no weights"
        fact = f"model {name!r} holds {held}; weights are read from *.safetensors"
        findings.append(Finding("blocker", "missing_file", fact, "save the model with save_pretrained, which writes safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            fact = f"{file} is truncated or damaged ({str(error).splitlines()[0]})"
            findings.append(Finding("blocker", "damaged_file", fact, "copy or download it again"))
    method = (_json(folder / "config.json").get("quantization_config") or {}).get("quant_method")
    package = _QUANTISERS.get(str(method))
    if package is not None and find_spec(package) is None:
        fact = f"model {name!r} is quantised by {method}, which needs the package {package}"
        findings.append(Finding("blocker", "missing_dependency", fact, f"pip install {package}, or name the unquantised model"))
    return findings


def num_parameters_of(name: str) -> int | None:
    """Weights of a local model folder, from the headers of its files alone; None for a hub id."""
    if name != STARTER and not Path(name).expanduser().is_dir():
        return None
    folder = Path(model_path(name))
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            count += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 -- no mapping
    return count


def check_stage(
    config: StageConfig, data: StageFacts, *, has_chat_template: bool, num_parameters: int | None = None
) -> list[Finding]:
    """Every finding about a stage's data and settings.

    num_parameters: of the model where known; published learning rates say nothing of models below SMALL.
    """
    findings: list[Finding] = []
    if data.has_chat_rows and not has_chat_template:
        fact = f"stage {config.name}: its data are conversations and the model has no chat template"
        return [Finding("blocker", "no_chat_template", fact, "set model.chat_template: chatml, plain or a file")]
    if not data.train:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(data.counts.items())) or "no rows were read"
        fact = f"stage {config.name}: no example is left to train on ({reasons})"
        return [Finding("blocker", "nothing_to_train", fact, "`preftune check FILE` shows each row that was left out and why")]
    findings += _check_splits(config, data)
    findings += _check_settings(config, len(data.train), is_small=num_parameters is not None and num_parameters < SMALL)
    return findings


def check_leaks(found: Sequence[Leak], trained: str, held_out: str) -> list[Finding]:
    """Findings about prompts of a held-out set that were trained on; ``found`` is what ``data.split.leaks`` gave.

    Equal prompts block; nearly equal ones warn, because a narrow domain has them by nature.
    """
    findings: list[Finding] = []
    kinds: tuple[tuple[str, Literal["blocker", "warning"], str], ...] = (
        ("exact", "blocker", "also"),
        ("near", "warning", "nearly the same"),
    )
    for kind, level, word in kinds:
        places = [leak for leak in found if leak.kind == kind]
        if places:
            first = f"number {places[0].heldout + 1} is number {places[0].train + 1} there"
            fact = f"{len(places)} of {held_out} are {word} in {trained} (the first: {first})"
            way_out = "take them out of one of the two, or let preftune split one file by prompt"
            findings.append(Finding(level, "leakage" if kind == "exact" else "near_leakage", fact, way_out))
    return findings


def _check_splits(config: StageConfig, data: StageFacts) -> list[Finding]:
    findings: list[Finding] = []
    trained = {example.prompt_ids for example in data.train}
    leaked = [example for example in data.select if example.prompt_ids in trained]
    if leaked:
        where = f"{leaked[0].provenance.file}:{leaked[0].provenance.line}"
        shared = f"{len(leaked)} of {len(data.select)} held-out examples have a prompt of the training data"
        fact = f"stage {config.name}: {shared}, first {where}"
        way_out = "take them out of one of the two, or write data.select as a share, which splits by prompt"
        findings.append(Finding("blocker", "leakage", fact, way_out))
    if not data.select and config.evals > 0:
        fact = f"stage {config.name}: no example is held out, so nothing will be measured while it trains"
        findings.append(Finding("warning", "empty_select", fact, "set data.select to a file or a share such as 0.1"))
    return findings


def _check_settings(config: StageConfig, num_examples: int, *, is_small: bool) -> list[Finding]:
    findings: list[Finding] = []
    view = losses.factory(config.method).view
    steps = num_steps_of(config, num_examples)
    peak = lr_of(config, view)
    if steps == 1 and schedule_of(config, view, steps).at(0) == 0:
        fact = f"stage {config.name}: {num_examples} examples make one step, and the warm-up begins at learning rate 0"
        findings.append(Finding("blocker", "no_learning", fact, "lower pairs_per_step, or set warmup: 0"))
    low, high = LR_RANGE[view, config.adapter]
    if not low <= peak <= high and not is_small:
        usual = f"what is published for {config.method} with {config.adapter} ({low:g} to {high:g})"
        fact = f"stage {config.name}: lr {peak:g} is outside {usual}"
        findings.append(Finding("warning", "unusual_lr", fact, f"{DEFAULT_LR[view, config.adapter]:g} is the default"))
    beta = config.loss.get("beta")
    is_normalised = bool(config.loss.get("length_normalised", False))
    if config.method == "dpo":
        given = 0.1 if beta is None else float(beta)
        low, high = BETA_RANGE[is_normalised]
        if not low <= given <= high:
            scale = "divided by length" if is_normalised else "summed over tokens"
            usual = f"what is published for log-ratios {scale} ({low:g} to {high:g})"
            fact = f"stage {config.name}: beta {given:g} is outside {usual}"
            findings.append(Finding("warning", "unusual_beta", fact, f"beta {5 if is_normalised else 0.1:g} is usual"))
    if config.epochs > MAX_EPOCHS[view]:
        fact = f"stage {config.name}: {config.epochs:g} epochs; more than {MAX_EPOCHS[view]:g} mostly memorise the data"
        findings.append(Finding("warning", "many_epochs", fact, "hold out a share (data.select) and watch eval_loss"))
    if view == "pairs" and config.adapter == "lora" and config.lora.dropout > 0:
        fact = f"stage {config.name}: dropout {config.lora.dropout:g} acts on the policy and not on its reference"
        findings.append(Finding("warning", "dropout", fact, "set lora.dropout: 0 for margins without that noise"))
    return findings


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of the model's folder; empty where the loader will complain about the file itself."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
