"""OpenAI's evals: criteria that are kept, and runs of them over rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from preftune.app.grading.graders import NEED_A_MODEL, check_grader, grade
from preftune.app.jobs.evaluations import cancel_evaluation, keep_rows, rows_of, submit_evaluation
from preftune.server.compat.openai.eval_views import eval_object, item_object, run_object
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import file_of, platform_of, resource_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import cursor_page
from preftune.store.base import Query as Asked
from preftune.store.records import Job, Resource, new_id, now

router = APIRouter(prefix="/v1")
TYPE = "openai.eval"
Limit = Annotated[int, Query(ge=1, le=1000)]
Order = Literal["asc", "desc"]


class Body(BaseModel):
    """A request; unknown keys are kept."""

    model_config = ConfigDict(extra="allow")


class NewEval(Body):
    """Criteria over rows of a schema."""

    data_source_config: dict[str, Any]
    testing_criteria: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=50)]
    name: Annotated[str, Field(max_length=200)] = ""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


class EvalChange(Body):
    """What may be changed of an eval."""

    name: Annotated[str, Field(max_length=200)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


class NewRun(Body):
    """A run of an eval's criteria."""

    data_source: dict[str, Any]
    name: Annotated[str, Field(max_length=200)] = ""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None


class GraderRun(Body):
    """One grader on one answer."""

    grader: dict[str, Any]
    model_sample: str = ""
    item: dict[str, Any] = Field(default_factory=dict)


@router.post("/evals")
def create_eval(request: Request, caller: CallerOf, body: NewEval) -> dict[str, Any]:
    """Keep criteria; ``python`` graders are refused, because code of users is not run."""
    caller.must_be("developer")
    if body.data_source_config.get("type") != "custom":
        raise ApiError(400, "data_source_config.type custom is what there is: rows come with a run", param="data_source_config")
    for index, grader in enumerate(body.testing_criteria):
        check_grader(grader, f"testing_criteria.{index}")
    told = {**body.model_dump(), "updated_at": now().isoformat()}
    made = Resource(id=new_id("eval_"), project=caller.project, type=TYPE, name=body.name, body=told)
    kept = platform_of(request).store.insert(made)
    audit(platform_of(request), caller, "eval.create", kept.id)
    return eval_object(kept)


@router.get("/evals")
def list_evals(
    request: Request, caller: CallerOf, after: str | None = None, limit: Limit = 20, order: Order = "asc"
) -> dict[str, Any]:
    """Evals of the project."""
    query = Asked(caller.project, {"type": TYPE}, after, limit, order == "desc")
    return cursor_page(platform_of(request).store.page(Resource, query), eval_object)


@router.get("/evals/{eval_id}")
def get_eval(request: Request, caller: CallerOf, eval_id: str) -> dict[str, Any]:
    """One eval."""
    return eval_object(resource_of(request, caller, TYPE, eval_id))


@router.post("/evals/{eval_id}")
def change_eval(request: Request, caller: CallerOf, eval_id: str, body: EvalChange) -> dict[str, Any]:
    """Change an eval's name or metadata; its criteria stay what runs were judged by."""
    caller.must_be("developer")
    found = resource_of(request, caller, TYPE, eval_id)
    told = {**found.body, **body.model_dump(exclude_none=True, include={"name", "metadata"}), "updated_at": now().isoformat()}
    return eval_object(platform_of(request).store.change(Resource, found.id, {"body": told, "name": told["name"]}) or found)


@router.delete("/evals/{eval_id}")
def delete_eval(request: Request, caller: CallerOf, eval_id: str) -> dict[str, Any]:
    """Delete an eval; its runs are no longer reached."""
    caller.must_be("developer")
    resource_of(request, caller, TYPE, eval_id)
    platform_of(request).store.change(Resource, eval_id, {"deleted_at": now()})
    audit(platform_of(request), caller, "eval.delete", eval_id)
    return {"object": "eval.deleted", "deleted": True, "eval_id": eval_id}


