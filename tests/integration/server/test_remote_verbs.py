"""``preftune --server URL``: check, compare, chat, export and keys on a server, and what the other verbs say."""

import json
import os
import subprocess
import sys

import pytest

from preftune.cli.main import INSTEAD, REMOTE, VERBS

KEY = "test-key-0123456789abcdef"


@pytest.fixture
def run(served, tmp_path):
    environment = {**os.environ, "PREFTUNE_API_KEY": KEY, "PREFTUNE_HOME": str(tmp_path / "none")}
    environment.pop("PREFTUNE_SERVER", None)

    def call(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "preftune", "--server", served.url, *map(str, arguments)], env=environment,
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert not (tmp_path / "none").exists(), "something was done on this machine"
        return done.stdout if code in {0, 1} and done.stdout else done.stderr

    return call


def test_check_uploads_and_tells_what_was_found(run, starter_rows, tmp_path):
    good = starter_rows("pairs.jsonl", 8)
    told = json.loads(run("check", good, "--json"))
    assert [(row["num_rows"], row["num_excluded"]) for row in told] == [(8, 0)]
    assert told[0]["id"] in run("ls", "files")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(good.read_bytes() + b'{"prompt": "x", "chosen": "a"}\n')
    said = run("check", bad, code=1)
    assert "bad.jsonl:9" in said
    assert "8 good rows, 1 bad rows" in said
    assert "preftune convert" in run("check", good, "--format", "trl", code=2)


@pytest.mark.slow
def test_two_models_are_compared_there(run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "A fox."}\n{"prompt": [{"role": "user", "content": "A cat."}]}\n{"prompt": "A tree."}\n')
    asked = ("compare", "starter", "starter", "--prompts", prompts, "--judge", "starter", "limit=2", "decoding.max_new_tokens=4")
    told = json.loads(run(*asked, "decoding.temperature=0", "--json"))
    assert told["wins"] + told["losses"] + told["ties"] + told["unjudged"] >= 2
    assert told["win_rate"] == 0.5, "the same answers on both sides are ties"
    assert told["evaluation"] in run("ls", "jobs")
    assert "limit, decoding" in run(*asked, "beta=1", code=2)
    (tmp_path / "judge.yaml").write_text("name: llm\nmodel: m\nurl: http://127.0.0.1:9\n")
    assert "llm:MODEL@URL" in run(*asked[:-3], "judge.yaml", code=2)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    assert "bad.jsonl:1 field 'prompt'" in run("compare", "a", "b", "--prompts", "bad.jsonl", "--judge", "starter", code=1)


def test_chat_with_a_model_of_the_server(run):
    one = run("chat", "starter", "--prompt", "A fox.", "--max-new-tokens", "6", "--temperature", "0")
    assert one.strip()
    assert one == run("chat", "starter", "--prompt", "A fox.", "--max-new-tokens", "6", "--temperature", "0")
    assert "nobody" in run("chat", "nobody", "--prompt", "A fox.", code=1)


def test_keys_of_the_server(run, served):
    made = json.loads(run("keys", "add", "alice", "--json"))
    assert served.ask("/api/v1/me", key=made["value"])[0] == 200
    assert made["id"] in run("keys", "list")
    assert made["value"] not in run("keys", "list", "--json")
    run("keys", "revoke", made["id"])
    assert served.ask("/api/v1/me", key=made["value"])[0] == 401


def test_an_alias_of_the_server(run, served):
    assert run("alias", "set", "remote-best", "starter", "--reason", "tried") == "remote-best  starter\n"
    assert served.ask("/api/v1/aliases/remote-best")[1]["model_name"] == "starter"
    assert "remote-best" in run("alias", "list")
    assert "(tried)" in run("alias", "history", "remote-best")
    run("alias", "delete", "remote-best")
    assert "remote-best" not in run("alias", "list", "--json")


def test_what_no_server_does_says_what_to_do(run):
    for verb in ("doctor", "sweep"):
        said = run(verb, code=2)
        assert f"{verb} works on this machine; " in said
        assert INSTEAD[verb] in said
    assert "name jobs, models or files" in run("ls", code=2)
    assert "leave --server out" in run("show", "x", "--suspects", code=2)
    assert not set(INSTEAD) & set(REMOTE)
    assert set(INSTEAD) | set(REMOTE) <= set(VERBS)


@pytest.mark.slow
def test_a_trained_model_is_evaluated_there_and_its_weights_are_fetched(run, starter_rows, tmp_path):
    starter_rows("pairs.jsonl", 8)
    (tmp_path / "mine.yaml").write_text("model: starter\ndata: pairs.jsonl\nmethod: dpo\nmax_steps: 2\nprobe: off\n")
    job = json.loads(run("train", "mine.yaml", "pairs_per_step=4", "--json"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"A fox, number {n}."}) + "\n" for n in range(4)))
    rules = {"name": "rules", "rules": [{"kind": "length", "min": 2, "max": 200, "weight": 1.0}]}
    (tmp_path / "judge.yaml").write_text(json.dumps(rules))
    asked = ("evaluation.prompts=prompts.jsonl", "evaluation.judge=judge.yaml", "evaluation.decoding.max_new_tokens=4")
    few = ("evaluation.limit=3", "evaluation.decoding.temperature=0")
    told = json.loads(run("eval", job["name"], *asked, *few, "--json"))
    assert (told["first"], told["second"]) == (job["name"], "starter"), "what its job started from"
    figures = told["win_rate"]
    assert figures["num_prompts"] == figures["wins"] + figures["losses"] + figures["ties"] == 3
    assert told["evaluation"] in run("ls", "jobs")
    same = run("eval", "starter", "--baseline", "starter", *asked, *few)
    assert "starter wins 0, starter wins 0, ties 3" in same
    assert json.loads(
        run("compare", "starter", "starter", "--prompts", "prompts.jsonl", "--judge", "judge.yaml", "limit=2", "--json")
    )["win_rate"]["num_prompts"] == 2, "a judge file goes there too"  # fmt: skip
    assert "--baseline MODEL" in run("eval", "starter", *asked, code=2)
    assert "evaluation.judge" in run("eval", job["name"], asked[0], code=2)
    assert "cannot be set on a server" in run("eval", job["name"], *asked, "beta=1", code=2)
    for name in ("prompts.jsonl", "judge.yaml"):
        (tmp_path / name).unlink()
    to = tmp_path / "fetched"
    assert run("export", job["name"], "--to", to, "--form", "adapter").strip() == str(to)
    assert (to / "adapter_model.safetensors").stat().st_size > 0
    assert "something is there already" in run("export", job["name"], "--to", to, code=2)
    assert "--gguf does not go with --server" in run("export", job["name"], "--to", tmp_path / "x", "--gguf", "f32", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fetched", "mine.yaml", "pairs.jsonl"]
