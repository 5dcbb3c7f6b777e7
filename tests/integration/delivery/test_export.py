"""An exported folder is the run's model for plain transformers and PEFT, and a wrong merge never gets a name."""

import json

import peft.tuners.lora.layer
import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.app.export import NotTheSameModel, export_model
from preftune.cli.export import command
from preftune.core.errors import UsageError
from preftune.modeling.quiet import quiet

TEXT = "Once upon a time, a fox named Pip went to the forest. The birds sang."


def logits_of(model, folder):
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits.float().log_softmax(-1)


@pytest.fixture(scope="module")
def trained(lora_run, starter_model):
    base = AutoModelForCausalLM.from_pretrained(starter_model, dtype=torch.float32)
    plain = logits_of(base, starter_model)
    with quiet():
        moved = logits_of(PeftModel.from_pretrained(base, lora_run.model), starter_model)
    assert (moved - plain).abs().max() > 0.5, "the adapter must matter for the comparison to say anything"
    return moved


def test_merged_weights_are_the_model_of_the_run(lora_run, trained, tmp_path):
    done = export_model(str(lora_run.run), tmp_path / "out")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits_of(mine, tmp_path / "out") - trained).abs().max() < 1e-3
    assert 0 < done.facts["verified"]["largest_gap"] <= 1e-4
    assert json.loads((tmp_path / "out/export.json").read_text())["verified"] == done.facts["verified"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 3


def test_the_adapter_loads_with_peft_alone(lora_run, trained, tmp_path):
    from peft import AutoPeftModelForCausalLM

    export_model(str(lora_run.run), tmp_path / "out", form="adapter")
    with quiet():
        mine = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits_of(mine, tmp_path / "out") - trained).abs().max() < 1e-5


def test_bfloat16_is_stored_and_its_bound_is_stated(lora_run, trained, tmp_path):
    done = export_model(str(lora_run.run), tmp_path / "out", dtype="bfloat16")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert mine.dtype == torch.bfloat16
    checked = done.facts["verified"]
    assert checked["merge_gap"] <= 1e-4 < checked["largest_gap"] <= checked["bound"] == 0.5
    assert (logits_of(mine.float(), tmp_path / "out") - trained).abs().max() < 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_caught_and_leaves_nothing(lora_run, tmp_path, monkeypatch, dtype):
    right = peft.tuners.lora.layer.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "get_delta_weight", lambda self, name: 0.98 * right(self, name))
    with pytest.raises(NotTheSameModel, match="nothing was written"):
        export_model(str(lora_run.run), tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_caught(lora_run, tmp_path, monkeypatch):
    import preftune.modeling.export as room

    right = room.save_model

    def damage(model, tokenizer, folder):
        next(model.parameters()).data[:, 0] += 0.01
        right(model, tokenizer, folder)

    monkeypatch.setattr(room, "save_model", damage)
    with pytest.raises(NotTheSameModel):
        export_model(str(lora_run.run), tmp_path / "out")


def test_the_card_has_front_matter_settings_counts_and_usage_that_runs(lora_run, tmp_path, monkeypatch):
    export_model(str(lora_run.run), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preftune", "dpo"],
    }
    for fact in ("beta 0.1", "examples trained on: 24", "lr: 0.02", "starter model", "No evaluation of these weights"):
        assert fact in body, fact
    code = body.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code, names)
    assert names["model"].num_parameters() > 1e6


def test_the_card_gives_the_result_of_the_newest_report(lora_run, tmp_path):
    folder = lora_run.run / "evaluation"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"sentence": "Better: 71 % [60 %, 80 %] of 90 prompts."}), encoding="utf-8")
    (folder / "completions.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "Write about a hen."}]}) + "\n", encoding="utf-8"
    )
    try:
        done = export_model(str(lora_run.run), tmp_path / "out")
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert "71 % [60 %, 80 %]" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert done.facts["verified"]["num_completions"] == 1


def test_what_cannot_be_exported_is_one_line(lora_run, tmp_path):
    with pytest.raises(UsageError, match="has whole weights and no adapter"):
        export_model("starter", tmp_path / "out", form="adapter")
    with pytest.raises(UsageError, match=r"no run or folder of that name.*hub id"):
        export_model("nothing", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists and is not an export"):
        export_model("starter", tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text(encoding="utf-8") == "mine"


def test_the_verb_prints_the_gap_and_writes_over_its_own(tmp_path):
    call = CliRunner().invoke(command, ["starter", "--to", str(tmp_path / "out")], standalone_mode=False)
    assert "the largest gap is 0 nat" in call.output, call.output
    call = CliRunner().invoke(command, ["starter", "--to", str(tmp_path / "out"), "--json"], standalone_mode=False)
    assert json.loads(call.output)["verified"]["largest_gap"] == 0
