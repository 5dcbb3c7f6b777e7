"""The clients' feedback, splits, evaluations, serving, keys, and waiting with an end, against a server as a user starts it."""

import asyncio
import json
import time

import pytest

from preftune.modeling.load import model_path
from preftune.sdk import AskedModel, AsyncClient, BadRequest, Better, Client, JobFailed, NotFound, PermissionDenied, WaitTimedOut
from preftune.sdk.errors import AuthenticationFailed

STEPS = {"max_steps": 2, "pairs_per_step": 4, "checkpoints": 0, "probe": "off"}


@pytest.fixture(scope="module")
def open_server(start):
    return start("nouns", "--capture", "asked", "--model", f"second={model_path('starter')}")


@pytest.fixture(scope="module")
def client(open_server):
    with Client(open_server.url, open_server.key) as made:
        yield made


def test_feedback_becomes_rows(client):
    words = {"store": True, "n": 2, "seed": 3, "temperature": 1.0, "max_tokens": 8}
    answer = client.chat("starter", "Write a short story about a fox.", **words)
    texts = [one["message"]["content"] for one in answer.raw["choices"]]
    kept = client.feedback.give(answer.id, choice=1, rating=1.0, better_than=Better(over=answer.id, strength=2))
    assert (kept.completion_id, kept.choice) == (answer.id, 1)
    client.feedback.give(answer.id, edit="A fox slept.")
    rows = list(client.feedback.rows())
    assert [(row["first"], row["second"]) for row in rows] == [(texts[1], texts[0]), ("A fox slept.", texts[0])]
    assert rows[0]["strength"] == 2
    assert [row["label"] for row in client.feedback.rows("ratings")] == [True]
    with pytest.raises(BadRequest, match="rating"):
        client.feedback.give(answer.id, rating=3)
    with pytest.raises(NotFound):
        client.feedback.give("chatcmpl-nobody", rating=1.0)


def test_traffic_split_and_its_result(client, open_server):
    split = client.splits.create("team/best", "starter", "second", weight=0.25)
    assert (split.verdict, split.weight, [arm.model for arm in split.arms]) == ("inconclusive", 0.25, ["starter", "second"])
    answer = client.chat("team/best", "A tree.", user="u1", max_tokens=1)
    client.feedback.give(answer.id, rating=1.0)
    found = client.splits.get("team/best")
    assert sum(arm.requests for arm in found.arms) == 1
    assert [arm.mean for arm in found.arms if arm.ratings] == [1.0]
    client.splits.create("other", "starter", "second")

    async def names():
        async with AsyncClient(open_server.url, open_server.key) as awaited:
            return [one.name async for one in awaited.splits.list(limit=1)], await awaited.splits.get("team/best")

    listed, same = asyncio.run(names())
    assert listed == ["other", "team/best"]
    assert same == found
    assert client.splits.close("team/best").deleted
    assert [one.name for one in client.splits.list()] == ["other"]


def test_what_is_in_memory(client):
    assert client.serving.load("second").loaded
    rows = [one for one in client.serving.state().data if one.pid]
    assert rows
    assert all(one.growing == 0 and one.positions for one in rows)
    assert not client.serving.unload("second").loaded


@pytest.mark.slow
def test_a_comparison_by_a_judge_of_the_server(client, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Say hello.", "ours": "Hello there, friend."}, {"prompt": "A fox", "ours": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = client.files.upload(path, purpose="eval")
    made = client.evaluations.compare(file.id, "ours", AskedModel(model="starter", max_tokens=4), judge="starter")
    done = client.jobs.wait(made.id, timeout=120)
    counted = ("A_wins", "B_wins", "Ties", "generation_fail_count", "judge_fail_count")
    assert sum(done.result[name] for name in counted) == 2
    judged = list(client.evaluations.rows(made.id))
    assert [row["MODEL_A_response"] for row in judged] == ["Hello there, friend.", "x"]
    assert made.id in [one.id for one in client.evaluations.list()]
    assert client.evaluations.get(made.id).work == "evaluate"
    marks = {"judge": AskedModel(model="starter", system="Is it polite?"), "low": 1, "high": 5, "passes_from": 3}
    scored = client.jobs.wait(client.evaluations.score(file.id, "ours", **marks).id, timeout=120)
    assert scored.status == "succeeded"
    assert 1 <= scored.result["aggregated_scores"]["mean_score"] <= 5


def test_keys_are_made_and_revoked(client, open_server):
    made = client.keys.add("labeller", "annotator")
    with Client(open_server.url, made.value) as theirs:
        assert theirs.access.me().role == "annotator"
        with pytest.raises(PermissionDenied):
            list(theirs.keys.list())
        assert made.id in [one.id for one in client.keys.list()]
        assert client.keys.revoke(made.id).revoked_at is not None
        with pytest.raises(AuthenticationFailed):
            theirs.access.me()
    assert [one.target for one in client.access.audit(action="key.revoke")] == [made.id]


def test_a_wait_with_an_end_leaves_the_job_alone(client, open_server, starter_rows):
    file = client.files.upload(starter_rows("pairs.jsonl", 8))
    job = client.jobs.create(model="starter", files=file.id, **{**STEPS, "max_steps": 5000})
    client.jobs.pause(job.id)
    told, begun = [], time.monotonic()
    with pytest.raises(WaitTimedOut, match=rf"not ended after 1\.5 s .*jobs\.wait\('{job.id}'\) waits again") as failed:
        client.jobs.wait(job.id, timeout=1.5, on_event=told.append)
    assert 1.5 <= time.monotonic() - begun < 12
    assert isinstance(failed.value, TimeoutError)
    assert told[0].type == "created"

    async def awaited():
        async with AsyncClient(open_server.url, open_server.key) as other:
            await other.jobs.wait(job.id, timeout=0)

    with pytest.raises(WaitTimedOut):
        asyncio.run(awaited())
    assert client.jobs.get(job.id).status not in {"cancelled", "failed"}
    client.jobs.cancel(job.id)
    assert client.jobs.wait(job.id, timeout=60, check=False).status == "cancelled"
    with pytest.raises(JobFailed, match="cancelled"):
        client.jobs.wait(job.id, timeout=60)
