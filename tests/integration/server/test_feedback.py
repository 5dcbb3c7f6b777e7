"""Kept completions, feedback that a next round reads, and traffic split between two versions."""

import json
import subprocess
import sys
import urllib.request

import pytest

from preftune.modeling.load import model_path


@pytest.fixture(scope="module")
def kept(start):
    return start("kept", "--slots", "0", "--capture", "asked", "--model", f"second={model_path('starter')}")


def ask(served, thing, model="starter", **changes):
    body = {"model": model, "messages": [{"role": "user", "content": f"Write a short story about a {thing}."}], "max_tokens": 12}
    status, answer, _ = served.ask("/v1/chat/completions", "POST", {**body, **changes})
    assert status == 200, answer
    return answer


def say(served, **body):
    return served.ask("/api/v1/feedback", "POST", body)


def export(served, kind):
    request = urllib.request.Request(f"{served.url}/api/v1/feedback/export?kind={kind}")
    request.add_header("Authorization", f"Bearer {served.key}")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_nothing_is_kept_by_default(served, kept):
    body = {"model": "starter", "messages": [{"role": "user", "content": "A fox."}], "max_tokens": 2, "store": True}
    status, answer, _ = served.ask("/v1/chat/completions", "POST", body)
    assert (status, answer["error"]["code"]) == (400, "capture_off")
    for server in (served, kept):
        unasked = server.ask("/v1/chat/completions", "POST", {**body, "store": None})[1]["id"]
        status, answer, _ = say(server, completion_id=unasked, rating=1)
        assert (status, answer["error"]["code"]) == (404, "completion_not_found")


def test_feedback_becomes_files_that_check_reads(kept, tmp_path):
    """Preferences, ties and edits as pairs, ratings as labels: through the command line, and with the text that was said."""
    answers = {thing: ask(kept, thing, store=True, n=2, seed=3, temperature=1.0) for thing in ("fox", "cat", "boat")}
    texts = {thing: [one["message"]["content"] for one in answer["choices"]] for thing, answer in answers.items()}
    ids = {thing: answer["id"] for thing, answer in answers.items()}
    fox, cat, boat = (ids[thing] for thing in ("fox", "cat", "boat"))
    assert say(kept, completion_id=fox, choice=1, preference={"over": fox, "choice": 0, "strength": 2}, rating=1.0)[0] == 200
    assert say(kept, completion_id=cat, preference={"over": cat, "choice": 1, "tie": True}, rating=0.0)[0] == 200
    assert say(kept, completion_id=boat, edit="A boat sailed home.", rating=0.2)[0] == 200
    assert say(kept, completion_id=boat, rating=0.9)[0] == 200  # they changed their mind
    pairs = [json.loads(line) for line in export(kept, "preferences").splitlines()]
    assert [(row["label"], row.get("strength"), row["first"], row["second"]) for row in pairs] == [
        ("first", 2.0, texts["fox"][1], texts["fox"][0]),
        ("tie", None, texts["cat"][0], texts["cat"][1]),
        ("first", None, "A boat sailed home.", texts["boat"][0]),
    ]
    labels = [json.loads(line) for line in export(kept, "ratings").splitlines()]
    assert [(row["completion"][0]["content"], row["label"]) for row in labels] == [
        (texts["fox"][1], True), (texts["cat"][0], False), (texts["boat"][0], True),
    ]  # fmt: skip
    for kind, form in (("preferences", "comparison"), ("ratings", "trl-unpaired")):
        path = tmp_path / f"{kind}.jsonl"
        path.write_bytes(export(kept, kind))
        done = subprocess.run(
            [sys.executable, "-m", "preftune", "check", path, "--json"], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.dumps(json.loads(done.stdout))
        assert form in found


def test_a_streamed_answer_is_kept_as_it_was_shown(kept):
    import http.client

    connection = http.client.HTTPConnection(kept.url.removeprefix("http://"), timeout=60)
    body = {
        "model": "starter",
        "messages": [{"role": "user", "content": "A duck."}],
        "max_tokens": 8,
        "stream": True,
        "store": True,
    }
    headers = {"Authorization": f"Bearer {kept.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    told = answer.read().decode()
    connection.close()
    assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8"), told
    *lines, end = told.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]", told
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks, told
    assert all(one.get("choices") for one in chunks), told  # one without them is an error, or counts that nobody asked for
    text = "".join(one["choices"][0]["delta"]["content"] for one in chunks)
    assert say(kept, completion_id=chunks[0]["id"], edit="Quack.")[0] == 200
    rows = [json.loads(line) for line in export(kept, "preferences").splitlines()]
    assert (rows[-1]["first"], rows[-1]["second"]) == ("Quack.", text)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, 400, "says nothing"),
        ({"rating": 2}, 400, "rating"),
        ({"choice": 5, "rating": 1}, 404, "choice 5"),
        ({"preference": {"over": "chatcmpl-nobody"}}, 404, "chatcmpl-nobody"),
        ({"preference": {"over": "itself"}}, 400, "with itself"),
        ({"preference": {"over": "other"}}, 400, "different prompts"),
        ({"edit": "itself"}, 400, "nothing was changed"),
    ],
)
def test_what_is_no_feedback(kept, changes, status, words):
    answer, other = ask(kept, "king", store=True), ask(kept, "queen", store=True)
    names = {"itself": answer["id"], "other": other["id"]}
    body = dict(changes)
    if "preference" in body:
        body["preference"] = {"over": names.get(body["preference"]["over"], body["preference"]["over"])}
    if "edit" in body:
        body["edit"] = answer["choices"][0]["message"]["content"]
    got, told, _ = say(kept, completion_id=answer["id"], **body)
    assert got == status
    assert words in told["error"]["message"]


def test_traffic_is_split_and_the_better_version_shows(kept):
    """Forty users, whose ratings prefer the second version; a user always gets the same one, and no text is kept."""
    split = {"name": "team/best", "models": ["starter", "second"], "weight": 0.5}
    status, made, _ = kept.ask("/api/v1/splits", "POST", split)
    assert (status, made["verdict"]) == (200, "inconclusive")
    assert kept.ask("/api/v1/splits", "POST", split)[0] == 400
    assert kept.ask("/api/v1/splits", "POST", {**split, "name": "x", "models": ["starter", "starter"]})[0] == 400

    def arms():
        return {one["model"]: one for one in kept.ask("/api/v1/splits/team/best")[1]["arms"]}

    for number in range(40):
        before = arms()
        asked = [ask(kept, "tree", "team/best", user=f"user-{number}", max_tokens=1) for _ in range(2 if number < 5 else 1)]
        second = arms()["second"]["requests"] - before["second"]["requests"]
        assert second in {0, len(asked)}
        for one in asked:
            assert say(kept, completion_id=one["id"], rating=1.0 if second or number % 4 == 0 else 0.0)[0] == 200
    assert say(kept, completion_id=asked[0]["id"], edit="Better.")[0] == 400  # no text was kept
    _, found, _ = kept.ask("/api/v1/splits/team/best")
    first, second = found["arms"]
    assert first["requests"] + second["requests"] == 45
    assert first["units"] + second["units"] == 40
    assert min(first["units"], second["units"]) > 8
    low, high = found["difference"]["interval"]
    assert 0 < low <= found["difference"]["value"] <= high <= 1
    assert found["verdict"] == "better"
    assert kept.ask("/api/v1/splits/team/best", "DELETE")[1]["deleted"]
    gone = {"model": "team/best", "messages": [{"role": "user", "content": "x"}]}
    assert kept.ask("/v1/chat/completions", "POST", gone)[0] == 404
