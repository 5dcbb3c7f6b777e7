"""docs/recipe.md is what docs/make_reference.py writes."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_recipe_page_is_written_from_the_code():
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "recipe.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_reference.py"
