"""Models by hub id, and pushes to a hub, with the real client against a server on loopback."""

import json
import shutil

import pytest
from hub_server import TOKEN, Hub

MODEL = "models/tinystories-656k/hf"


@pytest.fixture
def hub(environment, tmp_path):
    served = Hub()
    environment.pop("HF_HUB_OFFLINE")
    environment |= {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / ".hf"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN", None)
    yield served
    served.close()


@pytest.fixture
def hub_recipe(tmp_path, pairs):
    def call(model):
        path = tmp_path / "hub.yaml"
        path.write_text(
            f"model: {model}\nmethod: dpo\nbeta: 0.1\nlr: 1e-4\nmax_steps: 2\nwarmup: 0\npairs_per_step: 2\nprobe: off\n"
            "data: {train: pairs.jsonl, limit: 4}\n",
            encoding="utf-8",
        )
        return path

    return call


@pytest.mark.slow
def test_a_model_is_trained_by_its_hub_id_at_a_revision_and_then_without_the_hub(
    hub, preftune, hub_recipe, shared_data, environment, tmp_path
):
    changed = tmp_path / "changed"
    shutil.copytree(shared_data / MODEL, changed)
    (changed / "config.json").write_text("{}")
    hub.add("acme/tiny", changed)
    hub.add("acme/tiny", shared_data / MODEL, "v1")
    recipe = hub_recipe("{name: acme/tiny, revision: v1, chat_template: chatml}")
    done = preftune("train", recipe, "--no-probe", "--json")
    assert done.returncode == 0, done.stderr
    assert any("/revision/v1" in path for path in hub.seen)
    assert not any("/resolve/main/" in path for path in hub.seen)
    hub.seen.clear()
    environment["HF_HUB_OFFLINE"] = "1"
    again = preftune("train", recipe, "--no-probe", "--json")
    assert again.returncode == 0, again.stderr
    assert hub.seen == []
    assert json.loads(again.stdout)["stages"][0]["reference_forwards"] == 0


@pytest.mark.slow
def test_gated_missing_and_unreachable_models_are_one_clear_line(hub, preftune, hub_recipe, shared_data, environment):
    hub.add("acme/gated", shared_data / MODEL)
    hub.gated.add("acme/gated")
    for model, words in (
        ("{name: acme/gated, chat_template: chatml}", "HF_TOKEN"),
        ("acme/nothing", "acme/nothing"),
        ("{name: acme/gated, revision: v9}", "acme/gated"),
    ):
        done = preftune("plan", hub_recipe(model), "--no-probe")
        assert done.returncode == 1
        assert words in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
    environment["HF_TOKEN"] = TOKEN
    done = preftune("plan", hub_recipe("{name: acme/gated, chat_template: chatml}"), "--no-probe")
    assert done.returncode == 0, done.stderr
    environment["HF_HUB_OFFLINE"] = "1"
    done = preftune("plan", hub_recipe("acme/never-seen"), "--no-probe")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_export_is_pushed_whole_and_can_be_loaded_by_its_id(hub, preftune, environment, tmp_path):
    refused = preftune("export", "starter", "--to", "out", "--push-to-hub", "me/tuned")
    assert refused.returncode == 2
    assert "HF_TOKEN" in refused.stderr
    assert not (tmp_path / "out").exists()
    environment["MY_TOKEN"] = "hf_wrong_token_0123456789"
    wrong = preftune("export", "starter", "--to", "out", "--push-to-hub", "me/tuned", "--token-env", "MY_TOKEN")
    assert wrong.returncode == 1
    assert "refuses the token in MY_TOKEN (401)" in wrong.stderr
    assert environment["MY_TOKEN"] not in wrong.stderr
    environment["MY_TOKEN"] = TOKEN
    done = preftune(
        "export", "starter", "--to", "out", "--push-to-hub", "me/tuned", "--private", "--token-env", "MY_TOKEN", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/me/tuned"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {name: data for name, data in hub.repos["me/tuned"]["main"].items() if name != ".gitattributes"} == kept
    assert "me/tuned" in hub.private
    environment["HF_TOKEN"] = TOKEN
    again = preftune("export", "me/tuned", "--to", "back", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["verified"]["largest_gap"] <= 1e-4
