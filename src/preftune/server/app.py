"""The application: gate, errors, probes and the routes of every dialect."""

from __future__ import annotations

import secrets

from fastapi import FastAPI
from starlette.responses import JSONResponse

from preftune.app.jobs.platform import Platform
from preftune.core.version import __version__
from preftune.server.compat import openai
from preftune.server.errors import add_handlers
from preftune.server.security import Gate, Limiter
from preftune.server.settings import ServerSettings
from preftune.store.base import Query, StoreUnavailable
from preftune.store.records import Project


def create_app(platform: Platform, settings: ServerSettings) -> FastAPI:
    """The server over an installation. Nothing is started here; jobs are a worker's."""
    app = FastAPI(title="preftune", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.platform, app.state.settings = platform, settings
    app.state.limiter = Limiter(settings.requests_per_minute)
    app.state.signing_key = secrets.token_bytes(32)
    app.add_middleware(Gate, settings=settings)
    add_handlers(app)

    @app.get("/healthz", include_in_schema=False)
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/readyz", include_in_schema=False)
    def readyz() -> JSONResponse:
        """The database answers too."""
        try:
            platform.store.page(Project, Query(None, limit=1))
        except StoreUnavailable as error:
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        return JSONResponse({"status": "ready"})

    app.include_router(openai.router)
    return app
