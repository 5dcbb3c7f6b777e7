"""Pairs made by a judge on loopback: asked for at once, kept, and what gets no verdict is left out and counted."""

import json
from pathlib import Path

import pytest

from judge_server import JudgeServer
from preftune.app.generate import generate_pairs

STARTER = Path(__file__).resolve().parents[3] / "src" / "preftune" / "starter"


class ByLength(dict):
    """A hidden quality for every text: its length."""

    def __missing__(self, text):
        return len(text) / 10


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join((STARTER / "verdict.jsonl").read_bytes().splitlines(keepends=True)[:6]))
    return path


def make(server, prompts, out):
    judge = tmp_judge(prompts.parent, server.url)
    keys = ("samples=3", "decoding.max_new_tokens=24", "decoding.temperature=1.0", "guards.require_complete=false")
    return generate_pairs("starter", {"prompts": str(prompts), "judge": str(judge)}, keys, out=out)


def tmp_judge(folder, url):
    path = folder / "llm.yaml"
    path.write_text(json.dumps({"name": "llm", "url": url, "model": "m", "concurrency": 4, "max_retries": 1}), encoding="utf-8")
    return path


@pytest.mark.slow
def test_every_pair_is_asked_in_both_orders_and_never_twice(prompts, tmp_path):
    with JudgeServer(ByLength()) as server:
        made = make(server, prompts, tmp_path / "a.jsonl")
        assert sum(server.paid.values()) == len(server.paid) <= 6 * 3 * 2
        paid = len(server.paid)
        make(server, prompts, tmp_path / "a.jsonl")
        assert len(server.paid) == paid
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows
    assert len(rows) == made.facts["pairs"]
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    assert any(name.startswith("llm:m") for name in rows[0]["judges"])


@pytest.mark.slow
def test_a_prompt_without_a_verdict_is_left_out_and_the_others_are_made(prompts, tmp_path):
    spoilt = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])
    words = json.dumps(spoilt["prompt"] if isinstance(spoilt["prompt"], str) else spoilt["prompt"][-1]["content"])[1:-1]
    with JudgeServer(ByLength(), fault=lambda text, call: "malformed" if words in text else None) as server:
        made = make(server, prompts, tmp_path / "b.jsonl")
    summary = json.loads((tmp_path / "b-record" / "summary.json").read_text(encoding="utf-8"))
    assert summary["left_out"]["no_verdict"] == 1
    assert summary["prompts"] == 6
    assert made.facts["pairs"] >= 3
    samples = [json.loads(line) for line in (tmp_path / "b-record" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(one["score"] is None for one in samples) == 3
