"""What the files of a model say before anything is loaded: whole or not, how large, and what adapters would attach to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open

from preftune.core.errors import Finding, InputError
from preftune.core.recipe import StageConfig
from preftune.modeling.load import ADAPTER_CONFIG, STARTER, model_path

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

NO_LINEAR = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|norm")
SHOWN_NAMES = 12
# packages that a quantised model needs; schemes that are not here cannot be trained on
_QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
}


def folder_of(name: str) -> Path | None:
    """The local folder with a model's weights; of an adapter, that of its base. None for a hub id."""
    if name != STARTER and not Path(name).expanduser().is_dir():
        return None
    folder = Path(model_path(name))
    base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base is None or (folder / "config.json").is_file():
        return folder
    return folder_of(str(base))


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
        named = set(read_json_object(index).get("weight_map", {}).values())
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
    return findings + _check_quantisation(name)


def _check_quantisation(name: str) -> list[Finding]:
    method = quantised_by(name)
    if method is None:
        return []
    package = _QUANTISERS.get(method)
    if package is None:
        fact = f"model {name!r} is quantised by {method}, which cannot be trained on"
        return [Finding("blocker", "quantised_weights", fact, "name the unquantised model")]
    if find_spec(package) is None:
        fact = f"model {name!r} is quantised by {method}, which needs the package {package}"
        way_out = f"pip install {package}, or name the unquantised model"
        return [Finding("blocker", "missing_dependency", fact, way_out)]
    return []


def quantised_by(name: str) -> str | None:
    """The scheme that a local model's weights are quantised by, or None."""
    folder = folder_of(name)
    if folder is None:
        return None
    method = (read_json_object(folder / "config.json").get("quantization_config") or {}).get("quant_method")
    return None if method is None else str(method)


def weight_shapes(name: str) -> Shapes | None:
    """The shape of every weight of a local model, from the headers of its files alone; None for a hub id."""
    folder = folder_of(name)
    if folder is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 -- no mapping
    return shapes


def num_parameters_of(name: str) -> int | None:
    """Weights of a local model, from the headers of its files alone; None for a hub id."""
    shapes = weight_shapes(name)
    return None if shapes is None else sum(math.prod(shape) for shape in shapes.values())


def linear_layers(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Module names and shapes of what ``all-linear`` means: every matrix that is no embedding and no output head."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not NO_LINEAR.search(name)
    }


def adapted_layers(config: StageConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The layers that a stage's adapters attach to, by PEFT's rule: a text is a pattern, a list holds ends of names."""
    layers, wanted = linear_layers(shapes), config.lora.target_modules
    if wanted == "all-linear":
        return layers
    if isinstance(wanted, str):
        return {name: shape for name, shape in layers.items() if re.fullmatch(wanted, name)}
    return {name: shape for name, shape in layers.items() if any(_is_target(name, one) for one in wanted)}


def num_trainable(config: StageConfig, shapes: Shapes) -> int:
    """Weights that the optimiser moves: rank x (in + out) for each adapted layer, or all of them."""
    if config.adapter == "full":
        return sum(math.prod(shape) for shape in shapes.values())
    return sum(config.lora.rank * sum(shape) for shape in adapted_layers(config, shapes).values())


def check_adapter(config: StageConfig, name: str, shapes: Shapes | None) -> list[Finding]:
    """Findings about what a stage trains: adapters that attach to nothing, all weights of a quantised model."""
    if config.adapter == "full":
        method = quantised_by(name)
        if method is None:
            return []
        fact = f"stage {config.name}: adapter full trains all weights, and those of {name!r} are quantised by {method}"
        return [Finding("blocker", "quantised_weights", fact, "set adapter: lora, or name the unquantised model")]
    sync = None if config.reference is None else config.reference.sync
    if sync is not None and sync.alpha < 1 and (method := quantised_by(name)) is not None:
        fact = (
            f"stage {config.name}: reference.sync.alpha: {sync.alpha:g} averages matrices of the base, and those of {name!r} are "
            f"quantised by {method}"
        )
        return [Finding("blocker", "quantised_weights", fact, "write alpha: 1, or name the unquantised model")]
    if shapes is None or not (layers := linear_layers(shapes)):
        return []
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    listed = ", ".join(known[:SHOWN_NAMES]) + (" ..." if len(known) > SHOWN_NAMES else "")
    wanted = config.lora.target_modules
    if not adapted_layers(config, shapes):
        fact = f"stage {config.name}: lora.target_modules {_words(wanted)} matches no linear layer of {name!r}"
        way_out = f"write all-linear, or names such as {listed}"
        return [Finding("blocker", "no_target_modules", fact, way_out)]
    if isinstance(wanted, str):
        return []
    unmatched = [one for one in wanted if not any(_is_target(layer, one) for layer in layers)]
    if not unmatched:
        return []
    fact = f"stage {config.name}: lora.target_modules {_words(unmatched)} matches no linear layer of {name!r}, the others do"
    return [Finding("warning", "unmatched_target", fact, f"there is {listed}")]


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object of the model's folder; empty where the loader will complain about the file itself."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_target(layer: str, wanted: str) -> bool:
    return layer == wanted or layer.endswith(f".{wanted}")


def _words(names: Any) -> str:
    return repr(names) if isinstance(names, str) else ", ".join(map(repr, names))
