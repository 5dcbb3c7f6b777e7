"""Two gloo processes train a stage to the numbers of one; and what makes them agree is shown to matter.

All cases run in one pair of processes (most of the time goes into starting them).
"""

import json
import re
import signal
import time

import pytest
import torch
from ranked import finished, plan_of, started, together
from safetensors.torch import load_file
from tiny import make_model

from preftune.core.files import read_json, read_jsonl
from preftune.training.loop import run_stage

pytestmark = pytest.mark.slow

PLAIN = {"rank": 4, "alpha": 8, "dropout": 0.0}
# 16 pairs, 5 a step: packs of unequal size, three or four a step for two ranks, and one pair in the last step
BASE = {"lora": PLAIN, "pairs_per_step": 5, "tokens_per_pack": 60, "checkpoints": 1, "epochs": 1.0, "lr": 3e-3, "count": 16}
FULL = {"adapter": "full", "lr": 1e-3}
CASES = {
    "lora, ddp": {**BASE, "distributed": "ddp"},
    "lora, fsdp2": {**BASE, "distributed": "fsdp2"},
    "full, fsdp2": {**BASE, **FULL, "distributed": "fsdp2"},
    "full, tied, fsdp2": {**BASE, **FULL, "distributed": "fsdp2", "model": "tied"},
    "full, ddp": {**BASE, **FULL, "distributed": "ddp"},
    "batchwise, ddp": {**BASE, "sorted": True, "distributed": "ddp"},
    "batchwise, fsdp2": {**BASE, "sorted": True, "distributed": "fsdp2"},
    "kto, ddp": {**BASE, "method": "kto", "loss": {}, "kind": "labelled", "distributed": "ddp", "pairs_per_step": 7},
    "kto, fsdp2": {**BASE, "method": "kto", "loss": {}, "kind": "labelled", "distributed": "fsdp2", "pairs_per_step": 7},
    "frozen, ddp": {**BASE, "reference": "frozen", "distributed": "ddp"},
    "following, ddp": {**BASE, **FULL, "reference": {"sync": {"alpha": 0.5, "every": 2}}, "distributed": "ddp"},
    "rows of their own, fsdp2": {**BASE, "shared_prefix": "off", "distributed": "fsdp2"},
    "checkpointed activations, fsdp2": {**BASE, "gradient_checkpointing": True, "distributed": "fsdp2"},
}
FAULTS = {
    "the factor of the averaging": CASES["lora, ddp"],
    "the sums over ranks": CASES["lora, ddp"],
    "the meeting of gradients": CASES["lora, ddp"],
}
DROPOUT = {**BASE, "lora": {**PLAIN, "dropout": 0.1}, "distributed": "fsdp2", "keep_checkpoints": 9}
MOVES = {  # a run that was stopped after step 2, and how many processes go on with it
    "lora, 2 to 1": ({**CASES["lora, fsdp2"], "term": [1, 2]}, 2, 1),
    "lora, 1 to 2": (CASES["lora, ddp"], 1, 2),
    "full, 2 to 1": ({**CASES["full, fsdp2"], "term": [0, 2]}, 2, 1),
    "full, 1 to 2": (CASES["full, fsdp2"], 1, 2),
}
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gb", "elapsed_s"}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def slug(name):
    return re.sub(r"\W+", "-", name)


