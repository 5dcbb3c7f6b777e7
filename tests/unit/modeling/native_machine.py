"""Where our own kernels can be tested: the marks of such a file, and the kernels."""

from __future__ import annotations

import pytest
import torch

from preftune.modeling.compile import native_kernels, why_not_compiled
from preftune.modeling.kernels import Kernels
from preftune.modeling.native_code import can_run_natively

CPU = torch.device("cpu")
NEEDS_NATIVE = [
    pytest.mark.skipif(not can_run_natively(), reason="this processor has no AVX512-BF16, or it has AMX"),
    pytest.mark.skipif(bool(why_not_compiled(CPU)), reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch's own compiler
]


def compiled() -> Kernels:
    """Our own kernels; a test fails where they do not compile."""
    made = native_kernels(pytest.fail)
    assert made is not None
    return made
