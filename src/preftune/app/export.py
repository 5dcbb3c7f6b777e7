"""Export a trained model: a folder for other programs, compared with its source before it gets its name."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from preftune.app.named import STARTER, find_named
from preftune.core.errors import InputError, PreftuneError, UsageError
from preftune.core.files import read_json, write_folder, write_json, write_text
from preftune.core.recipe import ModelConfig
from preftune.core.version import __version__

RECORD = "export.json"
PROMPTS = 8


class NotTheSameModel(PreftuneError):
    """The exported model does not compute what its source does."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, how far it is from its source, and where it was pushed."""

    folder: Path
    facts: dict[str, Any]
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"folder": str(self.folder), **self.facts, "url": self.url}

    def summary(self) -> list[str]:
        """What a person reads."""
        checked = self.facts["verified"]
        lines = [
            f"{self.facts['form']} model in {self.facts['dtype']}: {self.folder}",
            f"same as its source: the largest gap is {checked['largest_gap']:.2g} nat a token (bound {checked['bound']:g})",
            f"compared on {checked['num_tokens']} tokens of {checked['num_completions']} completions",
        ]
        return lines if self.url is None else [*lines, f"pushed to {self.url}"]


def export_model(
    given: str, to: Path, form: Literal["merged", "adapter"] = "merged", dtype: Literal["float32", "bfloat16"] = "float32",
    output: Path = Path("runs"),
) -> Exported:  # fmt: skip
    """Write a model folder with a card and verify it; nothing is left at ``to`` where it is not the same model.

    Parameters
        given: a run, ``RUN@STEP``, a model folder, a hub id or ``starter``. to: the folder, which must not hold anything else.

    Raises
        UsageError: there is no such model, or ``form`` is adapter and the model has none, or ``to`` holds other files.
        NotTheSameModel: the comparison with the source exceeds its bound.
    """
    from preftune.modeling.export import is_adapter, write_export

    named = find_named(given, output)
    if form == "adapter" and not is_adapter(named.config.name):
        raise UsageError(f"model {given!r}: has whole weights and no adapter; write --form merged")
    if to.exists() and not _is_ours(to):
        raise UsageError(f"{to}: exists and is not an export; give a folder that does not exist yet")
    with write_folder(to.resolve()) as folder:
        verified = write_export(named.config, folder, form, dtype, named.prompts(PROMPTS))
        if not verified.is_same:
            raise NotTheSameModel(
                f"{to}: the export is not the model of {given!r}: a token's log-prob differs by {verified.largest_gap:.3g} "
                f"nat ({dtype} allows {verified.bound:g}), before rounding by {verified.merge_gap:.3g}; nothing was written, "
                "report this with the run's recipe"
            )
        checked = asdict(verified)
        base = _base(named.config)
        run = None if named.run is None else named.run.path.name
        facts = {"model": given, "run": run, "step": named.step, "base": base, "form": form, "dtype": dtype, "verified": checked}
        from preftune.app.card import write_card

        write_json(folder / RECORD, {**facts, "preftune": __version__})
        write_text(folder / "README.md", write_card(named, form, dtype, checked, base))
    return Exported(to, facts)


def export_gguf(given: str, to: Path, kind: Literal["f32", "f16", "q8_0"] = "f16", output: Path = Path("runs")) -> Exported:
    """Write one GGUF file and verify it; nothing is left at ``to`` where it is not the same model.

    Parameters
        given: as in ``export_model``. to: the file. kind: of its matrices.

    Raises
        UsageError: ``to`` is no name of a .gguf file, or exists.
        InputError: the model or its tokenizer has no GGUF form here, or gguf is not installed.
        NotTheSameModel: the comparison with the source exceeds its bound.
    """
    from preftune.modeling.export import write_gguf_export

    if to.suffix != ".gguf":
        raise UsageError(f"{to}: --gguf writes one file; give it a name that ends in .gguf")
    if to.exists():
        raise UsageError(f"{to}: exists; give a file that does not exist yet")
    named = find_named(given, output)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".writing-") as place:
        file = Path(place) / to.name
        verified = write_gguf_export(named.config, file, kind, named.prompts(PROMPTS))
        if not verified.is_same:
            raise NotTheSameModel(
                f"{to}: the file is not the model of {given!r}: a token's log-prob differs by {verified.largest_gap:.3g} nat "
                f"({kind} allows {verified.bound:g}), before rounding by {verified.merge_gap:.3g}; nothing was written"
                + (", write a less narrow type: --gguf f32" if kind != "f32" else ", report this with the model's config")
            )
        file.replace(to)
    run = None if named.run is None else named.run.path.name
    facts = {"model": given, "run": run, "step": named.step, "base": _base(named.config), "form": "GGUF", "dtype": kind}
    return Exported(to, {**facts, "verified": asdict(verified)})


def check_push(repo: str, token_variable: str) -> None:
    """UsageError where a push could not begin, before anything is exported."""
    from preftune.modeling.hub import check_target

    check_target(repo, token_variable)


def push(exported: Exported, repo: str, *, is_private: bool, token_variable: str) -> Exported:
    """Push an export to the hub; the folder stays whatever the hub says.

    Raises
        InputError: the hub refuses, or cannot be reached.
    """
    from preftune.modeling.hub import push_folder

    url = push_folder(exported.folder, repo, is_private=is_private, token_variable=token_variable)
    return replace(exported, url=url)


def _base(config: ModelConfig) -> str | None:
    """The model that training began from, as its adapter or run says."""
    adapter = Path(config.name) / "adapter_config.json"
    if adapter.is_file():
        try:
            return str(read_json(adapter)["base_model_name_or_path"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{adapter}: cannot be read: {str(error).splitlines()[0]}") from None
    for parent in Path(config.name).parents:
        if (parent / "run.json").is_file():
            starts = [stage.get("start") for stage in read_json(parent / "run.json")["stages"] if stage.get("start")]
            return str(starts[0]) if starts else None
    return STARTER if config.name == STARTER else None


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))
