"""Write docs/recipe.md from the recipe's own sections: `python docs/make_reference.py`. A test compares the two."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any, cast

from preftune.core import recipe as recipes
from preftune.core import references, tracking
from preftune.core.findings import FINDINGS
from preftune.core.memory import MemoryOptions
from preftune.core.section import bounds_of, range_of
from preftune.maths.losses.base import losses

TARGET = Path(__file__).with_name("recipe.md")
PREFLIGHT = Path(__file__).with_name("preflight.md")
SECTIONS = (
    recipes.Recipe,
    recipes.ModelConfig,
    recipes.StageConfig,
    MemoryOptions,
    references.ReferenceConfig,
    references.SyncConfig,
    recipes.LoraConfig,
    recipes.GenerateConfig,
    recipes.GuardsConfig,
    recipes.ProbeConfig,
    recipes.EarlyStoppingConfig,
    recipes.DataConfig,
    recipes.EvaluationConfig,
    recipes.DecodingConfig,
    tracking.TrackingConfig,
)

HEAD = """# The recipe

A recipe is YAML or a Python mapping; both are the same thing. Unknown keys are errors that name the nearest known one.
This page is written from the code by `python docs/make_reference.py`; a test compares them.

The short form holds one stage at the top level:

```yaml
model: starter
method: dpo
beta: 0.1
data: pairs.jsonl
```

The long form lists stages; each starts from, and is anchored to, the one before. Keys of a stage at the top level are
defaults for every stage. Relative paths are relative to the recipe file.

```yaml
model: starter
seed: 1
lr: 1e-4
stages:
  - {method: sft, data: pairs.jsonl}
  - {method: dpo, beta: 0.1, data: {train: pairs.jsonl, select: 0.1}}
evaluation:
  prompts: prompts.jsonl
  judge: judge.yaml
```

On the command line `key=value` overrides a key, with dots for depth: `preftune train recipe.yaml beta=0.2 stages.0.lr=1e-5`.
"""


def words(annotation: Any) -> str:
    """A type in words that a user reads."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{one}`" for one in arguments)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join("none" if one is type(None) else words(one) for one in arguments)
    if origin is typing.Annotated:
        bounds = range_of(annotation) if not list(bounds_of(arguments[0])) else ""
        return f"{words(arguments[0])} {bounds}".rstrip()
    if origin is tuple:
        return f"list of {words(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "yes or no"}.get(
        annotation.__name__, annotation.__name__
    )


def table(section: type[recipes.Section]) -> str:
    """One section: its docstring and its keys with types and defaults."""
    lines = [
        f"## {section.__name__}",
        "",
        inspect.cleandoc(section.__doc__ or ""),
        "",
        "| key | type | default |",
        "|---|---|---|",
    ]
    hints = typing.get_type_hints(section, include_extras=True)
    own = [name for name in section.__annotations__ if name in section.model_fields]
    for name in own:
        field, hint = section.model_fields[name], hints[name]
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        shown = default if isinstance(default, str) and default == "required" else f"`{_plain(default)}`"
        lines.append(f"| `{name}` | {words(hint)} | {shown} |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, recipes.Section):
        return type(value).__name__
    if value is None:
        return "none"
    return str(list(value)) if isinstance(value, tuple) else str(value) if value != "" else '""'


def _default(option: dataclasses.Field[Any]) -> Any:
    return "required" if option.default is dataclasses.MISSING else option.default


def loss_table() -> str:
    """Every registered loss with its options."""
    lines = ["## Methods and their options", "", "| method | what | options (default) |", "|---|---|---|"]
    for name in losses.names():
        factory = losses.factory(name)
        what = (inspect.getdoc(factory) or "").split("\n")[0]
        options = ", ".join(f"`{one.name}` ({_default(one)})" for one in dataclasses.fields(cast("Any", factory)) if one.init)
        lines.append(f"| `{name}` | {what} | {options or 'none'} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.strip(), *(table(section) for section in SECTIONS), loss_table()]) + "\n"


def preflight_page(text: str) -> str:
    """docs/preflight.md with the table of findings between its two marks."""
    rows = [f"| `{code}` | {kind.level} | {kind.when} | {kind.way_out} |" for code, kind in FINDINGS.items()]
    table = "\n".join(["| code | level | when | way out |", "|---|---|---|---|", *rows])
    before, _, rest = text.partition("<!-- findings -->")
    _, _, after = rest.partition("<!-- end of findings -->")
    return f"{before}<!-- findings -->\n{table}\n<!-- end of findings -->{after}"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    PREFLIGHT.write_text(preflight_page(PREFLIGHT.read_text(encoding="utf-8")), encoding="utf-8")
