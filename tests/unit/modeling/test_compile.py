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
    assert choose_kernels("auto", CPU, torch.float32, WORTH_STEPS - 1, told.append) is EAGER
    assert choose_kernels("off", CPU, torch.float32, WORTH_STEPS, told.append) is EAGER
    assert choose_kernels("auto", CPU, torch.float32, WORTH_STEPS, told.append).name == "compiled"
    assert choose_kernels("on", CPU, torch.float32, 1, told.append).name == "compiled"
    assert told == []


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert choose_kernels("on", CPU, torch.float32, 1, told.append) is EAGER
    assert len(told) == 1
    assert "install g++" in told[0]
    assert why_not_compiled(torch.device("cuda")) == ""


def test_a_region_that_does_not_compile_runs_eager_and_tells_once() -> None:
    told: list[str] = []
    region = Region("swiglu", told.append)

    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction\nin line 3\nmore")

    region._compiled = broken
    both = torch.randn(3, 8)
    assert torch.equal(region(both), EAGER.swiglu(both))
    assert torch.equal(region(both), EAGER.swiglu(both))
    assert told == ["swiglu runs uncompiled: RuntimeError: no such instruction in line 3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_operators_compute_what_is_compiled(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both, grad = torch.randn(5, 12).to(dtype), torch.randn(5, 6).to(dtype)
    torch.testing.assert_close(EAGER.swiglu(both), kernels.swiglu(both))
    for got, wanted in zip(EAGER.swiglu_backward(both, grad), kernels.swiglu_backward(both, grad), strict=True):
        torch.testing.assert_close(got, wanted, atol=0.03 if dtype == torch.bfloat16 else 1e-6, rtol=0.03)
    assert set(REGIONS) < set(EAGER.__dataclass_fields__)


@pytest.mark.skipif(bool(why_not_compiled(CPU)), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_a_region_is_compiled_once_whatever_autograd_knows_of_its_inputs() -> None:
    told: list[str] = []
    region = Region("add_rms", told.append)
    counted = torch._dynamo.utils.counters["stats"]
    torch.manual_seed(0)
    graphs: list[int] = []
    for rows, wants_grad, is_view in ((5, False, False), (7, True, False), (9, True, True), (11, False, True)):
        x, branch = (torch.randn(2, rows, 16, requires_grad=wants_grad) for _ in range(2))
        x, branch = (one[1] if is_view else one[1].detach().requires_grad_(wants_grad) for one in (x, branch))
        with torch.no_grad():
            got, wanted = region(x, branch, torch.ones(16), 1e-6), EAGER.add_rms(x, branch, torch.ones(16), 1e-6)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counted["unique_graphs"])
    assert told == []
    assert graphs[1:] == graphs[:1] * 3
