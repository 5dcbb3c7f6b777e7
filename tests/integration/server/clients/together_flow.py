"""Together's own package, in strict mode, through a whole DPO job. Prints one JSON line."""

import io
import json
import sys
import tarfile
import time
from pathlib import Path

import together

pairs, more = map(Path, sys.argv[1:])
client = together.Together(_strict_response_validation=True)


def processed(file):
    deadline = time.time() + 600
    while file.processing_status in {"QUEUED", "RUNNING", "PENDING"}:
        assert time.time() < deadline, file
        time.sleep(0.2)
        file = client.files.retrieve(file.id)
    return file


def finished(job):
    deadline = time.time() + 900
    while job.status not in {"completed", "error", "cancelled"}:
        assert time.time() < deadline, job
        time.sleep(0.3)
        job = client.fine_tuning.retrieve(job.id)
    assert job.status == "completed", [event.message for event in job.events or []]
    return job


def names_of(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return sorted(tar.getnames()), {
            one: tar.extractfile(one).read().decode() for one in tar.getnames() if one == "adapter_config.json"
        }


# files: the redirect, the same bytes again, what the server found in them
file = processed(client.files.upload(pairs, purpose="fine-tune"))
assert file.processing_status == "COMPLETED", file
assert file.validation_report.valid
again = client.files.upload(pairs, purpose="fine-tune")
assert client.files.content(file.id).read() == pairs.read_bytes()
held_out = client.files.upload(more, purpose="fine-tune")
assert {file.id, held_out.id} <= {one.id for one in client.files.list().data}

common = {"model": "starter", "batch_size": 4, "n_epochs": 1, "suffix": "together", "random_seed": 42}
dpo = finished(
    client.fine_tuning.create(
        training_file=file.id, validation_file=held_out.id, training_method="dpo", dpo_beta=0.95, rpo_alpha=0.5,
        dpo_normalize_logratios_by_length=True, lora=True, lora_r=4, n_checkpoints=2, n_evals=2, learning_rate=1e-4,
        lr_scheduler_type="cosine", min_lr_ratio=0.1, scheduler_num_cycles=0.5, warmup_ratio=0.25, weight_decay=0.01,
        max_seq_length=512, wandb_api_key="wandb-secret-0123", wandb_project_name="mine", **common,
    )
)  # fmt: skip
events = client.fine_tuning.list_events(dpo.id).data
checkpoints = client.fine_tuning.list_checkpoints(dpo.id).data
metrics = client.fine_tuning.list_metrics(dpo.id, resolution=3).metrics
adapter, configs = names_of(client.fine_tuning.content(ft_id=dpo.id, checkpoint="adapter").read())
merged, _ = names_of(client.fine_tuning.content(ft_id=dpo.id, checkpoint="merged", checkpoint_step=2).read())

# the tuned model answers by its name, by its job's id, and by the name of an endpoint
turns = [{"role": "user", "content": "Tell a story about a shy queen."}]
options = {"messages": turns, "max_tokens": 6, "temperature": 0}
chat = client.chat.completions.create(model=dpo.x_model_output_name, logprobs=1, **options)
stream = client.chat.completions.create(model=dpo.id, stream=True, **options)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
project = client.whoami().project.id
model = next(one for one in client.models.list(project_id=project).data if one.id == dpo.api_model_object_id)
endpoint = client.endpoints.create(project_id=project, name="smoke-ep")
deployment = client.endpoints.deployments.create(
    endpoint.id, project_id=project, name="smoke-dep", model=f"projects/{project}/models/{model.id}",
    autoscaling={"minReplicas": 1, "maxReplicas": 1},
)  # fmt: skip
by_endpoint = client.chat.completions.create(model=endpoint.name, **options)
client.endpoints.deployments.delete(deployment.id, endpoint_id=endpoint.id, project_id=project)
client.endpoints.delete(endpoint.id, project_id=project)
supported = [one.name for one in client.models.list_supported(product="PRODUCT_FINE_TUNING").data]
print(
    json.dumps(
        {
            "file": file.to_dict(),
            "again": again.id,
            "dpo": dpo.to_dict(mode="json"),
            "events": [[event.type, event.level, event.message, event.created_at] for event in events],
            "checkpoints": [[one.step, one.checkpoint_type, one.path, one.checkpoint] for one in checkpoints],
            "metrics": metrics,
            "archives": [adapter, merged],
            "base": json.loads(configs["adapter_config.json"])["base_model_name_or_path"],
            "chat": chat.choices[0].message.content,
            "streamed": streamed,
            "by_endpoint": by_endpoint.choices[0].message.content,
            "state": deployment.status.state,
            "supported": supported,
        }
    )
)
