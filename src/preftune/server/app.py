"""The application: gate, errors, probes and the routes of every dialect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.responses import JSONResponse

from preftune.app.jobs.platform import Platform
from preftune.app.serving.service import Service, ServingOptions
from preftune.core.version import __version__
from preftune.server import feedback, native, observe, serving
from preftune.server.compat import completions, files, openai, seekr, storage, together
from preftune.server.errors import add_handlers
from preftune.server.observe import Meters, Observed
from preftune.server.security import Gate, Limiter, signing_key
from preftune.server.settings import ServerSettings
from preftune.store.base import Query, StoreUnavailable
from preftune.store.records import Project


def create_app(platform: Platform, settings: ServerSettings, options: ServingOptions | None = None) -> FastAPI:
    """The server over an installation. Nothing is started here; jobs are a worker's, and models start when they are asked."""
    service = Service(platform, options or ServingOptions())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await service.close()

    app = FastAPI(
        title="preftune", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    app.state.platform, app.state.settings, app.state.serving = platform, settings, service
    app.state.limiter = Limiter(settings.requests_per_minute)
    app.state.signing_key = signing_key(platform.home)
    app.state.meters = Meters()
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(Observed, meters=app.state.meters)  # what is added last is outermost
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

    dialects = (*together.routers, *seekr.routers, files.router, *openai.routers)
    serving_routers = (completions.router, serving.router, serving.adapters, feedback.router)
    for router in (observe.router, storage.router, *serving_routers, *native.routers, *dialects):
        app.include_router(router)
    return app
