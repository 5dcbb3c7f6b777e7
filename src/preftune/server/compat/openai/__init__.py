"""OpenAI's dialect."""

from __future__ import annotations

from preftune.server.compat.openai import evals, jobs, models, uploads

routers = (evals.router, uploads.router, jobs.router, models.router)
