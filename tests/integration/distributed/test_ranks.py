"""Two gloo processes train a stage to the numbers of one; and what makes them agree is shown to matter.

All cases run in one pair of processes (most of the time goes into starting them).
"""

import json
import re
import signal
import time

import pytest
import torch
from ranked import at_step, finished, plan_of, started, together
from safetensors.torch import load_file
from tiny import make_model

from preftune.core.errors import Interrupted
from preftune.core.files import read_json, read_jsonl
from preftune.training.loop import run_stage

pytestmark = pytest.mark.slow

PLAIN = {"rank": 4, "alpha": 8, "dropout": 0.0}
# 16 pairs, 5 a step: packs of unequal size, three or four a step for two ranks, and one pair in the last step
BASE = {"lora": PLAIN, "pairs_per_step": 5, "tokens_per_pack": 60, "checkpoints": 1, "epochs": 1.0, "lr": 3e-3, "count": 16}
FULL = {"adapter": "full", "lr": 1e-3}
KTO = {"method": "kto", "loss": {}, "kind": "labelled", "pairs_per_step": 7}
FOLLOWED = {"reference": {"sync": {"alpha": 0.5, "every": 2}}}
BROAD = {"precision": "bfloat16"}
CASES = {
    "lora, ddp": {**BASE, "distributed": "ddp"},
    "lora, fsdp2": {**BASE, "distributed": "fsdp2"},
    "full, fsdp2": {**BASE, **FULL, "distributed": "fsdp2"},
    "full, tied, fsdp2": {**BASE, **FULL, "distributed": "fsdp2", "model": "tied"},
    "full, ddp": {**BASE, **FULL, "distributed": "ddp"},
    "batchwise, ddp": {**BASE, "sorted": True, "distributed": "ddp"},
    "batchwise, fsdp2": {**BASE, "sorted": True, "distributed": "fsdp2"},
    "kto, ddp": {**BASE, **KTO, "distributed": "ddp"},
    "kto, fsdp2": {**BASE, **KTO, "distributed": "fsdp2"},
    "frozen, ddp": {**BASE, "reference": "frozen", "distributed": "ddp"},
    "following, ddp": {**BASE, **FULL, **FOLLOWED, "distributed": "ddp"},
    # rows of their own: every process takes as many passes of the reference as the one with the most
    "adapter off, rows, fsdp2": {**BASE, "reference": "adapter_off", "shared_prefix": "off", "distributed": "fsdp2"},
    "batchwise, frozen, fsdp2": {**BASE, **FULL, "sorted": True, "reference": "frozen", "distributed": "fsdp2"},
    "kto, frozen, fsdp2": {**BASE, **FULL, **KTO, "reference": "frozen", "distributed": "fsdp2"},
    "following, fsdp2": {**BASE, **FULL, **FOLLOWED, "distributed": "fsdp2"},
    "following softly, lora, fsdp2": {**BASE, **FOLLOWED, "distributed": "fsdp2"},
    "another model, live, fsdp2": {**BASE, "reference": {"policy": "frozen", "model": "other"}, "distributed": "fsdp2"},
    "another model, cached, fsdp2": {**BASE, "reference": {"model": "other"}, "shared_prefix": "off", "distributed": "fsdp2"},
    "bfloat16, fsdp2": {**BASE, **FULL, **BROAD, "distributed": "fsdp2"},
    "bfloat16, tied, following, fsdp2": {**BASE, **FULL, **BROAD, **FOLLOWED, "distributed": "fsdp2", "model": "tied"},
    "rows of their own, fsdp2": {**BASE, "shared_prefix": "off", "distributed": "fsdp2"},
    "checkpointed activations, fsdp2": {**BASE, "gradient_checkpointing": True, "distributed": "fsdp2"},
}
FAULTS = {
    "the factor of the averaging": CASES["lora, ddp"],
    "the sums over ranks": CASES["lora, ddp"],
    "the meeting of gradients": CASES["lora, ddp"],
    "following": CASES["following, fsdp2"],
    "one rank's gradients": CASES["bfloat16, fsdp2"],
}
DROPOUT = {**BASE, "lora": {**PLAIN, "dropout": 0.1}, "distributed": "fsdp2", "keep_checkpoints": 9}
MOVES = {  # a case, and how many processes train it: all but the last are stopped, after steps 1 and 3 or after step 2
    "lora, 2 to 1": ("lora, fsdp2", (2, 1)),
    "lora, 1 to 2": ("lora, ddp", (1, 2)),
    "full, 2 to 1 to 2": ("full, fsdp2", (2, 1, 2)),
    "following, 2 to 1 to 2": ("following, fsdp2", (2, 1, 2)),
    "bfloat16, 2 to 1 to 2": ("bfloat16, fsdp2", (2, 1, 2)),
}
STOPS = {2: (2,), 3: (1, 3)}
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
    make_model(work / "other", seed=5)
    for name, case in CASES.items():
        run_stage(plan_of(work, named(name, case, "one")))
    killed = named("killed", {**DROPOUT, "checkpoints": 3, "kill": [1, 3]}, "two")
    began = time.time()
    ended = finished(started(work, [*legs(0, 2), killed]))
    (work / "killed.json").write_text(json.dumps([began, time.time(), ended]))
    for leg in (*legs(0, 1), *legs(1, 1)):
        with pytest.raises(Interrupted):
            run_stage(plan_of(work, leg), at_step(leg["term"], signal.SIGTERM, 0))
    whole = named("killed", {**DROPOUT, "checkpoints": 3}, "whole")
    again = {**killed, "resume": True}
    del again["kill"]
    together(
        work,
        [named(name, case, "two") for name, case in CASES.items()]
        + [named(fault, {**case, "fault": fault}, "broken") for fault, case in FAULTS.items()]
        + [*legs(1, 2), *legs(2, 2), whole, again],
    )
    return work


