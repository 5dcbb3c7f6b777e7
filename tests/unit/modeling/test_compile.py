"""Compiled kernels: where they are chosen, what they compute, and how they fall back."""

from __future__ import annotations

import pytest
import torch

from preftune.modeling import kernels
from preftune.modeling.compile import REGIONS, WORTH_STEPS, Region, choose_kernels, why_not_compiled
from preftune.modeling.kernels import EAGER

CPU = torch.device("cpu")


def test_short_stages_are_not_compiled_and_long_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/g++")
    assert choose_kernels("auto", CPU, WORTH_STEPS - 1, told.append) is EAGER
    assert choose_kernels("off", CPU, WORTH_STEPS, told.append) is EAGER
    assert choose_kernels("auto", CPU, WORTH_STEPS, told.append).name == "compiled"
    assert choose_kernels("on", CPU, 1, told.append).name == "compiled"
    assert told == []


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert choose_kernels("on", CPU, 1, told.append) is EAGER
    assert len(told) == 1
    assert "install g++" in told[0]
    assert why_not_compiled(torch.device("cuda")) == ""


def test_a_region_that_does_not_compile_runs_eager_and_tells_once() -> None:
    told: list[str] = []
    region = Region("swiglu", told.append)

    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction\nmore")

    region._compiled = broken
    both = torch.randn(3, 8)
    assert torch.equal(region(both), EAGER.swiglu(both))
    assert torch.equal(region(both), EAGER.swiglu(both))
    assert told == ["swiglu runs uncompiled: RuntimeError: no such instruction"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_operators_compute_what_is_compiled(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both, grad = torch.randn(5, 12).to(dtype), torch.randn(5, 6).to(dtype)
    torch.testing.assert_close(EAGER.swiglu(both), kernels.swiglu(both))
    for got, wanted in zip(EAGER.swiglu_backward(both, grad), kernels.swiglu_backward(both, grad), strict=True):
        torch.testing.assert_close(got, wanted, atol=0.03 if dtype == torch.bfloat16 else 1e-6, rtol=0.03)
    assert set(REGIONS) < set(EAGER.__dataclass_fields__)
