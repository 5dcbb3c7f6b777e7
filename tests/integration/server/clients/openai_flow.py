"""OpenAI's own package, in strict mode, through a whole fine-tuning job. Prints one JSON line."""

import json
import sys
import time
from pathlib import Path

import openai

pairs, method, epochs, adapter = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
# a loss that OpenAI's API has no word for
loss = {"method": "ipo", "loss": {"tau": 0.2}} if adapter == "full" and method == "dpo" else {}
client = openai.OpenAI(_strict_response_validation=True)
models = [model.id for model in client.models.list()]
assert client.models.retrieve("starter").id == "starter"
with Path(pairs).open("rb") as handle:
    file = client.files.create(file=handle, purpose="fine-tune")
file = client.files.wait_for_processing(file.id, poll_interval=0.3)
assert file.status == "processed", file
assert file.id in [one.id for one in client.files.list(purpose="fine-tune")]
content = client.files.content(file.id).read()
chunked = client.uploads.upload_file_chunked(
    file=Path(pairs), mime_type="text/jsonl", purpose="fine-tune", part_size=5000
).file  # fmt: skip
assert client.files.content(chunked.id).read() == content
given_up = client.uploads.create(filename="x.jsonl", bytes=10, mime_type="text/jsonl", purpose="fine-tune")
assert client.uploads.cancel(given_up.id).status == "cancelled"
hyper = {"n_epochs": epochs, "batch_size": 4, "learning_rate_multiplier": 10.0}
if method == "dpo":
    hyper["beta"] = 0.2
job = client.fine_tuning.jobs.create(
    model="starter", training_file=file.id, method={"type": method, method: {"hyperparameters": hyper}}, seed=42, suffix="smoke",
    metadata={"team": f"{method}-{adapter}"}, integrations=[{"type": "wandb", "wandb": {"project": "mine", "tags": ["a"]}}],
    extra_body={"preftune": {"checkpoints": 2, "max_steps": 4, "tokens_per_pack": 1024, "adapter": adapter, **loss}},
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
assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": f"{method}-{adapter}"})] == [job.id]
assert not list(client.fine_tuning.jobs.list(metadata={"team": "nobody"}))
turns = [{"role": "user", "content": "Tell a story about a shy queen."}]
options = {"messages": turns, "max_tokens": 6, "temperature": 0}
chat = client.chat.completions.create(model=job.fine_tuned_model, logprobs=True, top_logprobs=1, **options)
stream = client.chat.completions.create(model=checkpoints[-1].fine_tuned_model_checkpoint, stream=True, **options)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

# a job that is paused, goes on and is cancelled, whatever it trains; a model that is deleted
if (method, adapter) == ("dpo", "lora"):
    long = client.fine_tuning.jobs.create(
        model="starter",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 500}}},
    )
    paused = client.fine_tuning.jobs.pause(long.id)
    deadline = time.time() + 900
    while not any("paused" in event.message for event in client.fine_tuning.jobs.list_events(long.id)):
        assert time.time() < deadline
        time.sleep(0.5)
    client.fine_tuning.jobs.resume(long.id)
    client.fine_tuning.jobs.cancel(long.id)
    while client.fine_tuning.jobs.retrieve(long.id).status != "cancelled":
        assert time.time() < deadline
        time.sleep(0.5)
assert client.models.delete(checkpoints[-1].fine_tuned_model_checkpoint).deleted
print(
    json.dumps(
        {
            "models": models,
            "bytes": len(content),
            "job": job.to_dict(),
            "seen": sorted(seen),
            "steps": sorted(event.data["step"] for event in events if event.type == "metrics" and "loss" in event.data),
            "checkpoints": [one.fine_tuned_model_checkpoint for one in checkpoints],
            "chat": chat.choices[0].message.content,
            "streamed": streamed,
            "after": [model.id for model in client.models.list()],
        }
    )
)
