"""The native API compares models and files by rules or a registered reward model, with the command line's own figures."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

WARM = {
    "name": "rules",
    "title": "warm",
    "rules": [{"kind": "lexicon", "name": "warm", "words": ["kind", "warm"], "weight": 1.0}],
}


def upload(server, name, rows):
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    status, file, _ = server.send(f"/api/v1/files?filename={name}&purpose=evals", "POST", content)
    assert status == 201, file
    return file["id"]


def ended(server, job_id, seconds=240):
    until = time.monotonic() + seconds
    while True:
        _, job, _ = server.ask(f"/api/v1/jobs/{job_id}")
        if job["status"] in {"succeeded", "failed", "cancelled"}:
            return job
        assert time.monotonic() < until, job
        time.sleep(0.3)


def completions(texts):
    return [{"prompt": f"Say something, number {number}.", "completion": text} for number, text in enumerate(texts)]


FIRST = completions(["A kind and warm word.", "A kind day.", "No.", "Go away now."])
SECOND = completions(["Leave me.", "A day.", "Go.", "A warm, kind word."])


@pytest.fixture(scope="module")
def rewarding(start, tmp_path_factory):
    """A server with a registered reward model: a tiny Llama with one output, on the starter's tokenizer."""
    from preftune.starter import __path__ as places

    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = AutoTokenizer.from_pretrained(f"{places[0]}/model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id or 0, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return start("rewarding", "--model", f"reward={folder}"), folder


def test_two_files_by_rules_give_the_command_lines_figures(rewarding, tmp_path):
    served, _ = rewarding
    first, second = upload(served, "a.jsonl", FIRST), upload(served, "b.jsonl", SECOND)
    body = {"first": {"file": first}, "second": {"file": second}, "judge": WARM}
    key = {"Idempotency-Key": "once"}
    status, made, _ = served.ask("/api/v1/evaluations", "POST", body, headers=key)
    assert status == 201, made
    assert served.ask("/api/v1/evaluations", "POST", body, headers=key)[1]["id"] == made["id"]
    job = ended(served, made["id"])
    assert job["status"] == "succeeded", job["error"]
    found = job["result"]["win_rate"]
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert str(served.home) not in json.dumps(job)
    _, rows, _ = served.ask(f"/api/v1/evaluations/{made['id']}/rows?limit=2")
    assert [row["score"] for row in rows["data"]] == [1.0, 1.0]
    assert (rows["data"][0]["policy"], rows["has_more"]) == ("A kind and warm word.", True)
    for name, given in (("a", FIRST), ("b", SECOND)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    (tmp_path / "judge.yaml").write_text(json.dumps(WARM))
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "compare", "a.jsonl", "b.jsonl", "--judge", "judge.yaml", "--json"], cwd=tmp_path,
        env={**os.environ, "PREFTUNE_HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["win_rate"]
    for name in ("rate", "interval", "p_value", "wins", "verdict", "controlled"):
        assert told[name] == found[name], name


def test_a_model_against_a_file_by_a_registered_reward_model(rewarding):
    from preftune.core.records import Message
    from preftune.judging.base import Candidate
    from preftune.judging.reward_model import RewardModelJudge

    served, folder = rewarding
    file = upload(served, "b.jsonl", SECOND)
    body = {
        "first": {"model": "starter"}, "second": {"file": file}, "prompts": file, "limit": 3, "max_new_tokens": 8,
        "temperature": 0, "judge": {"name": "reward_model", "model": "reward"},
    }  # fmt: skip
    status, made, _ = served.ask("/api/v1/evaluations", "POST", body)
    assert status == 201, made
    job = ended(served, made["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["win_rate"]["num_judged"] == 3
    assert "reward" in job["result"]["win_rate"]["judge"]["label"]
    assert str(folder.parent) not in json.dumps(job)
    _, rows, _ = served.ask(f"/api/v1/evaluations/{made['id']}/rows")
    judge = RewardModelJudge(str(folder))
    for row in rows["data"]:
        prompt = tuple(Message(one["role"], one["content"]) for one in row["prompt"])
        first, second = (judge.score(prompt, Candidate(row[side], 1, True)) for side in ("policy", "baseline"))
        assert (row["score"] > 0.5) == (first > second)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": {"name": "llm", "model": "m", "url": "http://127.0.0.1:1"}}, "asked by /v1/evaluation"),
        ({"judge": {"name": "rules", "rules": [{"kind": "pattern", "regex": r"(a)\1", "weight": 1}]}}, "RE2 syntax is needed"),
        ({"judge": {"name": "reward_model", "model": "/etc"}}, "there is no model '/etc'"),
        ({"judge": {"name": "reward_model", "model": "reward", "revision": "main"}}, "revision is not taken"),
        ({"judge": {"name": "rules", "rules": [{"kind": "complete", "weight": 1.0}] * 201}}, "up to 200"),
        ({"first": {"model": "starter", "file": "file-1"}}, "one of them"),
        ({"first": {"file": "file-0"}}, "there is no file 'file-0'"),
        ({"first": {"model": "starter"}, "prompts": None}, "prompts is missing"),
    ],
)
def test_what_is_refused_says_what_to_do(rewarding, changes, words):
    served, _ = rewarding
    file = upload(served, "b.jsonl", SECOND)
    body = {"first": {"file": file}, "second": {"file": file}, "judge": WARM, **changes}
    status, answer, _ = served.ask("/api/v1/evaluations", "POST", body)
    assert status == 400, answer
    assert words in answer["error"]["message"]
