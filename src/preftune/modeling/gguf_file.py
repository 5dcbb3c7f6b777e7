"""One GGUF file for llama.cpp and its relatives: weights, tokenizer, chat template, end tokens.

llama.cpp rotates neighbouring dimensions of a head where transformers rotates its halves, so the rows of q and k of the
Llama architecture are interleaved on the way (those of Qwen are read as they are). Vectors stay float32. In q8_0 each
32 weights of a row share a float16 scale (gguf's own quantiser); matrices whose rows are no multiple of 32 stay float16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedModel

from preftune.core.errors import InputError
from preftune.modeling.load import LoadedModel, MissingPackage
from preftune.modeling.tokenizer import HubTokenizer

GgufType: TypeAlias = Literal["f32", "f16", "q8_0"]
BLOCK = 32  # weights that share a scale in q8_0

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type -> gguf's name
PERMUTED = frozenset({"LLAMA"})

_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how text is cut before the merges -> llama.cpp's name for it
SPLITS = {_LLAMA_3: "llama-bpe", _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def check_gguf(loaded: LoadedModel) -> None:
    """Refuse what this writer cannot write, before anything is written.

    Raises
        MissingPackage: gguf is not installed. InputError: another architecture, rotary positions or tokenizer.
    """
    if find_spec("gguf") is None:
        raise MissingPackage("a GGUF file needs the package gguf; pip install 'preftune[gguf]'")
    config: Any = loaded.model.config
    elsewhere = "export a merged folder and convert it with llama.cpp's convert_hf_to_gguf.py"
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{loaded.name}: a {config.model_type} model cannot be written as GGUF here ({known} can); {elsewhere}")
    rope = str((config.rope_parameters or {}).get("rope_type", "default"))
    if rope != "default":
        raise InputError(f"{loaded.name}: its rotary positions are of the type {rope}, only default is written here; {elsewhere}")
    split_name(loaded.tokenizer)


def write_gguf(loaded: LoadedModel, path: Path, kind: GgufType) -> None:
    """Write the file. The model's weights are read in float32, one after the other.

    Parameters
        path: of the file, in a folder that exists.

    Raises
        InputError, MissingPackage: as ``check_gguf``.
    """
    import gguf

    check_gguf(loaded)
    config: Any = loaded.model.config
    name = ARCHITECTURES[config.model_type]
    arch = gguf.MODEL_ARCH[name]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    try:
        _write_shape(writer, config, loaded.name, kind)
        _write_tokenizer(writer, loaded.tokenizer, int(config.vocab_size))
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        for key, weights in _weights(loaded.model, is_permuted=name in PERMUTED):
            target = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise InputError(
                    f"{loaded.name}: the weight {key} has no place in a GGUF file of the architecture {name.lower()}"
                )
            _add(writer, target, weights, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def head_width(path: Path) -> int:
    """Width of a key head, as a file says."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    return int(next(field.contents() for name, field in fields.items() if name.endswith(".attention.key_length")))


def split_name(tokenizer: HubTokenizer) -> str:
    """llama.cpp's name for how this tokenizer cuts text before its merges; InputError where it has none."""
    backend = json.loads(_backend(tokenizer).to_str())
    if backend["model"]["type"] != "BPE" or backend["model"].get("byte_fallback"):
        kind = "SentencePiece" if backend["model"].get("byte_fallback") else backend["model"]["type"]
        raise InputError(
            f"{tokenizer.name}: its tokenizer is of the kind {kind}; byte-level BPE is what can be written as GGUF here"
        )
    before = backend["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = parts[0]["pattern"].get("Regex")
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise InputError(
        f"{tokenizer.name}: its tokenizer cuts text in a way that has no name in this writer ({' + '.join(map(str, kinds))}), "
        "and under another name it would give other tokens; convert a merged export with llama.cpp's convert_hf_to_gguf.py"
    )


def splitter(name: str) -> pre_tokenizers.PreTokenizer:
    """What ``split_name`` calls by this name, for readers that do not know the name."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in {"gpt-2", "smollm"})
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    pattern = next(regex for regex, known in SPLITS.items() if known == name)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _backend(tokenizer: HubTokenizer) -> Any:
    raw: Any = tokenizer.raw
    return raw.backend_tokenizer


def _write_shape(writer: Any, config: Any, name: str, kind: GgufType) -> None:
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head)
    writer.add_value_length(head)
    types = gguf.LlamaFileType
    writer.add_file_type({"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}[kind])


def _write_tokenizer(writer: Any, tokenizer: HubTokenizer, num_rows: int) -> None:
    """Tokens in the order of the embedding's rows, merges, special tokens, chat template."""
    import gguf

    raw: Any = tokenizer.raw
    backend = json.loads(_backend(tokenizer).to_str())
    added = {one["id"]: one for one in backend["added_tokens"]}
    tokens = {number: token for token, number in backend["model"]["vocab"].items()}
    tokens |= {number: one["content"] for number, one in added.items()}
    kinds = gguf.TokenType

    def kind(number: int) -> int:
        if number in added:
            return int(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
        return int(kinds.NORMAL if number in tokens else kinds.UNUSED)

    merges = [" ".join(one) if isinstance(one, list) else one for one in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(num_rows)])
    writer.add_token_types([kind(number) for number in range(num_rows)])
    writer.add_token_merges(merges)
    end = tokenizer.end_id
    writer.add_eos_token_id(end)
    others = sorted(tokenizer.eos_ids - {end})
    if others:  # the one that ends a turn, where it is not the one that ends a text
        writer.add_eot_token_id(others[0])
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if raw.pad_token_id is not None:
        writer.add_pad_token_id(raw.pad_token_id)
    starts = tokenizer.encode("a", add_special_tokens=True)
    writer.add_add_bos_token(tokenizer.bos_id is not None and starts[:1] == [tokenizer.bos_id])
    if isinstance(raw.chat_template, str):
        writer.add_chat_template(raw.chat_template)


def _weights(model: PreTrainedModel, *, is_permuted: bool) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    config: Any = model.config
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights: npt.NDArray[np.float32] = tensor.detach().to(torch.float32).cpu().numpy()
        if is_permuted and key.endswith(("q_proj.weight", "q_proj.bias")):
            weights = _interleaved(weights, config.num_attention_heads)
        elif is_permuted and key.endswith(("k_proj.weight", "k_proj.bias")):
            weights = _interleaved(weights, config.num_key_value_heads)
        yield key, weights


def _interleaved(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows 0, h/2, 1, h/2 + 1 ... of each head of h rows."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _add(writer: Any, name: str, weights: npt.NDArray[np.float32], kind: GgufType) -> None:
    import gguf

    if weights.ndim == 1 or kind == "f32":
        writer.add_tensor(name, np.ascontiguousarray(weights))
    elif kind == "f16" or weights.shape[-1] % BLOCK:
        writer.add_tensor(name, weights.astype(np.float16))
    else:
        eight = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weights), eight), raw_dtype=eight)
