"""The unmodified together package and its command line against a running server."""

import hashlib
import json
import re
import threading
import time
import urllib.request

import pytest

BIG = 5 << 20


@pytest.fixture
def pairs(starter_rows):
    return starter_rows("pairs.jsonl", 16)


@pytest.fixture
def stories(starter_rows):
    return starter_rows("sft.jsonl", 8)


@pytest.mark.slow
def test_a_job_from_upload_to_weights_and_chat(served, client, starter_rows, pairs):
    found = client("together_flow.py", pairs, starter_rows("pairs.jsonl", 8, skip=200))
    assert found["again"] == found["file"]["id"], "the same bytes are one file"
    dpo = found["dpo"]
    assert dpo["training_method"] == {
        "method": "dpo",
        "dpo_beta": 0.95,
        "dpo_normalize_logratios_by_length": True,
        "dpo_reference_free": False,
        "rpo_alpha": 0.5,
        "simpo_gamma": None,
    }
    assert dpo["training_type"]["lora_r"] == 4
    assert dpo["training_type"]["lora_alpha"] == 8
    assert dpo["lr_scheduler"]["lr_scheduler_args"] == {"min_lr_ratio": 0.1, "num_cycles": 0.5}
    assert (dpo["learning_rate"], dpo["warmup_ratio"], dpo["weight_decay"], dpo["n_checkpoints"]) == (1e-4, 0.25, 0.01, 2)
    assert dpo["wandb_project_name"] == "mine"
    types = [event[0] for event in found["events"]]
    assert types[0] == "job_pending"
    assert types[-1] == "job_complete"
    said = " ".join(event[2] for event in found["events"])
    assert "outside of 0.05 to 0.9" in said
    assert "Weights & Biases is not reported to" in said
    assert [row[:2] for row in found["checkpoints"]] == [[4, "Final Adapter"], [2, "Intermediate Adapter"]]
    steps = [row["train/global_step"] for row in found["metrics"] if "train/loss" in row]
    assert steps == [1, 3, 4] or steps == [1, 2, 4], "three of four, the first and the last among them"
    names = {name for row in found["metrics"] for name in row}
    assert {"train/rewards/accuracies", "train/logps/chosen", "train/logps/rejected", "eval/kl", "eval/loss"} <= names
    adapter, merged = found["archives"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(adapter)
    assert "model.safetensors" in merged
    assert "adapter_config.json" not in merged
    assert found["base"] == "starter", "no folder of the server is named"
    assert found["chat"] == found["by_endpoint"] != ""
    assert found["streamed"]
    assert found["state"] == "DEPLOYMENT_STATE_READY"
    assert found["supported"] == ["starter"]
    # one job, seen by another dialect; and nothing that was secret is anywhere
    _, seen, _ = served.ask(f"/v1/fine_tuning/jobs/{dpo['id']}")
    assert (seen["status"], seen["fine_tuned_model"]) == ("succeeded", dpo["model_output_name"])
    assert seen["method"]["dpo"]["hyperparameters"]["beta"] == 0.95
    _, events, _ = served.ask(f"/v1/fine_tuning/jobs/{dpo['id']}/events?limit=1000")
    assert "wandb-secret" not in json.dumps([seen, events, found])
    kept = b"".join(path.read_bytes() for path in (served.home / "state").rglob("*") if path.is_file())
    assert b"wandb-secret" not in kept


@pytest.mark.slow
def test_all_weights_a_checkpoint_and_an_end(client, pairs, stories):
    found = client("together_full.py", pairs, stories)
    full, simpo = found["full"], found["simpo"]
    assert full["training_type"] == {"type": "Full"}
    assert full["training_method"] == {"method": "sft", "train_on_inputs": "auto"}
    assert "model.safetensors" in found["archive"]
    assert (simpo["training_method"]["simpo_gamma"], simpo["training_method"]["dpo_beta"]) == (0.5, 2.0)
    assert simpo["training_method"]["dpo_reference_free"]
    assert simpo["training_method"]["dpo_normalize_logratios_by_length"]
    assert simpo["from_checkpoint"] == f"{full['id']}:2"
    assert simpo["training_type"] == {"type": "Full"}, "as the job that it goes on from"
    assert found["doomed"] not in found["listed"]
    assert {full["id"], simpo["id"]} <= set(found["listed"])
    assert "file-nope" in found["refused"]


@pytest.mark.slow
def test_the_command_line(served, command, pairs, tmp_path):
    """Every command that a fine-tuning job needs; the job's own words are checked with the package above."""
    who = command("whoami", "--json")
    assert "default" in who
    asked = "--model starter --training-method dpo --lora --batch-size 8 --n-epochs 1 --suffix cli --n-checkpoints 2 --confirm"
    made = command("fine-tuning", "create", "--training-file", pairs, *asked.split())
    job = re.search(r"ft-[0-9a-f-]{36}", made).group()
    deadline = time.monotonic() + 900
    while (status := served.ask(f"/v1/fine-tunes/{job}")[1]["status"]) != "completed":
        assert status not in {"error", "cancelled"}
        assert time.monotonic() < deadline
        time.sleep(1)
    assert job in command("fine-tuning", "list")
    assert "Training metrics" in command("fine-tuning", "retrieve", job)
    assert "train/loss" in command("fine-tuning", "list-metrics", job)
    assert "job_complete" in command("fine-tuning", "list-events", job)
    assert f"{job}:1" in command("fine-tuning", "list-checkpoints", job)
    saved = tmp_path / "model.tar.gz"
    command("fine-tuning", "download", job, "--checkpoint-type", "adapter", "--output-dir", saved)
    assert saved.stat().st_size > 1000
    assert pairs.name in command("files", "list")
    assert "already" in command("files", "upload", pairs, "--purpose", "fine-tune").lower()


def put(url, data):
    request = urllib.request.Request(url, data, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_file_in_parts(served):
    data = b"".join(json.dumps({"prompt": f"q{k}", "chosen": "a" * 90_000, "rejected": "b"}).encode() + b"\n" for k in range(64))
    digest = hashlib.sha256(data).hexdigest()
    body = {"file_name": "big.jsonl", "file_size": len(data), "num_parts": 3, "purpose": "fine-tune", "file_type": "jsonl",
            "checksum": digest}  # fmt: skip
    status, begun, _ = served.ask("/v1/files/multipart/initiate", "POST", body)
    assert status == 200
    size = -(-len(data) // 3)
    etags = {}

    def send(part):
        start = (part["PartNumber"] - 1) * size
        code, headers = put(part["URL"], data[start : start + size])
        assert code == 200
        etags[part["PartNumber"]] = headers["ETag"]

    threads = [threading.Thread(target=send, args=(part,)) for part in begun["parts"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = {key: begun[key] for key in ("upload_id", "file_id")}
    parts = [{"part_number": number, "etag": etag} for number, etag in etags.items()]
    assert served.ask("/v1/files/multipart/complete", "POST", {**ends, "parts": parts[:2]})[0] == 400, "a part is missing"
    status, done, _ = served.ask("/v1/files/multipart/complete", "POST", {**ends, "parts": parts})
    assert (status, done["file"]["bytes"]) == (200, len(data))
    assert served.ask("/v1/files/multipart/complete", "POST", {**ends, "parts": parts})[1]["file"]["id"] == begun["file_id"]
    status, answer, headers = served.ask("/v1/files/multipart/initiate", "POST", body)
    assert (status, answer["file_id"], headers["x-should-retry"]) == (409, begun["file_id"], "false")
    assert served.ask("/v1/files/multipart/abort", "POST", ends)[0] == 400, "it is complete"


def announce(served, checksum="", headers=None, **fields):
    form = {"purpose": "fine-tune", "file_name": "p.jsonl", "file_type": "jsonl", "checksum": checksum} | fields
    request = urllib.request.Request(served.url + "/v1/files", urllib.parse.urlencode(form).encode(), method="POST")
    request.add_header("Authorization", f"Bearer {served.key}")
    for name, value in (headers or {}).items():
        request.add_header(name, value)

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    try:
        urllib.request.build_opener(Stay).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        return error.code, error.headers
    raise AssertionError("no redirect")


def test_where_the_bytes_go(served):
    data = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    digest = hashlib.sha256(data).hexdigest()
    status, headers = announce(served, digest, {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"})
    assert status == 302
    place = headers["Location"]
    assert place.startswith(served.url + "/uploads/"), "nobody's header decides where bytes go"
    file_id = headers["X-Together-File-Id"]
    code, body = put(place[:-4] + "0000", data)
    assert code == 403
    assert "not signed" in body["error"]["message"]
    code, body = put(place.replace("exp=", "exp=9"), data)
    assert code == 403
    code, body = put(place, data + b"x")
    assert code == 400
    assert "SHA-256" in body["error"]["message"]
    assert served.ask(f"/v1/files/{file_id}/content")[0] == 404
    assert put(place, data)[0] == 200
    assert put(place, data)[0] == 200, "a replay of the same bytes"
    assert put(place, data.replace(b"q", b"r"))[0] == 409
    assert served.ask(f"/v1/files/{file_id}/preprocess", "POST")[1]["bytes"] == len(data)
    status, headers = announce(served, digest)
    assert (status, headers["x-should-retry"]) == (409, "false")
    assert announce(served, digest, purpose="eval")[0] == 302, "of another purpose it is another file"
    assert announce(served, file_name="../../etc/passwd")[0] == 400
    assert announce(served, file_name="bad\nname.jsonl")[0] == 400


def test_the_same_bytes_of_another_project_are_not_told_of(served, other_key):
    data = b'{"prompt": "mine", "chosen": "a", "rejected": "b"}\n'
    digest = hashlib.sha256(data).hexdigest()
    _, headers = announce(served, digest)
    assert put(headers["Location"], data)[0] == 200
    assert announce(served, digest)[0] == 409
    stranger = type(served)(served.url, served.home)
    stranger.key = other_key
    status, there = announce(stranger, digest)
    assert status == 302, "whether another project has a file is nobody's business"
    assert served.ask(f"/v1/files/{there['X-Together-File-Id']}")[0] == 404
    assert served.ask(f"/v1/files/{headers['X-Together-File-Id']}", key=other_key)[0] == 404


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "nothing"}, 400, "there is no model"),
        ({"model": "../../etc"}, 400, "there is no model"),
        ({"model": "simplecache::s3://bucket/x"}, 400, "there is no model"),
        ({"from_checkpoint": "ft-1:3"}, 400, "one of them"),
        ({"model": None, "from_checkpoint": "/etc"}, 400, "there is no model"),
        ({"from_hf_model": "org/model"}, 400, "only registered models"),
        ({"training_method": {"method": "sft", "train_on_inputs": True}}, 400, "answers only"),
        ({"training_method": {"method": "dpo", "dpo_beta": -1}}, 400, "dpo_beta"),
        ({"early_stopping_enabled": True, "n_evals": 4}, 400, "validation file"),
        ({"suffix": "a/b"}, 400, "suffix"),
        ({"preftune": {"output": "/tmp"}}, 400, "cannot be set here"),
    ],
)
def test_a_bad_job_is_one_envelope(served, changes, status, words):
    body = {"model": "starter", "training_file": "file-x", "training_method": {"method": "dpo"}} | changes
    got, answer, _ = served.ask("/v1/fine-tunes", "POST", body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
