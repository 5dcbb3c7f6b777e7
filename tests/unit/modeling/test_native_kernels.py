"""Our own kernels for elementwise work beside the functions that say what they compute; when they are chosen, and if not."""

from __future__ import annotations

import pytest
import torch
from native_machine import CPU, NEEDS_NATIVE, compiled
from torch import Tensor

from preftune.modeling import kernels as plain
from preftune.modeling.compile import NATIVE_WORTH_STEPS, REGIONS, choose_kernels
from preftune.modeling.kernels import EAGER, Kernels
from preftune.modeling.native_code import can_run_natively

pytestmark = NEEDS_NATIVE


@pytest.fixture(scope="module")
def native() -> Kernels:
    return compiled()


def halves(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def side_by_side(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads and values as a block has them, in one row of memory, and the places of the rows."""
    lot, angles = halves(7, 5, width), torch.arange(7.0)[:, None] * torch.linspace(0.1, 1.0, width)
    return lot[:, :4], lot[:, 4:], angles.cos().bfloat16(), angles.sin().bfloat16()


def inputs(name: str, width: int) -> list[object]:
    """What a function is given: rows of ``width``, which is that of a head too."""
    scale = torch.rand(7, 1, generator=torch.Generator().manual_seed(9)) + 0.5
    parts = [halves(7, heads, width, seed=heads) for heads in (2, 1, 1)]
    made: dict[str, list[object]] = {
        "rms": [halves(7, width), halves(width, seed=1), 1e-5],
        "add_rms": [halves(7, width), halves(7, width, seed=1), halves(width, seed=2), 1e-5],
        "rms_backward": [halves(7, width), halves(7, width, seed=1), scale, halves(width, seed=2), halves(7, width, seed=3)],
        "rotate": list(side_by_side(width)),
        "rotate_backward": [*parts, *side_by_side(width)[2:]],
        "swiglu": [4 * halves(7, 2 * width)],
        "swiglu_backward": [4 * halves(7, 2 * width), halves(7, width, seed=1)],
        "token_softmax": [4 * halves(7, width), torch.arange(7)[:, None] % width],
    }
    return made[name]


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("width", [32, 96, 24])  # 24 is no whole number of vectors: eager functions take over, but for the head
def test_each_computes_what_its_function_says_rounded_once(native: Kernels, name: str, width: int) -> None:
    wide = [one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for one in inputs(name, width)]
    wanted, got = getattr(plain, name)(*wide), getattr(native, name)(*inputs(name, width))
    several = isinstance(wanted, tuple)
    for one, other in zip(got, wanted, strict=True) if several else [(got, wanted)]:
        assert one.shape == other.shape
        error = (one.float() - other).abs()
        # one rounding of 8 bits; a sum that was rounded before its norm is taken has two, and so have torch's operators
        slack = 2.0**-7 if width == 24 or name == "add_rms" else 2.0**-8 * 1.01
        assert (error <= slack * other.abs().clamp_min(2e-2 if width == 24 else 1e-6)).all(), float((error / other.abs()).max())
    assert all(one.dtype in (torch.bfloat16, torch.float32) for one in (got if several else [got]))


@pytest.mark.parametrize("name", [name for name in REGIONS if name != "rotate"])
def test_what_is_no_number_stays_none_in_its_row_and_touches_no_other(native: Kernels, name: str) -> None:
    given = inputs(name, 32)
    assert isinstance(given[0], Tensor)
    given[0].view(7, -1)[3, 5] = float("nan")
    got = getattr(native, name)(*given)
    rows = [one.isnan().view(7, -1).any(-1) for one in (got if isinstance(got, tuple) else [got])]
    broken = torch.stack(rows).any(0)
    assert broken.tolist() == [row == 3 for row in range(7)]


@pytest.mark.parametrize("size", [1, 7, 16, 17, 50])
def test_a_vocabulary_may_have_any_size(native: Kernels, size: int) -> None:
    lot = torch.full((6, size + 30), 99.0).bfloat16()  # what stands behind a row must not count
    lot[:, :size] = 3 * halves(6, size)
    logits, chosen = lot[:, :size].contiguous(), torch.arange(6)[:, None] % size
    wanted = torch.log_softmax(logits.float(), -1)
    probabilities, logps = native.token_softmax(logits, chosen)  # type: ignore[misc]
    assert probabilities.data_ptr() == logits.data_ptr()  # the kernel's: it writes where it reads
    torch.testing.assert_close(probabilities.float(), wanted.exp(), rtol=2**-8, atol=1e-30)
    torch.testing.assert_close(logps, wanted.gather(1, chosen).squeeze(1), rtol=1e-5, atol=1e-5)


def test_a_gate_far_from_zero_overflows_nothing(native: Kernels) -> None:
    both = torch.cat([torch.tensor([-3e38, -80.0, -1.0, 0.0, 200.0, 3e38]).repeat(16), torch.ones(96)])[None].bfloat16()
    wanted = torch.nn.functional.silu(both[:, :96].float())
    torch.testing.assert_close(native.swiglu(both).float(), wanted, rtol=2**-8, atol=1e-30)
    of_both, act = native.swiglu_backward(both, torch.ones(1, 96).bfloat16())
    torch.testing.assert_close(act.float(), wanted, rtol=2**-8, atol=1e-30)
    assert of_both[:, 96:].isfinite().all()
    assert of_both[0, 3] == 0.5


def test_no_bit_depends_on_the_number_of_threads(native: Kernels) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([getattr(native, name)(*inputs(name, 64)) for name in REGIONS])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        assert all(torch.equal(*pair) for pair in pairs)


def test_they_are_chosen_for_bfloat16_and_pay_earlier_than_torchs_compiler() -> None:
    asked = [
        (dtype, steps) for dtype in (torch.bfloat16, torch.float32) for steps in (NATIVE_WORTH_STEPS - 1, NATIVE_WORTH_STEPS)
    ]
    names = [choose_kernels("auto", CPU, dtype, steps, pytest.fail).name for dtype, steps in asked]
    assert names == ["eager", "native", "eager", "eager"]
    assert choose_kernels("on", CPU, torch.bfloat16, 1, pytest.fail).name == "native"
    assert choose_kernels("off", CPU, torch.bfloat16, 10**6, pytest.fail) is EAGER


def test_a_compiler_that_fails_is_told_and_torchs_way_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_source: str) -> None:
        raise RuntimeError("unknown instruction\nvdpbf16ps")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", fail)
    told: list[str] = []
    assert choose_kernels("on", CPU, torch.bfloat16, 1, told.append).name == "compiled"
    assert told == ["our own kernels are not used: RuntimeError: unknown instruction vdpbf16ps"]


def test_a_processor_without_the_instructions_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert not can_run_natively()
    assert choose_kernels("on", CPU, torch.bfloat16, 1, pytest.fail).name == "compiled"
    assert choose_kernels("auto", CPU, torch.bfloat16, NATIVE_WORTH_STEPS, pytest.fail) is EAGER
