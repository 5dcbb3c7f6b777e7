"""Adapters that were merged into a model, and saving so that nothing of them is lost.

An adapter adds s B A to a matrix. Two in a row add s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2], which is one adapter
of rank r1 + r2 on the original base. So the model of a second stage is saved as one ordinary PEFT adapter.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import peft
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.modeling.forward import base_of
from preftune.modeling.quantised import write_note
from preftune.modeling.quiet import quiet
from preftune.modeling.routers import as_loaded
from preftune.modeling.tokenizer import HubTokenizer

PREFIX = "base_model.model."
ATTRIBUTE = "preftune_lineage"
Factors: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]  # module -> A (r, in), s B (out, r), float32


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """Where a model's weights come from: the base as an adapter file names it, and the adapters merged into it.

    merged: factors of each, oldest first; None where one of them was not a plain adapter and only full weights will do.
    """

    base: str
    merged: tuple[Factors, ...] | None = ()


def set_lineage(model: PreTrainedModel, lineage: Lineage) -> None:
    """Remember a model's lineage on the model itself."""
    setattr(model, ATTRIBUTE, lineage)


def lineage_of(model: nn.Module) -> Lineage:
    """A model's lineage; of a model that preftune did not load, its path with nothing merged."""
    base = base_of(model)
    found = getattr(base, ATTRIBUTE, None)
    return found if isinstance(found, Lineage) else Lineage(str(base.name_or_path))


def absorb_adapter(model: PeftModel, dtype: torch.dtype) -> tuple[PreTrainedModel, tuple[Factors, ...] | None]:
    """Merge an adapter in the dtype of its base (float32), then round the weights to ``dtype``; buffers stay as they are."""
    factors = plain_factors(model)
    merged = cast(PreTrainedModel, cast(Any, model).merge_and_unload(safe_merge=True))
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad = True
    merged.config.dtype = dtype
    return merged, None if factors is None else (factors,)


def plain_factors(model: PeftModel) -> Factors | None:
    """A and s B of every adapted layer; None where adapters are more than that (DoRA, biases, saved modules)."""
    config = model.active_peft_config
    if not isinstance(config, peft.LoraConfig) or config.use_dora or config.modules_to_save or config.bias != "none":
        return None
    name = model.active_adapter
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in base_of(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
            return None
        a, b = cast(Tensor, module.lora_A[name].weight), cast(Tensor, module.lora_B[name].weight)
        factors[path] = (a.detach().float().cpu().clone(), (b.detach().float() * module.scaling[name]).cpu().clone())
    return factors or None


def is_adapter_enough(model: nn.Module) -> bool:
    """Whether saving a model reads its adapters alone, and no weight of its base."""
    lineage = lineage_of(model)
    if not isinstance(model, PeftModel):
        return False
    return lineage.merged == () or (lineage.merged is not None and not model.active_peft_config.use_dora)


def save_model(model: nn.Module, tokenizer: HubTokenizer, folder: Path) -> None:
    """Write a folder that ``load_model`` reads: full weights or an adapter with its base's name, and the tokenizer.

    Adapters that were merged on loading become part of the adapter that is written. The folder is filled in place:
    wrap it in ``core.files.write_folder`` to make it atomic.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), as_loaded(base_of(model)):
        _save_weights(model, folder)
        tokenizer.raw.save_pretrained(folder)


def _save_weights(model: nn.Module, folder: Path) -> None:
    lineage = lineage_of(model)
    if not isinstance(model, PeftModel):
        base_of(model).save_pretrained(folder)
    elif lineage.merged == ():
        model.peft_config[model.active_adapter].base_model_name_or_path = lineage.base
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        own = plain_factors(model)
        if lineage.merged is None or own is None:
            _save_merged(model, folder)
        else:
            _save_joined((*lineage.merged, own), lineage.base, folder)
    if isinstance(model, PeftModel) and (folder / "adapter_config.json").is_file():
        write_note(base_of(model), folder)
    readme = folder / "README.md"  # PEFT's empty model card
    if isinstance(model, PeftModel) and readme.is_file():
        readme.unlink()


def _save_joined(parts: tuple[Factors, ...], base: str, folder: Path) -> None:
    names = sorted({name for part in parts for name in part})
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in names:
        found = [part[name] for part in parts if name in part]
        a, b = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], 1)
        ranks[name] = len(a)
        state[f"{PREFIX}{name}.lora_A.weight"], state[f"{PREFIX}{name}.lora_B.weight"] = a.contiguous(), b.contiguous()
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = peft.LoraConfig(
        r=usual,
        lora_alpha=usual,  # scale 1: the scales are in B
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=names,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
    )
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _save_merged(model: PeftModel, folder: Path) -> None:
    whole = copy.deepcopy(model).float()
    cast(PreTrainedModel, cast(Any, whole).merge_and_unload(safe_merge=True)).save_pretrained(folder)
