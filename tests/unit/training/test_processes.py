"""What each of several processes has to do, and which settings they refuse; no process is started."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import distributed as dist

from preftune.core.errors import RankLost, UsageError
from preftune.core.launch import Launch
from preftune.core.recipe import GenerateConfig, LoraConfig, StageConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import pack_step
from preftune.training.ranks import ALONE, Ranks
from preftune.training.sharing_out import Sizes, check_distributed, describe, spread_kind

TWO = Launch(0, 2, 0, 2)


def examples(*lengths):
    return [
        TokenisedExample(f"e{at}", (1, 2), (TokenisedCompletion((3,) * (length - 2), (True,) * (length - 2)),))
        for at, length in enumerate(lengths)
    ]


def ids_of(packs):
    return [[one.example_id for one in pack.examples] for pack in packs]


def stage(**changes):
    return StageConfig(name="dpo", **changes)


def test_one_process_has_the_packs_and_the_order_of_pack_step():
    rows = examples(30, 9, 14, 22, 5, 11)
    packs = ALONE.packs(rows, 32)
    assert ids_of(packs) == ids_of(pack_step(rows, 32))
    turns = list(ALONE.turns(packs))
    assert [turn.index for turn in turns] == list(range(len(packs)))
    assert [turn.is_last for turn in turns] == [False] * (len(packs) - 1) + [True]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("lengths", [(30, 9, 14, 22, 5, 11), (8,), (40, 40, 40), (5,) * 19, (31, 4)])
def test_every_pack_is_run_once_and_every_rank_has_equally_many_turns(size, lengths):
    rows = examples(*lengths)
    everybody = [Ranks(Launch(rank, size, rank, size)) for rank in range(size)]
    packs = [ranks.packs(rows, 32) for ranks in everybody]
    assert all(ids_of(one) == ids_of(packs[0]) for one in packs)
    assert Counter(name for pack in ids_of(packs[0]) for name in pack) == Counter(one.example_id for one in rows)
    assert all(len(pack.ids) <= 32 or pack.num_groups == 1 for pack in packs[0])
    turns = [list(ranks.turns(packs[0])) for ranks in everybody]
    assert len({len(one) for one in turns}) == 1
    assert Counter(turn.index for one in turns for turn in one if turn.index is not None) == Counter(range(len(packs[0])))
    for meeting in zip(*turns, strict=True):
        assert len({turn.is_last for turn in meeting}) == 1
        for rank, turn in enumerate(meeting):
            assert turn.peers[rank] is turn.pack or turn.index is None
            assert [len(pack.ids) for pack in turn.peers] == [len(pack.ids) for pack in meeting[0].peers]
            assert turn.index is None or turn.pack is packs[0][turn.index]


def test_no_rank_waits_where_examples_and_budget_allow_it():
    rows = examples(*(12,) * 9)  # 96 tokens hold eight: two packs for one process, eight and one
    assert [len(pack.ids) for pack in ALONE.packs(rows, 96)] == [96, 12]
    packs = Ranks(Launch(0, 3, 0, 3)).packs(rows, 96)
    assert [len(pack.ids) for pack in packs] == [36, 36, 36]
    longest = Ranks(TWO).packs(examples(90, 60, 30, 60), 90)  # as many packs as one process, because the budget says so
    assert all(len(pack.ids) <= 90 for pack in longest)


def test_what_torchrun_says_is_read_and_nothing_else_is_guessed():
    assert Launch.from_environment({"RANK": "3"}) == Launch()
    found = Launch.from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert (found.rank, found.size, found.local_rank, found.is_first, found.is_one_host) == (5, 8, 1, False, False)
    with pytest.raises(UsageError, match="start several processes with torchrun"):
        Launch.from_environment({"RANK": "one", "WORLD_SIZE": "2"})


def test_auto_copies_adapters_shares_full_models_and_shares_what_fills_a_device():
    lora, full = stage(adapter="lora"), stage(adapter="full")
    small, large = Sizes(7_000, 10, 2, 80_000), Sizes(30_000, 10, 2, 80_000)
    assert spread_kind(full, Launch(), small) == "one"
    assert spread_kind(lora, TWO, small) == spread_kind(lora, TWO, None) == "ddp"
    assert spread_kind(lora, TWO, large) == spread_kind(full, TWO, small) == "fsdp2"
    assert spread_kind(stage(adapter="full", distributed="ddp"), TWO, small) == "ddp"


@pytest.mark.parametrize(
    ("config", "kind", "precision", "quantised", "code", "words"),
    [
        (stage(adapter="full"), "ddp", "bfloat16", None, "distributed_precision", "distributed: fsdp2"),
        (stage(), "fsdp2", "bfloat16", "bitsandbytes", "distributed_quantised", "distributed: ddp"),
        (stage(optimizer="adamw_8bit"), "fsdp2", "float32", None, "distributed_optimizer", "distributed: ddp"),
        (stage(pairs_per_step=1), "ddp", "float32", None, "idle_ranks", "pairs_per_step: 2"),
        (stage(lora=LoraConfig(dropout=0.1)), "ddp", "float32", None, "distributed_dropout", "lora.dropout: 0"),
        (
            StageConfig(name="make", method="generate", generate=GenerateConfig(prompts="p.jsonl", judge="j.yaml")),
            "ddp", "float32", None, "distributed_method", "without torchrun",
        ),
    ],
)  # fmt: skip
def test_what_several_processes_cannot_do_is_said_with_the_field_and_a_way_out(config, kind, precision, quantised, code, words):
    (found,) = check_distributed(config, TWO, kind, precision=precision, quantised_by=quantised)
    assert found.code == code
    assert words in found.way_out
    assert config.name in found.fact
    assert not check_distributed(config, Launch(), kind, precision=precision, quantised_by=quantised)


def test_a_plan_says_how_memory_falls_on_the_processes():
    sizes = Sizes(1_000_000_000, 1_000_000_000, 4)
    full = describe(stage(adapter="full"), Launch(0, 8, 0, 4), "fsdp2", sizes)
    assert full.startswith("8 processes on 2 host(s), fsdp2")
    assert "2.00 GB" in full  # (4 bytes of weights + 12 of gradient and moments) / 8
    copied = describe(stage(), TWO, "ddp", Sizes(1_000_000_000, 1_000_000, 2))
    assert "all weights (2.00 GB)" in copied


@pytest.mark.parametrize("error", [RuntimeError("[gloo/pair.cc:5] Connection closed by peer"), dist.DistNetworkError("reset")])
def test_a_broken_connection_names_the_rank_that_is_gone(error):
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ranks = Ranks(TWO, ((socket.gethostname(), os.getpid()), (socket.gethostname(), gone.pid)))
    with pytest.raises(RankLost, match=rf"rank 1 \(process {gone.pid} on .*\) ended; .*resume the run"), ranks.watched():
        raise error


def test_errors_of_our_own_are_not_blamed_on_other_ranks():
    with pytest.raises(RuntimeError, match="shape"), Ranks(TWO).watched():
        raise RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError, match="gloo"), ALONE.watched():
        raise RuntimeError("gloo")


def test_one_process_says_everything_to_itself():
    assert ALONE.highest(2.0, 1.0) == (2.0, 1.0)
    assert ALONE.from_first({"a": 1}) == {"a": 1}
    assert ALONE.gather(b"x") == [b"x"]
    tensor = torch.ones(2)
    assert ALONE.add_up(tensor) is tensor
    ALONE.wait()
