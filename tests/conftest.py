"""Fixtures for every test: the Hypothesis profile, real inputs, the embedded starter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("torch", deadline=None, derandomize=True)  # the first torch call is slow, not wrong
settings.load_profile("torch")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real inputs are not beside this checkout ({folder.name} of the shared folder is absent)")
    return folder


@pytest.fixture(scope="session")
def starter_model() -> Path:
    return ROOT / "src" / "preftune" / "starter" / "model"
