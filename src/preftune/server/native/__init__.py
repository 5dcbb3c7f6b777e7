"""The native API under /api/v1: the words of the command line, for every part of an installation."""

from preftune.server.native import access, aliases, evaluations, events, files, jobs, models, webhooks

routers = (
    access.router, files.router, jobs.router, evaluations.router, events.router, models.router, aliases.router, webhooks.router,
)  # fmt: skip

__all__ = ["routers"]
