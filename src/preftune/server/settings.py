"""How a server is set up; only its operator decides these."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from preftune.core.errors import UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Parameters of a server.

    host, port: where it listens. public_url: what absolute URLs begin with; None means the scheme and Host of the request.
    allowed_hosts: Host headers that are answered, besides loopback and ``host``. trusted_proxies: addresses whose
    X-Forwarded-Proto and X-Forwarded-Host are believed. max_upload, max_body: bytes of a file, and of any other request.
    requests_per_minute: of one key, 0 = no limit. name: the organisation that clients are told.
    adapter_folder: below which admins may offer adapters by path; None: nowhere.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    max_upload: int = 50 * GIB
    max_body: int = 64 << 20
    requests_per_minute: int = 0
    name: str = "preftune"
    adapter_folder: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host in LOOPBACK:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self, *, has_own_key: bool) -> None:
        """Refuse to listen beyond loopback without a key that the operator chose or kept.

        Raises
            UsageError: an address that others reach, and no key.
        """
        if not self.is_loopback and not has_own_key:
            raise UsageError(
                f"host {self.host} can be reached from elsewhere and there is no key: set PREFTUNE_API_KEY, or make one with "
                "`preftune keys add` first, or listen on 127.0.0.1"
            )

    def answers(self, host: str) -> bool:
        """Whether a Host header is one of this server's: others come from pages that were made to reach it."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        name = name.strip("[]").lower()
        return name in LOOPBACK or name == self.host.lower() or name in {one.lower() for one in self.allowed_hosts}
