"""JSON Schema (2020-12) of what preftune reads and writes, made from the code that reads and writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter

from preftune.core.errors import UnknownName
from preftune.core.recipe import DataConfig, EvaluationConfig, LoraConfig, ModelConfig, Recipe, StageConfig
from preftune.core.records import Demonstration, Desirability, Message, Preference, Ranking
from preftune.core.registry import Registry, suggest

Schema: TypeAlias = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFS = "#/$defs/{model}"
_STRINGS: Schema = {"type": "array", "items": {"type": "string"}}


def schema_of(kind: str) -> Schema:
    """The schema of a kind: ``recipe``, ``judge``, ``example`` or ``report``; UnknownName for another."""
    if kind not in SCHEMAS:
        raise UnknownName(f"no schema {kind!r}: {suggest(kind, list(SCHEMAS))}")
    return {"$schema": DIALECT, "title": f"preftune {kind}", **SCHEMAS[kind]()}


def recipe_schema() -> Schema:
    """A recipe as a user writes it: the short form, the long form, and the options of every loss beside its method."""
    from preftune.maths.losses.base import losses

    definitions = _sections()
    known = sorted({option for name in losses.names() for option in _options(losses.factory(name))[0]})
    stage_keys: Schema = definitions["StageConfig"]["properties"]
    stage_keys["method"] = {**stage_keys["method"], "enum": losses.names()}
    stage_keys["data"] = {"anyOf": [{"type": "string"}, _STRINGS, {"$ref": "#/$defs/DataConfig"}, {"type": "null"}]}
    stage_keys["adapter"] = {"anyOf": [stage_keys["adapter"], {"$ref": "#/$defs/LoraConfig"}]}
    by_method = []
    for name in losses.names():
        options, inner = _options(losses.factory(name))
        definitions |= inner
        loss: Schema = {"type": "object", "properties": options, "additionalProperties": False}
        chosen = {"properties": {"method": {"const": name}}, "required": ["method"]}
        by_method.append({"if": chosen, "then": {"properties": {**options, "loss": loss}}})
    # where the method is said elsewhere the names of options are known, not which of them it takes
    by_method.append({"if": {"not": {"required": ["method"]}}, "then": {"properties": dict.fromkeys(known, True)}})
    definitions["Stage"] = {"type": "object", "properties": stage_keys, "allOf": by_method, "unevaluatedProperties": False}
    top = Recipe.model_json_schema(ref_template=_REFS)["properties"]
    top["model"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelConfig"}]}
    top["stages"] = {"type": "array", "items": {"$ref": "#/$defs/Stage"}, "minItems": 1}
    del definitions["StageConfig"]
    defaults = {"if": {"required": ["stages"]}, "then": {"properties": dict.fromkeys(known, True)}}
    return {
        "type": "object",
        "properties": {**stage_keys, **top},
        "required": ["model"],
        "allOf": [*by_method, defaults],
        "unevaluatedProperties": False,
        "$defs": definitions,
    }


def judge_schema() -> Schema:
    """A judge file, or a judge written into a recipe: a name and its options."""
    from preftune.judging.base import judges

    return _by_name(judges)


def example_schema() -> Schema:
    """One example as datasets hold it: prompt, completions, one judgement."""
    definitions: Schema = {}
    kinds: list[Schema] = []
    for judgement in (Demonstration, Preference, Desirability, Ranking):
        made = _bare(TypeAdapter(judgement).json_schema(ref_template=_REFS), definitions)
        properties = {"kind": {"const": judgement.__name__}, **made.get("properties", {})}
        kinds.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    message = _bare(TypeAdapter(Message).json_schema(ref_template=_REFS), definitions)
    definitions["Message"] = {**message, "additionalProperties": False}
    turns = {"type": "array", "items": {"$ref": "#/$defs/Message"}}
    objects = {"type": "array", "items": {"type": "object"}}
    properties = {
        "prompt": turns,
        "completions": {"type": "array", "items": turns},
        "judgement": {"oneOf": kinds},
        "style": {"enum": ["chat", "text"]},
        "tools": objects,
        "annotators": _STRINGS,
        "generators": _STRINGS,
        "judges": _STRINGS,
    }
    required = ["prompt", "completions", "judgement", "style"]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "$defs": definitions,
    }


def report_schema() -> Schema:
    """``report.json`` of an evaluation: the parts that other programs may count on."""
    from preftune.evaluation.report import SCHEMA

    number, text = {"type": "number"}, {"type": "string"}
    rate: Schema = {
        "type": "object",
        "properties": {
            "verdict": {"enum": ["better", "worse", "equivalent", "inconclusive"]},
            "rate": number,
            "interval": {"type": "object", "properties": {"low": number, "high": number}, "required": ["low", "high"]},
            "num_prompts": {"type": "integer", "minimum": 1},
        },
        "required": ["verdict", "rate", "interval", "num_prompts"],
    }
    nothing = {"type": "null"}
    properties: Schema = {
        "schema": {"const": SCHEMA},
        "run": text,
        "created": text,
        "verdict": rate["properties"]["verdict"],
        "sentence": text,
        "win_rate": rate,
        "pairs_win_rate": {"anyOf": [rate, nothing]},
        "held_out": {"anyOf": [{"type": "object"}, nothing]},
        "notes": _STRINGS,
    }
    return {"type": "object", "properties": properties, "required": ["schema", "verdict", "sentence", "win_rate"]}


SCHEMAS: Mapping[str, Callable[[], Schema]] = {
    "recipe": recipe_schema,
    "judge": judge_schema,
    "example": example_schema,
    "report": report_schema,
}
Kind: TypeAlias = Literal["recipe", "judge", "example", "report"]


def _sections() -> Schema:
    """The sections of a recipe as they may be written, by name."""
    definitions: Schema = dict(Recipe.model_json_schema(ref_template=_REFS).get("$defs", {}))
    for section in (ModelConfig, StageConfig, DataConfig, LoraConfig, EvaluationConfig):
        made = section.model_json_schema(ref_template=_REFS)
        definitions |= made.pop("$defs", {})
        definitions[section.__name__] = made
    train: Schema = definitions["DataConfig"]["properties"]["train"]
    definitions["DataConfig"]["properties"]["train"] = {"anyOf": [{"type": "string"}, train]}
    judge = _by_name_of_judges()
    for key in ("judge", "pairs_judge"):
        options = [{"type": "string"}, judge, *([{"type": "null"}] if key == "pairs_judge" else [])]
        definitions["EvaluationConfig"]["properties"][key] = {"anyOf": options}
    return definitions


def _by_name_of_judges() -> Schema:
    from preftune.judging.base import judges

    made = _by_name(judges)
    return {key: value for key, value in made.items() if key != "$defs"} if not made.get("$defs") else made


def _by_name(registry: Registry[Any]) -> Schema:
    """A mapping with ``name`` and the options of the leaf of that name."""
    definitions: Schema = {}
    cases = []
    for name in registry.names():
        options, inner = _options(registry.factory(name))
        definitions |= inner
        cases.append({"if": {"properties": {"name": {"const": name}}}, "then": {"properties": options}})
    made: Schema = {
        "type": "object",
        "properties": {"name": {"enum": registry.names()}},
        "required": ["name"],
        "allOf": cases,
        "unevaluatedProperties": False,
    }
    return {**made, "$defs": definitions} if definitions else made


def _options(factory: type[Any]) -> tuple[Schema, Schema]:
    """The options of a leaf with their types and ranges, and what these refer to."""
    definitions: Schema = {}
    made = _bare(TypeAdapter(factory).json_schema(ref_template=_REFS), definitions)
    return dict(made.get("properties", {})), definitions


def _bare(made: Schema, definitions: Schema) -> Schema:
    """A schema without its own ``$defs``, which go to ``definitions``."""
    definitions |= made.pop("$defs", {})
    return made
