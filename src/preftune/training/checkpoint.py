"""Checkpoints: whole or absent, verified on load, no pickle.

    checkpoints/step-000010/
      model/                  a model folder: weights or adapter, tokenizer
      parameters.safetensors  every trained parameter, as the optimiser holds it (float32)
      optimizer.safetensors   first and second moments, step counts
      reference.safetensors   a reference that follows the policy, as it stands (float32); absent otherwise
      state.safetensors       random number generators: torch, CUDA, numpy, python
      manifest.json           position, identities, and size and digest of every other file

A folder of that name is always whole, because it gets its name last (``core.files.write_folder``).
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.core.errors import CheckpointError
from preftune.core.files import TEMPORARY_PREFIX, read_json, remove_leftovers, write_folder, write_json
from preftune.core.ids import digest_file

FORMAT = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Parameters
        path: its folder. facts: what the manifest says of position and identity.
        parameters, moments: what ``Optimiser.masters`` and ``Optimiser.tensors`` gave. generators: of ``generator_state``.
        reference: what ``Reference.tensors`` gave.
    """

    path: Path
    facts: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    generators: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]


def folder_of(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:06d}"


def steps_in(root: Path) -> list[int]:
    """Steps that have a checkpoint, ascending; what a crash left half-written does not count."""
    found = (_STEP_FOLDER.fullmatch(path.name) for path in (root.iterdir() if root.is_dir() else ()))
    steps = [int(match[1]) for match in found if match]
    return sorted(step for step in steps if (folder_of(root, step) / MANIFEST).is_file())


def latest(root: Path) -> Path | None:
    """The newest checkpoint, found by looking, or None."""
    steps = steps_in(root)
    return folder_of(root, steps[-1]) if steps else None


def save_checkpoint(
    root: Path,
    step: int,
    *,
    facts: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    write_model: Callable[[Path], None],
    generators: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint; it appears whole or not at all.

    Parameters
        facts: JSON values for the manifest: position and identities.
        parameters, moments: of the optimiser. write_model: writes a model folder at the path it is given.
        generators: the state of the random generators; of this process where it is None.
        reference: the weights of one that follows the policy.

    Raises
        CheckpointError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    path = folder_of(root, step)
    states = generator_state() if generators is None else generators
    try:
        remove_leftovers(root)
        with write_folder(path) as folder:
            write_model(folder / "model")
            parts = {"parameters": parameters, "optimizer": moments, "state": states}
            for name, tensors in (parts | ({"reference": reference} if reference else {})).items():
                whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(whole, folder / f"{name}.safetensors")
            files = {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "digest": digest_file(file)}
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
            write_json(folder / MANIFEST, {"format": FORMAT, "step": step, **facts, "files": files})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {why_not_written(error)}; free some space and resume; {_earlier(root, step)}"
        ) from error
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify every file of it.

    Raises
        CheckpointError: a file that is missing, truncated or altered, by name, and which checkpoint to use instead.
    """
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        fault = _fault(path / name, expected["bytes"], expected["digest"])
        if fault:
            raise CheckpointError(f"checkpoint {path}: {name} {fault}; {_way_out(path)}")
    return Checkpoint(
        path=path,
        facts={key: value for key, value in manifest.items() if key != "files"},
        parameters=load_file(path / "parameters.safetensors"),
        moments=load_file(path / "optimizer.safetensors"),
        generators=load_file(path / "state.safetensors"),
        reference=load_file(path / "reference.safetensors") if "reference.safetensors" in manifest["files"] else {},
    )


def prune(root: Path, keep: int, best_step: int = 0) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one; each loses its name first, so none is ever half there."""
    for step in steps_in(root)[:-keep]:
        if step == best_step:
            continue
        doomed = root / f"{TEMPORARY_PREFIX}pruned-{step:06d}"
        folder_of(root, step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def generator_state() -> dict[str, Tensor]:
    """The state of every random number generator of this process, as tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries use the global one
    assert name == "MT19937"
    version, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy/keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy/rest": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy/gauss": torch.tensor([gauss], dtype=torch.float64),
        "python/words": torch.tensor([version, *words], dtype=torch.int64),
        "python/gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda/{index}": one for index, one in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_generators(state: Mapping[str, Tensor]) -> None:
    """Put back what ``generator_state`` gave."""
    torch.set_rng_state(state["torch"])
    position, has_gauss = state["numpy/rest"].tolist()
    keys = state["numpy/keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy/gauss"].item()))  # noqa: NPY002 - as above
    version, *words = state["python/words"].tolist()
    gauss = state["python/gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    devices = sorted(key for key in state if key.startswith("cuda/"))
    if torch.cuda.is_available() and devices:
        torch.cuda.set_rng_state_all([state[key] for key in devices])


def why_not_written(error: Exception) -> str:
    """The reason of a failed write in a few words, whichever library met it."""
    text = getattr(error, "strerror", None) or str(error)
    return "no space left on the disk" if "No space left" in text else text.splitlines()[0]


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT}")
        for expected in manifest["files"].values():
            int(expected["bytes"]), str(expected["digest"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} cannot be read ({error}); {_way_out(path)}") from None
    return dict(manifest)


def _fault(file: Path, num_bytes: int, digest: str) -> str:
    """What is wrong with a file, or the empty string."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size < num_bytes:
        return f"is truncated ({size} of {num_bytes} bytes)"
    return "" if size == num_bytes and digest_file(file) == digest else "is altered (its digest differs)"


def _way_out(path: Path) -> str:
    others = [step for step in steps_in(path.parent) if folder_of(path.parent, step) != path]
    return f"delete it to go on from step {others[-1]}" if others else "delete it to start again; there is no other"


def _earlier(root: Path, step: int) -> str:
    others = [other for other in steps_in(root) if other != step]
    return f"the checkpoint of step {others[-1]} is intact" if others else "there is no earlier checkpoint"
