"""Waits short enough for tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.judging.llm_client.FIRST_WAIT_S", 0.01)
