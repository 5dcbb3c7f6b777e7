"""Stages that two gloo processes train together.

python ranked.py WORK CASES.json     in each process, with the variables that torchrun sets
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

SCRIPT = Path(__file__)
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


def plan_of(work: Path, case: dict, **more):
    """The plan of a case: a folder, how many examples, and fields of the stage."""
    from tiny import Sorted, labelled, make_examples, make_plan

    from preftune.core.recipe import ModelConfig

    given = {**case, **more}
    for key in ("fault", "kill", "term"):
        given.pop(key, None)
    count, kind = given.pop("count", 18), given.pop("kind", "pairs")
    loss = Sorted() if given.pop("sorted", False) else None
    model = work / given.pop("model", "model")
    each = 1 if kind == "demonstrations" else 2
    train, select = make_examples(count, completions=each), make_examples(5, 1, completions=each, prefix="select")
    if kind in {"said", "tied"}:  # what is said of labels: confidences and strengths, and some pairs without a winner
        train, select = ([said_of(one, at, is_tied=kind == "tied") for at, one in enumerate(rows)] for rows in (train, select))
    if kind == "labelled":
        from preftune.data.partners import with_partners

        train = with_partners(labelled(train), 64, labelled(train))
        select = with_partners(labelled(select), 64, train)
    plan = make_plan(work, model, train, select, **given)
    named = (given.get("reference") or {}).get("model") if isinstance(given.get("reference"), dict) else None
    other = None if named is None else ModelConfig(name=str(work / named))
    return replace(plan, loss=loss, reference=other, cache_folder=work / f"cache-{given['folder']}")


def said_of(example, at: int, *, is_tied: bool):
    """A pair with a confidence, a strength, or neither; every fourth a tie where the loss takes them."""
    confidence, strength = (None, 0.9, 0.6)[at % 3], (0.0, 1.0, 2.0, 0.5)[at % 4]
    return replace(example, confidence=confidence, strength=strength, is_tie=is_tied and at % 4 == 3)


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


def finished(processes: list[subprocess.Popen], timeout: float = 900) -> list[tuple[int, str]]:
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


def at_step(given: list[int] | None, signal_number: int, rank: int):
    """A sink that sends this process a signal when a step is done, on one rank: ``given`` is (rank, step)."""
    from preftune.core.events import StepDone

    def sink(event: object) -> None:
        if given is not None and given[0] == rank and isinstance(event, StepDone) and event.step == given[1]:
            print(f"signal at {time.time()}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal_number)

    return sink


@contextmanager
def without(what: str | None):
    """One thing that makes ranks agree with one process, taken away."""
    from preftune.training.held import FollowingWeights
    from preftune.training.ranks import Ranks
    from preftune.training.spread import Spread

    broken = {
        None: {},
        "the factor of the averaging": {(Spread, "backward"): lambda self, share: share.backward()},
        "the factor of the averaging in the second pass": {
            (Spread, "backward_from"): lambda self, logps, slopes: logps.backward(slopes)
        },
        "the sums over ranks": {(Ranks, "add_up"): lambda self, tensor: tensor},
        "one rank's gradients": {
            (Spread, "backward"): lambda self, share: (share * self.ranks.size * (self.ranks.rank == 0)).backward()
        },
        "following": {(FollowingWeights, "follow"): lambda self, alpha: None},
        "the meeting of gradients": {
            (Spread, "turn"): lambda self, scorer, turn, has_backward=False: self_turn(self, scorer, turn)
        },
    }[what]
    before = {place: getattr(*place) for place in broken}
    self_turn = before.get((Spread, "turn"))
    for (owner, name), other in broken.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name), other in before.items():
            setattr(owner, name, other)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(SCRIPT.parents[2] / "invariant" / "training"))
    from preftune.core.errors import Interrupted, PreftuneError
    from preftune.core.launch import Launch
    from preftune.training.loop import run_stage
    from preftune.training.ranks import joined

    work = Path(sys.argv[1])
    try:
        with joined(Launch.from_environment()) as ranks:
            for case in json.loads(Path(sys.argv[2]).read_text()):
                kill, term = (at_step(case.get(key), number, ranks.rank) for key, number in SIGNALS.items())
                plan = replace(plan_of(work, case), ranks=ranks)
                with without(case.get("fault")):
                    try:
                        run_stage(plan, lambda event: (kill(event), term(event)))  # noqa: B023 -- called in this turn only
                    except Interrupted:
                        if "term" not in case:
                            raise
    except PreftuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


if __name__ == "__main__":
    main()
