"""The unmodified seekrai package against a running server."""

import json

import pytest

JOB = {"project_id": 1, "training_config": {"training_files": ["file-x"], "model": "starter", "n_epochs": 1}}


def as_seekr(row):
    return {"messages": row["prompt"], **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}}


@pytest.fixture
def uploads(starter_rows, tmp_path):
    """A good preference file, a chat file, and a preference file with 25 bad rows after the good ones."""
    rows = [json.loads(line) for line in starter_rows("pairs.jsonl", 16).read_text().splitlines()]
    good = [as_seekr(row) for row in rows]
    bad = [{**good[0], "rejected": f"row {number}"} for number in range(25)]
    chats = [{"messages": row["chosen"]} for row in good]
    for name, content in {"pairs.jsonl": good, "chats.jsonl": chats, "bad.jsonl": good[:3] + bad}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return [tmp_path / name for name in ("pairs.jsonl", "chats.jsonl", "bad.jsonl")]


@pytest.mark.slow
def test_jobs_from_upload_to_deployment(served, client, uploads, tmp_path):
    found = client("seekr_flow.py", *uploads, tmp_path)
    assert "starter" in found["models"]
    dpo = found["dpo"]
    assert (dpo["fine_tune_type"], dpo["beta"], dpo["batch_size"], dpo["learning_rate"]) == ("PREFERENCE", 0.04, 8, 1e-4)
    assert (dpo["lora_config"]["r"], dpo["lora_config"]["alpha"], dpo["accel_type"]) == (4, 8, "A10")
    assert (dpo["project_id"], dpo["experiment_name"]) == (found["project"], "smoke test")
    assert found["sft"]["lora_config"] is None, "no lora_config trains every weight"
    assert found["sft"]["fine_tune_type"] == "STANDARD"
    assert [event["step"] for event in found["events"]] == [1, 2]
    assert {"loss", "epoch", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= set(found["events"][0])
    assert found["runs"] == [[found["project"], 3]]
    assert {dpo["id"], found["sft"]["id"]} <= set(found["jobs"])
    assert found["demoted"] is False
    assert found["states"] == ["Inactive", "Active", "Inactive", "Inactive"]
    by_deployment, by_job, _, streamed = found["chats"]
    assert by_deployment == by_job == streamed != ""
    assert found["listed"] == [found["file"]]
    assert found["renamed"] == "renamed.jsonl"
    assert found["content"] == uploads[0].stat().st_size
    rows, kinds = found["refused"]
    assert rows[:2] == ["InvalidRequestError", 400]
    assert [f"line {number}," in rows[2] for number in range(1, 28)] == [False] * 3 + [True] * 20 + [False] * 4
    assert "and 5 more" in rows[2]
    assert "nothing was stored" in rows[2]
    assert kinds[1] == 400
    assert "preference" in kinds[2]
    kept = [path.name for path in (served.home / "state" / "artifacts" / "files").iterdir()]
    assert len(kept) == 1, "the refused and the deleted files have no bytes left"
    # the same job in the other dialects
    _, openai, _ = served.ask(f"/v1/fine_tuning/jobs/{dpo['id']}")
    _, together, _ = served.ask(f"/v1/fine-tunes/{dpo['id']}")
    assert (openai["status"], together["status"]) == ("succeeded", "completed")
    assert openai["method"]["dpo"]["hyperparameters"]["beta"] == together["training_method"]["dpo_beta"] == 0.04
    assert together["training_type"]["lora_r"] == 4
    said = [event["message"] for event in together["events"]]
    assert any("outside of 0.05 to 0.9" in text for text in said)
    _, models, _ = served.ask("/v1/models")
    assert openai["fine_tuned_model"] in [model["id"] for model in models["data"]]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, 404, "no project"),
        ({"training_config": {**JOB["training_config"], "fine_tune_type": "GRPO"}}, 400, "not offered"),
        ({"training_config": {**JOB["training_config"], "pre_train": True}}, 400, "plain text"),
        ({"training_config": {**JOB["training_config"], "beta": 0.1}}, 400, "PREFERENCE"),
        ({"training_config": {**JOB["training_config"], "lora_config": {"bias": "all"}}}, 400, "biases"),
        ({"training_config": {**JOB["training_config"], "lora_config": {"extras": {"x": 1}}}}, 400, "not offered"),
        ({"training_config": {**JOB["training_config"], "model": "/etc"}}, 400, "there is no model"),
    ],
)
def test_a_bad_job_is_one_envelope(served, changes, status, words):
    number = 0
    if changes:
        number = served.ask("/v1/flow/projects", "POST", {"id": None, "name": "a project", "description": "of a test"})[1]["id"]
    got, answer, _ = served.ask("/v1/flow/fine-tune", "POST", {**JOB, **changes, "project_id": number})
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]


def test_a_cookie_promotes_nothing(served):
    got, _, _ = served.ask("/v1/flow/fine-tunes/ft-1/promote-model", key=None, headers={"Cookie": f"key={served.key}"})
    assert got == 401


def test_a_bare_key_is_a_key(served):
    assert served.ask("/v1/flow/models", key=None, headers={"Authorization": served.key})[0] == 200
