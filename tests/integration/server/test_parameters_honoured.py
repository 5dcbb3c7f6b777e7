"""Every parameter that the vendors' clients send reaches the recipe that is trained, and is shown again in every dialect."""

import json

import pytest
from starlette.testclient import TestClient

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.app.recipes import check_recipe
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.store.artifacts import Artifacts
from preftune.store.memory import MemoryStore
from preftune.store.records import File, Job, ModelVersion

ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Creates a job by a dialect's route; the job as it is kept, and the answer."""
    home = tmp_path_factory.mktemp("parameters")
    platform = Platform(MemoryStore(), Artifacts(str(home / "artifacts")), home, Context(home / "cache", home))
    project = platform.project(DEFAULT_PROJECT).id
    add_base_model(platform, "starter", "starter")
    _, key = add_key(platform, project, "test", "admin")
    for file_id in ("file-1", "file-2"):
        stored = platform.artifacts.put(f"files/{file_id}.jsonl", [ROW])
        file = File(id=file_id, project=project, filename="a.jsonl", purpose="fine-tune", bytes=stored.bytes, status="processed")
        platform.store.insert(file.model_copy(update={"artifact": stored.key, "sha256": stored.sha256}))
    recipe = check_recipe({"model": "starter", "data": "file-1"}).model_dump(mode="json")
    base = platform.store.insert(
        Job(id="ft-0", project=project, work="train", status="succeeded", name="tuned-0", model="starter", recipe=recipe)
    )
    for name, step in (("tuned-0:2", 2), ("tuned-0", 4)):
        start = ModelVersion(id=f"ml_{step}", project=project, name=name, version=1, form="full", job=base.id, step=step, run="x")
        platform.store.insert(start)
    with TestClient(create_app(platform, ServerSettings()), base_url="http://localhost") as client:
        client.headers["Authorization"] = f"Bearer {key}"
        number = client.post("/v1/flow/projects", json={"name": "a project", "description": "of a test"}).json()["id"]

        def call(path, body):
            answer = client.post(path, json={**body, **({"project_id": number} if "/flow/" in path else {})})
            assert answer.status_code == 200, answer.text
            return platform.store.get(Job, answer.json()["id"]), answer.json()

        call.client = client
        yield call


