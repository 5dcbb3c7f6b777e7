"""Replays a run's events through one real sink and reads them back with the tool's own reader, as JSON on stdout.

python track.py SINK FILE      FILE: options, facts of the run, events; statuses of one or two sessions
"""

import json
import sys
from pathlib import Path

from preftune.core import events as kinds
from preftune.tracking.base import DataFacts, RunFacts, sinks
from preftune.tracking.runner import Tracking


def main(name, file):
    given = json.loads(Path(file).read_text())
    facts = given["facts"]
    run = RunFacts(facts["name"], Path(facts["folder"]), facts["recipe"], tuple(facts["stages"]), tuple(
        DataFacts(one["stage"], one["split"], tuple(one["files"]), one["rows"], one["digest"]) for one in facts["data"]
    ))  # fmt: skip
    told = []
    for status, rows in given["sessions"]:
        sink = sinks.build(name, given["options"])
        assert not sink.missing(), sink.missing()
        tracking = Tracking({name: sink}, run, told.append, close_seconds=120.0)
        for row in rows:
            tracking(getattr(kinds, row["kind"])(**row["fields"]))
        tracking.close(status)
    print("\n" + json.dumps({"told": [one.message for one in told], **READERS[name](given, run)}))


def read_tensorboard(given, run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted((run.folder / "tracking" / "tensorboard").iterdir()):
        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        reader.Reload()
        found[folder.name] = {tag: [[one.step, one.value] for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
        found[f"{folder.name} texts"] = {
            tag: reader.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]
        }
    return found


def read_mlflow(given, run):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=given["options"]["uri"])
    experiment = client.get_experiment_by_name("preftune")
    found = client.search_runs([experiment.experiment_id])
    one = found[0]
    models = client.search_logged_models([experiment.experiment_id])
    version = client.get_model_version_by_alias(given["options"]["register"], "candidate")
    history = {
        key: [[row.step, row.value] for row in client.get_metric_history(one.info.run_id, key)] for key in one.data.metrics
    }
    inputs = one.inputs.dataset_inputs
    return {
        "runs": len(found), "status": one.info.status, "params": dict(one.data.params), "tags": dict(one.data.tags),
        "history": history,
        "datasets": [[row.dataset.name, row.dataset.digest, row.dataset.profile, row.tags[0].value] for row in inputs],
        "models": {
            model.name: {
                "id": model.model_id, "status": str(model.status), "tags": model.tags,
                "metrics": {row.key: row.value for row in model.metrics or []},
                "files": sorted(file.path.split("/")[-1] for file in client.list_logged_model_artifacts(model.model_id)),
            }
            for model in models
        },
        "version": [version.name, str(version.version), version.run_id == one.info.run_id, version.source],
    }  # fmt: skip


def read_wandb(given, run):
    import wandb
    from wandb.proto import wandb_internal_pb2

    # `finish` returns before its service has written the last block; a process that ends waits for it, and so does this
    wandb.teardown()
    history, config, summary = [], {}, {}
    folders = sorted((run.folder / "tracking" / "wandb").glob("offline-run-*"))
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        for data in leveldb_log(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                history.append({(one.key or "/".join(one.nested_key)): json.loads(one.value_json) for one in record.history.item})
            elif record.WhichOneof("record_type") == "run":
                config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
                run_id = record.run.run_id
            elif record.WhichOneof("record_type") == "summary":
                summary |= {(one.key or "/".join(one.nested_key)): json.loads(one.value_json) for one in record.summary.update}
    return {"sessions": len(folders), "history": history, "config": config, "summary": summary, "id": run_id}


def leveldb_log(content):
    """The records of a .wandb file behind its header: LevelDB's log format, whose blocks hold crc (4), length (2), type (1)."""
    held, at, block = b"", 0, 32768
    while at + 7 <= len(content):
        # the header of the file belongs to the first block
        left = block - (at + 7) % block
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield held
            held = b""


def read_trackio(given, run):
    import sqlite3

    from trackio.sqlite_storage import SQLiteStorage

    path = SQLiteStorage.get_project_db_path("preftune")
    rows = SQLiteStorage.get_logs("preftune", run.name)
    with sqlite3.connect(path) as database:
        alerts = database.execute("select title, text, level from alerts").fetchall()
    return {"rows": rows, "alerts": alerts, "config": SQLiteStorage.get_run_config("preftune", run.name)}


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb, "trackio": read_trackio}

if __name__ == "__main__":
    main(*sys.argv[1:])
