"""Planted faults in the losses, log-probs, packing, reference and normaliser: the fast tests see every one of them."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from faults import CONTROLS, FAULTS, ONLY_IN_SOAK, QUICK  # noqa: E402  # a neighbour, found by the path above

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def verdicts():
    command = [sys.executable, "tests/mutation/run_faults.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1700)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_tests_pass_without_a_fault(verdicts):
    assert verdicts["the unchanged source"] == "survived"


@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.name)
def test_a_fault_is_caught(verdicts, fault):
    assert verdicts[fault.name] == "killed", f"{fault.file}: {fault.old!r} -> {fault.new!r}, run by {fault.tests}"


@pytest.mark.parametrize(("fault", "verdict"), CONTROLS, ids=lambda one: getattr(one, "name", ""))
def test_the_machinery_tells_a_fault_from_none(verdicts, fault, verdict):
    assert verdicts[fault.name].startswith(verdict)


def test_there_are_faults_of_every_kind():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert set(names) > ONLY_IN_SOAK
    areas = Counter(fault.area for fault in QUICK)
    assert set(areas) == {"losses", "logps", "packing", "reference", "normaliser"}
    assert len(QUICK) >= 40
    assert min(areas.values()) >= 5
