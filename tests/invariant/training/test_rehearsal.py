"""What a rehearsal predicts, against what training then takes; and which packs it runs."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_examples, make_model, make_plan

from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import pack_step
from preftune.modeling import machine
from preftune.training.order import Order
from preftune.training.rehearsal import Rehearsal, Sample, choose_sample, predict, rehearse

ROOT = Path(__file__).resolve().parents[3]


def sized(index, tokens):
    answers = tuple(TokenisedCompletion((3 + side,) * tokens, (True,) * tokens) for side in (0, 1))
    return TokenisedExample(f"e{index}", (1, 5), answers)


def all_packs(config, train, seed):
    order = Order(len(train), config.pairs_per_step, seed, config.shuffle)
    return [pack_step([train[i] for i in order.indices(step)], config.tokens_per_pack) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sample_holds_the_largest_pack_and_the_longest_example_of_the_epoch(seed):
    lengths = np.random.default_rng(seed).integers(2, 90, 150)
    train = [sized(index, int(length)) for index, length in enumerate(lengths)]
    config = StageConfig(name="s", pairs_per_step=12, tokens_per_pack=256)
    sample = choose_sample(config, train, train[:40], seed)
    packs = [pack for step in all_packs(config, train, seed) for pack in step]
    assert sample.peak_tokens == max(len(pack.ids) for pack in packs)
    longest = max(one.num_tokens for one in train)
    assert max(one.num_tokens for pack in sample.peak for one in pack) == longest
    assert sample.epoch_tokens == sum(one.num_tokens for one in train) == sum(len(pack.ids) for pack in packs)
    assert sample.num_steps == sample.steps_per_epoch == 13
    assert len(sample.steps) == 3
    assert all(sum(one.num_tokens for one in pack) <= 256 for step in sample.steps for pack in step)


def test_a_run_cut_short_is_rehearsed_on_the_steps_that_it_will_take():
    train = [sized(index, 4) for index in range(40)] + [sized(99, 80)]
    config = StageConfig(name="s", pairs_per_step=4, shuffle=False, max_steps=2)
    sample = choose_sample(config, train, [], 0)
    assert max(one.num_tokens for pack in sample.peak for one in pack) < 80, "the long one is in a step that is not taken"
    assert (sample.num_steps, sample.steps_per_epoch) == (2, 2)


def test_the_arithmetic_of_a_prediction():
    measured = Rehearsal(1000, 400, 1.0, 2.0, 0.01, 0.003, 0.004, 0.5, 3.0, 4.0, "cpu", 100)
    sample = Sample(((),), (), (), epoch_tokens=1000, select_tokens=100, num_steps=30, steps_per_epoch=10)
    found = predict(measured, sample, StageConfig(name="s", evals=4, checkpoints=2), parent_bytes=450)
    assert found.peak_bytes == 1050
    assert math.isclose(found.training_s, 3 * 1000 * 0.01 + 30 * 0.5)
    assert math.isclose(found.reference_s, 1100 * 0.003)
    assert math.isclose(found.evaluation_s, 100 * 0.004 * 4)
    assert math.isclose(found.saving_s, 2 * 3.0 + 4.0)
    assert found.probing_s == 0.0
    probed = dataclasses.replace(measured, probe_s=0.7, probe_tokens=100.0)
    # a tenth of 3,000 tokens affords three probes after the one at the start
    assert math.isclose(predict(probed, sample, StageConfig(name="s", evals=4), 450).probing_s, 4 * 0.7)
    assert predict(probed, sample, StageConfig(name="s", probe="off"), 450).probing_s == 0.0
    assert math.isclose(found.seconds, 3.0 + found.training_s + found.reference_s + found.evaluation_s + found.saving_s)
    on_gpu = dataclasses.replace(measured, base_bytes=0, device="cuda:0")
    assert predict(on_gpu, sample, StageConfig(name="s"), parent_bytes=450).peak_bytes == 1000


@pytest.mark.parametrize("changes", [{}, {"adapter": "full"}, {"method": "sft", "loss": {}}, {"gradient_checkpointing": True}])
def test_a_rehearsal_trains_for_real_and_reports_every_part(tmp_path, changes):
    kind = 1 if changes.get("method") == "sft" else 2
    train, select = make_examples(30, completions=kind), make_examples(9, 1, completions=kind, prefix="select")
    stage = make_plan(tmp_path, make_model(tmp_path / "model"), [], [], **changes)
    sample = choose_sample(stage.config, train, select, 0)
    before = machine.resident_bytes()  # what is resident afterwards may be a page more than it was when it was read
    found = rehearse(stage, sample, loaded_in=0.5, base_bytes=before)
    assert found.load_s == 0.5
    assert found.peak_bytes >= before
    assert found.tokens == sample.peak_tokens <= 96
    rates = (found.step_s_per_token, found.eval_s_per_token, found.optimiser_s, found.checkpoint_s, found.final_s, found.probe_s)
    assert all(rate > 0 for rate in rates)
    assert (found.forward_s_per_token > 0) == (kind == 2), "only preferences have a reference"
    assert (stage.folder / "final" / "tokenizer.json").is_file()


def test_a_cuda_device_is_measured_by_its_allocator(monkeypatch):
    from preftune.training import devices

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    cuda = torch.device("cuda", 0)
    assert devices.peak_memory_bytes(cuda) == 123
    assert machine.memory_limit(cuda) == machine.MemoryLimit(75, "free memory of the GPU")


def test_the_container_may_be_smaller_than_the_machine(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000000\n")
    assert machine.cgroup_memory(tmp_path) == (3_000_000_000, 600_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cgroup_memory(tmp_path) is None
    monkeypatch.setattr(machine, "cgroup_memory", lambda: (3_000_000_000, 600_000_000))
    limit = machine.memory_limit(torch.device("cpu"))
    assert limit.what == "memory limit of the container"
    assert limit.num_bytes == pytest.approx(2_400_000_000 + machine.resident_bytes(), rel=0.05)


def test_allocations_beyond_the_limit_fail_in_that_process_alone():
    code = (
        "import torch; from preftune.modeling.machine import limit_memory; limit_memory(200_000_000)\n"
        "try:\n    torch.ones(100_000_000)\n"
        "except RuntimeError as error:\n    print('refused' if 'memory' in str(error) else error)\n"
        "print(torch.ones(1_000_000).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "1000000.0"]


LAYOUTS = {
    "full, short rows, small packs": ("starter", 0, {"adapter": "full", "tokens_per_pack": 512, "pairs_per_step": 8}),
    "lora, long rows, large packs": (
        "wide",
        150,
        {"adapter": "lora", "lora": {"rank": 8}, "tokens_per_pack": 4096, "pairs_per_step": 16},
    ),
}


def wide_model(folder):
    """Another shape than the starter's: wider, fewer layers, with the starter's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = ROOT / "src" / "preftune" / "starter" / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    settings = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **shape, **ends)
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(tmp_path, *arguments):
    keep = {key: value for key, value in os.environ.items() if not key.startswith("PREFTUNE_")}
    place = {"PREFTUNE_CACHE": str(tmp_path / "cache"), "PREFTUNE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("preftune")), *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=tmp_path, env={**keep, **place}, capture_output=True, text=True, check=False)
    return json.loads(done.stdout), done


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_within_a_quarter_and_time_within_a_third_of_what_training_takes(tmp_path, layout):
    name, words, keys = LAYOUTS[layout]
    model = "starter" if name == "starter" else str(wide_model(tmp_path / "wide"))
    lines = (ROOT / "src/preftune/starter/pairs.jsonl").read_text(encoding="utf-8").splitlines()[:56]
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        more = " ".join(["The sun came up."] * (words * (number % 3) // 8))
        row["chosen"] += [{"role": "user", "content": "More."}, {"role": "assistant", "content": f"Yes. {more}"}]
        row["rejected"] += [{"role": "user", "content": "More."}, {"role": "assistant", "content": f"No. {more}"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"model": {"name": model, "dtype": "float32"}, "data": {"train": "pairs.jsonl", "select": 0.1}, "lr": 1e-5, **keys}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    for attempt in range(5):  # a busy machine may slow one of the two; memory never gets another chance
        seen, _ = run(tmp_path, "plan", "recipe.yaml", "--probe", f"seed={attempt}")
        trained, done = run(tmp_path, "train", "recipe.yaml", "--no-probe", f"seed={attempt}")
        assert done.returncode == 0, done.stderr
        (stage,), expected = trained["stages"], seen["probes"][0]["prediction"]
        assert expected["peak_bytes"] == pytest.approx(stage["peak_memory_bytes"], rel=0.25)
        seconds = expected["training_s"] + expected["evaluation_s"] + expected["saving_s"] + expected["probing_s"]
        if seconds == pytest.approx(stage["seconds"], rel=0.35):
            return
    pytest.fail(f"predicted {seconds:.1f} s, took {stage['seconds']:.1f} s")
