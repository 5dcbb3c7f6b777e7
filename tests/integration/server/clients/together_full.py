"""Together's own package: all weights, a checkpoint to go on from without a reference, cancelling. Prints one JSON line."""

import io
import json
import sys
import tarfile
import time
from pathlib import Path

import together

pairs, stories = map(Path, sys.argv[1:])
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


file = processed(client.files.upload(pairs, purpose="fine-tune"))
sft = processed(client.files.upload(stories, purpose="fine-tune"))
full = finished(
    client.fine_tuning.create(
        training_file=sft.id, training_method="sft", model="starter", batch_size=4, lora=False, suffix="full", n_checkpoints=1
    )
)
whole, _ = names_of(client.fine_tuning.content(ft_id=full.id, checkpoint="model_output_path").read())
simpo = finished(
    client.fine_tuning.create(
        training_file=file.id, training_method="dpo", simpo_gamma=0.5, dpo_beta=2.0, from_checkpoint=f"{full.id}:2", batch_size=8
    )
)
doomed = client.fine_tuning.create(training_file=sft.id, model="starter", n_epochs=500, batch_size=4)
doomed = client.fine_tuning.cancel(doomed.id)
cancelled = {doomed.status}
deadline = time.time() + 600
while doomed.status != "cancelled":
    assert time.time() < deadline
    time.sleep(0.3)
    doomed = client.fine_tuning.retrieve(doomed.id)
client.fine_tuning.delete(doomed.id)
listed = [one.id for one in client.fine_tuning.list().data]
try:
    client.fine_tuning.create(training_file="file-nope", model="starter")
except together.NotFoundError as error:
    refused = error.body["error"]["message"]
client.files.delete(sft.id)
print(
    json.dumps(
        {
            "archive": whole,
            "full": full.to_dict(mode="json"),
            "simpo": simpo.to_dict(mode="json"),
            "listed": listed,
            "doomed": doomed.id,
            "refused": refused,
        }
    )
)
