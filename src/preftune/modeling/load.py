"""Models and tokenizers from the starter, a folder or the hub; every failure is one line.

A folder that holds a PEFT adapter is loaded as its base with the adapter merged in float32 and rounded once to the
dtype of the run. So what an earlier stage trained is the reference and the start of the next one, at no cost per
token, and the digest of the weights identifies it. The price is one rounding of the merged matrices to bfloat16, of
the size of that which the base itself went through. The merged adapters are remembered (``Lineage``), and saving
writes one adapter on the original base that holds them all: rank r1 + r2, exact, readable by plain PEFT.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HUB
from huggingface_hub.errors import GatedRepoError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from preftune.core.errors import InputError
from preftune.core.recipe import ModelConfig
from preftune.modeling.lineage import Lineage, absorb_adapter, set_lineage
from preftune.modeling.quantised import Bits, bits_of, dequantised, is_available, quantisation, read_note, settle
from preftune.modeling.quiet import quiet
from preftune.modeling.routers import quieten_routers
from preftune.modeling.sharing import position_limits
from preftune.modeling.tokenizer import HubTokenizer, template_text

STARTER = "starter"
NO_LIMIT = sys.maxsize
ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOT_TEXT = re.compile(r"(vision|audio|image|video|speech)\w*_config|(vision|audio)_(tower|encoder)")
RANDOM_PARTS = re.compile(r"drop|jitter")
Precision = Literal["float32", "bfloat16"]


class NotATextModel(InputError):
    """A model that takes images or sound, or that has an encoder."""


class MissingPackage(InputError):
    """A model that needs a package that is not installed."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for a stage.

    model: weights in the dtype asked for, dropout off. tokenizer: ``.raw`` is the Hugging Face one. name: as the recipe
    says it. path: the folder or hub id it came from. max_positions: tokens that a row may have.
    """

    model: PreTrainedModel
    tokenizer: HubTokenizer
    name: str
    path: str
    max_positions: int


def model_path(name: str) -> str:
    """The folder or hub id behind a model's name; ``starter`` is the one in the package.

    InputError where a path was meant and nothing is there.
    """
    if name == STARTER:
        folder = Path(__file__).resolve().parent.parent / "starter" / "model"
        if not (folder / "config.json").is_file():
            raise InputError("the embedded starter is missing from this installation; install preftune again")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise InputError(f"{name}: is a file, a model is a folder with config.json and safetensors; give the folder")
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith((".", "/", "~"))
    if not is_hub_id:
        raise InputError(f"{name}: no such model folder; check model.name")
    if not _is_cached(name) and not _hub_answers():
        raise InputError(f"{name}: is no folder and no cached hub model, and the model hub cannot be reached; give a folder")
    return name


def load_tokenizer(config: ModelConfig) -> HubTokenizer:
    """The tokenizer alone, with the chat template that the recipe names."""
    path = model_path(config.name)
    with quiet(), one_line(config.name):
        adapter = _adapter_config(path, config)
        source = path
        if adapter is not None and not _has_tokenizer(path):
            source = model_path(str(adapter.base_model_name_or_path))
        raw = AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=False)
        eos = _stated_eos(model_path(str(adapter.base_model_name_or_path)) if adapter is not None else path, config.revision)
    _keep_unknown_token(raw)
    if config.chat_template is not None:
        raw.chat_template = template_text(config.chat_template)
    return HubTokenizer(raw, eos, config.name)


def load_model(config: ModelConfig, *, precision: Precision) -> LoadedModel:
    """Weights and tokenizer of a causal language model, on the CPU, dropout off, nothing trainable decided yet.

    Raises
        InputError: one line for a missing folder, an unreadable or incomplete file, an unknown architecture, code that
            would have to be executed, pickled weights, a model of images or sound, a missing dependency.
    """
    path = model_path(config.name)
    dtype = DTYPES[precision]
    with quiet(), one_line(config.name):
        adapter = _adapter_config(path, config)
        if adapter is None:
            model, base = _read(path, config.revision, dtype, config.name, bits_of(config)), config.name
        else:
            base = str(adapter.base_model_name_or_path)
            bits = read_note(Path(path))
            model = _read(model_path(base), adapter.revision, torch.float32, base, bits)
            if bits is not None:  # the adapter learnt on the base as it was rounded
                model = dequantised(model, bits)
            wrapped = PeftModel.from_pretrained(model, path, is_trainable=False)
            model, parts = absorb_adapter(wrapped, dtype)
        set_lineage(model, Lineage(_portable(base), parts if adapter is not None else ()))
    tokenizer = load_tokenizer(config)
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    largest = max(tokenizer.raw.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{config.name}: its tokenizer has ids up to {largest} but the model has {rows} embeddings; they do not match"
        )
    limits = position_limits(model.config.get_text_config())
    model.train(False)
    return LoadedModel(model, tokenizer, config.name, path, limits[0] if limits else NO_LIMIT)


def _keep_unknown_token(raw: PreTrainedTokenizerBase) -> None:
    """Give a rebuilt tokenizer its unknown token back.

    transformers 5 rebuilds some tokenizers of Llama's class and loses the token on the way; characters outside the
    vocabulary would then vanish from the ids, and character offsets slip behind them.
    """
    backend = getattr(raw, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "unk_token", "") is None and raw.unk_token is not None:
        backend.model.unk_token = raw.unk_token


def read_max_positions(config: ModelConfig) -> int:
    """Tokens that a row may have, from the configuration alone; ``NO_LIMIT`` where it names none."""
    path = model_path(config.name)
    with quiet(), one_line(config.name):
        adapter = _adapter_config(path, config)
        source = path if adapter is None else model_path(str(adapter.base_model_name_or_path))
        settings = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
        _refuse(settings, config.name)
    limits = position_limits(settings.get_text_config())
    return limits[0] if limits else NO_LIMIT


def _read(path: str, revision: str | None, dtype: torch.dtype, name: str, bits: Bits | None = None) -> PreTrainedModel:
    if bits is not None and not is_available():
        raise MissingPackage(f"{name}: model.load_in_{bits} needs the package bitsandbytes; pip install 'preftune[quant]'")
    settings = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    _refuse(settings, name)
    for part in {id(part): part for part in (settings, settings.get_text_config())}.values():
        _no_randomness(part)
    read = cast(Callable[..., tuple[PreTrainedModel, dict[str, Any]]], AutoModelForCausalLM.from_pretrained)
    model, info = read(
        path,
        config=settings,
        revision=revision,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **({} if bits is None else {"quantization_config": quantisation(bits, dtype)}),
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{name}: {len(missing)} weights are not in its files, first {missing[0]}; the model folder is incomplete"
        )
    quieten_routers(model)
    if bits is not None:
        settle(model, bits)
    return model


def _refuse(settings: PreTrainedConfig, name: str) -> None:
    """Models that are not text in, text out."""
    for field, value in settings.to_dict().items():
        if value is not None and NOT_TEXT.fullmatch(field):
            raise NotATextModel(
                f"{name}: its config has {field!r}, so it also takes images or sound; preftune trains text models only"
            )
    if settings.is_encoder_decoder:
        raise NotATextModel(f"{name}: its config has 'is_encoder_decoder', preftune trains decoder-only language models")


def _no_randomness(settings: PreTrainedConfig) -> None:
    """Dropout and router noise off: a policy that is not its own reference at step 0 cannot be checked."""
    for field, value in settings.to_dict().items():
        if isinstance(value, float) and value > 0 and RANDOM_PARTS.search(field):
            setattr(settings, field, 0.0)


def _is_cached(name: str) -> bool:
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", ADAPTER_CONFIG))


def _hub_hint(error: BaseException) -> str:
    """What to do about a hub's refusal: a gated or private model needs a token."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(seen, GatedRepoError) or status in {401, 403}:
            return "the model is gated or private: ask for access on its page, and set HF_TOKEN to a token that may read it"
        seen = seen.__cause__ or seen.__context__
    return "check model.name"


