"""The unmodified openai package against a running server."""

import pytest


@pytest.fixture
def pairs(starter_rows):
    return starter_rows("pairs.jsonl", 16)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "adapter"), [("dpo", "lora"), ("supervised", "full"), ("dpo", "full")])
def test_a_job_from_upload_to_chat(served, client, pairs, method, adapter):
    found = client("openai_flow.py", pairs, method, 1, adapter)
    job = found["job"]
    assert job["method"]["type"] == method
    assert found["bytes"] == pairs.stat().st_size
    assert found["steps"] == [1, 2, 3, 4]
    assert job["fine_tuned_model"].startswith("starter-smoke-")
    assert job["fine_tuned_model"] in found["after"]
    assert found["checkpoints"][0] == job["fine_tuned_model"]
    assert job["hyperparameters"] == {"batch_size": 4, "learning_rate_multiplier": pytest.approx(10), "n_epochs": 1}
    assert job["seed"] == 42
    assert job["integrations"][0]["wandb"]["project"] == "mine"
    assert found["chat"]
    assert found["streamed"]
    _, seen, _ = served.ask(f"/v1/fine-tunes/{job['id']}")
    assert seen["training_type"]["type"] == ("Lora" if adapter == "lora" else "Full")
    if method == "dpo" and adapter == "lora":
        assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.2


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"model": "nothing"}, None, "there is no model 'nothing'"),
        ({"training_file": "file-nothing"}, "training_file", "upload it first"),
        ({"method": {"type": "reinforcement"}}, "method.type", "dpo and supervised"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}}, None, "beta"),
        ({"suffix": "../x"}, "suffix", "pattern"),
        ({"preftune": {"output": "/etc"}}, "preftune.output", "cannot be set here"),
        ({"preftune": {"chat_template": "/etc/passwd"}}, "preftune.chat_template", "chatml or plain"),
        ({"preftune": {"lr": -3}}, None, "lr"),
    ],
)
def test_a_bad_job_is_one_envelope(served, changes, param, words):
    body = {"model": "starter", "training_file": "file-x"} | changes
    status, answer, headers = served.ask("/v1/fine_tuning/jobs", "POST", body)
    assert status == 400
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
    assert param is None or answer["error"]["param"] == param
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/v1/models", {"key": None}, 401),
        ("/v1/models", {"key": "wrong-key-0123456789"}, 401),
        ("/v1/files/file-nope", {}, 404),
        ("/v1/fine_tuning/jobs/ft-nope", {}, 404),
        ("/models", {}, 404),
        ("/v1/models", {"headers": {"Host": "evil.example"}}, 400),
        ("/v1/models/starter", {"method": "DELETE"}, 403),
        ("/v1/files?limit=0", {}, 400),
        ("/v1/fine_tuning/jobs", {"method": "PUT"}, 405),
        ("/v1/files", {"method": "POST", "body": {"file": "x"}}, 400),
    ],
)
def test_what_is_refused(served, path, options, status):
    got, answer, _ = served.ask(path, **options)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    if status == 404 and path == "/models":
        assert "base_url must end in /v1" in answer["error"]["message"]


def test_probes_need_no_key(served):
    assert served.ask("/healthz", key=None)[0] == 200
    assert served.ask("/readyz", key=None)[0] == 200


def test_two_v1_are_one(served):
    assert "starter" in [model["id"] for model in served.ask("/v1/v1/models")[1]["data"]]
