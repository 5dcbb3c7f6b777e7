"""SeekrFlow's dialect."""

from __future__ import annotations

from preftune.server.compat.seekr import deployments, files, jobs, projects

routers = (files.router, jobs.router, projects.router, deployments.router)
