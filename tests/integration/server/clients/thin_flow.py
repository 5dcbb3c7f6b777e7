"""The shortest whole way with one vendor's own package: upload, a DPO job with LoRA, a chat by name. Prints one JSON line.

python thin_flow.py openai|together|seekrai PAIRS
"""

import json
import sys
import time
from pathlib import Path

TURNS = [{"role": "user", "content": "Tell a story about a shy queen."}]
CHAT = {"messages": TURNS, "max_tokens": 6, "temperature": 0}
ENDED = {"succeeded", "completed", "failed", "error", "cancelled"}


def ended(retrieve, job, words=str):
    deadline = time.time() + 300
    while words(job.status) not in ENDED:
        assert time.time() < deadline, job
        time.sleep(0.2)
        job = retrieve(job.id)
    return job


def with_openai(pairs):
    import openai

    client = openai.OpenAI(_strict_response_validation=True)
    with Path(pairs).open("rb") as handle:
        file = client.files.create(file=handle, purpose="fine-tune")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 8, "beta": 0.2}}}
    job = client.fine_tuning.jobs.create(
        model="starter", training_file=file.id, method=method, extra_body={"preftune": {"adapter": "lora", "probe": "off"}}
    )
    job = ended(client.fine_tuning.jobs.retrieve, job)
    chat = client.chat.completions.create(model=job.fine_tuned_model, **CHAT)
    return job.id, job.status, chat, [one.id for one in client.fine_tuning.jobs.list()]


def with_together(pairs):
    import together

    client = together.Together(_strict_response_validation=True)
    file = client.files.upload(pairs, purpose="fine-tune")
    job = client.fine_tuning.create(
        model="starter", training_file=file.id, training_method="dpo", lora=True, batch_size=8, n_epochs=1, learning_rate=1e-4
    )
    job = ended(client.fine_tuning.retrieve, job)
    chat = client.chat.completions.create(model=job.x_model_output_name, **CHAT)
    return job.id, job.status, chat, [one.id for one in client.fine_tuning.list().data]


def with_seekrai(pairs):
    from seekrai import SeekrFlow
    from seekrai.types import InfrastructureConfig, TrainingConfig
    from seekrai.types.finetune import LoRAConfig

    client = SeekrFlow()
    file = client.files.upload(pairs, purpose="preference-fine-tune")
    project = client.projects.create(name="a project", description="of the client")
    config = TrainingConfig(
        training_files=[file.id], model="starter", n_epochs=1, learning_rate=1e-4, n_checkpoints=1, batch_size=8,
        experiment_name="thin", fine_tune_type="PREFERENCE", beta=0.1, lora_config=LoRAConfig(r=4, alpha=8, dropout=0.0),
        preftune={"probe": "off"},
    )  # fmt: skip
    job = client.fine_tuning.create(
        project_id=project.id, training_config=config, infrastructure_config=InfrastructureConfig(accel_type="A10", n_accel=1)
    )
    job = ended(client.fine_tuning.retrieve, job, lambda status: status.value)
    chat = client.chat.completions.create(model=job.id, **CHAT)
    return job.id, job.status.value, chat, [one.id for one in client.fine_tuning.list().data]


flows = {"openai": with_openai, "together": with_together, "seekrai": with_seekrai}
job_id, status, answer, listed = flows[sys.argv[1]](sys.argv[2])
print(json.dumps({"job": job_id, "status": status, "chat": answer.choices[0].message.content, "listed": listed}))
