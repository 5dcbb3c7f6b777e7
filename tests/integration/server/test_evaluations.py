"""Evaluations by the unmodified together and openai packages; an external judge with a key that must not be seen."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = [
        {"prompt": f"Tell a story about a fox named Nora {number}.", "a": f"Nora {number} sat.", "b": "No."}
        for number in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.mark.slow
def test_evaluations_of_both_packages(client, rows):
    found = client("evaluations.py", rows)
    assert set(found["statuses"].values()) == {"completed"}
    compared = found["results"]["compare"]
    assert compared["A_wins"] + compared["B_wins"] + compared["Ties"] == 4
    assert (compared["generation_fail_count"], compared["judge_fail_count"]) == (0, 0)
    for row in found["judged"]:
        orders = (row["choice_original"], row["choice_flipped"])
        assert row["MODEL_A_response"] == row["a"]
        assert row["MODEL_B_response"]
        assert (row["choice"] == "A") == (orders in {("A", "B"), ("A", "TIE"), ("TIE", "B")})
    wins = sum(row["choice"] == "A" for row in found["judged"])
    assert wins == compared["A_wins"]
    assert 1 <= found["results"]["score"]["aggregated_scores"]["mean_score"] <= 10
    assert sum(found["results"]["classify"]["label_counts"].values()) == 4
    assert found["listed"] == [True] * 3
    brought = found["brought"]
    assert brought["result_counts"] == {"total": 2, "passed": 1, "failed": 1, "errored": 0}
    named = {one["testing_criteria"]: (one["passed"], one["failed"]) for one in brought["per_testing_criteria_results"]}
    assert named == {"good": (2, 0), "score": (2, 0), "same": (1, 1)}
    assert [item["status"] for item in found["items"]] == ["pass", "fail"]
    shares = found["items"][0]["results"][0]["sample"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert found["written"]["per_model_usage"][0]["invocation_count"] == 1
    assert found["answers"][0]["sample"]["output"][0]["content"]
    assert found["answers"][0]["sample"]["finish_reason"] == "length"
    assert "code of users is not run" in found["refused"][0]
    assert "operation" in found["refused"][1]
    assert (found["reward"], found["runs"], found["renamed"], found["one"]) == (1.0, 2, "renamed", True)


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose judge prefers the answer that says Nora."""

    asked: ClassVar[list[str]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.asked.append(self.headers["Authorization"])
        text = body["messages"][-1]["content"]
        first, second = text.index("ANSWER A"), text.index("ANSWER B")
        answer = "A" if "Nora" in text[first:second] else "B"
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": f"Verdict: {answer}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def judged_by(served, address, rows):
    """A comparison by an external judge, when it has ended."""
    _, file, _ = upload(served, rows)
    judge = {"model": "any", "model_source": "external", "external_base_url": address, "external_api_token": "judge-secret-0123",
             "system_template": "Pick."}  # fmt: skip
    given = {"input_data_file_path": file["id"], "judge": judge, "model_a": "a", "model_b": "b"}
    _, made, _ = served.ask("/v1/evaluation", "POST", {"type": "compare", "parameters": given})
    deadline = time.monotonic() + 300
    while (told := served.ask(f"/v1/evaluation/{made['workflow_id']}")[1])["status"] not in {"completed", "error"}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    kept = b"".join(path.read_bytes() for path in (served.home / "state").rglob("*") if path.is_file())
    assert b"judge-secret" not in kept + json.dumps(told).encode(), "the key is seen nowhere in the clear"
    return told


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Judge.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_an_external_judge_is_reached_where_the_operator_allows_it(reaching, address, rows):
    told = judged_by(reaching, address, rows)
    assert (told["status"], told["results"]["A_wins"]) == ("completed", 4), told
    assert set(Judge.asked) == {"Bearer judge-secret-0123"}


@pytest.mark.slow
def test_an_external_judge_is_not_reached_else(served, address, rows):
    told = judged_by(served, address, rows)
    assert told["status"] == "error"
    assert "not on this server's list" in told["results"]["error"]
    assert not Judge.asked


def upload(served, path):
    parts = [("purpose", None, b"eval"), ("file", path.name, path.read_bytes())]
    body = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename else ""
        body += f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
    return served.send("/v1/files", "POST", body + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "input_data_file_path"),
        ({"judge": {"model": "starter", "system_template": "{% if %}"}}, "no Jinja"),
        ({"judge": {"model": "nobody", "system_template": ""}}, "there is no model"),
        ({"judge": {"model": "x", "model_source": "external", "external_base_url": "file:///etc/passwd"}}, "external_base_url"),
        ({"model_a": None}, "model_a is missing"),
        ({"model_b": {"model": "/etc", "input_template": "x"}}, "there is no model"),
    ],
)
def test_a_bad_evaluation_is_one_envelope(served, rows, parameters, words):
    given = {"judge": {"model": "starter"}, "model_a": "a", "model_b": "b"}
    if parameters:
        given |= {"input_data_file_path": upload(served, rows)[1]["id"]} | parameters
    status, answer, _ = served.ask("/v1/evaluation", "POST", {"type": "compare", "parameters": given})
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert words in answer["error"]["message"]
