"""Evals, their runs and judged rows in OpenAI's words."""

from __future__ import annotations

from typing import Any

from preftune.server.views import seconds
from preftune.store.records import Job, Resource

STATUS = {
    "validating": "queued", "queued": "queued", "running": "in_progress", "exporting": "in_progress", "paused": "queued",
    "cancelled": "canceled", "succeeded": "completed", "failed": "failed",
}  # fmt: skip


def eval_object(found: Resource) -> dict[str, Any]:
    """An eval; the schema is that of an item, and of a sample beside it where there is one."""
    given = found.body["data_source_config"]
    properties: dict[str, Any] = {"item": given.get("item_schema", {})}
    if given.get("include_sample_schema"):
        properties["sample"] = {"type": "object", "properties": {"output_text": {"type": "string"}}}
    return {
        "id": found.id,
        "object": "eval",
        "created_at": seconds(found.created_at),
        "name": found.body["name"],
        "metadata": found.body["metadata"] or {},
        "data_source_config": {
            "type": "custom", "schema": {"type": "object", "properties": properties, "required": list(properties)},
        },
        "testing_criteria": [_criterion(one) for one in found.body["testing_criteria"]],
    }  # fmt: skip


def _criterion(given: dict[str, Any]) -> dict[str, Any]:
    """A grader with what a client's model needs and the request may leave out."""
    extra = {"pass_threshold": 0.5} if given["type"] == "text_similarity" and "pass_threshold" not in given else {}
    return {"name": given["type"], **given, **extra}


def run_object(job: Job) -> dict[str, Any]:
    """A run; its error is always an object, which is what the client's strict mode wants."""
    result = job.result if job.status == "succeeded" else {}
    usage, sample = result.get("usage") or {}, job.recipe.get("sample")
    used = {"prompt_tokens": usage.get("prompt_tokens", 0), "completion_tokens": usage.get("completion_tokens", 0)}
    per_model = {
        "run_model_name": sample["model"], "model_name": sample["model"], "invocation_count": usage.get("invocation_count", 0),
        **used, "total_tokens": sum(used.values()), "cached_tokens": 0,
    } if sample else None  # fmt: skip
    return {
        "id": job.id,
        "object": "eval.run",
        "eval_id": job.name,
        "created_at": seconds(job.created_at),
        "status": STATUS[job.status],
        "model": sample["model"] if sample else "",
        "name": job.request.get("name", ""),
        "metadata": job.metadata,
        "data_source": job.request["data_source"],
        "error": {"code": job.error.get("code", ""), "message": job.error.get("message", "")},
        "report_url": "",
        "result_counts": result.get("result_counts") or {"total": 0, "passed": 0, "failed": 0, "errored": 0},
        "per_testing_criteria_results": result.get("per_testing_criteria_results") or [],
        "per_model_usage": [per_model] if per_model else [],
    }


def item_object(job: Job, index: int, row: dict[str, Any]) -> dict[str, Any]:
    """A judged row."""
    spec, sample = job.recipe.get("sample") or {}, row["sample"]
    sampling = spec.get("sampling") or {}
    used = {"prompt_tokens": sample.get("prompt_tokens", 0), "completion_tokens": sample.get("completion_tokens", 0)}
    answer = sample.get("output_text")
    failed = row["error"] or sample.get("error", "")
    return {
        "id": f"outputitem_{job.id.rpartition('_')[2]}_{index}",
        "object": "eval.run.output_item",
        "created_at": seconds(job.finished_at or job.updated_at),
        "datasource_item": row["item"],
        "datasource_item_id": index,
        "eval_id": job.name,
        "run_id": job.id,
        "status": row["status"],
        "results": [
            {"name": one["name"], "type": one["type"], "passed": one["passed"], "score": one["score"], "sample": one["detail"]}
            for one in row["results"]
        ],
        "sample": {
            "error": {"code": "error" if failed else "", "message": failed},
            "finish_reason": sample.get("finish_reason", ""),
            "input": sample.get("input", []),
            "output": [] if answer is None else [{"role": "assistant", "content": answer}],
            "max_completion_tokens": sampling.get("max_tokens", 0),
            "model": spec.get("model", ""),
            "seed": sampling.get("seed", 0),
            "temperature": sampling.get("temperature", 0.0),
            "top_p": sampling.get("top_p", 1.0),
            "usage": {**used, "total_tokens": sum(used.values()), "cached_tokens": 0},
        },
    }
