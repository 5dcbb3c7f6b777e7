"""What an operator sees: Prometheus metrics at ``/metrics``, one JSON line a request in the log."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preftune.app.jobs.platform import Platform
from preftune.server.security import CallerOf
from preftune.store.base import Query
from preftune.store.records import ACTIVE, ENDED, Job

log = logging.getLogger("preftune.access")
router = APIRouter()
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Meters:
    """The metrics of one server. Labels have few values: a route's template, never a path with ids in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        words = ("method", "route")
        self.requests = Counter("preftune_http_requests", "Requests answered.", (*words, "status"), registry=self.registry)
        self.seconds = Histogram(
            "preftune_http_request_seconds", "From a request's first byte to its answer's last.", words, buckets=BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.active = Gauge("preftune_http_requests_in_progress", "Requests being answered.", registry=self.registry)
        self.jobs = Gauge("preftune_jobs", "Jobs by kind of work and status.", ("work", "status"), registry=self.registry)

    def count_jobs(self, platform: Platform) -> None:
        """Read how many jobs there are in each state."""
        for work in ("train", "evaluate", "validate", "export"):
            for status in (*ACTIVE, *ENDED):
                number = platform.store.count(Job, Query(None, {"work": work, "status": status}))
                self.jobs.labels(work, status).set(number)


class Observed:
    """The outermost layer: times each request, counts it and writes it down."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        request_id = ""

        async def tell(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                found = dict(message.get("headers", ()))
                request_id = found.get(b"x-request-id", b"").decode("latin-1")
            await send(message)

        self._meters.active.inc()
        try:
            await self._app(scope, receive, tell)
        finally:
            self._meters.active.dec()
            took = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", None) or "none"
            self._meters.requests.labels(scope["method"], route, str(status)).inc()
            self._meters.seconds.labels(scope["method"], route).observe(took)
            caller = scope.get("state", {}).get("caller")
            log.info(
                "request",
                extra={
                    "fields": {
                        "request_id": request_id, "method": scope["method"], "route": route, "path": scope["path"][:200],
                        "status": status, "ms": round(1000 * took, 1), "key": getattr(caller, "key", None),
                        "client": (scope.get("client") or ("",))[0],
                    }
                },
            )  # fmt: skip


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, message and its fields. Nothing that a client sends breaks a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        made: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            made["traceback"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=True)


def write_log(kind: str) -> None:
    """Send the log to standard error: ``plain`` warnings and worse as text, ``json`` every request as a line of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    if kind == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    root = logging.getLogger("preftune")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if kind == "json" else logging.WARNING)
    root.propagate = False


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, caller: CallerOf) -> Response:
    """Prometheus' text format; any key may read it."""
    del caller
    meters: Meters = request.app.state.meters
    meters.count_jobs(request.app.state.platform)
    return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)
