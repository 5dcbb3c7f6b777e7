"""Look at the machine before it is needed: versions, processor, memory, disk, GPU, packages, folders."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from preftune.app.context import Context
from preftune.core.version import __version__

Level: TypeAlias = Literal["ok", "note", "problem"]
MIN_PYTHON = (3, 11)
MIN_FREE_GB = 1.0
MIN_MEMORY_GB = 1.0
REQUIRED = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "scipy", "pydantic", "pyarrow", "click")
OPTIONAL = {
    "zstandard": "reading .zst files",
    "bitsandbytes": "bases of 4 and 8 bits, moments of 8 bits",
    "gguf": "export --gguf",
    "gptqmodel": "models quantised by GPTQ or AWQ",
}
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Check:
    """One fact about the machine; a ``problem`` would stop a run, a ``note`` would not."""

    name: str
    level: Level
    detail: str
    way_out: str = ""

    def to_dict(self) -> dict[str, str]:
        """As JSON."""
        return {"name": self.name, "level": self.level, "detail": self.detail, "way_out": self.way_out}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every check, in order."""

    checks: list[Check]

    @property
    def problems(self) -> list[Check]:
        """What would stop a run."""
        return [one for one in self.checks if one.level == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"ok": not self.problems, "checks": [one.to_dict() for one in self.checks]}

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = [
            f"{one.level:<8} {one.name:<16} {one.detail}" + (f"; {one.way_out}" if one.way_out else "") for one in self.checks
        ]
        count = len(self.problems)
        end = "nothing stands in the way of a run" if not count else f"{count} problem{'s' if count > 1 else ''} would stop a run"
        return [*lines, end]


def diagnose(output: Path, context: Context | None = None, *, asks_hub: bool = False) -> Diagnosis:
    """Look at everything that a run needs. Nothing leaves the machine unless ``asks_hub``."""
    place = context or Context.from_environment()
    checks = [_python(), *_packages()]
    if find_spec("torch") is not None:
        checks += [_processor(), _allocator(), _gpu(), _memory()]
    checks += [_platform(), _starter()]
    for name, folder in (("runs", output), ("cache", place.cache), ("state", place.state)):
        checks += _folder(name, folder)
    checks += _optional()
    if asks_hub:
        checks.append(_hub())
    return Diagnosis(checks)


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return Check("python", "problem", f"{found}, preftune needs 3.11 or newer", "make the environment with a newer Python")
    return Check("python", "ok", f"{found}, preftune {__version__}")


def _packages() -> Iterator[Check]:
    found: list[str] = []
    for name in REQUIRED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Check(name, "problem", "is not installed", "install preftune again, with its dependencies")
    yield Check("packages", "ok", ", ".join(found))


def _processor() -> Check:
    import torch

    from preftune.modeling.machine import cpu_count
    from preftune.training.devices import has_fast_bfloat16

    fast = has_fast_bfloat16(torch.device("cpu"))
    capabilities = torch.cpu.get_capabilities().items()
    flags = sorted(name for name, has in capabilities if has is True and name.startswith(("avx", "amx", "sve", "neon")))
    words = "multiplies bfloat16 itself" if fast else "has no bfloat16 of its own, so float32 is used"
    detail = f"{platform.machine()}, {cpu_count()} cores, {torch.get_num_threads()} threads, {words}"
    return Check("processor", "ok", f"{detail} ({', '.join(flags)})" if flags else detail)


def _allocator() -> Check:
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return Check("allocator", "note", "no glibc on Linux here: its memory settings are not used, steps are slower")
    chosen = [name for name in os.environ if name == "LD_PRELOAD" or name.startswith("MALLOC_")]
    if chosen:
        return Check("allocator", "note", f"{', '.join(chosen)} is set, so preftune leaves the allocator as it is")
    if os.environ.get("PREFTUNE_ALLOCATOR") == "off":
        return Check("allocator", "note", "switched off by PREFTUNE_ALLOCATOR, steps are slower")
    return Check("allocator", "ok", "glibc, kept from returning memory while it trains")


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return Check("gpu", "note", "none: training runs on the processor" + ("" if built else "; this torch has no CUDA"))
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info(0)
    detail = f"{', '.join(names)}; the first has {free / _GB:.1f} of {total / _GB:.1f} GB free, CUDA {torch.version.cuda}"
    return Check("gpu", "ok", detail)


def _memory() -> Check:
    import torch

    from preftune.modeling.machine import memory_limit, total_memory

    limit, total = memory_limit(torch.device("cpu")), total_memory()
    if limit is None:
        return Check("memory", "note", "not known on this system; give it to `preftune plan` with --memory")
    detail = f"{limit.num_bytes / _GB:.1f} GB for a run ({limit.what})" + (f", {total / _GB:.1f} GB in all" if total else "")
    if limit.num_bytes < MIN_MEMORY_GB * _GB:
        return Check("memory", "problem", detail, "close other programs or give the container more")
    return Check("memory", "ok", detail)


def _platform() -> Check:
    system = platform.system()
    if system == "Linux":
        return Check("system", "ok", f"{system} {platform.release()}")
    missing = "bit-exact resume, memory limits and GPU training are tested on Linux only"
    return Check("system", "note", f"{system} {platform.release()}: {missing}")


def _starter() -> Check:
    from preftune.core.errors import PreftuneError
    from preftune.training.model_files import check_model

    try:
        found = check_model("starter")
    except PreftuneError as error:
        return Check("starter", "problem", str(error), "install preftune again")
    if found:
        return Check("starter", "problem", found[0].fact, "install preftune again")
    return Check("starter", "ok", "the embedded model is whole")


def _folder(name: str, folder: Path) -> Iterator[Check]:
    """Whether something can be written there, and how much space there is."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".writing-"):
            pass
    except OSError as error:
        yield Check(name, "problem", f"{folder} cannot be written: {error.strerror}", _elsewhere(name))
        return
    free = shutil.disk_usage(place).free / _GB
    if free < MIN_FREE_GB:
        yield Check(name, "problem", f"{folder} has {free:.2f} GB free", "`preftune gc` gives some back")
        return
    yield Check(name, "ok", f"{folder}, {free:.1f} GB free")


def _elsewhere(name: str) -> str:
    variable = {"cache": "PREFTUNE_CACHE", "state": "PREFTUNE_HOME"}.get(name)
    return f"set {variable} to another folder" if variable else "use output=FOLDER"


def _optional() -> Iterator[Check]:
    for name, purpose in OPTIONAL.items():
        if find_spec(name) is None:
            yield Check(name, "note", f"not installed; it is for {purpose}")
        else:
            try:
                yield Check(name, "ok", f"{version(name)}, for {purpose}")
            except PackageNotFoundError:
                yield Check(name, "ok", f"for {purpose}")


def _hub() -> Check:
    import httpx2 as httpx
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Check("hub", "note", "HF_HUB_OFFLINE is set: only models on this machine")
    try:
        answer = httpx.get(f"{ENDPOINT}/api/models?limit=1", timeout=5.0)
    except httpx.HTTPError as error:
        detail = f"{ENDPOINT} cannot be reached ({type(error).__name__})"
        return Check("hub", "note", detail, "models and adapters must be folders on this machine")
    if answer.status_code >= 400:
        return Check("hub", "note", f"{ENDPOINT} answers {answer.status_code}", "check HF_ENDPOINT and HF_TOKEN")
    return Check("hub", "ok", f"{ENDPOINT} answers")
