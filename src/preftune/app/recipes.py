"""Recipe files: YAML in, overrides from the command line, paths made absolute, one resolved file out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from preftune.app.presets import preset_file, preset_overrides
from preftune.core.errors import InputError, RecipeError, UsageError
from preftune.core.files import write_text
from preftune.core.ids import digest_json
from preftune.core.recipe import DataConfig, EvaluationConfig, GenerateConfig, ModelConfig, Recipe, StageConfig, build_recipe
from preftune.core.references import ReferenceConfig, check_reference_of_loss
from preftune.core.registry import suggest
from preftune.core.rounds import PREVIOUS

STARTER = "starter"
BUILT_IN_TEMPLATES = ("chatml", "plain")
PATH_KEYS = ("data", "train", "select", "prompts", "judge", "pairs_judge", "pairs", "chat_template")


def loss_options() -> dict[str, list[str]]:
    """Every registered loss with the names of its options."""
    from preftune.maths.losses.base import losses

    return {
        name: [field.name for field in dataclasses.fields(cast(Any, losses.factory(name))) if field.init]
        for name in losses.names()
    }


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or of a preset (``preset:NAME``); relative paths in a file are relative to it.

    Parameters
        overrides: ``key=value`` with dotted keys (``stages.1.lr=1e-4``, ``beta=0.2``); values are YAML.

    Raises
        InputError: the file cannot be read or is not YAML (with the line).
        RecipeError: its content does not validate.
    """
    path = Path(path)
    preset = preset_file(str(path))
    if preset is not None:
        path, overrides = preset, preset_overrides(overrides)
    given = read_mapping(path)
    for override in overrides:
        apply_override(given, override)
    given.setdefault("name", path.stem)
    if preset is not None and ("model" not in given or "train" not in given.get("data", {})):
        raise RecipeError(f"preset {path.stem}: say the model and the data: preset:{path.stem} model=MODEL data=FILE")
    try:
        return make_recipe(given, path.resolve().parent)
    except UsageError as error:
        raise RecipeError(f"{path}: {error}") from None


def make_recipe(given: Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """A checked recipe from a mapping, the same thing as a file; relative paths are relative to ``folder`` (or here)."""
    return _absolute(check_recipe(given), folder or Path.cwd())


def check_recipe(given: Mapping[str, Any]) -> Recipe:
    """A checked recipe whose names stay as they were written: no folder of this machine is looked at."""
    recipe = build_recipe(given, loss_options())
    from preftune.data.formats.base import formats
    from preftune.maths.losses.base import losses

    for index, stage in enumerate(recipe.stages):
        where = f"stages.{index}." if "stages" in given else ""
        wanted = None if stage.data is None else stage.data.format
        if wanted is not None and wanted not in formats.names():
            raise RecipeError(f"{where}data.format: no format {wanted!r}: {suggest(wanted, formats.names())}")
        if stage.kind == "train":
            try:
                loss = losses.build(stage.method, stage.loss)
            except UsageError as error:
                raise RecipeError(f"{where[:-1]}: {error}" if where else str(error)) from None
            needs, view = loss.needs_reference, loss.view
            check_reference_of_loss(stage.reference, stage.method, needs_reference=needs, view=view, where=where)
    if recipe.tracking:
        from preftune.app.tracking import build_sinks

        build_sinks(recipe)
    return recipe


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, one clear line where it has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write one, or try `preftune demo`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {_first_line(error)}") from None
    try:
        given = yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader that also reads 1e-4 as a number
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise InputError(f"{path}{where}: not YAML: {problem}; check the indentation and quotes there") from None
    if not isinstance(given, dict):
        raise InputError(
            f"{path}: {'is empty' if given is None else 'holds no mapping'}; a recipe is keys and values, such as model: starter"
        )
    return given


def save_recipe(recipe: Recipe, path: Path) -> None:
    """The resolved recipe as YAML; ``load_recipe`` reads it back to the same recipe."""
    header = "# The resolved recipe of this run: every default written out. `preftune train FILE` runs it again.\n"
    write_text(path, header + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def recipe_digest(recipe: Recipe, stage: StageConfig) -> str:
    """Digest of what decides a stage's numbers: its own settings, the model and the seed; not the output folder."""
    return digest_json([recipe.model.model_dump(mode="json"), stage.model_dump(mode="json"), recipe.seed])


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads ``1e-4`` as a number, as YAML 1.2 does, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _add_float_resolver() -> None:
    import re

    pattern = re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?)$"
    )
    _Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789."))


_add_float_resolver()


