"""What needs bitsandbytes runs in a process that has it: PEFT imports it wherever it is installed, a second for every process."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = [Path(__file__).with_name(name) for name in ("test_quantised_base.py", "test_eight_bit.py")]
LENT = next((ROOT / ".venv-quant").glob("lib/python*/site-packages/bitsandbytes"), None)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed, so its tests run by themselves")
@pytest.mark.skipif(LENT is None, reason="bitsandbytes is not there: `make quant` fetches it")
def test_bases_of_4_and_8_bits_and_moments_of_8():
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, FILES)]
    done = subprocess.run(
        command, cwd=ROOT, env={**keep, "PYTHONPATH": str(LENT.parent)}, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    told = done.stdout.splitlines()[-1] if "passed" in done.stdout else done.stdout
    assert re.search(r"\b1[0-9] passed", told), told
    assert "skipped" not in told, told
