"""A base in 4 or 8 bits under adapters, by bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

4 bits are NF4 with double quantisation, 8 bits are LLM.int8(). An adapter learns on the base as it was rounded, so whatever
merges it must merge into that base dequantised and not into the original: a note beside the adapter says how it was rounded.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from preftune.core.files import read_json, write_json
from preftune.core.recipe import ModelConfig

Bits: TypeAlias = Literal["4bit", "8bit"]
NOTE = "base_quantization.json"
ATTRIBUTE = "preftune_bits"


def bits_of(config: ModelConfig) -> Bits | None:
    """What the model section of a recipe asks for."""
    return "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else None


def is_available() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def quantisation(bits: Bits, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is told. dtype: that products are computed in."""
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **options)  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def settle(model: PreTrainedModel, bits: Bits) -> None:
    """Remember the bits on the model, and keep its layers to one arithmetic.

    On a processor that multiplies bfloat16 a 4-bit layer repacks its own weights at the first forward pass in evaluation,
    and computes in bfloat16 from then on: reference and policy would differ, and the weights' digest would change. An
    8-bit layer rounds activations too in evaluation and, on a CPU, not in training; it stays in training's arithmetic.
    """
    setattr(model, ATTRIBUTE, bits)
    for found in model.modules():
        module: Any = found
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if bits == "8bit" and hasattr(module, "state") and hasattr(module.state, "is_training"):
            module.train(True)
            module.train = partial(_stay, module)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 -- torch's own signature
    return module


def bits_in(model: nn.Module) -> Bits | None:
    """The bits of a model that ``settle`` saw, or that was dequantised from such a one; None for any other."""
    return cast("Bits | None", getattr(model, ATTRIBUTE, None))


def dequantised(model: PreTrainedModel, bits: Bits) -> PreTrainedModel:
    """The same function with dense float32 weights: what the rounded base stands for."""
    dense: PreTrainedModel = cast(Any, model).dequantize()
    for parameter in dense.parameters():
        parameter.data = parameter.data.float()
    dense.config.dtype = torch.float32
    setattr(dense, ATTRIBUTE, bits)
    return dense


def write_note(model: nn.Module, folder: Path) -> None:
    """Say beside an adapter what its base was rounded to; nothing for a base that was not."""
    bits = bits_in(model)
    if bits is not None:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if bits == "4bit" else {}
        write_json(folder / NOTE, {"quant_method": "bitsandbytes", f"load_in_{bits}": True, **options})


def read_note(folder: Path) -> Bits | None:
    """What the base of an adapter was rounded to while it trained, or None."""
    if not (folder / NOTE).is_file():
        return None
    return "4bit" if read_json(folder / NOTE).get("load_in_4bit") else "8bit"


def scales_of(parameter: Tensor) -> list[Tensor]:
    """The tensors that packed values mean nothing without, in a fixed order."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        packed = state.as_dict(packed=False)
        return [torch.as_tensor(packed[key]) for key in sorted(packed) if isinstance(packed[key], (Tensor, float))]
    scale = getattr(parameter, "SCB", None)
    return [scale] if isinstance(scale, Tensor) else []
