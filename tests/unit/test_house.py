"""The house rules that a machine can see: import contracts, sizes, names, suppressions with reasons."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 120
MAX_PARAMETERS = 8


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_imports_go_one_way():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_upward_import_is_caught(tmp_path):
    import shutil

    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "starter"))
    shutil.copy(ROOT / ".importlinter", tmp_path / ".importlinter")
    (tmp_path / "src/preftune/starter").mkdir()
    (tmp_path / "src/preftune/starter/__init__.py").touch()
    planted = tmp_path / "src/preftune/core/ids.py"
    planted.write_text(planted.read_text(encoding="utf-8") + "\nimport preftune.app.context\n", encoding="utf-8")
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path / "src")},
    )
    assert done.returncode != 0
    assert "preftune.core.ids -> preftune.app.context" in done.stdout


def test_files_and_functions_stay_small():
    long = []
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        limit = MAX_LOOP_LINES if path.match("training/loop.py") else MAX_FUNCTION_LINES
        for node in functions(path):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
            parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = len([one for one in parameters if one.arg not in {"self", "cls", "ctx"}])
            if count > MAX_PARAMETERS and not any("click" in ast.unparse(one) for one in node.decorator_list):
                allowed = "Function" in path.read_text(encoding="utf-8") and node.name in {"forward", "backward"}
                if not allowed and not _is_foreign_signature(node):
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count} parameters")
    assert not long, "\n".join(long)


def _is_foreign_signature(node):
    """Attention functions take what transformers passes."""
    return any(one.arg == "attention_mask" for one in node.args.args)


def test_no_file_is_named_after_nothing():
    assert not [path for path in SOURCES if path.stem in {"utils", "helpers", "common", "misc"}]


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_every_suppression_has_a_reason():
    bare = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.search(r"#\s*(type: ignore(\[[\w,\- ]+\])?|noqa(: ?[A-Z0-9, ]+)?)(.*)", line)
            if found and len(found.group(4).strip(" #-")) < 8:
                bare.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
    assert not bare, "\n".join(bare)


def test_public_things_have_docstrings():
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None:
            bare.append(f"{path.relative_to(ROOT)}: module")
        bare.extend(
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)
        )
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize("word", ["/work/", "/root/", "farm-", "TODO", "FIXME", "XXX"])
def test_nothing_unfinished_or_private_is_committed(word):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    if not any(tracked):
        pytest.skip("not a git checkout")
    hits = []
    for name in tracked:
        path = ROOT / name
        if (
            not name
            or path.suffix in {".safetensors", ".png", ".parquet", ".gz"}
            or not path.is_file()
            or name == "tests/unit/test_house.py"
        ):
            continue
        if word in path.read_text(encoding="utf-8", errors="replace"):
            hits.append(name)
    assert not hits, f"{word!r} in {hits}"
