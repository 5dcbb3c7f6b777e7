"""What this machine computes on: device, threads, precision, determinism, and how memory is handed out."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from preftune.core.launch import Launch
from preftune.modeling.machine import peak_resident_bytes

Precision = Literal["float32", "bfloat16"]

# mallopt's parameter numbers (malloc.h of glibc) and the values that were measured: see set_allocator
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_ALLOCATOR = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 * 2**20))

_APPLIED: set[str] = set()


def choose_device() -> torch.device:
    """A CUDA device where there is one (under torchrun that of this process's place on its host), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = Launch.from_environment().local_rank
    return torch.device("cuda", local if local < torch.cuda.device_count() else 0)


def sent(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device; the host does not wait for the device, which works in the order it was told to.

    The array must not change before the host next waits; pinned memory alone is copied beside other work.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies bfloat16: AVX512-BF16 or AMX on a CPU, CUDA's own answer on a GPU.

    Elsewhere bfloat16 is emulated: slower than float32 and less exact.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def choose_precision(
    asked: Literal["auto", "float32", "bfloat16"], adapter: Literal["lora", "full"], device: torch.device | None = None
) -> Precision:
    """The precision of the forward pass. ``auto``: bfloat16 for LoRA where the hardware multiplies it, else float32.

    ``device`` None means the one that ``choose_device`` chooses.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if adapter == "lora" and has_fast_bfloat16(device or choose_device()) else "float32"


def set_threads(num_threads: int | None = None) -> int:
    """Threads of one operation; None keeps torch's choice (the cores this process may use, or OMP_NUM_THREADS)."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def set_allocator() -> bool:
    """Keep freed memory in the process instead of returning it page by page; True where it was applied.

    With glibc's defaults every large tensor is mapped from the kernel and returned to it, and half of the time of a
    training step goes into page faults. Applies to the whole process and cannot be undone, so only a process that
    preftune starts to train calls it: never an import, a server or a notebook. Only glibc on Linux, where it was
    measured; an allocator of the user's own choice (LD_PRELOAD, MALLOC_ variables) is left alone.
    """
    is_chosen = "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc" or is_chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    is_applied = all(mallopt(name, value) == 1 for name, value in _ALLOCATOR)
    _APPLIED.update({"allocator"} if is_applied else set())
    return is_applied


def return_free_memory() -> None:
    """Give back what preparation took and freed, where ``set_allocator`` keeps it: steps want blocks of other sizes.

    Once a stage: what is given back has to be mapped again where it is wanted again.
    """
    if _APPLIED:
        ctypes.CDLL(None).malloc_trim(0)


def has_allocator() -> bool:
    """Whether ``set_allocator`` was applied to this process."""
    return bool(_APPLIED)


@contextmanager
def deterministic(device: torch.device, *, is_wanted: bool) -> Iterator[None]:
    """Choose deterministic kernels while the block runs.

    On the CPU the kernels that preftune uses are deterministic as they are, so nothing changes there.
    """
    if device.type != "cuda" or not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, and reads it at its first call
    was, was_warning = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=was_warning)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the GPU's allocator, or of this process (resident) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    own = peak_resident_bytes()
    if own:
        return own
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
