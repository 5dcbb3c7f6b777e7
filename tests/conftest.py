"""Fixtures for every test: the Hypothesis profile, real inputs, the embedded starter."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from warm_start import WarmStart

settings.register_profile("torch", deadline=None, derandomize=True)  # the first torch call is slow, not wrong
settings.load_profile("torch")

# a suite that runs in the background of a shell ignores ^C, and so would every program that it starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# Torch, transformers and what pytest collects are a million objects that stay. The garbage collector finds nothing among them,
# and looking was half of the processor time of collecting the suite and of its fast tests. So nothing is looked for while they
# are loaded, and at the end of each file what is still there is left alone from then on.


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    said = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return said


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real inputs are not beside this checkout ({folder.name} of the shared folder is absent)")
    return folder


@pytest.fixture(scope="session")
def starter_model() -> Path:
    return ROOT / "src" / "preftune" / "starter" / "model"


@pytest.fixture(scope="session")
def cold_command() -> Path:
    """The installed ``preftune``."""
    return Path(sys.executable).with_name("preftune")


@pytest.fixture(scope="session")
def warm_command(tmp_path_factory: pytest.TempPathFactory, cold_command: Path) -> Iterator[Path]:
    """The same without the wait for its libraries: see tests/warm_start.py."""
    folder = tmp_path_factory.mktemp("warm")
    base = tmp_path_factory.getbasetemp()  # of one worker, in a folder of all
    warm = WarmStart(folder, (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "started", cold_command)
    yield warm.command
    warm.stop()
