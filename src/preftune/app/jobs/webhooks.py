"""Webhooks: addresses that are told when a job ends, signed by the Standard Webhooks scheme.

What is delivered are the events of the store, in their order, by a cursor that each webhook has in the store too: a crash
tells an event again rather than not at all, always under the same ``webhook-id``, by which a receiver knows it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from preftune.app.jobs import vault
from preftune.app.jobs.platform import Platform, event
from preftune.core.errors import PreftuneError, UsageError
from preftune.store.base import Query
from preftune.store.records import Event, Job, Resource, Webhook, new_id, now

TYPES = {
    f"{kind}.{state}": (work, state)
    for kind, work in (("fine_tuning.job", "train"), ("eval.run", "evaluate"))
    for state in ("succeeded", "failed", "cancelled")
}
WAITS_S = (1.0, 5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)  # behind each failed try; then the event is given up
TIMEOUT_S = 10.0
CURSOR = "webhook_cursor"
ENDINGS = ("succeeded", "failed", "cancelled")

log = logging.getLogger("preftune.webhooks")


def add(platform: Platform, project: str, url: str, types: Sequence[str] = (), name: str = "") -> tuple[Webhook, str]:
    """Make a webhook; its signing secret is given back once. It is told of what happens from now on.

    Raises
        UsageError: no http or https URL, or a type of event that does not exist.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.password:
        raise UsageError("url: write http://HOST/PATH or https://HOST/PATH, without a user name")
    unknown = sorted(set(types) - set(TYPES))
    if unknown:
        raise UsageError(f"events: there is no {unknown[0]!r}; there is {', '.join(sorted(TYPES))}")
    webhook_id = new_id("we_")
    value = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode("ascii")
    kept = vault.keep(platform, project, f"webhook {webhook_id}", value)
    last = platform.store.page(Event, Query(project, limit=1)).items
    platform.store.insert(
        Resource(
            id=f"cursor_{webhook_id}", project=project, type=CURSOR, name=webhook_id, body={"after": last[0].id if last else None}
        )
    )
    made = Webhook(id=webhook_id, project=project, url=url, events=tuple(types) or tuple(TYPES), secret=kept.id, name=name)
    return platform.store.insert(made), value


def signature(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """``webhook-signature`` of Standard Webhooks 1.0: ``v1,`` base64(HMAC-SHA256(secret, "{id}.{timestamp}.{body}"))."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode("ascii")


class Deliverer:
    """Tells webhooks what happened; a worker runs one in a thread of its own.

    A receiver has ten seconds. Anything but a 2xx is tried again, later and later, and keeps the events behind it waiting; 410
    Gone ends the webhook. Redirects are not followed.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._not_before: dict[str, float] = {}

    def run(self, should_stop: Callable[[], bool], pause_s: float = 1.0) -> None:
        """Deliver until asked to stop."""
        while not should_stop():
            try:
                self.tick()
            except PreftuneError as error:
                log.warning("webhooks wait: %s", error)
            time.sleep(pause_s)

    def tick(self) -> int:
        """One round over all webhooks; how many events were delivered."""
        store = self._platform.store
        hooks = store.page(Webhook, Query(None, limit=1000, is_newest_first=False)).items
        return sum(self._serve(hook) for hook in hooks if self._not_before.get(hook.id, 0.0) <= time.monotonic())

    def _serve(self, hook: Webhook) -> int:
        """Deliver what a webhook has not been told of yet, in order, until one fails."""
        store, number = self._platform.store, 0
        while True:
            cursor = store.get(Resource, f"cursor_{hook.id}", hook.project)
            if cursor is None:
                return number
            waiting = Query(hook.project, {"type": ENDINGS}, cursor.body["after"], limit=20, is_newest_first=False)
            events = store.page(Event, waiting).items
            if not events:
                return number
            for one in events:
                body = self._body(hook, one)
                if body is not None and not self._post(hook, cursor, one, body):
                    return number
                number += body is not None
                moved = {"body": {"after": one.id}}
                cursor = store.change(Resource, cursor.id, moved, expect={"body": cursor.body})
                if cursor is None:  # another worker tells this webhook at the same moment: leave it to that one
                    return number

    def _body(self, hook: Webhook, one: Event) -> bytes | None:
        job = self._platform.store.get(Job, one.subject, hook.project, with_deleted=True)
        found = [name for name, what in TYPES.items() if job is not None and what == (job.work, one.type)]
        if not found or found[0] not in hook.events:
            return None
        told = {"id": _id(one), "object": "event", "created_at": int(one.created_at.timestamp()), "type": found[0]}
        return json.dumps({**told, "data": {"id": one.subject}}).encode()

    def _post(self, hook: Webhook, cursor: Resource, one: Event, body: bytes) -> bool:
        """Whether the event is done with: delivered, or given up."""
        said = self._call(hook, one, body)
        if not said:
            self._not_before.pop(hook.id, None)
            return True
        tries = int(cursor.body.get("tries", 0)) + 1
        log.warning("webhook %s, event %s, try %d: %s", hook.id, one.id, tries, said)
        store = self._platform.store
        if said == "410":
            store.change(Webhook, hook.id, {"deleted_at": now()})
            gone = event(
                hook.id, hook.project, "webhook_gone", "the receiver answered 410 Gone; the webhook is off", level="warn"
            )
            store.insert(gone)
            return True
        if tries > len(WAITS_S):
            message = f"event {one.id} of {one.subject} was not delivered in {tries} tries, the last: {said}"
            store.insert(event(hook.id, hook.project, "webhook_given_up", message, level="error"))
            return True
        store.change(Resource, cursor.id, {"body": {**cursor.body, "tries": tries}}, expect={"body": cursor.body})
        self._not_before[hook.id] = time.monotonic() + WAITS_S[tries - 1]
        return False

    def _call(self, hook: Webhook, one: Event, body: bytes) -> str:
        """Empty where the receiver took it, else why not."""
        import httpx2

        from preftune.judging import outbound

        try:
            secret = vault.read(self._platform, hook.secret, hook.project)
        except PreftuneError as error:
            return str(error)
        stamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "webhook-id": _id(one),
            "webhook-timestamp": str(stamp),
            "webhook-signature": signature(secret, _id(one), stamp, body),
        }
        try:
            with (
                outbound.client(timeout=TIMEOUT_S) as http,
                http.stream("POST", hook.url, content=body, headers=headers) as reply,
            ):
                status = reply.status_code
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return " ".join(str(error).split()) or type(error).__name__
        return "" if 200 <= status < 300 else "410" if status == 410 else f"the receiver answered {status}"


def _id(one: Event) -> str:
    return "evt_" + one.id.rpartition("-")[2]


def remove(platform: Platform, project: str, webhook_id: str) -> None:
    """Take a webhook away: nothing more is told.

    Raises
        UsageError: there is no such webhook.
    """
    gone = {"deleted_at": now()}
    if platform.store.change(Webhook, webhook_id, gone, expect={"project": project, "deleted_at": None}) is None:
        raise UsageError(f"there is no webhook {webhook_id!r}")
