"""Together's dialect: SDK and command line."""

from __future__ import annotations

from preftune.server.compat.together import account, endpoints, evaluation, files, jobs, outputs, registry

routers = (account.router, files.router, outputs.router, jobs.router, registry.router, endpoints.router, evaluation.router)
