"""The OpenAPI document of the native API: every route under /api/v1, with its one error envelope and its key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import iter_route_contexts

from preftune.core.api import ErrorBody
from preftune.core.version import __version__

PREFIX = "/api/v1"
_ERROR = {"description": "What went wrong, and what to do.", "content": {"application/json": {"schema": {}}}}


def document_of(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1 of every route under /api/v1, those of other parts of the server too."""
    routes = [route for route in iter_route_contexts(app.routes) if (route.path or "").startswith(PREFIX)]
    document = get_openapi(title="preftune", version=__version__, summary="Preference tuning end to end.", routes=routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**error.pop("$defs"), "ErrorBody": error}
    told = {**_ERROR, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}}
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # what does not validate is answered 400, as everywhere here
            operation["responses"] |= {"4XX": told, "503": told, "507": told}
    return document
