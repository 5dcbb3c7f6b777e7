"""Models: listed, with their versions and lineage; weights to download."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from preftune.app.jobs.exports import archive_key
from preftune.app.jobs.lineage import ancestry_of
from preftune.app.jobs.models import delete_model as remove
from preftune.core import api
from preftune.server.errors import ApiError
from preftune.server.lookup import model_of, platform_of
from preftune.server.native import shown
from preftune.server.native.paging import PartOf, page_of
from preftune.server.packing import packed
from preftune.server.ranges import content_of
from preftune.server.security import CallerOf, audit
from preftune.store.records import ModelVersion

router = APIRouter(prefix="/api/v1/models", tags=["models"])
WAIT_SECONDS = 50.0
ARCHIVE = "application/x-tar"


@router.get("")
def list_models(
    request: Request, caller: CallerOf, asked: PartOf, form: Literal["full", "adapter"] | None = None,
    job: Annotated[str | None, Query(max_length=128)] = None, name: Annotated[str | None, Query(max_length=512)] = None,
) -> api.Page[api.Model]:  # fmt: skip
    """Models that were made in the project; ``/models/base`` lists what the operator offers."""
    where = {"form": form or ("full", "adapter"), "job": job, "name": name}
    return page_of(platform_of(request), ModelVersion, asked, caller.project, shown.model, where=where)


@router.get("/base")
def base_models(request: Request, caller: CallerOf, asked: PartOf) -> api.Page[api.Model]:
    """Models that jobs of every project may start from."""
    del caller
    return page_of(platform_of(request), ModelVersion, asked, None, shown.model, where={"form": "base"})


@router.get("/{name:path}/versions")
def versions(request: Request, caller: CallerOf, name: str, asked: PartOf) -> api.Page[api.Model]:
    """Every version of a name."""
    found = model_of(request, caller, name)
    project = None if found.form == "base" else caller.project
    where = {"name": found.name} | ({"form": "base"} if found.form == "base" else {})
    return page_of(platform_of(request), ModelVersion, asked, project, shown.model, where=where)


@router.get("/{name:path}/lineage")
def lineage(request: Request, caller: CallerOf, name: str) -> api.Lineage:
    """Where a model comes from: parents, jobs, files, and the people who judged their rows."""
    model = model_of(request, caller, name)
    found = ancestry_of(platform_of(request), model)
    files = tuple(
        api.LineageFile(
            id=file_id, filename=None if file is None or file.deleted_at else file.filename, sha256=file.sha256 if file else "",
            annotators=tuple(file.report.get("annotators", ())) if file else (),
        )
        for file_id, file in found.files.items()
    )  # fmt: skip
    return api.Lineage(
        model=shown.model(model), parents=tuple(map(shown.model, found.parents)), jobs=tuple(map(shown.job, found.jobs)),
        files=files,
    )  # fmt: skip


@router.get(
    "/{name:path}/download",
    response_class=Response,
    responses={
        200: {"content": {ARCHIVE: {}}}, 206: {"content": {ARCHIVE: {}}},
        416: {"description": "The range lies outside of the bytes.", "model": api.ErrorBody},
        503: {"description": "The archive is being packed; ask again.", "model": api.ErrorBody},
    },
)  # fmt: skip
async def download(
    request: Request, caller: CallerOf, name: str, form: api.WeightsForm = "merged",
    wait: Annotated[float, Query(ge=0, le=300, description="Seconds to wait where it must be packed first.")] = WAIT_SECONDS,
) -> Response:  # fmt: skip
    """The weights as one gzipped tar of safetensors, whole or a range of them; packed when they are first asked for."""
    caller.must_be("developer")
    platform = platform_of(request)
    model = await run_in_threadpool(model_of, request, caller, name)
    if model.form == "base":
        raise ApiError(403, f"{model.name!r} is a base model; ask its operator for its weights", code="base_model")
    await packed(platform, model, form, wait)
    await run_in_threadpool(lambda: audit(platform, caller, "model.download", model.id, form=form))
    return await run_in_threadpool(content_of, request, archive_key(model, form), ARCHIVE)


@router.get("/{name:path}")
def get_model(request: Request, caller: CallerOf, name: str) -> api.Model:
    """The newest version of a name, or the version that an id names."""
    return shown.model(model_of(request, caller, name))


@router.delete("/{name:path}")
def delete_model(request: Request, caller: CallerOf, name: str) -> api.Deleted:
    """Delete a version of a tuned model; base models are the operator's."""
    caller.must_be("developer")
    model = model_of(request, caller, name)
    if model.form == "base":
        raise ApiError(403, f"{model.name!r} is a base model; only its operator can take it away", code="base_model")
    remove(platform_of(request), model)
    audit(platform_of(request), caller, "model.delete", model.id, name=model.name)
    return api.Deleted(id=model.id)
