"""A job whose model knows nothing is refused; its user insists: natively, in each dialect, by the SDK, by the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preftune import Client

KEY = "test-key-0123456789abcdef"
STARTER = Path(__file__).resolve().parents[3] / "src" / "preftune" / "starter"
SMALL = {"max_steps": 1, "warmup": 0, "pairs_per_step": 4, "adapter": "lora", "checkpoints": 0, "evals": 0, "probe": "off"}


@pytest.fixture(scope="module")
def knows_nothing(tmp_path_factory):
    """The starter with weights drawn at random: it gives chosen completions less than their token frequencies do."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("random") / "model"
    shutil.copytree(STARTER / "model", folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(start, knows_nothing):
    return start("no-probe", "--model", f"random={knows_nothing}")


@pytest.fixture
def file(server, starter_rows):
    rows = starter_rows("pairs.jsonl", 32).read_bytes()
    return server.send("/api/v1/files?filename=pairs.jsonl&purpose=fine-tune", "POST", rows)[1]["id"]


def types_of(server, job_id):
    return [one["type"] for one in server.ask(f"/api/v1/jobs/{job_id}/events?limit=200")[1]["data"]]


def test_a_refused_job_names_the_field_and_a_retry_does_not_slip_through(server, file):
    body = {"model": "random", "files": [file], "options": SMALL}
    _, made, _ = server.ask("/api/v1/jobs", "POST", body)
    assert made["no_probe"] is False
    job = server.ended(made["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "cannot_do_the_task")
    assert '"no_probe": true' in job["error"]["message"]
    server.ask(f"/api/v1/jobs/{made['id']}/retry", "POST", {"reason": "once more"})
    again = server.ended(made["id"])
    assert (again["status"], again["error"]["code"]) == ("failed", "cannot_do_the_task"), "it was let through in silence"
    with Client(server.url, api_key=KEY) as client:
        assert client.jobs.retry(made["id"], "I know that it knows nothing", no_probe=True).no_probe
    assert server.ended(made["id"])["status"] == "succeeded"
    assert types_of(server, made["id"]).count("not_probed") == 1


BODIES = {
    "/v1/fine_tuning/jobs": lambda file, own: {
        "model": "random", "training_file": file, "preftune": own, "method": {"type": "dpo", "dpo": {"hyperparameters": {}}},
    },
    "/v1/fine-tunes": lambda file, own: {
        "model": "random", "training_file": file, "preftune": own, "training_method": {"method": "dpo"},
        "training_type": {"type": "Lora"},
    },
    "/v1/flow/fine-tunes": lambda file, own: {
        "project_id": 1,
        "training_config": {
            "model": "random", "training_files": [file], "n_epochs": 1, "learning_rate": 1e-5, "fine_tune_type": "PREFERENCE",
            "lora_config": {"r": 4, "alpha": 8}, "preftune": own,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("route", BODIES)
def test_each_dialect_takes_it_and_says_it_again(server, file, route):
    if route == "/v1/flow/fine-tunes":
        status, project, _ = server.ask("/v1/flow/projects", "POST", {"name": "insist", "description": "who insists, may"})
        assert status < 300, project
    status, made, _ = server.ask(route, "POST", BODIES[route](file, {**SMALL, "no_probe": True}))
    assert status == 200, made
    assert made["preftune"] == {"no_probe": True}
    job = server.ended(made["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["no_probe"] is True
    assert "not_probed" in types_of(server, made["id"])
    status, answer, _ = server.ask(route, "POST", BODIES[route](file, {"no_probe": 1}))
    assert (status, answer["error"]["message"]) == (400, "preftune.no_probe: write true or false")


def test_a_job_of_several_processes_is_refused_or_told(server, file):
    stage = {"method": "dpo", "data": {"train": [file]}, "distributed": "fsdp2"}
    status, answer, _ = server.ask("/api/v1/jobs", "POST", {"recipe": {"model": "random", "stages": [stage]}})
    assert (status, answer["error"]["param"]) == (400, "stages.0.distributed")
    assert "a job trains in one process" in answer["error"]["message"]
    server.ask("/v1/flow/projects", "POST", {"name": "several", "description": "many of them"})
    body = BODIES["/v1/flow/fine-tunes"](file, SMALL)
    for number, count in ((1, 1), (4, 2)):
        machine = {"accel_type": "A100", "n_accel": number, "n_node": 1}
        _, made, _ = server.ask("/v1/flow/fine-tunes", "POST", {**body, "infrastructure_config": machine})
        events = server.ask(f"/api/v1/jobs/{made['id']}/events")[1]["data"]
        told = [one["message"] for one in events if one["type"] == "warning"]
        assert len(told) == count - 1, told
        assert all("n_accel 4, n_node 1 is not honoured" in one for one in told)
        server.ask(f"/api/v1/jobs/{made['id']}/cancel", "POST")


def test_the_command_line_tells_the_server_and_the_run_says_so(server, starter_rows, tmp_path):
    starter_rows("pairs.jsonl", 32)
    settings = "".join(f"{key}: {value}\n" for key, value in SMALL.items())
    (tmp_path / "recipe.yaml").write_text(f"model: random\ndata: {{train: pairs.jsonl}}\n{settings}")
    environment = {**os.environ, "PREFTUNE_API_KEY": KEY, "PREFTUNE_HOME": str(tmp_path / "none")}
    environment.pop("PREFTUNE_SERVER", None)

    def run(*options):
        return subprocess.run(
            [sys.executable, "-m", "preftune", "--server", server.url, "train", "recipe.yaml", *options], env=environment,
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip

    refused = run()
    assert refused.returncode == 1
    assert "--no-probe" in refused.stderr
    told = run("--no-probe", "--json")
    assert told.returncode == 0, told.stderr
    job = json.loads(told.stdout)
    assert job["no_probe"] is True
    assert types_of(server, job["id"]).count("not_probed") == 1
    run_folder = server.home / "state" / "jobs" / job["id"] / "run"
    assert json.loads((run_folder / "run.json").read_text())["is_probed"] is False
    status, answer, _ = server.ask("/api/v1/jobs", "POST", {"model": "random", "files": list(job["files"]), "no_probe": "maybe"})
    assert (status, answer["error"]["param"]) == (400, "no_probe")
    assert "--probe are for runs of this machine" in run("--probe").stderr
