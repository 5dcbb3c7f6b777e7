"""Where a client's server is, and by which key it asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from preftune.core.errors import UsageError
from preftune.core.version import __version__

SERVER, KEY = "PREFTUNE_SERVER", "PREFTUNE_API_KEY"
DEFAULT = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class Place:
    """A server and a key."""

    url: str
    key: str

    @classmethod
    def of(cls, url: str | None, key: str | None) -> Place:
        """What was given, else PREFTUNE_SERVER and PREFTUNE_API_KEY, else this machine.

        Raises
            UsageError: no key, or no URL of a server.

        >>> Place.of("http://tune.example.org/v1/", "k").url
        'http://tune.example.org'
        """
        address = (url or os.environ.get(SERVER) or DEFAULT).rstrip("/")
        for tail in ("/api/v1", "/v1"):
            address = address.removesuffix(tail)
        parts = urlsplit(address)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError(f"server {address!r}: write http://HOST:PORT or https://HOST")
        value = key or os.environ.get(KEY, "")
        if not value:
            raise UsageError(f"no API key: pass api_key, or set {KEY}")
        if not value.isascii() or not value.isprintable():
            raise UsageError("the API key holds characters that no key has; copy it again")
        return cls(address, value)

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.key}", "User-Agent": f"preftune/{__version__}"}
