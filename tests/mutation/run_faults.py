"""Plant each fault in a copy of the package, run the tests that have to see it, and say what came of it.

One process loads the libraries; each fault is a fork of it that imports preftune from the copy. So a fault costs the
tests' own time and half a second, and nothing of one fault is left in the next.

    python tests/mutation/run_faults.py            those of the suite: one JSON object, name -> verdict
    python tests/mutation/run_faults.py --all      every fault
    python tests/mutation/run_faults.py NAME ...   some of them, with what pytest wrote

A verdict is ``killed`` (a test failed), ``survived`` (all passed), ``not loaded`` (no test ran, or a file of them did not
load), or what went wrong, such as a place that does not stand exactly once in the file. First the tests have to pass on
the unchanged copy.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from _pytest.config import default_plugins

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from faults import CONTROLS, FAULTS, QUICK, Fault  # noqa: E402  # a neighbour, found by the path above

# loaded once, in the parent, beside pytest and its plugins; nothing of preftune may be among them
LIBRARIES = (
    *("torch", "torch.utils.checkpoint", "transformers", "peft", "safetensors.torch", "tokenizers", "numpy", "scipy.stats"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2", "pyarrow", "pydantic"),
    *("hypothesis.strategies", "jaxtyping", "beartype", "pytest"),
)
KILLED, SURVIVED, NOT_LOADED = "killed", "survived", "not loaded"


class Watch:
    """A plugin that tells a test that failed from a file that could not be loaded: pytest's exit code is one for both."""

    def __init__(self) -> None:
        self.num_failed = self.num_passed = self.num_broken = 0

    def pytest_collectreport(self, report: Any) -> None:
        self.num_broken += report.failed

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.num_failed += report.failed
        self.num_passed += report.passed and report.when == "call"

    def verdict(self, code: int) -> str:
        """In words; a run in which nothing failed and nothing passed has seen nothing."""
        if self.num_broken or not (self.num_failed or self.num_passed):
            return NOT_LOADED
        return KILLED if self.num_failed else SURVIVED if code == 0 else f"pytest ended with {code}"


def copy_of_the_package(folder: Path) -> Path:
    """A source tree of its own; compiled files come along, so that only what changes is compiled."""
    target = folder / "src" / "preftune"
    shutil.copytree(ROOT / "src" / "preftune", target, ignore=shutil.ignore_patterns("starter"))
    (target / "starter").symlink_to(ROOT / "src" / "preftune" / "starter")
    return target


def run_tests(source: Path, tests: Iterable[str], log: Path, *, keeps_compiled: bool = False) -> str:
    """What pytest says in a fork that imports preftune from ``source``.

    keeps_compiled: write compiled files, which later forks read; a fault's must not outlive it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "the fork failed"
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.dont_write_bytecode = not keeps_compiled
            sys.path.insert(0, str(source.parent))
            said = _said_by_pytest([f"tests/{test}" for test in tests])
            where = Path(importlib.import_module("preftune").__file__ or "").parent
            if where != source:
                said = f"preftune came from {where}, not from the copy"
        except BaseException:  # noqa: BLE001  # whatever it is, this fork must not go on as its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or "the fork died"


def _said_by_pytest(nodes: list[str]) -> str:
    pytest, watch = importlib.import_module("pytest"), Watch()
    quiet = "ignore::pytest.PytestAssertRewriteWarning"  # plugins were imported in the parent
    options = ["-x", "-W", quiet, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    return watch.verdict(int(pytest.main([*options, *nodes], plugins=[watch])))


def verdict_of(fault: Fault, source: Path, log: Path) -> str:
    """What comes of a fault; the copy is as before afterwards."""
    path = source / fault.file
    before = path.read_text(encoding="utf-8")
    count = before.count(fault.old)
    if count != 1:
        return f"old stands {count} times in {fault.file}"
    times = path.stat()
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return run_tests(source, fault.tests, log)
    finally:
        path.write_text(before, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the compiled file of the unchanged source holds again


def plugins() -> list[str]:
    """Modules of the plugins that pytest would load by itself."""
    return [point.value.split(":")[0] for point in entry_points(group="pytest11") if "xdist" not in point.value]


def main(names: list[str]) -> int:
    """The faults that are asked for."""
    wanted = {one.name for one in (FAULTS if names == ["--all"] else QUICK)} if names in ([], ["--all"]) else set(names)
    is_by_name = names not in ([], ["--all"])
    os.chdir(ROOT)
    for key in [key for key in os.environ if key.startswith("PYTEST_")]:
        del os.environ[key]  # of a test process that started this one
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork must not inherit a pool of threads
    gc.disable()  # tests/conftest.py says why; it switches the collector on again in each fork
    for library in (*LIBRARIES, *(f"_pytest.{name}" for name in default_plugins), *plugins()):
        importlib.import_module(library)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)  # loads them, which importing it does not
    if any(name.split(".")[0] == "preftune" for name in sys.modules):
        raise SystemExit("preftune is loaded already: a fault in it would not be seen")
    gc.freeze()
    controls = [fault for fault, _ in CONTROLS if not is_by_name or fault.name in wanted]
    chosen = [*(one for one in FAULTS if one.name in wanted), *controls]
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, log = copy_of_the_package(folder), folder / "log"
        real = {test for fault in chosen if fault in FAULTS for test in fault.tests}
        found["the unchanged source"] = run_tests(source, sorted(real), log, keeps_compiled=True)
        if found["the unchanged source"] != SURVIVED:
            sys.stderr.write(log.read_text(errors="replace"))
        for fault in chosen:
            found[fault.name] = verdict_of(fault, source, log)
            if is_by_name or (fault in FAULTS and found[fault.name] != KILLED):
                sys.stderr.write(f"---- {fault.name}\n{log.read_text(errors='replace') if log.is_file() else ''}")
    json.dump(found, sys.stdout, indent=1)
    return int(any(found[fault.name] != KILLED for fault in chosen if fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
