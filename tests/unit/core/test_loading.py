"""Heavy libraries load without a single collection, and the collector is afterwards as it was."""

import gc
import json
import subprocess
import sys

import pytest

from preftune.core.loading import without_collections

COUNT = """
import gc, json, sys
full = []
gc.callbacks.append(lambda phase, info: full.append(1) if phase == "start" and info["generation"] == 2 else None)
{first}
import {module}
print(json.dumps([len(full), gc.isenabled(), gc.get_freeze_count(), {library!r} in sys.modules]))
"""


def counted(module, library, first=""):
    code = COUNT.format(module=module, library=library, first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("module", "library"),
    [("preftune.maths.logps", "torch"), ("preftune.training.devices", "torch"), ("preftune.modeling.load", "peft")],
)
def test_a_heavy_library_loads_without_a_full_collection(module, library):
    assert counted(module, library) == [0, True, 0, True], "and nothing of the user's is kept for ever"
    full, is_on, num_kept, is_loaded = counted(module, library, "from preftune.core.loading import own_process; own_process()")
    assert (full, is_on, is_loaded) == (0, True, True)
    assert num_kept > 100_000, "in a process of preftune's own nobody looks at them again"


def test_a_library_loaded_by_itself_is_collected_over_and_over():
    assert counted("torch", "torch")[0] > 0, "else the test above shows nothing"


def test_the_collector_stays_off_where_it_was():
    gc.disable()
    try:
        with without_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError), without_collections():
        _ = 1 / 0
    assert gc.isenabled()
