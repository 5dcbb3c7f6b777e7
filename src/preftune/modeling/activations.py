"""What a forward pass keeps for backward: how much it is, keeping less of it, and keeping it elsewhere.

Checkpointing keeps the input of each layer and computes the layer again in backward. Those inputs are one vector a token
and layer; where even they are too many, they go to the memory of the host or to a file until backward asks for them.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from preftune.data.pack import Pack
from preftune.modeling.forward import Scorer, base_of, checkpoint_activations

Place: TypeAlias = Literal["host", "disk"]

LEAST_BYTES = 1 << 16  # smaller tensors stay where they are


def keep_layer_inputs(model: nn.Module, place: Place | None = None, folder: Path | None = None) -> None:
    """Checkpoint the layers of a model, in evaluation as in training, wherever a graph is built.

    Without this a held-out pack, which is scored with a graph and dropout off, would keep everything: transformers
    checkpoints in training mode alone.

    Parameters
        place: where the kept inputs wait for backward; None leaves them on the device.
        folder: for the file, where the place is ``disk``.
    """
    checkpoint_activations(model)
    base = base_of(model)
    body = base.base_model
    hooks = _Hooks(base, place, folder)
    body.register_forward_pre_hook(hooks.before)
    body.register_forward_hook(hooks.after, always_call=True)


def kept_bytes(scorer: Scorer, pack: Pack) -> int:
    """Bytes that the forward pass of a pack keeps for backward, weights not counted. Gradients are not touched."""
    held = map(own_part, (*scorer.model.parameters(), *scorer.model.buffers()))
    weights = {one.untyped_storage().data_ptr() for one in held}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # addresses are used again as soon as a tensor is gone

    def note(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in sizes:
            sizes[storage.data_ptr()] = storage.nbytes()
            # a node that holds its own output, through this list or by what is given back, is never freed
            alive.append(tensor.detach())
        return len(alive)

    def never(kept: int) -> Tensor:
        raise AssertionError(f"nothing goes backward here, and tensor {kept} was not kept")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, never):
        scorer.token_logps(pack)
    return sum(sizes.values())


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be spread over several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class DiskFile:
    """Tensors in one file without a name: it is gone when the last of them is, or with the process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- lives as long as the graph that holds it
        self._end = 0
        weakref.finalize(self, self._file.close)

    def write(self, tensor: Tensor) -> _OnDisk:
        """Append a tensor, from the CPU."""
        at = self._end
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        self._end += len(raw)
        written = 0
        while written < len(raw):
            written += os.pwrite(self._file.fileno(), raw[written:], at + written)
        return _OnDisk(self, at, tensor.shape, tensor.dtype)

    def read(self, at: int, count: int) -> Tensor:
        """``count`` bytes from a place."""
        found = np.empty(count, dtype=np.uint8)
        view, done = found.data, 0
        while done < count:
            got = os.preadv(self._file.fileno(), [view[done:]], at + done)
            if got == 0:
                raise OSError("the file of offloaded activations is shorter than what was written to it")
            done += got
        return torch.from_numpy(found)


class _OnDisk:
    """Where a tensor lies."""

    def __init__(self, file: DiskFile, at: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self._file, self._at, self._shape, self._dtype = file, at, shape, dtype

    def read(self) -> Tensor:
        count = self._shape.numel() * self._dtype.itemsize
        return self._file.read(self._at, count).view(self._dtype).view(self._shape)


class _Hooks:
    """Around the forward pass of a model's body, where a graph is built."""

    def __init__(self, base: PreTrainedModel, place: Place | None, folder: Path | None) -> None:
        self._layers = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
        self._place, self._folder = place, folder
        self._woken: list[nn.Module] = []
        self._saving: AbstractContextManager[Any] | None = None

    def before(self, _module: nn.Module, _arguments: Any) -> None:
        if not torch.is_grad_enabled():
            return
        # the flag of the layer itself, not of what is in it: dropout stays as it was
        self._woken = [layer for layer in self._layers if not layer.training]
        for layer in self._woken:
            layer.training = True
        self._saving = self._context()
        self._saving.__enter__()

    def after(self, *_given: Any) -> None:
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
        for layer in self._woken:
            layer.training = False
        self._woken = []

    def _context(self) -> AbstractContextManager[Any]:
        if self._place == "host":
            return torch.autograd.graph.save_on_cpu(pin_memory=True)
        if self._place == "disk":
            assert self._folder is not None
            return offloaded_to(DiskFile(self._folder))
        return nullcontext()


def offloaded_to(file: DiskFile) -> torch.autograd.graph.saved_tensors_hooks:
    """While this is on, what a graph keeps goes to a file: all but parameters, views of them, and small tensors."""

    def pack(tensor: Tensor) -> Any:
        root = tensor if tensor._base is None else tensor._base  # noqa: SLF001 (torch has no public name for it)
        is_weight = isinstance(root, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        if is_weight:
            return tensor
        if tensor.untyped_storage().nbytes() < LEAST_BYTES or tensor.layout != torch.strided:
            return tensor.detach()  # a node that held its own output would never be freed
        return tensor.device, file.write(tensor.cpu())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, place = kept
        found: Tensor = place.read()
        return found.to(device)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