def _hub_answers() -> bool:
    """Whether the hub's name resolves: the client itself would retry for half a minute."""
    try:
        socket.getaddrinfo(urlsplit(HUB).hostname, 443)
    except OSError:
        return False
    return True


def _adapter_config(path: str, config: ModelConfig) -> PeftConfig | None:
    folder = Path(path)
    if not folder.is_dir():
        return cast(PeftConfig, PeftConfig.from_pretrained(path)) if _hub_file(path, ADAPTER_CONFIG, config.revision) else None
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = PeftConfig.from_pretrained(path)
        if not adapter.base_model_name_or_path:
            raise InputError(f"{config.name}: {ADAPTER_CONFIG} does not name its base model; set base_model_name_or_path")
        return cast(PeftConfig, adapter)
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            f"{config.name}: has neither config.json nor {ADAPTER_CONFIG}, so it is no model folder; check model.name"
        )
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({_line(error)}); restore the file") from None
    return None


def _stated_eos(path: str, revision: str | None) -> tuple[int, ...]:
    """End tokens of generation_config.json, else of config.json."""
    for file in ("generation_config.json", "config.json"):
        local = Path(path) / file if Path(path).is_dir() else _hub_file(path, file, revision)
        if local is None or not local.is_file():
            continue
        stated = json.loads(local.read_text(encoding="utf-8")).get("eos_token_id")
        if stated is not None:
            return tuple(stated) if isinstance(stated, list) else (int(stated),)
    return ()


def _hub_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub model in the local cache, fetched if need be; None where the model has none of that name."""
    held = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(held, str):
        return Path(held)
    if not _hub_answers():
        return None
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _has_tokenizer(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _portable(name: str) -> str:
    """What an adapter's file says of its base: ``starter``, a hub id, or a folder that does not depend on where one stands."""
    return str(Path(name).expanduser().resolve()) if name != STARTER and Path(name).expanduser().is_dir() else name


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """What transformers, PEFT and safetensors raise about a model's files, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(
            f"{name}: a safetensors file is truncated or damaged ({_line(error)}); copy or download it again"
        ) from None
    except ImportError as error:
        raise MissingPackage(f"{name}: needs a package that is not installed ({_line(error)}); install it") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{name}: cannot be loaded as a causal language model ({_line(error)}); {_hub_hint(error)}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def load_info(loaded: LoadedModel) -> dict[str, Any]:
    """The facts of a loaded model that a plan or report shows: parameters, layers, dtype, positions."""
    config: Any = loaded.model.config.get_text_config()
    return {
        "name": loaded.name,
        "architecture": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "layers": getattr(config, "num_hidden_layers", None),
        "vocabulary": config.vocab_size,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "max_positions": None if loaded.max_positions == NO_LIMIT else loaded.max_positions,
    }
