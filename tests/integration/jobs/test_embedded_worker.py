"""The worker of a server ends with it, also where the server died while the worker was starting."""

import os
import subprocess
import sys


def test_a_worker_whose_server_is_gone_ends(tmp_path):
    places = {"PREFTUNE_HOME": str(tmp_path / "home"), "PREFTUNE_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **places, "PREFTUNE_EMBEDDED": "1"}  # process 1 is not who started it
    environment.pop("PREFTUNE_DATABASE", None)
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "worker"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
