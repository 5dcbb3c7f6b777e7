"""Every finding that the code can make is in the table, on the page, and in a test."""

import ast
import importlib.util
import re
from pathlib import Path

from preftune.core.findings import FINDINGS

ROOT = Path(__file__).resolve().parents[2]


def findings_in_the_code():
    """Level and code of every ``Finding(level, code, ...)``; both arms where one is chosen."""
    found = {}
    for path in sorted((ROOT / "src" / "preftune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Finding" and len(node.args) >= 2:
                for code in _texts(node.args[1]):
                    found.setdefault(code, set()).add(path.relative_to(ROOT).as_posix())
    return found


def _texts(node):
    """The texts that an expression may be: of a chosen one both arms, not what it is chosen by."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body) | _texts(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def test_every_code_is_in_the_table_and_every_row_is_a_code():
    found = findings_in_the_code()
    assert not {code: files for code, files in found.items() if code not in FINDINGS}, "add them to core/findings.py"
    assert set(found) == set(FINDINGS)


def test_every_code_is_in_a_test():
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path.name != Path(__file__).name
    )
    assert not [code for code in FINDINGS if re.search(rf"\b{code}\b", tests) is None]


def test_the_page_is_written_from_the_table():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "preflight.md").read_text(encoding="utf-8")
    assert text == module.preflight_page(text), "run: python docs/make_reference.py"
