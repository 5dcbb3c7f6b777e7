"""What absolute URLs begin with: nobody decides it but the operator, a trusted proxy, and a Host that the gate let through."""

from types import SimpleNamespace

import pytest
from starlette.requests import Request

from preftune.server.addresses import public_url, upload_url
from preftune.server.errors import ApiError
from preftune.server.security import is_signed, signing_key
from preftune.server.settings import ServerSettings

FORWARDED = {"host": "127.0.0.1:8080", "x-forwarded-host": "tune.example.org", "x-forwarded-proto": "https"}


def request(settings, headers, sender="10.0.0.9", key=b"k"):
    state = SimpleNamespace(settings=settings, signing_key=key)
    scope = {
        "type": "http", "method": "GET", "path": "/", "query_string": b"", "scheme": "http", "server": ("127.0.0.1", 8080),
        "client": (sender, 5), "app": SimpleNamespace(state=state),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    return Request(scope)


def test_a_stranger_forwards_nothing():
    assert public_url(request(ServerSettings(), FORWARDED)) == "http://127.0.0.1:8080"


def test_a_trusted_proxy_does_within_the_allowed_hosts():
    settings = ServerSettings(trusted_proxies=("10.0.0.9",), allowed_hosts=("tune.example.org",))
    assert public_url(request(settings, FORWARDED)) == "https://tune.example.org"
    with pytest.raises(ApiError, match="names no host of this server"):
        public_url(request(settings, {**FORWARDED, "x-forwarded-host": "evil.example"}))
    with pytest.raises(ApiError, match="names no host of this server"):
        public_url(request(settings, {**FORWARDED, "x-forwarded-proto": "file"}))


def test_the_operators_word_goes_first():
    settings = ServerSettings(public_url="https://tune.example.org/", trusted_proxies=("10.0.0.9",))
    assert public_url(request(settings, {**FORWARDED, "x-forwarded-host": "evil.example"})) == "https://tune.example.org"


def test_a_signed_url_is_good_for_its_path_alone(tmp_path):
    key = signing_key(tmp_path)
    assert key == signing_key(tmp_path), "it outlives a restart"
    assert (tmp_path / "signing.key").stat().st_mode & 0o777 == 0o600
    url = upload_url(request(ServerSettings(), FORWARDED, key=key), "file-1")
    expires, signature = (one.partition("=")[2] for one in url.partition("?")[2].split("&"))
    assert is_signed(key, "file-1", int(expires), signature)
    assert not is_signed(key, "file-2", int(expires), signature)
    assert not is_signed(key, "file-1", int(expires) + 1, signature)
    assert not is_signed(b"another", "file-1", int(expires), signature)
    assert not is_signed(key, "file-1", 1, signature)
