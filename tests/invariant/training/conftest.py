"""One tiny model for the whole folder, on one thread: other processes share this machine."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py
# elsewhere test_quantised.py runs them, in a process that has bitsandbytes
collect_ignore = [] if find_spec("bitsandbytes") else ["test_quantised_base.py", "test_eight_bit.py"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
