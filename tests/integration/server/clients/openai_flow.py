"""OpenAI's own package, in strict mode, through a whole fine-tuning job. Prints one JSON line."""

import json
import sys
import time
from pathlib import Path

import openai

pairs, method, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = openai.OpenAI(_strict_response_validation=True)
models = [model.id for model in client.models.list()]
assert client.models.retrieve("starter").id == "starter"
with Path(pairs).open("rb") as handle:
    file = client.files.create(file=handle, purpose="fine-tune")
file = client.files.wait_for_processing(file.id, poll_interval=0.3)
assert file.status == "processed", file
assert file.id in [one.id for one in client.files.list(purpose="fine-tune")]
content = client.files.content(file.id).read()
hyper = {"n_epochs": epochs, "batch_size": 4, "learning_rate_multiplier": 10.0}
if method == "dpo":
    hyper["beta"] = 0.2
job = client.fine_tuning.jobs.create(
    model="starter", training_file=file.id, method={"type": method, method: {"hyperparameters": hyper}}, seed=42, suffix="smoke",
    metadata={"team": method}, extra_body={"preftune": {"checkpoints": 2, "max_steps": 4, "tokens_per_pack": 1024}},
)  # fmt: skip
seen = {job.status}
deadline = time.time() + 900
while job.status not in ("succeeded", "failed", "cancelled"):
    assert time.time() < deadline, job
    time.sleep(0.3)
    job = client.fine_tuning.jobs.retrieve(job.id)
    seen.add(job.status)
assert job.status == "succeeded", job
events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": method})] == [job.id]
assert not list(client.fine_tuning.jobs.list(metadata={"team": "nobody"}))
print(
    json.dumps(
        {
            "models": models,
            "bytes": len(content),
            "job": job.to_dict(),
            "seen": sorted(seen),
            "steps": sorted(event.data["step"] for event in events if event.type == "metrics" and "loss" in event.data),
            "checkpoints": [one.fine_tuned_model_checkpoint for one in checkpoints],
            "after": [model.id for model in client.models.list()],
        }
    )
)
