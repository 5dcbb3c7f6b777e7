"""SeekrFlow's own package, which checks every answer, through whole fine-tuning jobs. Prints one JSON line."""

import asyncio
import json
import sys
import time
from pathlib import Path

from seekrai import AsyncSeekrFlow, SeekrFlow
from seekrai.error import InvalidRequestError
from seekrai.types import InfrastructureConfig, TrainingConfig
from seekrai.types.finetune import LoRAConfig

pairs, chats, bad, work = map(Path, sys.argv[1:])
client = SeekrFlow()
machine = InfrastructureConfig(accel_type="A10", n_accel=1)


def finished(job):
    deadline = time.time() + 900
    while job.status.value not in {"completed", "failed", "cancelled"}:
        assert time.time() < deadline, job
        time.sleep(0.3)
        job = client.fine_tuning.retrieve(job.id)
    assert job.status.value == "completed", job.error_analysis
    return job


models = [model.id for model in client.models.list().data]
project = client.projects.create(name="my project", description="created by the client")
assert client.projects.retrieve(project.id).name == "my project"

# files: a good one, several at once, and one with bad rows, of which nothing is kept
file = client.files.upload(pairs, purpose="preference-fine-tune")
both = client.files.bulk_upload([chats], purpose="fine-tune")
before = [one.id for one in client.files.list(limit=100).data]
refused = []
for path, purpose in ((bad, "preference-fine-tune"), (chats, "preference-fine-tune")):
    try:
        client.files.upload(path, purpose=purpose)
        refused.append("")
    except InvalidRequestError as error:
        refused.append([type(error).__name__, error.http_status, str(error)])
assert [one.id for one in client.files.list(limit=100).data] == before
assert client.files.retrieve(file.id).purpose.value == "preference-fine-tune"
renamed = client.files.rename(file.id, "renamed.jsonl")
content = client.files.retrieve_content(file.id, output=work / "content.jsonl")
listed = client.files.list(limit=50, offset=0, sort_by="created_at", sort_order="desc", purpose="preference-fine-tune")

dpo = finished(
    client.fine_tuning.create(
        project_id=project.id,
        training_config=TrainingConfig(
            training_files=[file.id], model="starter", n_epochs=1, learning_rate=1e-4, n_checkpoints=2, batch_size=8,
            experiment_name="smoke test", max_length=512, fine_tune_type="PREFERENCE", beta=0.04,
            lora_config=LoRAConfig(r=4, alpha=8, dropout=0.0, extras={"use_rslora": True}), preftune={"probe": "off"},
        ),
        infrastructure_config=machine,
    )
)  # fmt: skip
events = client.fine_tuning.list_events(dpo.id).data
sft_config = TrainingConfig(
    training_files=[both[0].id], model="starter", n_epochs=1, batch_size=4, preftune={"probe": "off", "max_steps": 2}
)


async def asynchronous():
    other = AsyncSeekrFlow()
    job = await other.fine_tuning.create(project_id=project.id, training_config=sft_config, infrastructure_config=machine)
    doomed = await other.fine_tuning.create(
        project_id=project.id, training_config=sft_config.model_copy(update={"n_epochs": 500}), infrastructure_config=machine
    )
    await other.fine_tuning.cancel(doomed.id)
    return job


sft = finished(asyncio.run(asynchronous()))
client.fine_tuning.promote(dpo.id)
client.fine_tuning.demote(dpo.id)
demoted = client.fine_tuning.retrieve(dpo.id).inference_available
client.fine_tuning.promote(dpo.id)
deployment = client.deployments.create(
    name="smoke deployment", description="a run, deployed", model_type="Fine-tuned Run", model_id=dpo.id, n_instances=1
)
states = [deployment.status.value]
states.append(client.deployments.promote(deployment.id).status.value)
turns = [{"role": "user", "content": "Tell a story about a shy queen."}]
chats = [
    client.chat.completions.create(model=name, messages=turns, max_tokens=6, temperature=0.0).choices[0].message.content
    for name in (deployment.id, dpo.id, "starter")
]
stream = client.chat.completions.create(model=deployment.id, messages=turns, max_tokens=6, temperature=0.0, stream=True)
chats.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
states.append(client.deployments.demote(deployment.id).status.value)
states.append(client.deployments.retrieve(deployment.id).status.value)
client.files.delete(both[0].id)
print(
    json.dumps(
        {
            "models": models,
            "project": project.id,
            "runs": [[one.id, one.runs] for one in client.projects.list().data],
            "refused": refused,
            "renamed": renamed.filename,
            "content": Path(content.filename).stat().st_size,
            "listed": [one.id for one in listed.data],
            "file": file.id,
            "dpo": dpo.model_dump(mode="json"),
            "events": [event.model_dump(mode="json") for event in events],
            "sft": sft.model_dump(mode="json"),
            "jobs": [one.id for one in client.fine_tuning.list().data],
            "demoted": demoted,
            "chats": chats,
            "states": states,
            "deployments": [one.id for one in client.deployments.list().data],
        }
    )
)
