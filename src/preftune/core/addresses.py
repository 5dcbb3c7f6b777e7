"""Which addresses a process may connect to on a user's word (judges, webhooks), decided when it connects.

A name is resolved once, every address it gave is judged, and the connection goes to an address that passed: so a name that
answers differently the second time, and a redirect, reach nothing that was not allowed.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from preftune.core.errors import PreftuneError, UsageError

VARIABLE = "PREFTUNE_ALLOW_URLS"
PUBLIC = "public"
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], Sequence[str]]


class AddressRefused(PreftuneError):
    """A host that the operator does not let users' URLs reach."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One allowed place: a name (``*.`` covers what is below it), a network, or every public address; and a port or any."""

    name: str = ""
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    port: int | None = None

    def names(self, host: str, port: int) -> bool:
        if self.port not in {None, port} or not self.name:
            return False
        return self.name in {PUBLIC, host} or (self.name.startswith("*.") and host.endswith(self.name[1:]))

    def holds(self, address: Address, port: int) -> bool:
        if self.port not in {None, port} or self.network is None:
            return False
        return address.version == self.network.version and address in self.network


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """What may be reached: names, networks, or ``public`` for every globally routable address; nothing else.

    A name that is allowed reaches public addresses only; an address of a private network, of this machine or of a cloud's
    metadata service has to be allowed as such (``10.0.0.5:8000``, ``127.0.0.1:11434``).

    >>> AddressPolicy.of("api.example.org, 10.0.0.0/8").places("api.example.org", 443, lambda host, port: ["93.184.216.34"])
    ['93.184.216.34']
    >>> AddressPolicy.of("api.example.org").places("api.example.org", 443, lambda host, port: ["127.0.0.1"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    preftune.core.addresses.AddressRefused: api.example.org:443 leads to 127.0.0.1, which is not on ...
    """

    entries: tuple[_Entry, ...] = ()

    @classmethod
    def of(cls, text: str) -> Self:
        """The policy of a list separated by commas.

        Raises
            UsageError: an entry that is neither a name, a network nor ``public``.
        """
        return cls(tuple(_entry(one.strip()) for one in text.split(",") if one.strip()))

    @classmethod
    def of_process(cls) -> Self | None:
        """What PREFTUNE_ALLOW_URLS allows; None where it is not set: a person's own process reaches what that person says."""
        text = os.environ.get(VARIABLE)
        return None if text is None else cls.of(text)

    def places(self, host: str, port: int, resolve: Resolver | None = None) -> list[str]:
        """The addresses of a host that may be connected to.

        Raises
            AddressRefused: none of them, or the host is not allowed.
            OSError: the name has no address.
        """
        host = host.strip("[]").rstrip(".").lower()
        found = list((resolve or _resolve)(host, port))
        is_named = any(entry.names(host, port) for entry in self.entries)
        good = [text for text in found if self._allows(_address(text), port, is_named=is_named)]
        if not good:
            where = found[0] if found else "no address"
            leads = "" if where == host else f" leads to {where}, which"
            raise AddressRefused(
                f"{host}:{port}{leads} is not on this server's list of allowed addresses; its operator adds it with --allow-url "
                f"{where if is_named else host}"
            )
        return good

    def _allows(self, address: Address, port: int, *, is_named: bool) -> bool:
        plain = getattr(address, "ipv4_mapped", None) or address
        if any(entry.holds(plain, port) for entry in self.entries):
            return True
        return is_named and plain.is_global and not plain.is_multicast


def limit_addresses(given: Sequence[str]) -> None:
    """Let this process and its children reach, on users' word, only what is given, or what PREFTUNE_ALLOW_URLS says already.

    Raises
        UsageError: an entry that cannot be read.
    """
    text = ",".join(given) or os.environ.get(VARIABLE, "")
    AddressPolicy.of(text)
    os.environ[VARIABLE] = text


def _entry(text: str) -> _Entry:
    bare = text
    port: int | None = None
    if text.count(":") == 1 or text.startswith("["):
        head, sign, tail = text.rpartition(":")
        if sign and tail.isdigit() and head:
            bare, port = head, int(tail)
    try:
        return _Entry(network=ipaddress.ip_network(bare.strip("[]"), strict=False), port=port)
    except ValueError:
        pass
    name = bare.lower()
    if not name.isascii() or not all(part.replace("-", "").isalnum() for part in name.removeprefix("*.").split(".")):
        raise UsageError(
            f"--allow-url {text}: write a host name, *.NAME, an address, a network or `public`, with :PORT if you like"
        )
    if name == "localhost":
        return _Entry(network=ipaddress.ip_network("127.0.0.0/8"), port=port)
    return _Entry(name=name, port=port)


def _address(text: str) -> Address:
    return ipaddress.ip_address(text.partition("%")[0])


def _resolve(host: str, port: int) -> list[str]:
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))
