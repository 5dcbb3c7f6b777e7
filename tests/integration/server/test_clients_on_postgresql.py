"""Every vendor's own package through the shortest whole way, on a server whose records are in PostgreSQL."""

import json

import pytest

from postgres_server import PostgresServer

psycopg = pytest.importorskip("psycopg", reason="PostgreSQL needs the extra postgres")


@pytest.fixture(scope="module")
def database():
    server = PostgresServer()
    try:
        yield server.new_database()
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize(("vendor", "dialect"), [("openai", "openai"), ("together", "together"), ("seekrai", "seekr")])
def test_from_upload_to_chat(served, client, database, starter_rows, tmp_path, vendor, dialect):
    pairs = starter_rows("pairs.jsonl", 16)
    if vendor == "seekrai":  # which takes its own form alone
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        forms = [{"messages": row["prompt"], **{key: row["prompt"] + row[key] for key in ("chosen", "rejected")}} for row in rows]
        pairs = tmp_path / "seekr.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in forms))
    found = client("thin_flow.py", vendor, pairs)
    assert found["status"] in {"succeeded", "completed"}
    assert found["chat"].strip()
    assert found["job"] in found["listed"]
    with psycopg.connect(database) as connection:
        stored = connection.execute("SELECT dialect, status, work FROM jobs WHERE id = %s", [found["job"]]).fetchall()
        types = connection.execute("SELECT type FROM events WHERE subject = %s", [found["job"]]).fetchall()
    assert stored == [(dialect, "succeeded", "train")]
    assert types.count(("metrics",)) >= 2
    assert not list((served.home / "state").glob("*.db*")), "the records are in one database"
