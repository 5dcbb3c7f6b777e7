"""Every code block of the README and of docs/ is executed, page by page, in a folder with the starter's own files.

A fence's info string says what to do: ```bash and ```python run; ```yaml NAME writes that file (and a recipe in it must
validate); ```bash no-run REASON is only shown, for what needs the network or an hour, and must say why; ```bash with EXTRA
has the packages of an environment of their own beside it (`make EXTRA`), because every process would pay for them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "src" / "preftune" / "starter"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return [(m.group(1) or "", m.group(2).strip(), m.group(3)) for m in FENCE.finditer(page.read_text(encoding="utf-8"))]


def rows(name, count):
    with (STARTER / name).open(encoding="utf-8") as file:
        return "".join(line for _, line in zip(range(count), file, strict=False))


@pytest.fixture
def programs(warm_command):
    """What the shell of a page finds first: a ``preftune`` that does not wait for its libraries (tests/warm_start.py)."""
    return f"{warm_command.parent}:{Path(sys.executable).parent}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(rows("pairs.jsonl", 60), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(rows("verdict.jsonl", 12), encoding="utf-8")
    shutil.copy(STARTER / "judge_verdict.yaml", tmp_path / "judge.yaml")
    broken = rows("pairs.jsonl", 2) + '{"prompt": [{"role": "user", "content": "Hi"}], "chosen": true}\n'
    (tmp_path / "broken.jsonl").write_text(broken, encoding="utf-8")
    return tmp_path


def lent_by(extra):
    """Where an environment of its own has its packages; "" without one. `make test` makes it."""
    if not extra:
        return ""
    place = next((ROOT / f".venv-{extra}").glob("lib/python*/site-packages"), None)
    assert place is not None, f"run make {extra}"
    return str(place)


def environment(folder, programs, extra=""):
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PREFTUNE_")}
    return {
        **keep,
        "PATH": f"{programs}:{keep['PATH']}",
        "PREFTUNE_CACHE": str(folder / ".cache"),
        "PREFTUNE_HOME": str(folder / ".home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(filter(None, (lent_by(extra), os.environ.get("PYTHONPATH")))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_the_page_runs(page, folder, programs):
    for language, info, code in blocks(page):
        if info.startswith("no-run"):
            assert len(info) > len("no-run ") + 8, f"{page.name}: say why this block is not run: {code[:60]}"
            continue
        if language == "yaml" and info:
            (folder / info).write_text(code, encoding="utf-8")
            if "model:" in code:
                check_recipe(folder / info)
        elif language in {"bash", "python"}:
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
            extra = info.removeprefix("with ") if info.startswith("with ") else ""
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment(folder, programs, extra),
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def check_recipe(path):
    from preftune.app.recipes import load_recipe

    load_recipe(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_every_loss_and_format_is_documented():
    from preftune.data.formats.base import formats
    from preftune.maths.losses.base import losses

    recipe = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    data = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert not [name for name in losses.names() if f"`{name}`" not in recipe]
    assert not [name for name in losses.names() if f"losses/{name}.py" not in papers]
    assert not [name for name in formats.names() if f"`{name}`" not in data]


def test_a_page_with_a_wrong_block_would_be_caught(tmp_path, folder, programs):
    page = tmp_path / "wrong.md"
    page.write_text("```bash\npreftune chekc pairs.jsonl\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="did you mean 'check'"):
        test_every_block_of_the_page_runs(page, folder, programs)


def test_the_sample_files_are_what_the_pages_say(folder):
    assert len([json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]) == 60
