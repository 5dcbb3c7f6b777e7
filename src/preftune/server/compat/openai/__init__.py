"""OpenAI's dialect."""

from __future__ import annotations

from preftune.server.compat.openai import jobs, models, uploads

routers = (uploads.router, jobs.router, models.router)
