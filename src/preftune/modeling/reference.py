"""The reference's log-probabilities, scored once and kept by content.

A score depends on the reference (every byte of its weights, the settings that shape its function), the precision, the
kernels, the library versions, the prompt's ids and the completion's ids. That is the key, and nothing else is:
learning rate, beta, loss, seed, adapter rank, epochs and folders change nothing that is stored here.

On disk, under ``folder/<digest of the identity>/``:

    identity.json            the identity in words
    <name>.logps             float32 log-probabilities, one record after the other, append-only
    <name>.index             one 40-byte entry a record: key (16), first value (8), values (8), checksum (8)

Each writer has files of its own, so readers and writers may work at once. Values are written before their entry; a
crash can cut the last entry, which is then not there, or lose the end of the values, which the checksum finds when a
record is looked up. Such a record is missing and is scored again.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn

from preftune.core.errors import CheckpointError
from preftune.core.files import write_json
from preftune.core.ids import digest_json
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Pack
from preftune.modeling.adapters import adapter_off
from preftune.modeling.forward import Scorer, base_of
from preftune.modeling.quantised import scales_of

Array = npt.NDArray[np.float32]
ENTRY = np.dtype([("key", "S16"), ("start", "<u8"), ("count", "<u8"), ("check", "S8")])
VOLATILE = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "attn_implementation"})


@dataclass(frozen=True)
class ReferenceIdentity:
    """What the scores of a reference depend on, besides the tokens.

    weights: digest of the reference's weights and function (:func:`weights_digest`). adapter: digest of adapters that
    belong to the reference and are not merged into its weights, or None. dtype: of the weights. kernel: layout,
    attention and head (``Scorer.kernel``). versions: of the libraries that compute.
    """

    weights: str
    dtype: str
    kernel: str
    adapter: str | None = None
    versions: tuple[tuple[str, str], ...] = (("torch", torch.__version__), ("transformers", transformers.__version__))

    @classmethod
    def of(cls, scorer: Scorer, weights: str | None = None) -> ReferenceIdentity:
        """The identity of the model under a scorer with its fresh adapters off.

        weights: its digest, where it was taken before the weights were spread over processes.
        """
        device = "" if scorer.device.type == "cpu" else f"@{torch.cuda.get_device_name(scorer.device)}"
        found = weights_digest(scorer.model) if weights is None else weights
        return cls(found, str(scorer.dtype).removeprefix("torch."), scorer.kernel + device)

    @cached_property
    def digest(self) -> str:
        """One digest of it all."""
        return digest_json(asdict(self))

    @property
    def model(self) -> str:
        """Digest of which model it is, wherever and by whichever kernel it is computed: what a resumed run must agree on."""
        return digest_json([self.weights, self.adapter, self.dtype])


def reference_logps(scorer: Scorer, pack: Pack, in_place: Callable[[], AbstractContextManager[None]]) -> Tensor:
    """Log-probabilities of a pack under the reference: dropout off, no graph; (targets,) nats, float32.

    Parameters
        in_place: makes the scorer's model the reference while this lasts, such as switching its fresh adapters off.
    """
    was_training = scorer.model.training
    scorer.model.train(False)
    try:
        with torch.no_grad(), in_place():
            return scorer.token_logps(pack).float()
    finally:
        scorer.model.train(was_training)


def weights_digest(model: nn.Module) -> str:
    """Digest of every weight of a model without its adapters, and of the settings that shape its function.

    Buffers that are saved with a model count as weights: some mixtures of experts (DeepSeek V3, GLM 4) hold what their
    routers add to the scores of experts in one. The same for a model and for the same model with fresh adapters of any rank
    or seed.
    """
    base = base_of(model)
    state = hashlib.blake2b(digest_size=16)
    settings = {k: v for k, v in base.config.to_dict().items() if not k.startswith("_") and k not in VOLATILE}
    state.update(digest_json(_jsonable(settings)).encode())
    for name, weight in sorted(_plain_weights(base)):
        state.update(f"{name}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        state.update(_bytes_of(weight).data)
        for scale in scales_of(weight):
            state.update(_bytes_of(scale).data)
    return state.hexdigest()


class ReferenceCache:
    """Per-token reference log-probabilities by content, on disk.

    Parameters
        folder: the cache's folder, shared by all runs on a machine.
        identity: of the reference; scores of other references are in other folders.

    Attributes
        num_forwards: completions that this object had scored by a model.
    """

    def __init__(self, folder: Path, identity: ReferenceIdentity) -> None:
        self.identity = identity
        self.folder = folder / identity.digest
        self.num_forwards = 0
        self._writer: _Writer | None = None
        self._shards: dict[str, tuple[int, Array]] = {}  # name -> index entries seen, values
        self._where: dict[bytes, tuple[str, int, int, bytes]] = {}
        self._checked: set[bytes] = set()
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have written since."""
        for path in sorted(self.folder.glob("*.index")):
            raw = path.read_bytes()
            entries = np.frombuffer(raw[: len(raw) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
            seen = self._shards[path.stem][0] if path.stem in self._shards else 0
            if len(entries) > seen:
                self._add_shard(path.stem, entries, seen)

    def lookup(self, examples: Iterable[TokenisedExample]) -> list[TokenisedExample]:
        """The examples of which at least one completion is not in the cache, each once, in their order."""
        missing: dict[tuple[bytes, ...], TokenisedExample] = {}
        for example in examples:
            if not all(self._is_held(key) for key in self._keys(example)):
                missing.setdefault(tuple(self._keys(example)), example)
        return list(missing.values())

    def count(self, examples: Iterable[TokenisedExample]) -> tuple[int, int]:
        """Different completions of these examples, and how many of them are in the cache."""
        keys = {key for example in examples for key in self._keys(example)}
        return len(keys), sum(self._is_held(key) for key in keys)

    @property
    def num_bytes(self) -> int:
        """Size of this reference's files on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.*"))

    def is_new(self, pack: Pack) -> bool:
        """Whether every completion of a pack would be scored by ``fill`` as it stands there: none is held, none comes twice."""
        keys = [key for example in pack.examples for key in self._keys(example)]
        return len(set(keys)) == len(keys) and not any(self._is_held(key) for key in keys)

    def scores(self, example: TokenisedExample) -> list[Array]:
        """Log-probabilities of the scored tokens of each completion; CheckpointError where one is not in the cache."""
        keys = self._keys(example)
        if not all(self._is_held(key) for key in keys):
            raise CheckpointError(f"reference scores of example {example.example_id} are not in {self.folder}; score them first")
        return [np.array(self._values(key), copy=True) for key in keys]

    def fill(self, pack: Pack, scorer: Scorer, *, is_forced: bool = False) -> None:
        """Score a pack with fresh adapters and dropout off and keep what is new; a pack without anything new costs nothing.

        The whole pack is scored, in the shape that the policy will see, so that policy and reference round alike.
        is_forced: the forward pass is run even so, because other processes run theirs.
        """
        keys = [key for example in pack.examples for key in self._keys(example)]
        if all(self._is_held(key) for key in keys) and not is_forced:
            return
        logps = reference_logps(scorer, pack, lambda: adapter_off(scorer.model)).cpu().numpy()
        self.num_forwards += pack.num_completions
        parts = np.split(logps, np.cumsum(pack.num_tokens)[:-1])
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "identity.json", asdict(self.identity))
            self._writer = _Writer(self.folder)
        for key, part in zip(keys, parts, strict=True):
            if not self._is_held(key):
                self._where[key] = self._writer.append(key, part)
                self._checked.add(key)
        self._writer.flush()
        name = self._writer.name
        self._shards[name] = (self._writer.num_entries, _map(self.folder / f"{name}.logps"))

    def _keys(self, example: TokenisedExample) -> list[bytes]:
        prompt = np.asarray(example.prompt_ids, dtype="<i8").tobytes()
        return [_key(prompt, completion) for completion in example.completions]

    def _is_held(self, key: bytes) -> bool:
        """Whether a record is there and whole; one that fails its checksum is forgotten."""
        if key in self._checked:
            return True
        if key not in self._where:
            return False
        values = self._values(key)
        if _checksum(key, values) != self._where[key][3]:
            del self._where[key]
            return False
        self._checked.add(key)
        return True

    def _values(self, key: bytes) -> Array:
        name, start, count, _ = self._where[key]
        return self._shards[name][1][start : start + count]

    def _add_shard(self, name: str, entries: npt.NDArray[Any], seen: int) -> None:
        path = self.folder / f"{name}.logps"
        values = _map(path) if path.is_file() else np.zeros(0, np.float32)
        self._shards[name] = (len(entries), values)
        for entry in entries[seen:]:
            # numpy strips trailing zero bytes of byte strings
            key, check = bytes(entry["key"]).ljust(16, b"\0"), bytes(entry["check"]).ljust(8, b"\0")
            start, count = int(entry["start"]), int(entry["count"])
            if start + count <= len(values):
                self._where[key] = (name, start, count, check)


class _Writer:
    """Appends records to a pair of files that nobody else writes; no file stays open between packs."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid.uuid4().hex
        self.num_entries = 0
        self._folder = folder
        self._at = 0
        self._values: list[bytes] = []
        self._index: list[bytes] = []

    def append(self, key: bytes, values: Array) -> tuple[str, int, int, bytes]:
        values = np.ascontiguousarray(values, dtype="<f4")
        check = _checksum(key, values)
        where = (self.name, self._at, len(values), check)
        self._values.append(values.tobytes())
        self._index.append(np.array([(key, self._at, len(values), check)], ENTRY).tobytes())
        self._at += len(values)
        self.num_entries += 1
        return where

    def flush(self) -> None:
        """Values first: an entry never promises what is not yet in the file."""
        for suffix, parts in ((".logps", self._values), (".index", self._index)):
            with (self._folder / f"{self.name}{suffix}").open("ab") as file:
                file.write(b"".join(parts))
            parts.clear()


def _key(prompt: bytes, completion: TokenisedCompletion) -> bytes:
    state = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    state.update(prompt)
    state.update(np.asarray(completion.ids, dtype="<i8").tobytes())
    state.update(bytes(completion.scored))
    return state.digest()


def _checksum(key: bytes, values: Array) -> bytes:
    return hashlib.blake2b(key + values.tobytes(), digest_size=8).digest()


def _map(path: Path) -> Array:
    count = path.stat().st_size // 4
    return np.memmap(path, dtype="<f4", mode="r", shape=(count,)) if count else np.zeros(0, np.float32)


def _plain_weights(base: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, and buffers that are saved with them, under the names that they have without adapters."""
    found: list[tuple[str, Tensor]] = []
    for name, weight in (*base.named_parameters(), *_saved_buffers(base)):
        parts = name.split(".")
        if any(part.startswith("lora_") for part in parts) or "modules_to_save" in parts:
            continue
        found.append((".".join(part for part in parts if part not in ("base_layer", "original_module")), weight))
    return found


def _saved_buffers(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # noqa: SLF001 -- torch tells it nowhere else
                yield f"{path}.{name}", buffer


def _bytes_of(weight: Tensor) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return flat


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
