"""What a user's URL may reach."""

import pytest

from preftune.core.addresses import AddressPolicy, AddressRefused
from preftune.core.errors import UsageError

PUBLIC, METADATA = "93.184.216.34", "169.254.169.254"


def reach(policy, host, address, port=443):
    return AddressPolicy.of(policy).places(host, port, lambda host, port: [address])


@pytest.mark.parametrize(
    ("policy", "host", "address", "port"),
    [
        ("api.example.org", "api.example.org", PUBLIC, 443),
        ("api.example.org", "API.Example.ORG.", PUBLIC, 443),
        ("*.example.org", "a.b.example.org", PUBLIC, 443),
        ("public", "anything.test", PUBLIC, 80),
        ("10.0.0.0/8", "judge.internal", "10.1.2.3", 8000),
        ("127.0.0.1:11434", "localhost", "127.0.0.1", 11434),
        ("localhost", "localhost", "127.0.0.1", 9),
        ("[::1]:8000", "::1", "::1", 8000),
        ("10.0.0.0/8", "[::ffff:10.0.0.1]", "::ffff:10.0.0.1", 80),
    ],
)
def test_what_is_allowed(policy, host, address, port):
    assert reach(policy, host, address, port) == [address]


@pytest.mark.parametrize(
    ("policy", "host", "address", "port"),
    [
        ("", "api.example.org", PUBLIC, 443),  # nothing is allowed by default
        ("api.example.org", "api.example.org", "127.0.0.1", 443),  # a name that leads inwards
        ("api.example.org", "api.example.org", METADATA, 80),
        ("public", "anything.test", "10.0.0.1", 80),
        ("public", "anything.test", "::ffff:127.0.0.1", 80),
        ("public", "anything.test", "fe80::1%eth0", 80),
        ("public", "anything.test", "0.0.0.0", 80),
        ("public", "anything.test", "224.0.0.1", 80),
        ("*.example.org", "example.org", PUBLIC, 443),
        ("*.example.org", "evilexample.org", PUBLIC, 443),
        ("127.0.0.1:11434", "localhost", "127.0.0.1", 11435),
    ],
)
def test_what_is_refused_names_the_way_out(policy, host, address, port):
    with pytest.raises(AddressRefused, match="--allow-url"):
        reach(policy, host, address, port)


def test_only_the_addresses_that_pass_are_connected_to():
    found = AddressPolicy.of("public").places("two.test", 443, lambda host, port: ["10.0.0.1", PUBLIC])
    assert found == [PUBLIC]


@pytest.mark.parametrize("text", ["http://example.org", "a b", "exa_mple.org/x", "*"])
def test_an_entry_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match="--allow-url"):
        AddressPolicy.of(text)


def test_a_process_without_the_variable_reaches_what_its_owner_says(monkeypatch):
    monkeypatch.delenv("PREFTUNE_ALLOW_URLS", raising=False)
    assert AddressPolicy.of_process() is None
    monkeypatch.setenv("PREFTUNE_ALLOW_URLS", "")
    assert AddressPolicy.of_process() == AddressPolicy()
