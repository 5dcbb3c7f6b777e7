"""Which engine a model folder belongs to: its base, and the adapter on it where that can share the base. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.core.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
STARTER = "starter"
# what makes an adapter more than A and B beside a matrix; such a one is merged and served as a model of its own
_MORE = (
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias",
    "alora_invocation_tokens", "use_qalora", "corda_config", "eva_config", "layers_to_transform_weights", "megatron_config",
    "arrow_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placement:
    """base: what the engine loads. adapter: the folder of the adapter on it, "" for the base itself."""

    base: str
    adapter: str = ""


def place(folder: str) -> Placement:
    """Where a model is served: an adapter that is plain low-rank matrices on its base, anything else by itself.

    Raises
        InputError: an adapter's configuration that cannot be read.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return Placement(folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); restore the file") from None
    base = str(config.get("base_model_name_or_path") or "")
    if not base or not is_plain(config):
        return Placement(folder)
    where = Path(base).expanduser()
    is_folder = base != STARTER and where.is_dir()  # the starter is the package's, whatever lies in the current folder
    return Placement(str(where.resolve()) if is_folder else base, str(Path(folder).resolve()))


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is low-rank matrices alone, on the base's weights as they are.

    >>> is_plain({"peft_type": "LORA", "r": 8}), is_plain({"peft_type": "LORA", "r": 8, "use_dora": True})
    (True, False)
    """
    has_more = any(config.get(name) for name in _MORE) or config.get("bias", "none") != "none"
    # PiSSA, OLoRA and others change the base's weights when they start
    is_on_base = config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
    return config.get("peft_type") == "LORA" and not has_more and is_on_base
