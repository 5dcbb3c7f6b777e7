"""A name handed to llama.cpp's own server, which has the model as our export wrote it: texts, streams and log-probabilities."""

import json
import urllib.request

import pytest

from llama_cpp_server import llama_cpp
from preftune.app.export import export_gguf

TURNS = [{"role": "user", "content": "Write a short story about a fox."}]


@pytest.fixture(scope="module")
def front(start, tmp_path_factory):
    """Asked under two names: ``there`` is the starter in llama.cpp, ``starter`` our own engine."""
    path = tmp_path_factory.mktemp("llama") / "m.gguf"
    export_gguf("starter", path, "f32")
    with llama_cpp(path, "--exact", "--parallel", "2") as server:
        yield start("front", "--slots", "0", "--dtype", "float32", "--upstream", f"there={server.url}/v1")


def ask(front, path, body):
    status, answer, _ = front.ask(path, "POST", {"max_tokens": 16, "temperature": 0, **body})
    assert status == 200, answer
    return answer


def test_a_chat_is_the_one_of_our_own_engine(front):
    body = {"messages": TURNS, "logprobs": True, "top_logprobs": 3}
    there, here = (ask(front, "/v1/chat/completions", {"model": name, **body}) for name in ("there", "starter"))
    assert there["model"] == "there"
    assert there["usage"]["completion_tokens"] == here["usage"]["completion_tokens"] == 16
    (got,), (wanted,) = there["choices"], here["choices"]
    assert got["message"]["content"] == wanted["message"]["content"]
    assert got["finish_reason"] == wanted["finish_reason"] == "length"
    for one, other in zip(got["logprobs"]["content"], wanted["logprobs"]["content"], strict=True):
        assert (one["token"], one["bytes"]) == (other["token"], other["bytes"])
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
        assert [top["token"] for top in one["top_logprobs"]] == [top["token"] for top in other["top_logprobs"]]


def test_a_completion_with_log_probs_is_the_one_of_our_own_engine(front):
    body = {"prompt": "Once upon a time", "logprobs": 2}
    there, here = (ask(front, "/v1/completions", {"model": name, **body})["choices"][0] for name in ("there", "starter"))
    assert there["text"] == here["text"]
    assert there["logprobs"]["tokens"] == here["logprobs"]["tokens"]
    assert there["logprobs"]["token_logprobs"] == pytest.approx(here["logprobs"]["token_logprobs"], abs=1e-3)


def test_a_stream_comes_in_pieces_with_log_probs_and_usage(front):
    body = {
        "model": "there", "messages": TURNS, "max_tokens": 16, "temperature": 0, "stream": True, "logprobs": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {front.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(front.url + "/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    whole = ask(front, "/v1/chat/completions", {"model": "there", "messages": TURNS})
    pieces = [one["delta"].get("content") or "" for one in choices]
    assert len([piece for piece in pieces if piece]) > 8
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert sum(len(one["logprobs"]["content"]) for one in choices if one.get("logprobs")) == 16
    assert not any(token["top_logprobs"] for one in choices if one.get("logprobs") for token in one["logprobs"]["content"])
    assert choices[-1]["finish_reason"] == "length"
    assert chunks[-1]["usage"] == whole["usage"]


def test_what_llama_cpp_leaves_unread_is_refused(front):
    body = {"model": "there", "prompt": "Once upon a time", "max_tokens": 4, "echo": True}
    status, answer, _ = front.ask("/v1/completions", "POST", body)
    assert (status, answer["error"]["param"]) == (400, "echo")
    assert "does not repeat prompts" in answer["error"]["message"]


def test_a_prompt_that_is_too_long_there_is_a_400_here(front):
    status, answer, _ = front.ask(
        "/v1/chat/completions", "POST", {"model": "there", "messages": [{"role": "user", "content": "a fox " * 600}]}
    )
    assert status == 400
    assert "context" in answer["error"]["message"]
