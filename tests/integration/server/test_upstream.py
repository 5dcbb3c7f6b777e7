"""A server hands names to another one: a second preftune is a real OpenAI-compatible server, adapters included."""

import json
import socket

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from preftune.modeling.load import model_path
from preftune.modeling.quiet import quiet

TURNS = [{"role": "user", "content": "Write a short story about a fox."}]


def make_adapters(folder):
    """Two adapters on the starter, which change what it says."""
    for seed, name in enumerate(("red", "blue")):
        base = AutoModelForCausalLM.from_pretrained(model_path("starter"), dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
            adapted = peft.get_peft_model(base, config)
        adapted.peft_config["default"].base_model_name_or_path = "starter"
        adapted.save_pretrained(str(folder / name))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with quiet():
        make_adapters(folder)
    return folder


@pytest.fixture(scope="module")
def behind(start, adapters):
    """The server elsewhere: it knows the starter, and takes adapters by path."""
    return start("behind", "--slots", "0", "--adapter-folder", str(adapters), "--adapters-gb", "0.00006")


@pytest.fixture(scope="module")
def front(start, behind, adapters):
    """The server that is asked: nothing of a model runs here."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("UPSTREAM_KEY", behind.key)
    there = f"{behind.url}/v1#adapters=vllm&key=UPSTREAM_KEY"
    models = [word for name in ("red", "blue") for word in ("--model", f"{name}={adapters / name}")]
    nobody = f"far=http://127.0.0.1:{free_port()}/v1"
    more = ["--upstream", f"starter={there}", "--upstream", nobody, "--upstream", f"there={behind.url}/v1#model=starter"]
    try:
        return start("front", "--slots", "0", *models, *more)
    finally:
        monkeypatch.undo()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(served, model, **changes):
    body = {"model": model, "messages": TURNS, "max_tokens": 16, "temperature": 0, **changes}
    return served.ask("/v1/chat/completions", "POST", body)


def text(served, model, **changes):
    status, answer, _ = ask(served, model, **changes)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def test_base_and_adapters_answer_through_the_front(front, behind):
    texts = {model: text(front, model) for model in ("starter", "red", "blue")}
    assert len(set(texts.values())) == 3
    assert text(behind, "starter") == texts["starter"]
    status, rows, _ = front.ask("/api/v1/serving")
    assert status == 200
    assert [len(row["adapters"]) for row in rows["data"] if row["base"] == "starter"] == [2]
    assert not any("pid" in row for row in rows["data"])


def test_what_is_asked_for_arrives(front, behind):
    options = {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "temperature": 0.9, "stop": ["."], "top_k": 40}
    _, through, _ = ask(front, "starter", **options)
    _, direct, _ = ask(behind, "starter", **options)

    def content(answer):
        return [
            [
                (token["token"], token["bytes"], [top["token"] for top in token["top_logprobs"]])
                for token in one["logprobs"]["content"]
            ]
            for one in answer["choices"]
        ]

    assert content(through) == content(direct)
    assert through["usage"] == direct["usage"]
    body = {"model": "starter", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0, "logprobs": 1, "echo": True}
    _, through, _ = front.ask("/v1/completions", "POST", body)
    _, direct, _ = behind.ask("/v1/completions", "POST", body)
    assert through["choices"][0]["text"] == direct["choices"][0]["text"]
    assert through["choices"][0]["logprobs"]["tokens"] == direct["choices"][0]["logprobs"]["tokens"]


def test_streams_are_streams(front):
    import http.client

    connection = http.client.HTTPConnection(front.url.removeprefix("http://"), timeout=60)
    body = {"model": "red", "messages": TURNS, "max_tokens": 16, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {front.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    lines = [line for line in connection.getresponse().read().decode().split("\n\n") if line]
    connection.close()
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len(chunks) > 8
    assert "".join(one["choices"][0]["delta"]["content"] for one in chunks) == text(front, "red")


def test_a_refusal_elsewhere_is_ours(front):
    status, answer, _ = ask(front, "starter", messages=[{"role": "user", "content": "a fox " * 600}])
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "messages")


def test_a_server_that_is_not_there_and_one_that_does_not_know_us(front):
    status, answer, headers = ask(front, "far")
    assert (status, answer["error"]["code"]) == (503, "upstream_unavailable")
    assert float(headers["retry-after"]) > 0
    status, answer, _ = ask(front, "there")  # no key was given for it
    assert (status, answer["error"]["code"]) == (503, "upstream_key")


def test_an_adapter_that_the_server_forgot_is_loaded_again(front, behind):
    wanted = text(front, "blue")
    _, rows, _ = behind.ask("/v1/models")
    name = next(row["id"] for row in rows["data"] if row["id"].startswith("preftune-") and text(behind, row["id"]) == wanted)
    status, _, _ = behind.ask("/v1/unload_lora_adapter", "POST", {"lora_name": name})
    assert status == 200
    assert ask(behind, name)[0] == 404
    assert text(front, "blue") == wanted


def test_adapters_share_little_memory_in_turn(behind, front):
    """There is room for one of the two: the one that was not asked for longest leaves, and the answers stay the same."""
    texts = [text(front, name) for name in ("red", "blue", "red", "blue")]
    assert texts[:2] == texts[2:]
    _, rows, _ = behind.ask("/api/v1/serving")
    assert len(rows["data"][0]["adapters"]) == 1


@pytest.mark.parametrize("path", ["/etc", "{adapters}/../x", "{adapters}", "{adapters}/red/nothing"])
def test_only_adapters_below_the_operators_folder(behind, adapters, path):
    body = {"lora_name": "x", "lora_path": path.format(adapters=adapters)}
    assert behind.ask("/v1/load_lora_adapter", "POST", body)[0] == 400


def test_without_a_folder_no_path_is_taken(front, adapters):
    body = {"lora_name": "x", "lora_path": str(adapters / "red")}
    status, answer, _ = front.ask("/v1/load_lora_adapter", "POST", body)
    assert status == 403
    assert "--adapter-folder" in answer["error"]["message"]