@router.post("/evals/{eval_id}/runs")
def create_run(request: Request, caller: CallerOf, eval_id: str, body: NewRun) -> dict[str, Any]:
    """Judge rows: those of a file or of the request, with answers that they bring or that a model writes now."""
    caller.must_be("developer")
    platform, found = platform_of(request), resource_of(request, caller, TYPE, eval_id)
    graders = found.body["testing_criteria"]
    task: dict[str, Any] = {
        "kind": "graders", "graders": graders, "sample": _sample(body.data_source),
        "models": sorted({str(one["model"]) for one in graders if one["type"] in NEED_A_MODEL}),
    }  # fmt: skip
    file_id = _rows(request, caller, body.data_source)
    job = Job(
        id=new_id("evalrun_"), project=caller.project, work="evaluate", status="validating", dialect="openai", name=eval_id,
        request=body.model_dump(exclude_none=True), recipe=task, files=(file_id,), metadata=body.metadata or {},
        idempotency=request.headers.get("idempotency-key"),
    )  # fmt: skip
    job = submit_evaluation(platform, job)
    audit(platform, caller, "eval.run", job.id, eval=eval_id)
    return run_object(job)


def _rows(request: Request, caller: Caller, source: dict[str, Any]) -> str:
    given = source.get("source")
    given = given if isinstance(given, dict) else {}
    if given.get("type") == "file_id":
        return file_of(request, caller, str(given.get("id"))).id
    rows = given.get("content")
    if given.get("type") != "file_content" or not isinstance(rows, list) or not rows:
        raise ApiError(400, "data_source.source: send file_id, or file_content with rows", param="data_source.source")
    return keep_rows(platform_of(request), caller.project, rows).id


def _sample(source: dict[str, Any]) -> dict[str, Any] | None:
    """The model that writes the answers, None where the rows bring them."""
    kind = source.get("type")
    if kind == "jsonl":
        return None
    if kind not in {"completions", "responses"}:
        raise ApiError(
            400, f"data_source.type {kind!r} is not offered; there is jsonl, completions, responses", param="data_source"
        )
    messages = source.get("input_messages") or {}
    template = messages.get("template") if isinstance(messages, dict) else None
    if not isinstance(template, list) or not template or not source.get("model"):
        raise ApiError(
            400, "data_source: model and input_messages with a template are needed", param="data_source.input_messages"
        )
    turns = []
    for turn in template:
        content = turn.get("content") if isinstance(turn, dict) else None
        text = content if isinstance(content, str) else (content or {}).get("text") if isinstance(content, dict) else None
        if not isinstance(text, str) or turn.get("role") not in {"system", "developer", "user", "assistant"}:
            raise ApiError(400, "data_source.input_messages: a turn has a role and a text", param="data_source.input_messages")
        turns.append({"role": turn["role"], "content": text})
    return {"model": str(source["model"]), "template": turns, "sampling": _sampling(source.get("sampling_params") or {})}


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    class Sampling(BaseModel):
        temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
        max_completion_tokens: Annotated[int, Field(ge=1, le=32_768)] = 256
        seed: Annotated[int, Field(ge=0, lt=2**63)] = 42

    try:
        found = Sampling.model_validate({key: value for key, value in given.items() if value is not None})
    except ValueError as error:
        raise ApiError(400, f"data_source.sampling_params: {str(error).splitlines()[-2].strip()}", param="data_source") from None
    told = found.model_dump()
    return {**{key: told[key] for key in ("temperature", "top_p", "seed")}, "max_tokens": told["max_completion_tokens"]}


@router.get("/evals/{eval_id}/runs")
def list_runs(
    request: Request, caller: CallerOf, eval_id: str, after: str | None = None, limit: Limit = 20, order: Order = "asc"
) -> dict[str, Any]:
    """Runs of an eval."""
    resource_of(request, caller, TYPE, eval_id)
    query = Asked(caller.project, {"work": "evaluate", "name": eval_id}, after, limit, order == "desc")
    return cursor_page(platform_of(request).store.page(Job, query), run_object)


def _run(request: Request, caller: Caller, eval_id: str, run_id: str) -> Job:
    resource_of(request, caller, TYPE, eval_id)
    job = platform_of(request).store.get(Job, run_id, caller.project)
    if job is None or job.work != "evaluate" or job.name != eval_id:
        raise not_found("run", run_id)
    return job


