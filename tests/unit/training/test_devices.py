"""Devices: precision follows the hardware; the allocator is set only where it was measured, and only when called."""

import json
import subprocess
import sys

import pytest
import torch

from preftune.training import devices
from preftune.training.devices import (
    choose_device,
    choose_precision,
    deterministic,
    has_fast_bfloat16,
    peak_memory_bytes,
    set_threads,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "adapter", "is_fast", "expected"),
    [
        ("auto", "lora", True, "bfloat16"),
        ("auto", "lora", False, "float32"),
        ("auto", "full", True, "float32"),
        ("bfloat16", "full", False, "bfloat16"),
        ("float32", "lora", True, "float32"),
    ],
)
def test_precision(monkeypatch, asked, adapter, is_fast, expected):
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: is_fast)
    assert choose_precision(asked, adapter, CPU) == expected
    assert choose_precision(asked, adapter) == expected


@pytest.mark.parametrize(("flags", "is_fast"), [(["avx512_bf16"], True), (["amx_bf16"], True), (["avx2"], False)])
def test_bfloat16_needs_the_instruction(monkeypatch, flags, is_fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True))
    assert has_fast_bfloat16(CPU) is is_fast
    assert not has_fast_bfloat16(torch.device("meta"))


PROBE = """
import json, resource, sys, torch
from preftune.training.devices import set_allocator
torch.set_num_threads(1)
is_set = set_allocator() if sys.argv[1] == "on" else False
for _ in range(12):
    torch.ones(16 * 2**20)  # the first touch of memory faults either way
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16 * 2**20)
print(json.dumps([is_set, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def probe(word, **environment):
    import os

    clean = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD" and not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, word], env=clean | environment, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(devices.platform.libc_ver()[0] != "glibc", reason="the allocator is set on glibc only")
def test_the_allocator_saves_page_faults():
    off, faults_off = probe("off")
    on, faults_on = probe("on")
    assert (off, on) == (False, True)
    assert faults_on < faults_off / 3, f"{faults_on} page faults with it, {faults_off} without"


def test_a_users_own_allocator_is_left_alone():
    assert probe("on", MALLOC_ARENA_MAX="2")[0] is False


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: ("musl", "1"))
    assert devices.set_allocator() is False


def test_importing_the_room_does_not_set_it():
    code = (
        "import ctypes\nreal = ctypes.CDLL\n"
        "class Spy(real):\n"
        "    def __getattr__(self, name):\n"
        "        assert name != 'mallopt'\n"
        "        return super().__getattr__(name)\n"
        "ctypes.CDLL = Spy\nimport preftune.training.devices\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_threads_device_and_memory():
    before = torch.get_num_threads()
    try:
        assert set_threads(1) == 1
        assert set_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 50e6 < peak_memory_bytes(CPU) < 100e9
    with deterministic(CPU, is_wanted=True):
        assert not torch.are_deterministic_algorithms_enabled()