def apply_override(given: dict[str, Any], override: str) -> None:
    """Apply one ``dotted.key=value``."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"override {override!r}: write key=value, such as beta=0.2 or stages.1.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 -- a SafeLoader, see above
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise RecipeError(f"override {override!r}: {text!r} is not YAML: {problem}; quote it for the shell as one word") from None
    target: Any = given
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        where = ".".join(parts[: depth + 1])
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise RecipeError(f"override {override!r}: {where} does not exist; there are {len(target)} entries, from 0")
            target = target[int(part)]
        else:
            inner = target.get(part)
            if isinstance(inner, str) and part in {"model", "data"}:
                inner = {"name": inner} if part == "model" else {"train": [inner]}
            target[part] = inner if isinstance(inner, (dict, list)) else {}
            target = target[part]
    if isinstance(target, list):
        raise RecipeError(f"override {override!r}: name a key of an entry, such as {'.'.join(parts[:-1])}.0.{parts[-1]}")
    target[parts[-1]] = _from_here(parts[-1], value)


def _from_here(key: str, value: Any) -> Any:
    """Paths typed on the command line are relative to where it was typed, not to the recipe file."""
    if isinstance(value, dict):
        return {inner: _from_here(inner, one) for inner, one in value.items()}
    if isinstance(value, list):
        return [_from_here(key, one) for one in value]
    if not isinstance(value, str) or not value:
        return value
    is_path = key in PATH_KEYS and value not in (*BUILT_IN_TEMPLATES, PREVIOUS)
    is_folder = key in {"model", "name", "from_checkpoint"} and value != STARTER and Path(value).expanduser().is_dir()
    return _path(value, Path.cwd()) if is_path or is_folder else value


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    stages = tuple(
        stage.model_copy(
            update={
                "data": _absolute_data(stage.data, folder),
                "generate": _absolute_generate(stage.generate, folder),
                "from_checkpoint": _absolute_checkpoint(stage.from_checkpoint, folder),
                "reference": _absolute_reference(stage.reference, folder),
            }
        )
        for stage in recipe.stages
    )
    evaluation = recipe.evaluation
    return recipe.model_copy(
        update={
            "model": _absolute_model(recipe.model, folder),
            "stages": stages,
            "evaluation": None if evaluation is None else _absolute_evaluation(evaluation, folder),
        }
    )


def _absolute_model(model: ModelConfig, folder: Path) -> ModelConfig:
    """A model name that is a folder becomes absolute; ``starter`` and hub ids stay."""
    name = model.name
    if name != STARTER and (folder / Path(name).expanduser()).is_dir():
        name = _path(name, folder)
    template = model.chat_template
    if template is not None and template not in BUILT_IN_TEMPLATES:
        template = _path(template, folder)
    return model.model_copy(update={"name": name, "chat_template": template})


def _absolute_data(data: DataConfig | None, folder: Path) -> DataConfig | None:
    if data is None:
        return None
    select = _path(data.select, folder) if isinstance(data.select, str) else data.select
    train = tuple(one if one == PREVIOUS else _path(one, folder) for one in data.train)
    return data.model_copy(update={"train": train, "select": select})


def _absolute_generate(generate: GenerateConfig | None, folder: Path) -> GenerateConfig | None:
    if generate is None:
        return None
    return generate.model_copy(
        update={"prompts": _path(generate.prompts, folder), "judge": _absolute_judge(generate.judge, folder)}
    )


def _absolute_judge(given: Any, folder: Path) -> Any:
    """A judge file by its absolute path; a mapping or ``llm:MODEL@URL`` as it is."""
    from preftune.judging.base import is_short_form

    return _path(given, folder) if isinstance(given, str) and not is_short_form(given) else given


def _absolute_evaluation(evaluation: EvaluationConfig, folder: Path) -> EvaluationConfig:
    return evaluation.model_copy(
        update={
            "prompts": _path(evaluation.prompts, folder),
            "judge": _absolute_judge(evaluation.judge, folder),
            "pairs_judge": _absolute_judge(evaluation.pairs_judge, folder),
            "pairs": None if evaluation.pairs is None else _path(evaluation.pairs, folder),
        }
    )


def _absolute_checkpoint(given: str | None, folder: Path) -> str | None:
    """Run names (without a slash) stay names; folders become absolute; ``@STEP`` is kept."""
    if given is None or ("/" not in given and not (folder / given).exists()):
        return given
    return _path(given, folder)


def _absolute_reference(reference: ReferenceConfig | None, folder: Path) -> ReferenceConfig | None:
    """The model of a reference that is a folder becomes absolute; runs, hub ids and ``starter`` stay names."""
    given = None if reference is None else reference.model
    if reference is None or given is None or not (folder / Path(given.partition("@")[0]).expanduser()).exists():
        return reference
    return reference.model_copy(update={"model": _path(given, folder)})


def _path(given: str, folder: Path) -> str:
    path = Path(given).expanduser()
    return str(path if path.is_absolute() else Path(folder, path).resolve())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
