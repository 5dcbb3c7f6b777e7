"""Runs one training of one system in a process of its own, and knows the machine. Light: imports neither torch nor preftune."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
PEER_PYTHON = ROOT / ".venv-trl" / "bin" / "python"

# glibc: keep freed blocks in the process instead of mapping and returning every large tensor (malloc's tunables);
# preftune sets the same for itself when it trains
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_TOP_PAD_": "268435456"}
# no hub; TRL's trainers call huggingface_hub.send_telemetry, which honours HF_HUB_DISABLE_TELEMETRY and HF_HUB_OFFLINE
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
GIB = 2**30


class RunFailed(RuntimeError):
    """A run ended badly; the message holds the end of what it said."""


def environment(*, allocator: bool) -> dict[str, str]:
    """The caller's environment without allocator settings of its own, offline; with glibc's settings where asked."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_") and key != "LD_PRELOAD"}
    return kept | OFFLINE | (ALLOCATOR if allocator else {})


def run(command: Sequence[str], *, allocator: bool = False, timeout: float = 1200) -> dict[str, Any]:
    """The JSON that the command writes to the file behind `--out`, with its wall seconds.

    Raises
        RunFailed: exit status, timeout or a kill for memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, "--out", str(out)],
                env=environment(allocator=allocator),
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RunFailed(f"{Path(command[1]).name}: still running after {timeout:.0f} s") from None
        seconds = time.perf_counter() - start
        if done.returncode != 0 or not out.is_file():
            last = "\n".join((done.stderr or done.stdout).splitlines()[-12:])
            raise RunFailed(f"{Path(command[1]).name} ended with {done.returncode}\n{last}")
        return json.loads(out.read_text()) | {"process_seconds": seconds}


def peer(*options: str, allocator: bool = False, timeout: float = 1200) -> dict[str, Any]:
    """One training of TRL in its own environment."""
    return run([str(PEER_PYTHON), str(BENCH / "peer_trl.py"), *options], allocator=allocator, timeout=timeout)


def ours(*options: str, timeout: float = 1200) -> dict[str, Any]:
    """One training of preftune, which sets the allocator for itself."""
    return run([sys.executable, str(BENCH / "ours.py"), *options], timeout=timeout)


def heldout(policy: str, reference: str, ids: str) -> dict[str, Any]:
    """Held-out accuracy of a trained model by the neutral judge."""
    return run([sys.executable, str(BENCH / "heldout.py"), "--policy", policy, "--reference", reference, "--ids", ids])


def equality(model: str, rows: str, *, ceiling_only: bool = False) -> dict[str, Any]:
    """Whether preftune's timed path equals a plain forward, and the machine's ceiling; or the ceiling alone."""
    only = ["--ceiling-only"] if ceiling_only else []
    return run([sys.executable, str(BENCH / "equality.py"), "--model", model, "--train", rows, *only])


def available_bytes() -> int:
    """Memory that a new process can take without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RunFailed("/proc/meminfo does not say what is available")


def say(text: str) -> None:
    """A progress line, with the time."""
    print(f"{datetime.now(UTC):%H:%M:%S}  {text}", flush=True)


def machine() -> dict[str, Any]:
    """What the figures hold for: processor, cores, memory, date, commit."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in facts if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in facts if line.startswith("flags")), [])
    memory = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    changed = git("status", "--porcelain", "--", "src", "bench/*.py")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "bfloat16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gb": round(memory / 1e9, 1),
        "load_at_start": os.getloadavg()[0],
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "python": platform.python_version(),
    }


def git(*words: str) -> str:
    """What git says, or nothing where there is no repository."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
