"""Webhooks: addresses that are told when jobs end."""

from __future__ import annotations

from fastapi import APIRouter, Request

from preftune.app.jobs import webhooks
from preftune.core import api
from preftune.server.errors import not_found
from preftune.server.lookup import platform_of
from preftune.server.native import shown
from preftune.server.native.paging import PartOf, page_of
from preftune.server.security import CallerOf, audit
from preftune.store.records import Webhook

router = APIRouter(prefix="/api/v1/webhooks", tags=["webhooks"])


@router.get("")
def list_webhooks(request: Request, caller: CallerOf, asked: PartOf) -> api.Page[api.Webhook]:
    """Webhooks of the project."""
    caller.must_be("developer")
    return page_of(platform_of(request), Webhook, asked, caller.project, shown.webhook)


@router.post("", status_code=201)
def add_webhook(request: Request, caller: CallerOf, body: api.NewWebhook) -> api.WebhookMade:
    """Add a webhook. Its signing secret (Standard Webhooks) is shown once. It is told of what happens from now on."""
    caller.must_be("developer")
    made, secret = webhooks.add(platform_of(request), caller.project, body.url, body.events, body.name)
    audit(platform_of(request), caller, "webhook.create", made.id, url=made.url)
    return api.WebhookMade(**shown.webhook(made).model_dump(), secret=secret)


@router.delete("/{webhook_id}")
def remove_webhook(request: Request, caller: CallerOf, webhook_id: str) -> api.Deleted:
    """Take a webhook away: nothing more is told."""
    caller.must_be("developer")
    if platform_of(request).store.get(Webhook, webhook_id, caller.project) is None:
        raise not_found("webhook", webhook_id)
    webhooks.remove(platform_of(request), caller.project, webhook_id)
    audit(platform_of(request), caller, "webhook.delete", webhook_id)
    return api.Deleted(id=webhook_id)
