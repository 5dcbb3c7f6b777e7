"""Uploads that break: cut by the network, slower than anybody waits for, larger than they said. Nothing stays behind."""

import json
import socket
import time
from urllib.parse import urlsplit


def request_of(served, length, body=b""):
    """The head of an upload that says its length, and the beginning of its body."""
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {served.key}\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode() + body


BEGIN = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
ROW = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode() + b"\n"


def left_behind(served):
    kept = [path for path in (served.home / "state" / "artifacts").rglob("*") if path.is_file()]
    return sorted(path.name for path in kept)


def test_an_upload_that_is_cut_leaves_nothing_and_can_be_sent_again(served):
    place = urlsplit(served.url)
    before, names = left_behind(served), {row["id"] for row in served.ask("/v1/files")[1]["data"]}
    for sent in (0, 1, 50_000, 3_000_000):
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(request_of(served, 4_000_000, (BEGIN + ROW * 60_000)[:sent]))
            time.sleep(0.2)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a goodbye
    time.sleep(0.5)
    assert left_behind(served) == before
    assert {row["id"] for row in served.ask("/v1/files")[1]["data"]} == names
    whole = BEGIN + ROW * 10 + b"\r\n--b--\r\n"
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(request_of(served, len(whole), whole))
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    assert len(left_behind(served)) == len(before) + 1


def test_a_body_longer_than_it_said_or_without_an_end_is_refused(served):
    place = urlsplit(served.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(request_of(served, 60 << 30))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413")
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(request_of(served, "12 34").replace(b"Content-Length: 12 34", b"Content-Length: -5"))
        assert connection.recv(65_536).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))
