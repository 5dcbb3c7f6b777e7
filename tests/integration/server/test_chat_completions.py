"""Models answer by name: the unmodified openai package, streams, refusals, hang-ups, an engine that dies."""

import http.client
import json
import os
import signal
import threading
import time

import pytest

from preftune.core.recipe import DecodingConfig, ModelConfig
from preftune.core.records import Message
from preftune.modeling.generate import generate
from preftune.modeling.load import load_model

TURNS = [{"role": "user", "content": "Write a short story about a fox."}]


@pytest.fixture(scope="module")
def wanted():
    """What the starter writes greedily, without any server."""
    starter = load_model(ModelConfig(name="starter"), precision="float32")
    prompt = (Message("user", TURNS[0]["content"]),)
    return generate(starter.model, starter.tokenizer, [prompt], DecodingConfig(temperature=0, max_new_tokens=24), 0)[0].text


def test_openais_package_asks_the_starter(client, wanted):
    found = client("openai_chat.py", "starter")
    answer = found["whole"]
    assert answer["choices"][0]["message"]["content"] == found["streamed"] == wanted
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == found["stream_usage"] == {"prompt_tokens": 11, "completion_tokens": 24, "total_tokens": 35}
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == wanted
    assert all(token["top_logprobs"][0]["token"] == token["token"] and len(token["top_logprobs"]) == 2 for token in tokens)
    assert found["stream_tokens"] == [token["token"] for token in tokens]
    assert found["seeded"][0] == found["seeded"][1]
    assert found["seeded"][0][0] != found["seeded"][0][1]
    assert found["parts"]
    first, second = found["legacy"]["choices"]
    assert first["text"].startswith("Once upon a time")
    assert second["text"].startswith("The dog")
    assert first["logprobs"]["token_logprobs"][0] is None
    assert first["logprobs"]["text_offset"][:3] == [0, 4, 9]
    assert found["of_ids"] == found["legacy_stream"] == first["text"].removeprefix("Once upon a time")
    assert found["together"] == [wanted, None] * 6
    assert found["refused"] == {
        "long": [400, "invalid_request_error", "messages", "context_length_exceeded"],
        "image": [400, "invalid_request_error", "messages.0.content", "invalid_value"],
        "hot": [400, "invalid_request_error", "temperature", "invalid_value"],
        "json": [400, "invalid_request_error", "response_format", None],
        "top": [400, "invalid_request_error", "top_logprobs", "invalid_value"],
        "unknown": [404, "not_found_error", "model", "model_not_found"],
    }


def ask(served, **changes):
    return served.ask("/v1/chat/completions", "POST", {"model": "starter", "messages": TURNS, "max_tokens": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is no text"),
        ({"n": 0}, "n:"),
        ({"n": 33}, "at most 32"),
        ({"logit_bias": {"x": 1}}, "token ids"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_request_is_one_envelope(served, changes, words):
    status, answer, _ = ask(served, **changes)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]


def test_seekrflows_path_and_its_nulls(served, wanted):
    """What its client sends, nulls included; 512 tokens are an upper bound where the model has fewer positions left."""
    body = {
        "model": "starter", "messages": TURNS, "max_tokens": 512, "temperature": 0, "top_k": 5, "repetition_penalty": 1, "n": 1,
        "stop": None, "top_p": None, "stream": False, "logprobs": None, "echo": None, "safety_model": None, "tools": None,
    }  # fmt: skip
    status, answer, _ = served.ask("/v1/inference/chat/completions", "POST", body)
    assert status == 200
    assert answer["choices"][0]["message"]["content"].startswith(wanted)
    assert answer["prompt"] == []


def test_it_needs_a_key_and_keeps_answering_probes_while_it_computes(served):
    status, _, _ = served.ask("/v1/chat/completions", "POST", {"model": "starter", "messages": TURNS}, key=None)
    assert status == 401
    busy = [threading.Thread(target=ask, args=(served,), kwargs={"max_tokens": 300, "ignore_eos": True}) for _ in range(8)]
    for one in busy:
        one.start()
    waits = []
    while any(one.is_alive() for one in busy) and len(waits) < 40:
        start = time.monotonic()
        assert served.ask("/healthz")[0] == 200
        waits.append(time.monotonic() - start)
    for one in busy:
        one.join()
    assert len(waits) >= 3
    assert sorted(waits)[len(waits) // 2] < 0.5, waits


def engine(served):
    status, rows, _ = served.ask("/api/v1/serving")
    assert status == 200
    return rows["data"][0]


def test_who_hangs_up_frees_the_engine(served):
    host = served.url.removeprefix("http://")
    for is_streamed in (True, False):
        connection = http.client.HTTPConnection(host, timeout=60)
        body = {"model": "starter", "messages": TURNS, "ignore_eos": True, "n": 32, "stream": is_streamed}
        headers = {"Authorization": f"Bearer {served.key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if is_streamed:
            assert connection.getresponse().status == 200
        deadline = time.monotonic() + 60
        while engine(served)["growing"] == 0:
            assert time.monotonic() < deadline
        connection.close()
        while engine(served)["growing"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_engine_that_dies_is_told_of_and_starts_again(served, wanted):
    ask(served)
    pid = engine(served)["pid"]
    os.kill(pid, signal.SIGSTOP)
    answers = []
    asked = threading.Thread(target=lambda: answers.append(ask(served)))
    asked.start()
    time.sleep(0.5)
    host = served.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", "/healthz")  # the server itself is not held up
    assert connection.getresponse().status == 200
    connection.close()
    os.kill(pid, signal.SIGKILL)
    asked.join(60)
    status, answer, headers = answers[0]
    assert status == 503
    assert "killed by signal 9" in answer["error"]["message"]
    assert float(headers["retry-after"]) > 0
    status, answer, _ = ask(served, temperature=0, max_tokens=24)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, wanted)
