"""The model card of an exported model: what it is, what it was trained on, what was measured, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from preftune.app.named import HUB_ID, STARTER, NamedModel
from preftune.app.recipes import load_recipe
from preftune.core.errors import PreftuneError
from preftune.core.files import read_json
from preftune.core.recipe import Recipe, StageConfig
from preftune.core.version import __version__

SHOWN = ("adapter", "loss", "lora", "epochs", "max_steps", "pairs_per_step", "lr", "schedule", "warmup", "weight_decay", "keep")


def write_card(named: NamedModel, form: str, dtype: str, verified: dict[str, Any], base: str | None) -> str:
    """The text of README.md.

    Parameters
        form: merged or adapter. verified: of the comparison with the source. base: the model that training began from.
    """
    recipe = _recipe(named)
    methods = [stage.method for stage in recipe.stages if stage.kind == "train"] if recipe is not None else []
    title = (recipe.name if recipe is not None and recipe.name else Path(named.config.name).name) or "model"
    front: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preftune", *dict.fromkeys(methods)],
    }
    if base is not None and HUB_ID.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if form == "adapter" else "finetune"
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {title}", ""]
    lines += [_what_it_is(base, methods, form, dtype), ""]
    lines += _training(named, recipe)
    lines += _result(named)
    lines += _usage(form, base)
    gap, bound = verified["largest_gap"], verified["bound"]
    lines += ["## Check of this export", ""]
    lines.append(
        f"{verified['num_completions']} completions ({verified['num_tokens']} tokens), read again with transformers: the largest "
        f"difference of a token's log-probability from the trained model is {gap:.2g} nat (bound {bound:g}, {dtype} weights)."
    )
    lines += ["", f"Written by preftune {__version__}."]
    return "\n".join(lines) + "\n"


def _what_it_is(base: str | None, methods: list[str], form: str, dtype: str) -> str:
    what = "A LoRA adapter (PEFT)" if form == "adapter" else f"A language model, whole weights in {dtype}"
    how = f", trained with {' then '.join(methods)}" if methods else ""
    if base is None:
        return f"{what}{how}."
    if base == STARTER:
        return f"{what}{how}, from the starter model that the preftune package carries."
    is_folder = Path(base).is_dir()
    return f"{what}{how}, from {f'a local model folder named `{Path(base).name}`' if is_folder else f'`{base}`'}."


def _training(named: NamedModel, recipe: Recipe | None) -> list[str]:
    if recipe is None or named.run is None:
        return []
    lines = ["## Training", ""]
    for index, stage in enumerate(recipe.stages):
        if stage.kind != "train":
            continue
        lines += [f"Stage {index + 1}, `{stage.name}` ({stage.method}):", ""]
        lines += [f"- {key}: {value}" for key, value in _settings(stage).items()]
        data = named.run.stage_folder(index, stage.name) / "data.json"
        if data.is_file():
            counts = read_json(data)
            lines.append(f"- examples trained on: {counts['train']}; held out: {counts['select']}")
            left_out = {key: value for key, value in counts["counts"].items() if value}
            if left_out:
                lines.append("- rows by outcome: " + ", ".join(f"{key} {value}" for key, value in left_out.items()))
            lines.append("- files: " + ", ".join(f"{Path(file).name} ({kind})" for file, kind in counts["formats"].items()))
        lines.append("")
    if named.step is not None:
        lines += [f"These are the weights of the checkpoint after step {named.step}.", ""]
    return [*lines, f"Seed {recipe.seed}.", ""]


def _settings(stage: StageConfig) -> dict[str, Any]:
    facts = stage.model_dump(mode="json", include=set(SHOWN))
    if stage.adapter != "lora":
        facts.pop("lora", None)
    shown = {}
    for key in SHOWN:
        value = facts.get(key)
        if value is None or value == {}:
            continue
        shown[key] = ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else value
    return shown


def _result(named: NamedModel) -> list[str]:
    report = named.report()
    if report is None:
        return ["## Result", "", "No evaluation of these weights was found.", ""]
    return ["## Result", "", str(report["sentence"]), ""]


def _usage(form: str, base: str | None) -> list[str]:
    lines = ["## How to use", "", "```python"]
    if form == "adapter":
        is_hub = base is not None and HUB_ID.fullmatch(base) is not None and not Path(base).exists()
        where = f'"{base}"' if is_hub else '"FOLDER_OF_THE_BASE_MODEL"'
        lines += [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # this folder, or the name of the repository',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({where}), folder)",
        ]
    else:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # this folder, or the name of the repository',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
        ]
    return [*lines, "```", ""]


def _recipe(named: NamedModel) -> Recipe | None:
    if named.run is None or not named.run.recipe_path.is_file():
        return None
    try:
        return load_recipe(named.run.recipe_path)
    except PreftuneError:  # a run of an older version: the card says less
        return None