def holds(found, wanted):
    """Whether a JSON value holds another, key by key."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and holds(found[key], value) for key, value in wanted.items())
    return found == wanted or (isinstance(wanted, float) and found == pytest.approx(wanted))


def dpo(**changes):
    return {"training_method": {"method": "dpo", **changes}}


LORA = {"type": "Lora", "lora_r": 4}
COSINE = {"lr_scheduler_type": "cosine", "lr_scheduler_args": {"min_lr_ratio": 0.1, "num_cycles": 1.5}}
STOPPING = {"early_stopping_enabled": True, "n_evals": 5, "validation_file": "file-2"}
TOGETHER = [
    (dpo(dpo_beta=0.05), {"method": "dpo", "loss": {"beta": 0.05}}),
    (dpo(dpo_beta=0.9), {"loss": {"beta": 0.9}}),
    (dpo(), {"loss": {"beta": 0.1, "length_normalised": False, "reference_free": False}}),
    (dpo(dpo_normalize_logratios_by_length=True), {"loss": {"length_normalised": True}}),
    (dpo(dpo_reference_free=True), {"loss": {"reference_free": True}}),
    (dpo(rpo_alpha=0.5), {"loss": {"rpo_alpha": 0.5}}),
    (dpo(simpo_gamma=0.5, dpo_beta=2.0), {"method": "simpo", "loss": {"beta": 2.0, "gamma": 0.5}}),
    (
        dpo(simpo_gamma=0.5, dpo_beta=2.0, rpo_alpha=0.3),
        {"method": "mix", "loss": {"parts": {"simpo": {"beta": 2.0, "gamma": 0.5}, "sft": {"weight": 0.3}}}},
    ),
    (dpo(simpo_gamma=0, rpo_alpha=0), {"method": "dpo", "loss": {"rpo_alpha": 0.0}}),
    ({"training_method": {"method": "sft", "train_on_inputs": "auto"}}, {"method": "sft"}),
    ({"n_epochs": 3, "learning_rate": 2e-5}, {"epochs": 3, "lr": 2e-5}),
    ({"batch_size": 6}, {"pairs_per_step": 6}),
    ({"batch_size": 6, "gradient_accumulation_steps": 4}, {"pairs_per_step": 24}),
    ({"warmup_ratio": 0.2, "weight_decay": 0.01}, {"warmup": 0.2, "weight_decay": 0.01}),
    ({"max_grad_norm": 0.3}, {"max_grad_norm": 0.3}),
    ({"max_grad_norm": 0}, {"max_grad_norm": None}),
    ({"lr_scheduler": COSINE}, {"schedule": "cosine", "min_lr_ratio": 0.1, "num_cycles": 1.5}),
    (
        {"lr_scheduler": {"lr_scheduler_type": "linear", "lr_scheduler_args": {"min_lr_ratio": 0.2}}},
        {"schedule": "linear", "min_lr_ratio": 0.2},
    ),
    ({"n_checkpoints": 4}, {"checkpoints": 3, "keep_checkpoints": 3}),
    ({"n_checkpoints": 1}, {"checkpoints": 0}),
    ({"n_evals": 5, "validation_file": "file-2"}, {"evals": 5, "data": {"select": "file-2", "train": ["file-1"]}}),
    (STOPPING, {"early_stopping": {"patience": 2, "min_delta": 0.0, "warmup_evals": 1}, "keep": "best"}),
    (
        {**STOPPING, "early_stopping_patience": 3, "early_stopping_min_delta": 0.01, "early_stopping_warmup_evals": 0},
        {"early_stopping": {"patience": 3, "min_delta": 0.01, "warmup_evals": 0}},
    ),
    ({"max_seq_length": 256}, {"data": {"max_length": 256}}),
    ({"training_type": {"type": "Full"}}, {"adapter": "full"}),
    ({"training_type": LORA}, {"adapter": "lora", "lora": {"rank": 4, "alpha": 8.0, "target_modules": "all-linear"}}),
    (
        {"training_type": {**LORA, "lora_alpha": 32, "lora_dropout": 0.1, "lora_trainable_modules": "q_proj, v_proj"}},
        {"lora": {"alpha": 32.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}},
    ),
    ({"model": None, "from_checkpoint": "ft-0"}, {"from_checkpoint": "ft-0", "adapter": "full"}),
    ({"model": None, "from_checkpoint": "ft-0:2"}, {"from_checkpoint": "ft-0:2"}),
    ({"model": None, "from_checkpoint": "tuned-0:4"}, {"from_checkpoint": "tuned-0:4"}),
    ({**dpo(), "preftune": {"method": "ipo", "loss": {"tau": 0.2}}}, {"method": "ipo", "loss": {"tau": 0.2}}),
]


@pytest.mark.parametrize(("changes", "stage"), TOGETHER)
def test_togethers(made, changes, stage):
    body = {"model": "starter", "training_file": "file-1", **dpo(), **changes}
    job, shown = made("/v1/fine-tunes", body)
    assert holds(job.recipe["stages"][0], stage), job.recipe["stages"][0]
    echoed = {key: value for key, value in changes.items() if key in shown and key not in {"training_type", "training_method"}}
    assert holds({key: shown[key] for key in echoed if key != "batch_size"}, {k: v for k, v in echoed.items() if k != "batch_size"
                 and v is not None}), shown  # fmt: skip


def hyper(method="dpo", **given):
    return {"method": {"type": method, method: {"hyperparameters": given}}}


OPENAI = [
    (hyper(beta=0.3), {"method": "dpo", "adapter": "lora", "loss": {"beta": 0.3}}),
    (hyper(beta=2), {"loss": {"beta": 2.0}}),
    (hyper(beta="auto", batch_size="auto", n_epochs="auto", learning_rate_multiplier="auto"), {"method": "dpo", "lr": None}),
    (hyper(batch_size=3, n_epochs=2), {"pairs_per_step": 3, "epochs": 2}),
    (hyper("supervised", batch_size=3, n_epochs=2), {"method": "sft", "pairs_per_step": 3, "epochs": 2}),
    ({"hyperparameters": {"n_epochs": 4}}, {"method": "sft", "epochs": 4}),
    ({**hyper(), "validation_file": "file-2"}, {"data": {"select": "file-2"}}),
    ({**hyper(), "preftune": {"adapter": "full", "schedule": "cosine"}}, {"adapter": "full", "schedule": "cosine"}),
    ({**hyper(), "preftune": {"method": "kto"}}, {"method": "kto"}),
]


@pytest.mark.parametrize(("changes", "stage"), OPENAI)
def test_openais(made, changes, stage):
    job, shown = made("/v1/fine_tuning/jobs", {"model": "starter", "training_file": "file-1", **changes})
    assert holds(job.recipe["stages"][0], stage), job.recipe["stages"][0]
    asked = next(
        iter((changes.get("method") or {}).get(shown["method"]["type"], {}).values()), changes.get("hyperparameters", {})
    )
    told = shown["method"][shown["method"]["type"]]["hyperparameters"]
    assert {key: told[key] for key, value in asked.items() if value != "auto"} == {k: v for k, v in asked.items() if v != "auto"}


def test_openais_multiplier_seed_suffix_and_metadata(made):
    body = {"model": "starter", "training_file": "file-1", "seed": 7, "suffix": "mine", "metadata": {"team": "a"}}
    one, first = made("/v1/fine_tuning/jobs", {**body, **hyper(learning_rate_multiplier=1)})
    two, second = made("/v1/fine_tuning/jobs", {**body, **hyper(learning_rate_multiplier=2.5)})
    rates = [job.recipe["stages"][0]["lr"] for job in (one, two)]
    assert rates[1] == pytest.approx(2.5 * rates[0])
    assert (one.recipe["seed"], first["seed"], first["metadata"]) == (7, 7, {"team": "a"})
    assert one.name.startswith("starter-mine-")
    assert second["hyperparameters"]["learning_rate_multiplier"] == pytest.approx(2.5)
    listed = made.client.get("/v1/fine_tuning/jobs", params={"metadata[team]": "a", "limit": 100}).json()["data"]
    assert {job["id"] for job in listed} == {one.id, two.id}


CONFIG = {"training_files": ["file-1"], "model": "starter", "n_epochs": 1}
SEEKR = [
    ({"fine_tune_type": "PREFERENCE"}, {"method": "dpo", "adapter": "full"}),
    ({"fine_tune_type": "PREFERENCE", "beta": 0.4}, {"loss": {"beta": 0.4}}),
    ({"fine_tune_type": "STANDARD"}, {"method": "sft"}),
    ({"n_epochs": 3, "learning_rate": 3e-5, "batch_size": 5}, {"epochs": 3, "lr": 3e-5, "pairs_per_step": 5}),
    ({"n_checkpoints": 3}, {"checkpoints": 2, "keep_checkpoints": 2}),
    ({"max_length": 128}, {"data": {"max_length": 128}}),
    ({"validation_files": ["file-2"]}, {"data": {"select": "file-2"}}),
    ({"training_files": ["file-1", "file-2"]}, {"data": {"train": ["file-1", "file-2"]}}),
    ({"gradient_checkpointing": True}, {"gradient_checkpointing": "on"}),
    ({"gradient_checkpointing": False}, {"gradient_checkpointing": "off"}),
    (
        {"lora_config": {"r": 4, "alpha": 16, "dropout": 0.2, "extras": {"use_rslora": True, "target_modules": ["q_proj"]}}},
        {"adapter": "lora", "lora": {"rank": 4, "alpha": 16.0, "dropout": 0.2, "rslora": True, "target_modules": ["q_proj"]}},
    ),
]


@pytest.mark.parametrize(("changes", "stage"), SEEKR)
@pytest.mark.parametrize("path", ["/v1/flow/fine-tune", "/v1/flow/fine-tunes"])
def test_seekrflows(made, path, changes, stage):
    job, shown = made(
        path, {"training_config": {**CONFIG, **changes}, "infrastructure_config": {"accel_type": "A100", "n_accel": 2}}
    )
    assert holds(job.recipe["stages"][0], stage), job.recipe["stages"][0]
    assert (shown["accel_type"], shown["n_accel"]) == ("A100", 2)
    echoed = {key: value for key, value in changes.items() if key in shown and key != "lora_config"}
    assert holds(shown, echoed), shown


def test_each_is_seen_in_every_dialect_and_no_list_breaks(made):
    """The strictest client breaks its whole list where one job has a value outside of its types."""
    mine = {made("/v1/fine-tunes", {"model": "starter", "training_file": "file-1", **dpo(), **one})[0].id for one, _ in TOGETHER}
    mine |= {made("/v1/fine_tuning/jobs", {"model": "starter", "training_file": "file-1", **one})[0].id for one, _ in OPENAI}
    mine |= {made("/v1/flow/fine-tune", {"training_config": {**CONFIG, **one}})[0].id for one, _ in SEEKR}
    counts = {}
    for path in ("/v1/fine-tunes", "/v1/flow/fine-tunes", "/v1/fine_tuning/jobs?limit=1000"):
        answer = made.client.get(path)
        json.loads(answer.content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        counts[path] = {job["id"] for job in answer.json()["data"]} - {"ft-0"}
    assert len(set(map(frozenset, counts.values()))) == 1
    assert mine <= counts["/v1/fine-tunes"]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": "1e999"}, {"weight_decay": "1e999"}, {"learning_rate": "1e-999"}, {"n_epochs": 0}, {"n_checkpoints": 0},
        {"early_stopping_min_delta": "1e999", **STOPPING}, {"training_type": {"type": "Lora", "lora_alpha": "1e999"}},
        dpo(rpo_alpha="1e999"), dpo(simpo_gamma="1e999"), dpo(dpo_beta="1e999"), {"random_seed": -1}, {"max_seq_length": 0},
    ],
)  # fmt: skip
def test_numbers_that_are_none_make_no_job(made, changes):
    body = json.dumps({"model": "starter", "training_file": "file-1", **dpo(), **changes})
    body = body.replace('"1e999"', "1e999").replace('"1e-999"', "1e-999")
    answer = made.client.post("/v1/fine-tunes", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
