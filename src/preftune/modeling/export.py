"""A model folder for the world outside, and the proof that it is the same model.

The proof compares two computations that share no code of ours. On one side the source as it was trained: the base and,
where there is one, PEFT's own adapter modules beside it, never merged. On the other the exported folder, read again by
plain transformers (and PEFT for an adapter). Both score the same completions in float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from preftune.core.errors import InputError, PreftuneError
from preftune.core.files import read_json, write_json
from preftune.core.recipe import DecodingConfig, ModelConfig
from preftune.core.records import Message
from preftune.modeling.forward import base_of
from preftune.modeling.generate import Prompt, prompt_ids, sample_tokens
from preftune.modeling.gguf_file import GgufType, check_gguf, head_width, split_name, splitter, write_gguf
from preftune.modeling.lineage import save_model
from preftune.modeling.load import ADAPTER_CONFIG, DTYPES, LoadedModel, MissingPackage, load_model, model_path, one_line
from preftune.modeling.quantised import NOTE, dequantised, is_available, quantisation, read_note, settle
from preftune.modeling.quiet import quiet
from preftune.modeling.tokenizer import HubTokenizer

Form: TypeAlias = Literal["merged", "adapter"]
Dtype: TypeAlias = Literal["float32", "bfloat16"]
Row: TypeAlias = tuple[list[int], list[int]]  # prompt ids, completion ids

# largest difference of a token's log-probability, in nats: float32 is the rounding of a merge, bfloat16 of the weights
# f16 keeps 11 bits of a weight (largest gap seen 0.004), q8_0 eight of a block's largest (0.07)
BOUNDS: dict[str, float] = {"float32": 1e-4, "bfloat16": 0.5, "f32": 1e-4, "f16": 0.05, "q8_0": 0.5}
PROMPTS = (
    "Write a short story about a fox.",
    "What is a good way to learn a language?",
    "Explain rain to a child.",
    "Once upon a time",
    "Name three uses of a brick.",
    "Write a friendly greeting.",
)
TOKENS = 48
TRICKY = "It's 1234567  o'clock\n\n\tat  the caf\u00e9 \u4f60\u597d \U0001f98a!!"


class WrongTokens(PreftuneError):
    """The tokenizer of an exported file is not that of its source."""


@dataclass(frozen=True, slots=True)
class Verified:
    """How far the exported model is from its source: nats a token, over ``num_tokens`` of ``num_completions``.

    merge_gap: the largest gap before the weights were rounded, so that rounding cannot hide a wrong merge.
    """

    largest_gap: float
    mean_gap: float
    merge_gap: float
    bound: float
    num_completions: int
    num_tokens: int

    @property
    def is_same(self) -> bool:
        """Whether the gaps are within their bounds; NaN is not."""
        return self.largest_gap <= self.bound and self.merge_gap <= BOUNDS["float32"]


def is_adapter(source: str) -> bool:
    """Whether a model folder holds an adapter rather than whole weights."""
    return (Path(source) / ADAPTER_CONFIG).is_file()


def write_export(source: ModelConfig, folder: Path, form: Form, dtype: Dtype, prompts: Sequence[Prompt] = ()) -> Verified:
    """Fill ``folder`` with the model, its tokenizer, chat template and generation config, and compare it with the source.

    Parameters
        source: the model as a recipe names it. form: whole weights, or the adapter on its base.
        prompts: what the compared completions answer; general ones where there are none.

    Raises
        InputError: the source cannot be loaded.
    """
    loaded = load_model(source, precision="float32")
    rows = sample_rows(loaded, prompts)
    merged = _score(loaded.model, rows) if dtype != "float32" else None
    if form == "adapter":
        _write_adapter(source.name, loaded, folder, dtype)
    else:
        _write_merged(loaded, folder, dtype)
    _write_generation_config(loaded, folder)
    del loaded
    before = score(source, rows)
    after = score(ModelConfig(name=str(folder)), rows)
    gaps = _gaps(before, after)
    merge = gaps if merged is None else _gaps(before, merged)
    return Verified(float(gaps.max()), float(gaps.mean()), float(merge.max()), BOUNDS[dtype], len(rows), len(gaps))


def write_gguf_export(source: ModelConfig, path: Path, kind: GgufType, prompts: Sequence[Prompt] = ()) -> Verified:
    """Write a GGUF file and compare it with the source; it is read back by transformers, which dequantises it.

    Raises
        InputError: the source cannot be loaded, or this kind of model or tokenizer cannot be written.
        WrongTokens: the file's tokenizer gives other tokens than the source's.
    """
    loaded = load_model(source, precision="float32")
    check_gguf(loaded)
    rows = sample_rows(loaded, prompts)
    merged = _score(loaded.model, rows)
    write_gguf(loaded, path, kind)
    texts = [loaded.tokenizer.decode(prompt + completion, skip_special_tokens=False) for prompt, completion in rows]
    check_tokens(loaded.tokenizer, path, texts)
    del loaded
    before = score(source, rows)
    after = score_gguf(path, rows)
    gaps, merge = _gaps(before, after), _gaps(before, merged)
    return Verified(float(gaps.max()), float(gaps.mean()), float(merge.max()), BOUNDS[kind], len(rows), len(gaps))


def score_gguf(path: Path, rows: Sequence[Row]) -> list[Tensor]:
    """log p of every token of every completion under the model of a GGUF file, by transformers in float32."""
    read = cast(Callable[..., PreTrainedModel], AutoModelForCausalLM.from_pretrained)
    with quiet(), one_line(str(path)):
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        config.head_dim = head_width(path)  # transformers does not read it for every architecture
        model: nn.Module = read(str(path.parent), config=config, gguf_file=path.name, dtype=torch.float32)
        return _score(model.eval(), rows)


def check_tokens(tokenizer: HubTokenizer, path: Path, texts: Sequence[str]) -> None:
    """WrongTokens where the vocabulary, merges and special tokens of the file give other ids than the source's.

    transformers does not know llama.cpp's names of how text is cut before the merges, so it is told.
    """
    with quiet(), one_line(str(path)):
        written: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    written.backend_tokenizer.pre_tokenizer = splitter(split_name(tokenizer))
    for text in (*texts, *PROMPTS, TRICKY):
        theirs = written(text, add_special_tokens=False)["input_ids"]
        ours = tokenizer.encode(text, add_special_tokens=False)
        if theirs != ours:
            at = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), 0)
            raise WrongTokens(f"{path}: its tokenizer gives other tokens for {text[:60]!r}, from token {at + 1} on")


def _gaps(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.cat([(left - right).abs() for left, right in zip(one, other, strict=True)])


def sample_rows(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[Row]:
    """Completions of the model itself, as token ids."""
    asked = list(prompts) or [
        (Message("user", text),) if loaded.tokenizer.has_chat_template else text for text in PROMPTS
    ]  # fmt: skip
    ids = [prompt_ids(loaded.tokenizer, prompt) for prompt in asked]
    room = loaded.max_positions - TOKENS
    kept = [row for row in ids if 0 < len(row) <= max(room, 1)]
    if not kept:
        raise InputError(f"{loaded.name}: has {loaded.max_positions} positions, too few for any prompt to compare the export on")
    written = sample_tokens(loaded.model, loaded.tokenizer, kept, DecodingConfig(temperature=0.8, max_new_tokens=TOKENS), 0)
    return list(zip(kept, written, strict=True))


def score(source: ModelConfig, rows: Sequence[Row]) -> list[Tensor]:
    """log p of every token of every completion, by plain transformers and PEFT in float32, one row at a time."""
    with quiet(), one_line(source.name):
        return _score(_plain_model(source), rows)


@torch.inference_mode()
def _score(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    found = []
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        found.append(torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    return found


def _plain_model(source: ModelConfig) -> nn.Module:
    path = model_path(source.name)
    read = cast(Callable[..., PreTrainedModel], AutoModelForCausalLM.from_pretrained)
    how = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
    model: nn.Module
    if is_adapter(path):
        adapter = cast(PeftConfig, PeftConfig.from_pretrained(path))
        base = read(model_path(str(adapter.base_model_name_or_path)), revision=adapter.revision, **how, **_rounded(Path(path)))
        bits = read_note(Path(path))
        if bits is not None:
            settle(base, bits)
        if bits == "8bit":  # LLM.int8() rounds activations too, which no dense model does
            base = dequantised(base, bits)
        model = PeftModel.from_pretrained(cast(Any, base), path, is_trainable=False)
    else:
        model = read(path, revision=source.revision, **how)
    return model.eval()


def _rounded(adapter: Path) -> dict[str, Any]:
    """How the base of an adapter was rounded while it trained, for ``from_pretrained``."""
    bits = read_note(adapter)
    if bits is None:
        return {}
    if not is_available():
        raise MissingPackage(f"{adapter}: its base was rounded by bitsandbytes; pip install 'preftune[quant]'")
    return {"quantization_config": quantisation(bits, torch.float32)}


def _write_merged(loaded: LoadedModel, folder: Path, dtype: Dtype) -> None:
    model = loaded.model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    save_model(model, loaded.tokenizer, folder)


def _write_adapter(source: str, loaded: LoadedModel, folder: Path, dtype: Dtype) -> None:
    """The adapter's two files; a base that is in this package is named by its folder, which plain PEFT can open."""
    from safetensors.torch import load_file, save_file

    path = Path(model_path(source))
    config = read_json(path / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = model_path(str(config["base_model_name_or_path"]))
    write_json(folder / ADAPTER_CONFIG, config)
    if (path / NOTE).is_file():
        write_json(folder / NOTE, read_json(path / NOTE))
    state = load_file(path / "adapter_model.safetensors")
    rounded = {name: one.to(DTYPES[dtype]).contiguous() for name, one in state.items()}
    save_file(rounded, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with quiet():
        loaded.tokenizer.raw.save_pretrained(folder)


def _write_generation_config(loaded: LoadedModel, folder: Path) -> None:
    """The source's own settings, with every token that ends an answer, so that other programs stop where this one does."""
    settings = cast("GenerationConfig | None", base_of(loaded.model).generation_config)
    ends = sorted(loaded.tokenizer.eos_ids)
    if settings is None:
        return
    if ends:
        settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    with quiet():
        settings.save_pretrained(folder)
