"""Steps that a thread prepares early are the steps that would be prepared late; nothing of the thread outlives the loop."""

import threading
import time

import numpy as np
import pytest
import torch
from test_resume import ROWS, files_of, stop_at
from tiny import labelled, losses_of, make_examples, make_plan

from preftune.core.errors import CheckpointError, Interrupted
from preftune.data.partners import with_partners
from preftune.modeling.reference import ReferenceCache
from preftune.training import ahead as ahead_module
from preftune.training.ahead import Ahead, Prepared, pinned
from preftune.training.loop import run_stage
from preftune.training.ranks import Ranks


def threads():
    return [one for one in threading.enumerate() if one.name == "preftune-ahead"]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert threads() == []


KTO = with_partners(labelled(make_examples(22)), 64, labelled(make_examples(22)))
STAGES = {
    "dpo": ({}, ROWS),
    "dpo, adapter off": ({"reference": "adapter_off"}, ROWS),
    "aot": ({"method": "aot"}, ROWS),
    "kto": ({"method": "kto", "loss": {}}, KTO),
    "orpo": ({"method": "orpo", "loss": {}}, ROWS),
}


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_weights_are_those_of_a_run_without_a_thread(tmp_path, tiny_model, monkeypatch, name):
    changes, rows = STAGES[name]
    by_thread: list[bool] = []
    real = Ranks.packs

    def watched(self, examples, tokens_per_pack):
        by_thread.append(threading.current_thread() is not threading.main_thread())
        return real(self, examples, tokens_per_pack)

    monkeypatch.setattr(Ranks, "packs", watched)
    select = rows[:5] if name == "kto" else None
    run_stage(make_plan(tmp_path, tiny_model, rows, select, folder="ahead", **changes))
    assert by_thread.count(True) == 12, "one call a step, all of them in the thread"
    by_thread.clear()
    monkeypatch.setattr(ahead_module, "DEPTH", 0)
    run_stage(make_plan(tmp_path, tiny_model, rows, select, folder="late", **changes))
    assert by_thread.count(True) == 0
    assert losses_of(tmp_path / "ahead") == losses_of(tmp_path / "late")
    after, before = files_of(tmp_path / "ahead"), files_of(tmp_path / "late")
    assert [name for name in before if after.get(name) != before[name]] == []
    assert after.keys() == before.keys()


def test_a_resumed_run_counts_the_steps_that_were_taken(tmp_path, tiny_model, monkeypatch):
    """Stopped while two further steps lie prepared, and resumed with none: the losses are those of the whole run."""
    run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="whole", checkpoints=0))

    stop = stop_at(5)

    def stop_when_full(event):
        time.sleep(0.02)  # long enough for the thread to be two steps on
        stop(event)

    with pytest.raises(Interrupted, match="after step 5 of 12"):
        run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="stopped", checkpoints=0), stop_when_full)
    assert threads() == []
    run_stage(make_plan(tmp_path, tiny_model, ROWS, folder="stopped", checkpoints=0, resume=True))
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")


def test_what_the_thread_raises_is_raised_by_the_loop_at_its_step(tmp_path, tiny_model, monkeypatch):
    """A score that is gone from the cache: the class, the words and the place are the cache's own."""
    lost = ROWS[int(make_order()[4 * 4])]  # an example of step 5
    real = ReferenceCache.scores

    def scores(self, example):
        if threading.current_thread() is not threading.main_thread() and example.example_id == lost.example_id:
            raise CheckpointError(f"reference scores of example {lost.example_id} are not there; score them first")
        return real(self, example)

    monkeypatch.setattr(ReferenceCache, "scores", scores)
    with pytest.raises(CheckpointError, match=rf"of example {lost.example_id} are not there") as caught:
        run_stage(make_plan(tmp_path, tiny_model, ROWS))
    assert max(losses_of(tmp_path / "run")) == 4, "the steps before it were trained"
    assert "scores" in [entry.name for entry in caught.traceback], "the traceback reaches to where it was raised"


def make_order():
    from preftune.training.order import epoch_order

    return epoch_order(len(ROWS), 0, 0)


def items(count):
    return [Prepared([], object()) for _ in range(count)]


def test_no_more_than_depth_are_prepared_early():
    made, all_of_them = [], items(9)

    def prepare(step):
        made.append(step)
        return all_of_them[step]

    with Ahead(prepare, 3, 9) as ahead:
        for step in range(3, 9):
            deadline = time.monotonic() + 5
            while len(made) < min(step - 3 + ahead_module.DEPTH, 6) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert made == list(range(3, min(step + ahead_module.DEPTH, 9)))
            assert ahead.take(step) is all_of_them[step]


def test_the_thread_ends_with_the_block_however_that_ends():
    def broken_off():
        with Ahead(lambda step: items(1)[0], 0, 100) as ahead:
            ahead.take(0)
            assert len(threads()) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert threads() == []


def test_steps_are_taken_in_their_order_and_not_beyond_the_end():
    with Ahead(lambda step: items(1)[0], 0, 2) as ahead:
        ahead.take(0)
        with pytest.raises(ValueError, match="step 2 was asked for and 1 is next"):
            ahead.take(2)


@pytest.mark.parametrize("when", ["enter", "prepare"])
def test_an_error_is_raised_once_and_the_steps_before_it_are_given(when):
    def prepare(step):
        if when == "prepare" and step == 1:
            raise OSError("no more")
        return items(1)[0]

    def enter():
        if when == "enter":
            raise OSError("no device")

    with Ahead(prepare, 0, 5, enter=enter) as ahead:
        if when == "prepare":
            ahead.take(0)
        with pytest.raises(OSError, match="no "):
            ahead.take(int(when == "prepare"))


def test_a_pack_stays_what_it_is_on_the_cpu_and_is_pinned_for_cuda():
    from preftune.data.pack import pack_of

    pack = pack_of(ROWS[:3])
    assert pinned(pack, torch.device("cpu")) is pack
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: pinned memory is not to be had")
    held = pinned(pack, torch.device("cuda"))
    assert np.array_equal(held.ids, pack.ids)
    assert torch.from_numpy(held.ids).is_pinned()
