"""The reference's log-probabilities, kept by content: scored once, served to every later run that needs them.

The key is what the numbers depend on and nothing else: the reference's weights and configuration, the arithmetic
(precision, kernel, library versions), the prompt ids, the completion ids and which of them count. Learning rate, beta,
loss, seed, adapter rank, epochs and output folder are not in it.

On disk, below the cache folder, one folder per reference; in it each process appends to a shard of its own:

    <identity>/identity.json       what the digest stands for
    <identity>/<shard>.f32         log-probabilities, little-endian float32, one record behind the other
    <identity>/<shard>.index       36 bytes a record: key (16), offset (8), count (4), checksums of data (4) and record (4)

Data are written before their index record, and both carry checksums: a record that a crash cut short is not served,
the others are.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn

from preftune.core.files import write_json
from preftune.core.ids import digest_bytes, digest_json
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Pack
from preftune.modeling.forward import Scorer, base_of

RECORD = struct.Struct("<16sQII")
CHECKSUM = struct.Struct("<I")
RECORD_BYTES = RECORD.size + CHECKSUM.size
ADAPTER_PARTS = ("lora_A.", "lora_B.", "lora_embedding_", "lora_magnitude_vector")
ZERO_AT_START = ("lora_B.", "lora_embedding_B")

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceIdentity:
    """What reference scores depend on, apart from the tokens.

    Parameters
        weights: digest of all weights and buffers, and of an adapter that changes them.
        settings: digest of the architecture's configuration.
        dtype: precision of the forward pass. kernel: the arithmetic, as ``Scorer.kernel`` names it.
        versions: of the libraries that compute.
    """

    weights: str
    settings: str
    dtype: str
    kernel: str
    device: str
    versions: str

    @cached_property
    def digest(self) -> str:
        """One digest of all fields."""
        return digest_json(asdict(self))

    @classmethod
    def of(cls, scorer: Scorer) -> ReferenceIdentity:
        """The identity of the model that the scorer holds, as it is now."""
        base = base_of(scorer.model)
        ignored = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "_attn_implementation"}
        settings = {key: value for key, value in base.config.to_dict().items() if key not in ignored}
        return cls(
            weights=weights_digest(scorer.model),
            settings=digest_json(_plain(settings)),
            dtype=str(next(base.parameters()).dtype).removeprefix("torch."),
            kernel=scorer.kernel,
            device=scorer.device.type,
            versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        )


def weights_digest(model: nn.Module) -> str:
    """Digest of every weight and buffer by name and bytes.

    An adapter that leaves the model as it is (B = 0, as every fresh one) does not count, so that a fresh adapter of any
    rank and seed has its base's digest; one that changes the model does.
    """
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    adapter = {name: tensor for name, tensor in tensors.items() if any(part in name for part in ADAPTER_PARTS)}
    is_fresh = all(not bool(tensor.any()) for name, tensor in adapter.items() if any(part in name for part in ZERO_AT_START))
    is_fresh &= not any("lora_magnitude_vector" in name for name in adapter)
    counted = {_own_name(name): tensor for name, tensor in tensors.items() if not (is_fresh and name in adapter)}
    return digest_bytes(*(part for name in sorted(counted) for part in (name.encode(), _bytes(counted[name]))))


def key_of(example: TokenisedExample, completion: TokenisedCompletion) -> bytes:
    """The content key of one completion behind its prompt, 16 bytes."""
    parts = (example.prompt_ids, completion.ids, completion.scored)
    return bytes.fromhex(digest_bytes(*(np.asarray(part, dtype="<i8").tobytes() for part in parts)))


class ReferenceCache:
    """Per-token log-probabilities of completions under one reference.

    Parameters
        folder: the cache folder, shared by all references and runs; other processes may fill it at the same time.
        identity: the reference.

    Attributes
        num_forwards: completions that this object had scored.
    """

    def __init__(self, folder: Path, identity: ReferenceIdentity) -> None:
        self.identity = identity
        self.num_forwards = 0
        self._folder = folder / identity.digest
        self._known: dict[bytes, Scores] = {}
        self._shard = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._read()

    def lookup(self, examples: Sequence[TokenisedExample]) -> list[TokenisedExample]:
        """The examples with a completion that is not in the cache, each once, in their order."""
        missing = {}
        for example in examples:
            keys = tuple(key_of(example, completion) for completion in example.completions)
            if any(key not in self._known for key in keys):
                missing.setdefault(keys, example)
        return list(missing.values())

    def fill(self, pack: Pack, scorer: Scorer) -> None:
        """Score a pack and keep the result; what is kept survives an interruption at once.

        The model runs in evaluation mode but with a graph, as in training: in low precision a pass without one rounds
        differently, and the margin of step 0 would not be 0.
        """
        was_training = scorer.model.training
        scorer.model.eval()
        try:
            with torch.enable_grad():
                logps = scorer.token_logps(pack).detach()
        finally:
            scorer.model.train(was_training)
        self.keep(pack, logps)

    def keep(self, pack: Pack, logps: Tensor) -> None:
        """Keep the log-probabilities of a pack's scored tokens, in the order of ``pack.targets``; (targets,) nats."""
        values = logps.to("cpu", torch.float32).numpy()
        ends = np.cumsum(pack.num_tokens)
        completions = [(example, one) for example in pack.examples for one in example.completions]
        new: dict[bytes, Scores] = {}
        for (example, completion), start, end in zip(completions, ends - pack.num_tokens, ends, strict=True):
            self.num_forwards += 1
            key = key_of(example, completion)
            if key not in self._known:
                new[key] = values[start:end].copy()
        self._append(new)
        self._known.update(new)

    def scores(self, example: TokenisedExample) -> list[Scores]:
        """Log-probabilities of each completion's scored tokens, in nats.

        Raises
            KeyError: a completion was never scored; ``lookup`` and ``fill`` first.
        """
        return [self._known[key_of(example, completion)] for completion in example.completions]

    def _append(self, new: dict[bytes, Scores]) -> None:
        if not new:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "identity.json").exists():
            write_json(self._folder / "identity.json", asdict(self.identity))
        with (self._folder / f"{self._shard}.f32").open("ab") as data:
            records = []
            for key, values in new.items():
                content = values.astype("<f4").tobytes()
                record = RECORD.pack(key, data.tell(), len(values), zlib.crc32(content))
                records.append(record + CHECKSUM.pack(zlib.crc32(record)))
                data.write(content)
            data.flush()
        with (self._folder / f"{self._shard}.index").open("ab") as index:
            index.write(b"".join(records))

    def _read(self) -> None:
        for path in sorted(self._folder.glob("*.index")):
            data_path = path.with_suffix(".f32")
            content = path.read_bytes()
            with contextlib.suppress(FileNotFoundError, ValueError):  # no data file, or an empty one: nothing to serve
                data = np.memmap(data_path, dtype=np.uint8, mode="r")
                self._read_shard(content, data)

    def _read_shard(self, content: bytes, data: npt.NDArray[np.uint8]) -> None:
        for at in range(0, len(content) - RECORD_BYTES + 1, RECORD_BYTES):
            record = content[at : at + RECORD.size]
            (checksum,) = CHECKSUM.unpack_from(content, at + RECORD.size)
            if zlib.crc32(record) != checksum:
                continue
            key, offset, count, data_checksum = RECORD.unpack(record)
            part = data[offset : offset + 4 * count]
            if len(part) == 4 * count and zlib.crc32(part) == data_checksum:
                self._known[key] = np.frombuffer(part, dtype="<f4")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _own_name(name: str) -> str:
    """A weight's name without what adapters put around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
