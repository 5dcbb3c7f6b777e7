"""A model as one archive to download: packed once by a job of its own, kept among the artifacts."""

from __future__ import annotations

import gzip
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

from preftune.app.jobs.platform import Platform
from preftune.core.errors import PreftuneError, UsageError
from preftune.core.files import read_json, replacing, write_json
from preftune.store.base import Query
from preftune.store.records import ACTIVE, Job, ModelVersion, new_id

ARCHIVE = "model.tar.gz"
CHUNK = 1 << 20
Form = Literal["merged", "adapter"]


def archive_key(model: ModelVersion, form: Form) -> str:
    """Where the archive of a model is kept."""
    return f"exports/{model.id}/{form}.tar.gz"


def request_archive(platform: Platform, model: ModelVersion, form: Form) -> Job | None:
    """The job that packs a model, queued where none does yet; None where the archive is there.

    Raises
        UsageError: an adapter is asked for and the model has none.
    """
    if form == "adapter" and model.form != "adapter":
        raise UsageError(f"model {model.name!r} has whole weights and no adapter; ask for the merged model")
    key = archive_key(model, form)
    if platform.artifacts.exists(key):
        return None
    name = f"export:{model.id}:{form}"
    active = platform.store.page(Job, Query(model.project, {"work": "export", "name": name, "status": ACTIVE}, limit=1)).items
    if active:
        return active[0]
    job = Job(
        id=new_id("job-"), project=model.project, work="export", status="queued", name=name, model=model.id, priority=5, slots=0,
        max_attempts=2, request={"form": form},
    )  # fmt: skip
    return platform.store.insert(job)


def forget_archives(platform: Platform, model: ModelVersion) -> None:
    """Let go of what was packed of a model."""
    for form in get_args(Form):
        platform.artifacts.delete(archive_key(model, form))


def export_task(platform: Platform, job: Job) -> dict[str, Any]:
    """What the process of an export is told.

    Raises
        PreftuneError: the model was deleted.
    """
    model = platform.store.get(ModelVersion, job.model)
    if model is None:
        raise PreftuneError("the model was deleted")
    base = platform.store.get(ModelVersion, model.base) if model.base else None
    return {"work": "export", "model": model.run, "form": job.request["form"], "base": base.name if base else model.name}


def keep_archive(platform: Platform, job: Job, path: Path) -> None:
    """Keep a packed model among the artifacts."""
    with path.open("rb") as file:
        platform.artifacts.put(f"exports/{job.model}/{job.request['form']}.tar.gz", iter(lambda: file.read(CHUNK), b""))


def pack(task: dict[str, Any], folder: Path) -> None:
    """Write ``folder/ARCHIVE``: the adapter on its base's name, or the whole model, merged and compared with its source."""
    source = Path(task["model"])
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        is_adapter = (source / "adapter_config.json").is_file()
        if task["form"] == "merged" and is_adapter:
            place = Path(temporary) / "merged"
            place.mkdir()
            _merge(str(source), place)
        elif is_adapter:
            place = Path(temporary)
            for path in source.iterdir():
                (place / path.name).symlink_to(path)
            (place / "adapter_config.json").unlink()
            config = {**read_json(source / "adapter_config.json"), "base_model_name_or_path": task["base"]}
            write_json(place / "adapter_config.json", config)
        else:
            place = source
        with replacing(folder / ARCHIVE) as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
            _tar(place, packed)


def _merge(source: str, place: Path) -> None:
    from preftune.core.recipe import ModelConfig
    from preftune.modeling.export import write_export

    base = str(read_json(Path(source) / "adapter_config.json")["base_model_name_or_path"])
    verified = write_export(ModelConfig(name=source), place, "merged", _dtype(base))
    if not verified.is_same:
        raise PreftuneError(
            f"the merged model is not its source: a token's log-prob differs by {verified.largest_gap:.3g} nat; report this"
        )


def _dtype(base: str) -> Literal["float32", "bfloat16"]:
    """The precision of the base's own files."""
    from preftune.modeling.load import model_path

    config = Path(model_path(base)) / "config.json"
    given = read_json(config) if config.is_file() else {}
    return "bfloat16" if given.get("dtype", given.get("torch_dtype")) == "bfloat16" else "float32"


def _tar(place: Path, file: Any) -> None:
    """The files of a folder, in order and without times or owners: the same model gives the same bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, dereference=True) as tar:
        for path in sorted(place.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                tar.add(path, path.name, filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
