"""Each finding about data, adapters, disk and verdict set: made for real with the starter, and silent without it."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest

from preftune.app import checks
from preftune.app.plan import plan
from preftune.app.recipes import make_recipe


def story(number, size=12):
    letters = random.Random(number)
    return " ".join("".join(letters.choices("aeinorst", k=4)) for _ in range(size))


def row(number, **changes):
    given = {"prompt": f"Tell of {story(number, 4)}", "chosen": story(number), "rejected": story(number + 500)}
    return {**given, **changes}


SOUND = [row(number) for number in range(40)]


@pytest.fixture
def found(tmp_path):
    def go(rows=SOUND, **keys):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        data = {"train": str(path), "select": 0.1, **keys.pop("data", {})}
        given = {"model": "starter", "method": "dpo", "data": data, "output": str(tmp_path / "runs"), **keys}
        made = plan(make_recipe(given, tmp_path))
        return {one.code: one for one in made.findings}

    return go


def test_a_sound_recipe_has_no_findings(found):
    assert found() == {}


def test_pairs_that_do_not_fit(found):
    long = [row(number, chosen=story(number, 90)) for number in range(40, 44)]
    finding = found([*SOUND, *long], data={"max_length": 160})["pairs_do_not_fit"]
    assert (finding.level, "4 of 44 rows (9%) are longer than 160 tokens" in finding.fact) == ("warning", True)
    assert "raise data.max_length" in finding.way_out
    assert "pairs_do_not_fit" not in found([*SOUND, *long], data={"max_length": 512})
    longer = [row(number, chosen=story(number, 900)) for number in range(40, 44)]
    finding = found([*SOUND, *longer], data={"max_length": 100_000})["pairs_do_not_fit"]
    assert "longer than 512 tokens, all positions that the model has" in finding.fact
    assert "raise data.max_length" not in finding.way_out, "it is above what the model has already"
    assert "pairs_do_not_fit" not in found([*SOUND, long[0]], data={"max_length": 160}), "one in forty is only counted"


def test_identical_pairs(found):
    finding = found([*SOUND, row(90, rejected=story(90))])["identical_pairs"]
    assert "1 of" in finding.fact


def test_contradictory_pairs(found):
    turned = {**SOUND[3], "chosen": SOUND[3]["rejected"], "rejected": SOUND[3]["chosen"]}
    assert "2 rows prefer the same two completions both ways" in found([*SOUND, turned])["contradictory_pairs"].fact
    assert "contradictory_pairs" not in found([*SOUND, SOUND[3]]), "a repeated row is a duplicate, not a contradiction"


def test_near_contradictions(found):
    base = row(3, chosen=story(3, 40), rejected=story(503, 40))
    turned = {"prompt": base["prompt"].upper(), "chosen": base["rejected"] + " So.", "rejected": base["chosen"] + " Yes."}
    finding = found([*SOUND[4:], base, turned])["near_contradictions"]
    assert finding.fact.startswith("stage dpo: 1 pairs of rows prefer nearly the same two completions")
    assert "pairs.jsonl:37 and" in finding.fact
    agreeing = {"prompt": base["prompt"].upper(), "chosen": base["chosen"] + " So.", "rejected": base["rejected"] + " Yes."}
    assert "near_contradictions" not in found([*SOUND[4:], base, agreeing])


def test_pairs_that_differ_by_a_word_do_not_contradict_each_other(found):
    text = story(3, 60)
    twins = [row(3, chosen=f"{text} {one} good.", rejected=f"{text} {one} bad.") for one in ("Very", "Quite")]
    assert "near_contradictions" not in found([*SOUND[4:], *twins])


def test_length_imbalance(found):
    longer = [row(number, chosen=story(number, 14)) for number in range(40)]
    finding = found(longer)["length_imbalance"]
    assert "in 100% of 36 pairs [90%, 100%]" in finding.fact
    mixed = [row(number, chosen=story(number, 14 if number % 2 else 10)) for number in range(40)]
    assert "length_imbalance" not in found(mixed)
    lopsided = [row(number, chosen=story(number, 60 if number % 2 else 10)) for number in range(40)]
    assert "x as long as rejected ones" in found(lopsided)["length_imbalance"].fact


def test_target_modules_that_match_nothing(found):
    finding = found(adapter={"target_modules": ["c_attn"]})["no_target_modules"]
    assert finding.level == "blocker"
    assert "'c_attn' matches no linear layer" in finding.fact
    assert "q_proj" in finding.way_out
    assert "no_target_modules" not in found(adapter={"target_modules": ["q_proj", "v_proj"]})
    partly = found(adapter={"target_modules": ["q_proj", "c_attn"]})
    assert (partly["unmatched_target"].level, "no_target_modules" in partly) == ("warning", False)


def test_target_modules_mean_what_peft_makes_of_them():
    from preftune.core.recipe import LoraConfig, ModelConfig, StageConfig
    from preftune.modeling.adapters import add_lora, trainable_parameters
    from preftune.modeling.load import load_model
    from preftune.training.model_files import num_trainable, weight_shapes

    for targets in ("all-linear", ("q_proj", "down_proj"), r".*\.(gate|up)_proj"):
        config = StageConfig(name="dpo", lora=LoraConfig(rank=4, target_modules=targets))
        model = add_lora(load_model(ModelConfig(name="starter"), precision="float32").model, config.lora, 0)
        count = sum(one.numel() for one in trainable_parameters(model).values())
        assert num_trainable(config, weight_shapes("starter")) == count


@pytest.fixture
def changed_model(tmp_path, starter_model):
    def go(**changes):
        folder = tmp_path / "changed"
        shutil.copytree(starter_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return str(folder)

    return go


def test_a_model_that_sees(found, changed_model):
    findings = found(model=changed_model(vision_config={"hidden_size": 8}))
    assert list(findings) == ["not_a_text_model"]
    assert "'vision_config'" in findings["not_a_text_model"].fact


def test_a_model_that_needs_a_package(found, tmp_path, starter_model):
    folder = tmp_path / "other"
    shutil.copytree(starter_model, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\n")
    codes = list(found(model=str(folder)))
    assert codes in (["missing_dependency"], ["no_model"])


def test_quantised_weights(found, changed_model, monkeypatch):
    from preftune.training import model_files

    monkeypatch.setattr(model_files, "find_spec", lambda name: object())
    folder = changed_model(quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised by bitsandbytes" in found(model=folder, adapter="full")["quantised_weights"].fact
    assert "quantised_weights" not in found(model=folder)
    shutil.rmtree(folder)
    assert found(model=changed_model(quantization_config={"quant_method": "quark"}))["quantised_weights"].level == "blocker"


def test_quantised_weights_under_a_soft_update(found, changed_model, monkeypatch):
    from preftune.training import model_files

    monkeypatch.setattr(model_files, "find_spec", lambda name: object())
    folder = changed_model(quantization_config={"quant_method": "bitsandbytes"})
    finding = found(model=folder, reference={"sync": {"alpha": 0.5}})["quantised_weights"]
    assert "reference.sync.alpha: 0.5 averages matrices" in finding.fact
    assert "quantised_weights" not in found(model=folder, reference={"sync": {"alpha": 1}})


def test_settings_that_need_what_is_not_here(found, monkeypatch):
    from preftune.training import available

    monkeypatch.setattr(available, "_has_gpu", lambda: False)
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert "optimizer: adamw_8bit needs the package bitsandbytes" in found(optimizer="adamw_8bit")["missing_dependency"].fact
    assert "activation_offloading: disk" in found(activation_offloading="host")["no_gpu_to_offload"].way_out
    assert found(activation_offloading="disk") == {}
    monkeypatch.setattr(available, "_has_gpu", lambda: True)
    monkeypatch.setattr(available, "find_spec", lambda name: object())
    assert found(optimizer="adamw_8bit", activation_offloading="host") == {}


def test_a_disk_that_is_too_small(found, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    finding = found(adapter="full")["disk_space"]
    assert (finding.level, "0.00 GB free" in finding.fact) == ("blocker", True)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert "disk_space" not in found(adapter="full")


def test_a_checkpoint_is_as_large_as_predicted(tmp_path, starter_model):
    from preftune.app.context import Context
    from preftune.app.train import train
    from preftune.training.model_files import weight_shapes

    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in SOUND[:16]), encoding="utf-8")
    for adapter in ("full", "lora"):
        given = {"model": {"name": "starter", "dtype": "float32"}, "data": str(rows), "adapter": adapter, "evals": 0}
        recipe = make_recipe({**given, "pairs_per_step": 8, "checkpoints": 1, "output": str(tmp_path / adapter), "lr": 1e-6})
        result = train(recipe, context=Context(tmp_path / "cache", tmp_path / "state"))
        one, final = checks.checkpoint_bytes(recipe.stages[0], weight_shapes("starter"), "float32")
        (checkpoint,) = result.run.glob("stages/*/checkpoints/step-*")

        def size(folder):
            return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

        assert size(checkpoint) == pytest.approx(one, rel=0.1)
        assert size(result.model) == pytest.approx(final, rel=0.1)


def test_a_verdict_set_that_shows_little(found, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    evaluation = {"prompts": str(prompts), "judge": {"name": "rules", "rules": [{"kind": "complete", "weight": 1.0}]}}

    def write(count):
        texts = [f"Speak about {story(number + 2000, 9)}" for number in range(count)]
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")

    write(50)
    finding = found(evaluation=evaluation)["small_verdict_set"]
    assert "50 verdict prompts show a win rate of 69.8% or more" in finding.fact
    assert "use 194 prompts or more" in finding.way_out
    write(200)
    assert "small_verdict_set" not in found(evaluation=evaluation)


WARM = {"kind": "lexicon", "name": "warm", "words": ["gentle", "happy"], "measure": "rate", "weight": 1.0, "cap": 8}


@pytest.fixture
def evaluated(found, tmp_path):
    """Findings of a recipe with these judges, on 200 prompts that nobody trains on."""
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"Speak about {story(number + 2000, 9)}" for number in range(200)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")

    def go(judge, **keys):
        return found(evaluation={"prompts": str(prompts), "judge": judge, **keys})

    return go


def rules(*kinds):
    return {"name": "rules", "rules": list(kinds)}


def test_an_evaluation_that_cannot_be_read(evaluated, tmp_path):
    assert evaluated(str(tmp_path / "none.yaml"))["unreadable_evaluation"].level == "blocker"
    assert evaluated(rules(WARM)) == {}


def test_a_judge_that_made_the_pairs(evaluated):
    same = evaluated(rules(WARM), pairs_judge=rules(WARM))
    assert same["judge_not_independent"].level == "blocker"
    other = {**WARM, "words": ["gentle", "sunny"]}
    assert "gentle" in evaluated(rules(WARM), pairs_judge=rules(other))["judge_not_independent"].fact
    assert evaluated(rules(WARM), pairs_judge=rules({**WARM, "words": ["sunny"]})) == {}


def test_a_judge_that_pays_for_length(evaluated):
    counting = {**WARM, "measure": "count"}
    assert evaluated(rules(counting))["judge_rewards_length"].level == "warning"