def named(name, case, who):
    return {**case, "folder": f"{slug(name)}-{who}"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Every case by one process and by two, killed and stopped runs included."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("ranks")
    make_model(work / "model")
    make_model(work / "tied", tie_word_embeddings=True)
    for name, case in CASES.items():
        run_stage(plan_of(work, named(name, case, "one")))
    for name, (case, first, _) in MOVES.items():
        if first == 1:
            with pytest.raises(KeyboardInterrupt):
                run_stage(plan_of(work, named(name, case, "moved")), stop_at(2))
    killed = named("killed", {**DROPOUT, "checkpoints": 3, "kill": [1, 3]}, "two")
    began = time.time()
    ended = finished(started(work, [killed]))
    (work / "killed.json").write_text(json.dumps([began, time.time(), ended]))
    whole = named("killed", {**DROPOUT, "checkpoints": 3}, "whole")
    again = {**killed, "resume": True}
    del again["kill"]
    together(
        work,
        [named(name, case, "two") for name, case in CASES.items()]
        + [named(fault, {**case, "fault": fault}, "broken") for fault, case in FAULTS.items()]
        + [named(name, case, "moved") for name, (case, first, _) in MOVES.items() if first == 2]
        + [{**named(name, case, "moved"), "resume": True} for name, (case, _, then) in MOVES.items() if then == 2]
        + [whole, again],
    )
    return work


def stop_at(step):
    """A sink that breaks off at this step as Ctrl-C would, with a checkpoint of the step before or at it."""
    from preftune.core.events import CheckpointSaved

    def sink(event):
        if isinstance(event, CheckpointSaved) and event.step >= step:
            raise KeyboardInterrupt

    return sink


def rows_of(folder):
    return [{key: value for key, value in row.items() if key not in SPEED} for row in read_jsonl(folder / "metrics.jsonl")]


def weights_of(folder):
    return load_file(next(iter(sorted((folder / "final").glob("*.safetensors")))))


def assert_same(one, two, **tolerance):
    """The same metrics at the same steps, and the same files with the same weights."""
    rows, others = rows_of(one), rows_of(two)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=5e-5), (row["step"], key)
    files = [sorted(path.name for path in (folder / "final").iterdir()) for folder in (one, two)]
    assert files[0] == files[1]
    weights, theirs = weights_of(one), weights_of(two)
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        assert weight.dtype == theirs[name].dtype
        torch.testing.assert_close(weight, theirs[name], **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(work, name):
    one, two = (work / f"{slug(name)}-{who}" for who in ("one", "two"))
    assert_same(one, two, **CLOSE)
    ledgers = [[row for row in read_jsonl(folder / "ledger.jsonl") if "pairs" in row] for folder in (one, two)]
    for row, other in zip(*ledgers, strict=True):
        margins, theirs = ({pair[2]: pair[3] for pair in each["pairs"]} for each in (row, other))
        assert margins == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_them_agree_matters(work, fault):
    with pytest.raises(AssertionError):
        assert_same(work / "lora-ddp-one", work / f"{slug(fault)}-broken", **CLOSE)


@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_goes_on_with_another_number_of_processes(work, name):
    case, _, then = MOVES[name]
    folder = work / f"{slug(name)}-moved"
    if then == 1:
        assert not (folder / "final").exists()
        run_stage(plan_of(work, named(name, case, "moved"), resume=True))
    assert_same(work / f"{slug('lora, ddp' if 'lora' in name else 'full, fsdp2')}-one", folder, **CLOSE)
    manifests = [read_json(path) for path in sorted((folder / "checkpoints").glob("*/manifest.json"))]
    assert all(name.endswith((".safetensors", ".json", ".jinja", ".md")) for one in manifests for name in one["files"])


def test_a_rank_that_is_killed_ends_the_other_with_a_clear_message(work):
    began, ended_at, ended = json.loads((work / "killed.json").read_text())
    (code, said), (killed, last) = ended
    assert killed == -signal.SIGKILL
    assert code == 1
    line = said.strip().splitlines()[-1]
    assert re.fullmatch(
        r"RankLost: rank 1 \(process \d+ on \S+\) ended; all ranks end, resume the run to go on from its last checkpoint", line
    )
    at = float(re.search(r"signal at ([\d.]+)", last)[1])
    assert began < at < ended_at < at + 30


def test_a_run_of_which_a_rank_was_killed_resumes_to_the_same_bits(work):
    """With dropout: every rank's generators are put back."""
    whole, again = work / "killed-whole", work / "killed-two"
    assert rows_of(whole) == rows_of(again)
    weights, theirs = weights_of(whole), weights_of(again)
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
