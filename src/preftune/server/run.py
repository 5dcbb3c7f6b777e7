"""A server with its embedded worker: started, announced, stopped."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace

import uvicorn

from preftune.app.jobs.keys import add_key, digest_of
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.app.serve import EmbeddedWorker, offer_models, placed_upstreams
from preftune.app.serving.service import ServingOptions
from preftune.core.errors import PreftuneError
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.serving.upstream import UpstreamOptions
from preftune.store.base import Query
from preftune.store.records import Key

STOP_SECONDS = 150
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, so that none is closed under a request


def serve(
    platform: Platform,
    settings: ServerSettings,
    models: Mapping[str, str],
    *,
    slots: int,
    say: Callable[[str], None],
    serving: ServingOptions | None = None,
    upstreams: Mapping[str, UpstreamOptions] | None = None,
) -> None:
    """Listen until SIGTERM or SIGINT; the worker's jobs checkpoint before this returns.

    Raises
        UsageError: an address that others reach without a key, or a model folder that is not there.
        PreftuneError: the port is taken.
    """
    settings.check(has_own_key=bool(os.environ.get("PREFTUNE_API_KEY")) or platform.store.count(Key, Query(None)) > 0)
    offer_models(platform, models, (upstreams or {}).keys())
    serving = replace(serving or ServingOptions(), upstreams=placed_upstreams(models, upstreams or {}))
    _first_key(platform, say)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    app = create_app(platform, settings, serving)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=10,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            proxy_headers=False,
        )
    )
    worker = EmbeddedWorker(slots, say) if slots > 0 else None
    say(f"listening on http://{host}:{port} (OpenAI base_url: http://{host}:{port}/v1); stop with Ctrl-C")
    try:
        server.run(sockets=[listener])
    finally:
        if worker is not None:
            worker.stop(STOP_SECONDS)
        platform.store.close()


def _first_key(platform: Platform, say: Callable[[str], None]) -> None:
    """The operator's key from PREFTUNE_API_KEY, or a fresh one that is printed once where there is none at all."""
    project = platform.project(DEFAULT_PROJECT).id
    given = os.environ.get("PREFTUNE_API_KEY")
    if given:
        if not platform.store.page(Key, Query(None, {"digest": digest_of(given)}, limit=1)).items:
            add_key(platform, project, "PREFTUNE_API_KEY", "admin", given)
        return
    if platform.store.count(Key, Query(None)) == 0:
        _, value = add_key(platform, project, "first", "admin")
        say(f"API key (shown once): {value}")


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise PreftuneError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
        ) from None
    listener.listen(512)
    return listener
