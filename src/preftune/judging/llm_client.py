"""Chat completions over HTTP: retries inside a budget, every outcome counted."""

from __future__ import annotations

import datetime
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from preftune.core.errors import PreftuneError, UsageError

if TYPE_CHECKING:
    import httpx2

MAX_REPLY_BYTES = 8 << 20
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
MAX_LOST_IN_A_ROW = 8  # judgements given up one after another; then the server is gone, not busy
RETRIED = frozenset({408, 425, 429})


class GivenUp(Exception):
    """A request whose retries or waiting time are used up."""


@dataclass(slots=True)
class Account:
    """What happened so far; every method may be called from any thread."""

    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, count: int = 1) -> None:
        """Count an event."""
        with self._lock:
            self.counts[name] += count

    def add_status(self, status: int) -> None:
        """Count an HTTP status."""
        with self._lock:
            self.statuses[status] += 1

    def to_dict(self) -> dict[str, Any]:
        """Every count in JSON values."""
        names = ("calls", "cached", "retried", "timeouts", "connection_errors", "malformed", "missing")
        with self._lock:
            tokens = {name: self.counts[f"{name}_tokens"] for name in ("prompt", "completion")}
            status = {str(one): count for one, count in sorted(self.statuses.items())}
            return {**{name: self.counts[name] for name in names}, "by_status": status, "tokens": tokens}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to try.

    timeout_s: of one call, from sending to the last byte. max_retries: of one request. budget_s: the longest sum of
    waits between the calls of one request. concurrency: calls at once.
    """

    timeout_s: float
    max_retries: int
    budget_s: float
    concurrency: int


class ChatClient:
    """Posts requests to one address. ``key_name`` is the environment variable that holds the key, for messages only."""

    def __init__(self, address: str, key: str | None, key_name: str | None, limits: Limits, account: Account) -> None:
        import httpx2

        from preftune.judging import outbound

        self.stopped = threading.Event()
        self._address, self._key, self._key_name, self._limits, self._account = address, key, key_name, limits, account
        self._lost_in_a_row = 0
        self._has_answered = False
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        pool = httpx2.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency)
        self._client = outbound.client(timeout=limits.timeout_s, headers=headers, limits=pool)

    def close(self) -> None:
        """Close every connection and wake every wait."""
        self.stopped.set()
        self._client.close()

    def post(self, body: Mapping[str, Any], draw: random.Random) -> Any:
        """The reply to a request as JSON, None where it is none.

        Parameters
            draw: of the waits between tries, seeded by the caller.

        Raises
            GivenUp: retries or budget are used up; the request is counted by the caller.
            PreftuneError: the server refuses the request (4xx), or it is gone.
        """
        waited = 0.0
        for attempt in range(self._limits.max_retries + 1):
            if self.stopped.is_set():
                raise GivenUp
            status, text, retry_after = self._call(body)
            if status == 200:
                self._lost_in_a_row, self._has_answered = 0, True
                return _json(text)
            if status and status < 500 and status not in RETRIED:
                raise PreftuneError(self._refused(status, text))
            if status == 0 and text.startswith("cannot connect") and not self._has_answered and attempt >= 2:
                raise PreftuneError(f"judge at {self._address}: {text}; is the server running, and is the address right?")
            wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * draw.uniform(0.5, 1.0)
            wait = max(wait, retry_after) if retry_after is not None else wait
            if attempt == self._limits.max_retries or waited + wait > self._limits.budget_s:
                break
            waited += wait
            self._account.add("retried")
            if self.stopped.wait(wait):
                raise GivenUp
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= MAX_LOST_IN_A_ROW:
            self.stopped.set()
            raise PreftuneError(
                f"judge at {self._address}: {self._lost_in_a_row} judgements in a row were given up after their retries (last: "
                f"{_reason(status, text)}); what was judged is kept, the same command goes on from there"
            )
        raise GivenUp

    def _call(self, body: Mapping[str, Any]) -> tuple[int, str, float | None]:
        """Status (0 = no reply), text and Retry-After of one call, counted."""
        import httpx2

        self._account.add("calls")
        deadline = time.monotonic() + self._limits.timeout_s
        try:
            with self._client.stream("POST", self._address, json=body) as reply:
                content = b""
                for part in reply.iter_bytes():
                    content += part
                    if len(content) > MAX_REPLY_BYTES:
                        break
                    if time.monotonic() > deadline:
                        raise httpx2.ReadTimeout("the reply took too long")
                self._account.add_status(reply.status_code)
                return reply.status_code, content.decode("utf-8", "replace"), _retry_after(reply)
        except httpx2.TimeoutException:
            self._account.add("timeouts")
            return 0, f"no reply within {self._limits.timeout_s:g} s", None
        except httpx2.TransportError as error:
            self._account.add("connection_errors")
            kind = "cannot connect" if isinstance(error, httpx2.ConnectError) else "connection lost"
            return 0, f"{kind}: {self._without_key(str(error))}", None
        except (httpx2.InvalidURL, httpx2.DecodingError, UnicodeError) as error:
            raise PreftuneError(f"judge at {self._address}: {self._without_key(str(error))}") from None

    def _refused(self, status: int, text: str) -> str:
        said = self._without_key(" ".join(text.split()))[:200]
        where = f"judge at {self._address}: HTTP {status}"
        if status in {401, 403}:
            way_out = (
                f"the key in {self._key_name} is not accepted"
                if self._key_name
                else "it wants a key: name its variable, api_key_env"
            )
        elif status < 400:
            way_out = "it points elsewhere; write the address that answers"
        else:
            way_out = "look at url and model" if status == 404 else "the request is refused"
        return f"{where}, {way_out}" + (f": {said}" if said else "")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def read_key(name: str | None) -> str | None:
    """The key in an environment variable; UsageError where the variable is not set."""
    import os

    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(f"judge llm: the environment variable {name}, which api_key_env names, is not set")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"judge llm: the value of {name} is no key: it holds characters that no HTTP header takes")
    return key


def _retry_after(reply: httpx2.Response) -> float | None:
    """Seconds that a reply asks to wait: a number, or an HTTP date."""
    given = reply.headers.get("retry-after", "").strip()
    if not given:
        return None
    if given.replace(".", "", 1).isdigit():
        return float(given)
    try:
        date = parsedate_to_datetime(given)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _reason(status: int, text: str) -> str:
    return f"HTTP {status}" if status else text