def legs(number, size):
    """The runs of MOVES whose leg of this number has so many processes; one process's last leg is the test's."""
    found = []
    for name, (case, sizes) in MOVES.items():
        if len(sizes) <= number or sizes[number] != size:
            continue
        leg = named(name, CASES[case], "moved") | ({"resume": True} if number else {})
        if number < len(sizes) - 1:
            found.append(leg | {"term": [size - 1, STOPS[len(sizes)][number]]})
        elif size > 1:
            found.append(leg)
    return found


def rows_of(folder):
    return [{key: value for key, value in row.items() if key not in SPEED} for row in read_jsonl(folder / "metrics.jsonl")]


def weights_of(folder):
    return load_file(next(iter(sorted((folder / "final").glob("*.safetensors")))))


def assert_same(one, two, case):
    """The same metrics at the same steps, and the same files with the same weights."""
    rows, others = rows_of(one), rows_of(two)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    is_broad = case.get("precision") == "bfloat16"
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if is_broad and key.startswith(SAMPLED):
                continue
            near = {"rel": 2e-2, "abs": broad(key)} if is_broad else {"rel": 1e-4, "abs": 5e-5}
            assert row[key] == pytest.approx(other[key], **near), (row["step"], key)
    files = [sorted(path.name for path in (folder / "final").iterdir()) for folder in (one, two)]
    assert files[0] == files[1]
    weights, theirs = weights_of(one), weights_of(two)
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        assert weight.dtype == theirs[name].dtype
        if not is_broad:
            torch.testing.assert_close(weight, theirs[name], **CLOSE)
    if is_broad:
        start = load_file(one.parent / case.get("model", "model") / "model.safetensors")
        moved = norm(weight.float() - start[name].bfloat16().float() for name, weight in weights.items())
        assert norm(weight.float() - theirs[name].float() for name, weight in weights.items()) < 0.2 * moved


# bfloat16: one process runs fused blocks, two run the model's own layers, and rounding differs by up to .02 nats a token. What
# is sampled from such a model, and which of two nearly equal answers is ahead, is then another.
SAMPLED = ("kl", "probe/", "rewards/accuracies", "eval_rewards/accuracies")


def broad(key):
    """What rounding to bfloat16 may move of a metric: nats of a completion, of a token; beta (.1) times the former."""
    return 0.15 if "logps" in key and "per_token" not in key else 0.015


def norm(differences):
    return sum(float(one.double().pow(2).sum()) for one in differences) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(work, name):
    one, two = (work / f"{slug(name)}-{who}" for who in ("one", "two"))
    assert_same(one, two, CASES[name])
    ledgers = [[row for row in read_jsonl(folder / "ledger.jsonl") if "pairs" in row] for folder in (one, two)]
    # a margin is beta (.1) times the change of two completions, each of which may be off by ``broad``
    near = {"abs": 2 * 0.1 * broad("logps")} if CASES[name].get("precision") == "bfloat16" else {"rel": 1e-3, "abs": 1e-4}
    for row, other in zip(*ledgers, strict=True):
        margins, theirs = ({pair[2]: pair[3] for pair in each["pairs"]} for each in (row, other))
        assert margins == pytest.approx(theirs, **near)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_them_agree_matters(work, fault):
    case = FAULTS[fault]
    whole = next(name for name, other in CASES.items() if other is case)
    with pytest.raises(AssertionError):
        assert_same(work / f"{slug(whole)}-one", work / f"{slug(fault)}-broken", case)


@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_goes_on_with_another_number_of_processes(work, name):
    case, sizes = MOVES[name]
    folder = work / f"{slug(name)}-moved"
    if sizes[-1] == 1:
        assert not (folder / "final").exists()
        run_stage(plan_of(work, named(name, CASES[case], "moved"), resume=True))
    assert_same(work / f"{slug(case)}-one", folder, CASES[case])
    paths = sorted((folder / "checkpoints").glob("*/manifest.json"))
    assert [path.parent.name for path in paths][-1] == f"step-{STOPS[len(sizes)][-1]:06d}"
    assert all(name.endswith((".safetensors", ".json", ".jinja", ".md")) for path in paths for name in read_json(path)["files"])
    if "reference" in CASES[case]:
        assert all((path.parent / "reference.safetensors").is_file() for path in paths)


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