@router.get("/evals/{eval_id}/runs/{run_id}")
def get_run(request: Request, caller: CallerOf, eval_id: str, run_id: str) -> dict[str, Any]:
    """One run."""
    return run_object(_run(request, caller, eval_id, run_id))


@router.post("/evals/{eval_id}/runs/{run_id}")
@router.post("/evals/{eval_id}/runs/{run_id}/cancel")
def cancel_run(request: Request, caller: CallerOf, eval_id: str, run_id: str) -> dict[str, Any]:
    """Cancel a run. (Older clients post to the run itself.)"""
    caller.must_be("developer")
    job = cancel_evaluation(platform_of(request), _run(request, caller, eval_id, run_id))
    audit(platform_of(request), caller, "eval.cancel", run_id)
    return run_object(job)


@router.delete("/evals/{eval_id}/runs/{run_id}")
def delete_run(request: Request, caller: CallerOf, eval_id: str, run_id: str) -> dict[str, Any]:
    """Delete a run that has ended."""
    caller.must_be("developer")
    from preftune.app.jobs import states

    states.delete(platform_of(request), _run(request, caller, eval_id, run_id))
    audit(platform_of(request), caller, "eval.run.delete", run_id)
    return {"object": "eval.run.deleted", "deleted": True, "run_id": run_id}


@router.get("/evals/{eval_id}/runs/{run_id}/output_items")
def list_items(
    request: Request, caller: CallerOf, eval_id: str, run_id: str, after: str | None = None, limit: Limit = 20,
    status: Literal["pass", "fail", "error"] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The judged rows of a finished run, in their order."""
    job = _run(request, caller, eval_id, run_id)
    first = 0 if after is None else int(after.rpartition("_")[2]) + 1 if after.rpartition("_")[2].isdecimal() else 0
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(rows_of(platform_of(request), job)):
        if index >= first and status in {None, row["status"]}:
            rows.append(item_object(job, index, row))
        if len(rows) > limit:
            break
    shown = rows[:limit]
    return {
        "object": "list", "data": shown, "has_more": len(rows) > limit,
        "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None,
    }  # fmt: skip


@router.get("/evals/{eval_id}/runs/{run_id}/output_items/{item_id}")
def get_item(request: Request, caller: CallerOf, eval_id: str, run_id: str, item_id: str) -> dict[str, Any]:
    """One judged row."""
    job = _run(request, caller, eval_id, run_id)
    for index, row in enumerate(rows_of(platform_of(request), job)):
        shown = item_object(job, index, row)
        if shown["id"] == item_id:
            return shown
    raise not_found("output item", item_id)


@router.post("/fine_tuning/alpha/graders/validate")
def validate_grader(caller: CallerOf, body: GraderRun) -> dict[str, Any]:
    """The grader as it was sent, where it is one that is offered."""
    del caller
    check_grader(body.grader)
    return {"grader": body.grader}


@router.post("/fine_tuning/alpha/graders/run")
def run_grader(caller: CallerOf, body: GraderRun) -> dict[str, Any]:
    """The grade of one answer, by a grader that asks no model."""
    del caller
    check_grader(body.grader)
    if body.grader["type"] in NEED_A_MODEL:
        raise ApiError(400, "a grader that asks a model is run by an eval; create one and a run of it", param="grader.type")
    graded = grade(body.grader, body.item, {"output_text": body.model_sample})
    kinds = (
        "formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error",
        "model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error",
        "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
    )  # fmt: skip
    errors: dict[str, Any] = dict.fromkeys(kinds, False)
    nulls = {"model_grader_server_error_details": None, "python_grader_runtime_error_details": None}
    told = {
        "name": graded.name, "type": graded.type, "errors": {**errors, **nulls, "python_grader_server_error_type": None},
        "execution_time": 0.0, "sampled_model_name": None, "scores": graded.detail.get("scores", {graded.name: graded.score}),
        "token_usage": None,
    }  # fmt: skip
    return {
        "reward": graded.score, "metadata": told, "sub_rewards": told["scores"], "model_grader_token_usage_per_model": {},
    }  # fmt: skip
