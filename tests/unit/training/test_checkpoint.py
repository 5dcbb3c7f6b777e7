"""Checkpoints are whole or absent; damage is named; generators come back."""

import random

import numpy as np
import pytest
import torch

from preftune.core.errors import CheckpointError
from preftune.core.files import read_json, write_json
from preftune.training import checkpoint as module
from preftune.training.checkpoint import (
    generator_state,
    latest,
    load_checkpoint,
    prune,
    restore_generators,
    save_checkpoint,
    steps_in,
)


def write_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))


def save(root, step, value=1.0):
    return save_checkpoint(
        root,
        step,
        facts={"epoch": 0, "index": step},
        parameters={"w": torch.full((3, 2), value)},
        moments={"w/exp_avg": torch.full((3, 2), -value)},
        write_model=write_model,
    )


def test_round_trip(tmp_path):
    path = save(tmp_path, 12, 0.25)
    assert path.name == "step-000012"
    found = load_checkpoint(path)
    assert found.facts["step"] == 12
    assert torch.equal(found.parameters["w"], torch.full((3, 2), 0.25))
    assert torch.equal(found.moments["w/exp_avg"], torch.full((3, 2), -0.25))
    files = read_json(path / "manifest.json")["files"]
    assert set(files) == {
        "model/config.json", "model/model.safetensors", "optimizer.safetensors", "parameters.safetensors", "state.safetensors",
    }  # fmt: skip
    assert not [file for file in path.rglob("*") if file.suffix in {".pt", ".pkl", ".bin"}]


NAMES = ["parameters.safetensors", "optimizer.safetensors", "state.safetensors", "model/model.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named_with_the_way_out(tmp_path, name):
    save(tmp_path, 4)
    path = save(tmp_path, 8)
    file = path / name
    content = file.read_bytes()
    altered = content[:-1] + bytes([content[-1] ^ 1])
    for damaged, words in ((content[:-7], "is truncated"), (altered, "is altered"), (None, "is missing")):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name} {words}.*go on from step 4") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        file.write_bytes(content)
    load_checkpoint(path)


def test_a_damaged_manifest_is_named(tmp_path):
    path = save(tmp_path, 4)
    for content in ('{"format": 1', "[]", '{"format": 1, "files": {"a": 3}}'):
        (path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
            load_checkpoint(path)
    write_json(path / "manifest.json", {"format": 99, "files": {}})
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_the_newest_whole_one_is_found_by_looking(tmp_path):
    assert latest(tmp_path / "nothing") is None
    save(tmp_path, 9)
    save(tmp_path, 10)
    (tmp_path / "step-000011").mkdir()  # no manifest: not a checkpoint
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / "step-12x").mkdir()
    assert steps_in(tmp_path) == [9, 10]
    assert latest(tmp_path) == tmp_path / "step-000010"
    save(tmp_path, 1_000_000)
    assert latest(tmp_path).name == "step-1000000"
    assert not list(tmp_path.glob(".writing-*")), "what a crash left behind goes with the next checkpoint"


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prune(tmp_path, 2)
    assert steps_in(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_failed_write_is_one_line_and_leaves_the_earlier_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    words = r"step-000002 cannot be written: no space left on the disk.*step 1 is intact"
    with pytest.raises(CheckpointError, match=words) as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    load_checkpoint(latest(tmp_path))


def draw():
    of_numpy = np.random.rand(3).tolist(), np.random.randn()  # noqa: NPY002 - the global generator is what is restored
    return torch.rand(3).tolist(), of_numpy, random.random(), random.gauss(0, 1)


def test_generators_come_back():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - as above
    random.seed(3)
    draw()  # an odd number of gaussians leaves one cached in each
    state = {key: value.clone() for key, value in generator_state().items()}
    expected = draw()
    assert draw() != expected
    restore_generators(state)
    assert draw() == expected
