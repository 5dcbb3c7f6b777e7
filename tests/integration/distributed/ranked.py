"""Stages that two gloo processes train together.

python ranked.py WORK CASES.json     in each process, with the variables that torchrun sets
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

SCRIPT = Path(__file__)


def plan_of(work: Path, case: dict, **more):
    """The plan of a case: a folder, how many examples, and fields of the stage."""
    from tiny import Sorted, labelled, make_examples, make_plan

    given = {**case, **more}
    count, kind = given.pop("count", 18), given.pop("kind", "pairs")
    loss = Sorted() if given.pop("sorted", False) else None
    model = work / given.pop("model", "model")
    train, select = make_examples(count), make_examples(5, 1, prefix="select")
    if kind == "labelled":
        from preftune.data.partners import with_partners

        train = with_partners(labelled(train), 64, labelled(train))
        select = with_partners(labelled(select), 64, train)
    plan = make_plan(work, model, train, select, **given)
    return replace(plan, loss=loss, cache_folder=work / f"cache-{given['folder']}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def started(work: Path, cases: list[dict], size: int = 2) -> list[subprocess.Popen]:
    """The processes of these cases, running."""
    name = work / f"cases-{free_port()}.json"
    name.write_text(json.dumps(cases))
    port = str(free_port())
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(work), str(name)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finished(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    ended = []
    try:
        for one in processes:
            said = one.communicate(timeout=timeout)[1]
            ended.append((one.returncode, said))
    finally:
        for one in processes:
            one.kill()
    return ended


def together(work: Path, cases: list[dict], size: int = 2) -> None:
    """Run the cases in processes that train together; all must end well."""
    for rank, (code, said) in enumerate(finished(started(work, cases, size))):
        assert code == 0, f"rank {rank}: {said[-4000:]}"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(SCRIPT.parents[2] / "invariant" / "training"))
    from preftune.core.errors import PreftuneError
    from preftune.core.launch import Launch
    from preftune.training.loop import run_stage
    from preftune.training.ranks import joined

    work = Path(sys.argv[1])
    try:
        with joined(Launch.from_environment()) as ranks:
            for case in json.loads(Path(sys.argv[2]).read_text()):
                run_stage(replace(plan_of(work, case), ranks=ranks))
    except PreftuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
