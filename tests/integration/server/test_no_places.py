"""No answer of the server names a place of its machine: every GET route is asked, after jobs that worked and jobs that failed."""

import io
import json
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

STARTER = Path(__file__).resolve().parents[3] / "src" / "preftune" / "starter"
STAGE = {
    "max_steps": 1, "warmup": 0, "pairs_per_step": 4, "adapter": "lora", "checkpoints": 1, "evals": 0, "probe": "off",
    "lora": {"rank": 2, "alpha": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two models of the operator, the second one with a weight file that is cut short."""
    good = tmp_path_factory.mktemp("operator") / "good model"
    shutil.copytree(STARTER / "model", good)
    cut = good.with_name("cut-model")
    shutil.copytree(STARTER / "model", cut)
    weights = next(cut.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100_000])
    return good, cut


@pytest.fixture(scope="module")
def server(start, places):
    return start("no-places", "--model", f"good={places[0]}", "--model", f"cut={places[1]}")


def bytes_of(server, path):
    """(status, body) of a GET."""
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {server.key}"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def templates():
    """Every GET route of the application, with its parameters in braces."""
    from preftune.server import feedback, native, observe, serving
    from preftune.server.compat import files, openai, seekr, storage, together

    routers = (observe.router, storage.router, serving.router, feedback.router, *native.routers, *together.routers,
               *seekr.routers, files.router, *openai.routers)  # fmt: skip
    return sorted({route.path for router in routers for route in router.routes if "GET" in route.methods})


def unpacked(body):
    """What an answer holds: itself, or the files of an archive."""
    if not body.startswith(b"\x1f\x8b"):
        return {"": body}
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}


@pytest.mark.slow
def test_no_answer_names_a_place_of_the_machine(server, places, starter_rows):
    rows = starter_rows("pairs.jsonl", 16).read_bytes()
    file = server.send("/api/v1/files?filename=pairs.jsonl&purpose=fine-tune", "POST", rows)[1]["id"]
    stage = {**STAGE, "data": {"train": [file]}}
    recipe = {"model": "good", "stages": [{**stage, "method": "sft"}, {**stage, "method": "dpo"}]}
    made = [server.ask("/api/v1/jobs", "POST", {"recipe": recipe})[1]]
    made.append(server.ask("/api/v1/jobs", "POST", {"model": "cut", "files": [file], "options": STAGE})[1])
    good, bad = (server.ended(one["id"], 900) for one in made)
    assert good["status"] == "succeeded", good["error"]
    assert [one["start"] for one in good["result"]["stages"]] == ["good", good["result"]["stages"][0]["name"]]
    assert bad["status"] == "failed"
    assert bad["error"]["code"] == "damaged_file"
    rules = {"name": "rules", "rules": [{"kind": "length", "min": 2, "max": 200, "weight": 1.0}]}
    asked = {"first": {"model": good["name"]}, "second": {"model": "good"}, "prompts": file, "judge": rules, "limit": 2}
    status, contest, _ = server.ask("/api/v1/evaluations", "POST", {**asked, "max_new_tokens": 4, "temperature": 0})
    assert status == 201, contest
    assert server.ended(contest["id"], 900)["status"] == "succeeded"
    said = [{"role": "user", "content": "A fox."}]
    answers = [server.ask("/v1/chat/completions", "POST", {"model": name, "messages": said, "max_tokens": 2})
               for name in (good["name"], "cut")]  # fmt: skip
    assert [status for status, _, _ in answers] == [200, 500]
    _, state, _ = server.ask("/api/v1/serving")
    assert {row["base"]: list(row["adapters"]) for row in state["data"]}["good"] == [good["name"]]
    server.ask("/api/v1/aliases/best", "PUT", {"model": good["name"], "reason": "x"})
    told = {f"answer {number}": json.dumps(answer).encode() for number, (_, answer, _) in enumerate(answers)}
    told |= {f"job {one['id']}": json.dumps(one).encode() for one in (*made, good, bad, contest)}
    asked_routes, answered = templates(), set()
    tuned = good["result"]["models"][-1]
    queries = {"/v1/finetune/download": f"?ft_id={good['id']}", "/v1/fine-tunes/models/limits": "?model_name=good"}
    for template in asked_routes:
        for values in (
            {"job_id": good["id"], "model_id": tuned, "evaluation_id": contest["id"], "name": good["name"]},
            {"job_id": bad["id"], "model_id": "good", "evaluation_id": bad["id"], "name": "good"},
            {"job_id": contest["id"], "model_id": "cut", "evaluation_id": "none", "name": "best"},
        ):
            known = {"file_id": file, "project_id": "default", "number": "1", **values}
            path = re.sub(r"\{(\w+)(?::path)?\}", lambda found, known=known: str(known.get(found.group(1), "none")), template)
            path += queries.get(path, "")
            for attempt in range(100):
                status, body = bytes_of(server, path)
                if status != 202:  # a packing that goes on
                    break
                time.sleep(0.5 if attempt else 0.1)
            if status == 200:
                answered.add(template)
            told |= {f"{status} {path} {name}": content for name, content in unpacked(body).items()}
    assert len(answered) > 45, sorted(set(asked_routes) - answered)
    assert any(name.endswith("adapter_config.json") for name in told) or any("safetensors" in name for name in told)
    marks = [str(server.home), str(places[0].parent), str(STARTER.parents[1]), "good model/"]
    leaks = {name: mark for name, content in told.items() for mark in marks if mark.encode() in content}
    assert leaks == {}
