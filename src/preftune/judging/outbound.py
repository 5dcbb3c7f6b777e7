"""HTTP clients for addresses that a user named: each connection is judged by the process's ``AddressPolicy``."""

from __future__ import annotations

from typing import Any

import httpx2

from preftune.core.addresses import AddressPolicy, AddressRefused


class GuardedTransport(httpx2.BaseTransport):
    """A transport that resolves a name itself, asks the policy, and connects to an address that passed.

    Every request comes through here, those of a redirect too. The name stays in the Host header and in TLS, so certificates
    are checked against it.
    """

    def __init__(self, policy: AddressPolicy, **options: Any) -> None:
        self._policy = policy
        self._inner = httpx2.HTTPTransport(trust_env=False, **options)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; ConnectError where the policy refuses its host."""
        host = request.url.host
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        try:
            places = self._policy.places(host, port)
        except AddressRefused as error:
            raise httpx2.ConnectError(str(error), request=request) from None
        except OSError as error:
            raise httpx2.ConnectError(f"{host}: {error.strerror or error}", request=request) from None
        request.headers.setdefault("Host", request.url.netloc.decode("ascii"))
        request.extensions = {**request.extensions, "sni_hostname": host}
        request.url = request.url.copy_with(host=places[0])
        return self._inner.handle_request(request)

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


def client(**options: Any) -> httpx2.Client:
    """A client that reaches what this process may reach: everything, or what PREFTUNE_ALLOW_URLS names. No redirects."""
    policy = AddressPolicy.of_process()
    if policy is None:
        return httpx2.Client(**options)
    limits = {"limits": options.pop("limits")} if "limits" in options else {}
    return httpx2.Client(transport=GuardedTransport(policy, **limits), trust_env=False, **options)
