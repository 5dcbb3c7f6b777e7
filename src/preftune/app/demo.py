"""The whole pipeline on the embedded starter model and pairs."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from preftune.app.recipes import load_recipe
from preftune.app.run import RunResult, run
from preftune.core.events import EventSink, ignore


def demo_recipe_path() -> Path:
    """The recipe of the demo, inside the package."""
    return Path(str(files("preftune"))) / "starter" / "recipe.yaml"


def demo(output: Path, sink: EventSink = ignore) -> RunResult:
    """SFT, then DPO from that checkpoint against its frozen copy, then the proof on unseen prompts."""
    recipe = load_recipe(demo_recipe_path()).model_copy(update={"output": str(output), "name": "demo"})
    return run(recipe, sink)
