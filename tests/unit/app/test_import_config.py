"""Jobs of other systems become recipes, and nothing of them disappears without a word."""

import json

import pytest
import yaml
from click.testing import CliRunner

from preftune.app.import_config import Answers, import_config
from preftune.app.imports.base import job_sources
from preftune.app.recipes import load_recipe, make_recipe
from preftune.cli.import_config import command
from preftune.core.errors import InputError, UnknownName, UsageError

# the least that each source needs, and what the key under test is tried with where "x" would not do
LEAST = {
    "trl": {"model_name_or_path": "starter", "use_peft": True},
    "axolotl": {"base_model": "starter", "rl": "dpo", "adapter": "lora", "micro_batch_size": 2},
    "llamafactory": {"model_name_or_path": "starter", "stage": "dpo", "finetuning_type": "lora"},
    "together": {"model": "starter", "training_file": "f", "training_method": {"method": "dpo"}},
    "openai": {"model": "starter", "training_file": "f", "method": {"type": "dpo", "dpo": {"hyperparameters": {}}}},
    "seekrflow": {"model": "starter", "training_files": ["f"], "fine_tune_type": "PREFERENCE", "n_epochs": 1},
}
TRIED = {
    "lr_scheduler_type": "cosine", "lr_scheduler": "cosine", "dtype": "bfloat16", "torch_dtype": "bfloat16",
    "optim": "adamw_torch", "optimizer": "adamw_torch", "loss_type": "sigmoid", "loss_weights": None, "rl": "ipo",
    "adapter": "lora", "stage": "kto",
    "finetuning_type": "full", "pref_loss": "ipo", "warmup_ratio": 0.1, "val_size": 0.1, "val_set_size": 0.1, "lora_dropout": 0.1,
    "dpo_loss_type": "sigmoid", "dpo_loss_weights": None, "training_method": "dpo", "method.type": "dpo",
    "training_type.type": "Full", "lr_scheduler.lr_scheduler_type": "linear", "fine_tune_type": "PREFERENCE",
    "datasets": [{"path": "a.jsonl"}], "lora_target_modules": ["q_proj"], "lora_target": "all",
    "lora_config.dropout": 0.1, "training_type.lora_dropout": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "label_smoothing": 0.1,
    "dpo_label_smoothing": 0.1, "training_method.method": "dpo", "cpo_alpha": 0.5, "simpo_gamma": 0.5,
    "early_stopping_patience": 2, "n_checkpoints": 2,
    "lora_target_linear": True, "lora": True, "use_peft": True, "trainer": "dpo", "training_files": ["a"],
    "validation_files": ["b"],
    "f_divergence_type": "js_divergence", "ld_alpha": 0.5, "use_weighting": True, "dpo_use_weighting": True,
    "lora_trainable_modules": "all-linear", "training_type.lora_trainable_modules": "q_proj,v_proj",
}  # fmt: skip
TEXT = ("model", "name", "file", "dir", "dataset", "suffix", "revision", "template", "checkpoint", "metric")


def value_for(key):
    if key in TRIED:
        return TRIED[key]
    return f"x-{key}" if any(word in key.rpartition(".")[2] for word in TEXT) else 2


def nest(given, key, value):
    *parents, last = key.split(".")
    target = given
    for parent in parents:
        inner = target.get(parent)
        target[parent] = dict(inner) if isinstance(inner, dict) else {}
        target = target[parent]
    target[last] = value
    return given


def write(folder, given, name="job.json"):
    path = folder / name
    path.write_text(json.dumps(given) if name.endswith("json") else yaml.safe_dump(given), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", sorted(LEAST))
def test_every_key_of_the_table_is_carried_or_listed_and_the_recipe_is_accepted(source, tmp_path):
    table = job_sources.factory(source).table
    assert len(table) > 10
    for key, rule in table.items():
        value = value_for(key)
        if value is None:
            continue
        given = nest(json.loads(json.dumps(LEAST[source])), key, value)
        if (source, key) == ("trl", "cpo_alpha"):
            given["loss_type"] = "simpo"
        made = import_config(write(tmp_path, given), Answers(source=source))
        assert (key in made.carried) != (key in made.left), (key, rule, made.carried.get(key), made.left.get(key))
        if key in made.left:
            assert len(made.left[key]) > 10, key
        make_recipe(made.recipe)


@pytest.mark.parametrize("source", sorted(LEAST))
def test_an_unknown_key_is_listed(source, tmp_path):
    made = import_config(write(tmp_path, {**LEAST[source], "frobnicate": 3}), Answers(source=source))
    assert made.left["frobnicate"] == "unknown key"
    assert "frobnicate" in made.to_yaml()


def test_a_file_of_trl(tmp_path):
    given = {
        "model_name_or_path": "org/base", "dataset_name": "org/pairs", "learning_rate": "5e-6", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "num_train_epochs": 2, "loss_type": "ipo", "beta": 0.05, "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine", "max_length": 512, "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0,
        "lora_target_modules": "all-linear", "seed": 7, "load_in_4bit": True, "reference_free": False,
    }  # fmt: skip
    made = import_config(write(tmp_path, given, "c.yaml"), Answers(devices=8))
    assert made.source == "trl"
    assert made.recipe == {
        "model": {"name": "org/base", "load_in_4bit": True}, "seed": 7, "method": "ipo",
        "loss": {"length_normalised": True, "tau": 0.05},
        "data": {"max_length": 512, "train": ["org/pairs"]}, "adapter": "lora",
        "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear"}, "lr": 5e-6, "epochs": 2.0,
        "schedule": "cosine", "pairs_per_step": 64, "warmup": 0.1,
    }  # fmt: skip
    assert not made.left
    said = " ".join(made.notes)
    for words in ("tau of IPO", "2 a device x 4 accumulated x 8 devices", "is no file here"):
        assert words in said, words


@pytest.mark.parametrize(
    ("given", "trainer", "method", "loss", "said"),
    [
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "", "dpo", {"beta": 0.1, "label_smoothing": 0.1}, ""),
        ({"loss_type": "sigmoid_norm", "beta": 5}, "", "dpo", {"length_normalised": True, "beta": 5.0}, "divided by length"),
        ({"rpo_alpha": 0.5}, "", "dpo", {"beta": 0.1, "rpo_alpha": 0.5}, "averages the NLL over a micro batch"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}, "", "mix",
         {"parts": {"dpo": {"weight": 0.8, "beta": 0.1}, "sft": {"weight": 0.2}}}, "whole step"),
        ({"loss_type": "simpo", "simpo_gamma": 1.5, "beta": 2, "cpo_alpha": 0}, "", "simpo",
         {"beta": 2.0, "gamma": 1.5}, "gamma / beta"),
        ({"loss_type": "simpo", "simpo_gamma": 1.5, "beta": 2}, "", "mix",
         {"parts": {"simpo": {"weight": 1.0, "beta": 2.0, "gamma": 1.5}, "sft": {"weight": 1.0}}}, "unless it is 0"),
        ({"beta": 0.2}, "orpo", "orpo", {"lambda_or": 0.2, "nll_scope": "prompt_and_answer"}, "weight lambda"),
        ({"desirable_weight": 1.2}, "", "kto", {"beta": 0.1, "lambda_d": 1.2, "lambda_u": 1.0}, "whole step"),
        ({"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.9}, "", "apo_zero_unpaired",
         {"beta": 0.1, "lambda_d": 1.0, "lambda_u": 0.9}, ""),
        ({"loss_type": "apo_zero_unpaired"}, "", "apo_zero_unpaired", {"beta": 0.1, "lambda_d": 1.0, "lambda_u": 1.0}, ""),
        ({}, "sft", "sft", None, ""),
        ({"loss_type": "hinge", "beta": 0.2}, "", "hinge", {"beta": 0.2}, ""),
        ({"loss_type": "robust"}, "", "robust", {"beta": 0.1, "label_smoothing": 0.0}, ""),
        ({"loss_type": "exo_pair", "label_smoothing": 0.01}, "", "exo_pair", {"beta": 0.1, "label_smoothing": 0.01}, ""),
        ({"loss_type": "exo_pair"}, "", "exo_pair", {"beta": 0.1}, "1e-3, the paper's"),
        ({"loss_type": "nca_pair"}, "", "nca_pair", {"beta": 0.1}, ""),
        ({"loss_type": "sppo_hard", "beta": 0.001}, "", "sppo_hard", {"beta": 0.001}, ""),
        ({"loss_type": "apo_zero"}, "", "apo_zero", {"beta": 0.1}, ""),
        ({"loss_type": "apo_down"}, "", "apo_down", {"beta": 0.1}, ""),
        ({"loss_type": "discopop", "discopop_tau": 0.07}, "", "discopop", {"beta": 0.1, "tau": 0.07}, ""),
        ({"f_divergence_type": "forward_kl"}, "", "dpo", {"beta": 0.1, "divergence": "forward_kl"}, ""),
        ({"f_divergence_type": "js_divergence", "loss_type": ["hinge", "sft"]}, "", "mix",
         {"parts": {"hinge": {"weight": 1.0, "beta": 0.1, "divergence": "jensen_shannon"}, "sft": {"weight": 1.0}}}, ""),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, "", "dpo",
         {"beta": 0.1, "divergence": "alpha", "divergence_alpha": 0.7}, "1 minus it"),
        ({"f_divergence_type": "alpha_divergence"}, "", "dpo", {"beta": 0.1, "divergence": "alpha", "divergence_alpha": 0.5}, ""),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1}, "", "dpo",
         {"beta": 0.1, "divergence": "reverse_kl"}, ""),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0}, "", "dpo",
         {"beta": 0.1, "divergence": "forward_kl"}, ""),
        ({"ld_alpha": 0.4, "beta": 0.2}, "", "ld_dpo", {"beta": 0.2, "alpha": 0.4}, ""),
        ({"ld_alpha": 1.0}, "", "dpo", {"beta": 0.1}, ""),
        ({"use_weighting": True}, "", "wpo", {"beta": 0.1}, ""),
        ({"cpo_alpha": 0.5, "loss_type": "sigmoid", "label_smoothing": 0.1}, "", "cpo",
         {"beta": 0.1, "alpha": 0.5, "label_smoothing": 0.1}, "whole step"),
        ({}, "cpo", "cpo", {"beta": 0.1, "alpha": 1.0}, ""),
        ({"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.25}, "", "alphapo",
         {"beta": 2.5, "gamma": 0.25, "alpha": 0.25}, "gamma / beta"),
        ({"loss_type": "simpo", "alpha": 0.25, "beta": 2.5, "cpo_alpha": 0}, "", "alphapo",
         {"beta": 2.5, "gamma": 0.5, "alpha": 0.25}, ""),
    ],
)  # fmt: skip
def test_losses_of_trl(tmp_path, given, trainer, method, loss, said):
    made = import_config(write(tmp_path, {"model_name_or_path": "starter", **given}), Answers(trainer=trainer))
    assert made.recipe["method"] == method
    assert made.recipe.get("loss") == loss
    assert said in " ".join(made.notes)


@pytest.mark.parametrize(
    ("given", "key", "reason"),
    [
        ({"loss_type": "ipo", "f_divergence_type": "forward_kl"}, "f_divergence_type", "does not cancel by length"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "f_divergence_type", "which apo_zero is not"),
        ({"f_divergence_type": "chi2"}, "f_divergence_type", "has no counterpart"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5}, "f_divergence_type", "lies in [0, 1]"),
        ({"f_alpha_divergence_coef": 0.5}, "f_alpha_divergence_coef", "does not name"),
        (
            {"f_divergence_type": "forward_kl", "f_alpha_divergence_coef": 0.5},
            "f_alpha_divergence_coef",
            "the job's is forward_kl",
        ),
        ({"loss_type": "hinge", "ld_alpha": 0.5}, "ld_alpha", "plain DPO only"),
        ({"ld_alpha": 2}, "ld_alpha", "not a weight in [0, 1]"),
        ({"discopop_tau": 0.1}, "discopop_tau", "does not name"),
        ({"loss_type": "hinge", "use_weighting": True}, "use_weighting", "plain DPO only"),
        ({"loss_type": "alphapo", "cpo_alpha": 1.0}, "cpo_alpha", "sets it to 0"),
    ],
)
def test_a_variant_that_cannot_be_carried_says_why(tmp_path, given, key, reason):
    made = import_config(write(tmp_path, {"model_name_or_path": "starter", **given}))
    assert reason in made.left[key]
    assert "divergence" not in made.recipe["loss"] or key == "f_alpha_divergence_coef"


def test_losses_of_llamafactory_and_axolotl(tmp_path):
    lf = {**LEAST["llamafactory"], "pref_beta": 0.2}
    assert import_config(write(tmp_path, {**lf, "pref_loss": "hinge"})).recipe["loss"] == {"beta": 0.2}
    tail = import_config(write(tmp_path, {**lf, "ld_alpha": 0.3}))
    assert (tail.recipe["method"], tail.recipe["loss"]) == ("ld_dpo", {"beta": 0.2, "alpha": 0.3})
    assert "policy alone" in " ".join(tail.notes)
    mixed = import_config(write(tmp_path, {**lf, "pref_bco_weight": 0.4, "pref_ftx": 0.1}))
    assert mixed.recipe["loss"]["parts"] == {
        "dpo": {"weight": 1.0, "beta": 0.2}, "bco_pair": {"weight": 0.4, "beta": 0.2}, "sft": {"weight": 0.1}
    }  # fmt: skip
    assert mixed.left == {}
    axolotl = {**LEAST["axolotl"], "dpo_loss_type": ["apo_zero", "sft"], "dpo_loss_weights": [1, 0.5], "rl_beta": 0.2}
    parts = import_config(write(tmp_path, axolotl)).recipe["loss"]["parts"]
    assert parts == {"apo_zero": {"weight": 1.0, "beta": 0.2}, "sft": {"weight": 0.5}}
    assert import_config(write(tmp_path, {**LEAST["axolotl"], "dpo_use_weighting": True})).recipe["method"] == "wpo"


def test_forms_of_cpo_that_are_not_here_are_refused(tmp_path):
    for given in ({"loss_type": "hinge"}, {"loss_type": "ipo"}, {"loss_type": "sigmoid", "alpha": 0.2}):
        with pytest.raises(InputError, match="of CPO"):
            import_config(write(tmp_path, {**LEAST["trl"], **given}), Answers(trainer="cpo"))


def test_warm_up_in_steps_needs_the_number_of_steps(tmp_path):
    least = LEAST["trl"]
    known = import_config(write(tmp_path, {**least, "warmup_steps": 30, "max_steps": 300}))
    assert known.recipe["warmup"] == 0.1
    open_ = import_config(write(tmp_path, {**least, "warmup_steps": 30}))
    assert "warmup" not in open_.recipe
    assert "max_steps is not given" in open_.left["warmup_steps"]


def test_a_file_of_axolotl(tmp_path):
    given = {
        "base_model": "org/base", "rl": "simpo", "rl_beta": 2.5, "simpo_gamma": 1.25, "cpo_alpha": 0.0, "adapter": "qlora",
        "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True, "micro_batch_size": 2,
        "gradient_accumulation_steps": 4, "num_epochs": 1, "learning_rate": 1e-6, "optimizer": "paged_adamw_8bit",
        "sequence_len": 2048, "val_set_size": 0.05, "datasets": [{"path": "org/pairs", "type": "chat_template.argilla"}],
    }  # fmt: skip
    made = import_config(write(tmp_path, given, "a.yml"))
    assert made.source == "axolotl"
    assert made.recipe["loss"] == {"beta": 2.5, "gamma": 1.25}
    assert (made.recipe["method"], made.recipe["pairs_per_step"]) == ("simpo", 8)
    assert made.recipe["lora"] == {"rank": 32, "alpha": 16.0, "target_modules": "all-linear"}
    assert made.recipe["data"] == {"max_length": 2048, "select": 0.05, "train": ["org/pairs"]}
    assert made.recipe["schedule"] == "cosine", "Axolotl's default"
    assert not made.left
    assert made.recipe["model"]["load_in_4bit"] is True
    assert made.recipe["optimizer"] == "adamw_8bit"


def test_a_file_of_llamafactory(tmp_path):
    given = {
        "model_name_or_path": "org/base", "stage": "dpo", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
        "lora_target": "all", "pref_beta": 0.1, "pref_loss": "sigmoid", "pref_ftx": 0.2, "dataset": "dpo_en_demo",
        "cutoff_len": 2048, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 5.0e-6,
        "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    }  # fmt: skip
    made = import_config(write(tmp_path, given, "lf.yaml"))
    assert made.source == "llamafactory"
    assert made.recipe["loss"] == {"beta": 0.1, "rpo_alpha": 0.2}
    assert made.recipe["lora"] == {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear"}
    assert (made.recipe["pairs_per_step"], made.recipe["epochs"], made.recipe["lr"]) == (8, 3.0, 5e-6)
    assert set(made.left) == {"do_train", "bf16"}


def test_a_job_of_together(tmp_path):
    given = {
        "training_file": "file-1", "model": "meta-llama/Llama-3.2-1B-Instruct-Reference", "n_epochs": 2, "batch_size": 8,
        "learning_rate": 2e-6, "warmup_ratio": 0.1, "packing": True, "random_seed": 3,
        "training_method": {"method": "dpo", "dpo_beta": 2.0, "simpo_gamma": 1.0, "dpo_reference_free": True,
                            "dpo_normalize_logratios_by_length": True},
        "training_type": {"type": "Lora", "lora_r": 16, "lora_alpha": 32, "lora_trainable_modules": "q_proj,v_proj"},
    }  # fmt: skip
    made = import_config(write(tmp_path, given))
    assert made.source == "together"
    assert (made.recipe["method"], made.recipe["loss"]) == ("simpo", {"beta": 2.0, "gamma": 1.0})
    assert made.recipe["model"]["name"] == "meta-llama/Llama-3.2-1B-Instruct"
    assert made.recipe["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert made.left == {}
    assert "no reference" in " ".join(made.notes)
    plain = import_config(write(tmp_path, {**given, "batch_size": "max", "training_method": {"method": "dpo", "dpo_beta": 0.2,
                                                                                        "rpo_alpha": 0.1}}))  # fmt: skip
    assert plain.recipe["loss"] == {"beta": 0.2, "rpo_alpha": 0.1}
    assert "16 is used" in plain.left["batch_size"]


def test_a_job_of_openai(tmp_path):
    hyper = {"beta": 0.2, "batch_size": "auto", "learning_rate_multiplier": 2, "n_epochs": 3}
    given = {"model": "gpt-4.1-mini", "training_file": "file-1", "method": {"type": "dpo", "dpo": {"hyperparameters": hyper}}}
    made = import_config(write(tmp_path, given), Answers(model="starter", data=("pairs.jsonl",)))
    assert made.source == "openai"
    assert made.recipe["model"] == {"name": "starter"}
    assert made.recipe["loss"] == {"beta": 0.2}
    assert (made.recipe["epochs"], made.recipe["lr"]) == (3.0, 2e-5)
    assert "pairs_per_step" not in made.recipe
    assert "not published" in made.left["method.dpo.hyperparameters.batch_size"]
    assert "cannot be had" in " ".join(made.notes)
    assert made.recipe["data"]["train"][0].endswith("/pairs.jsonl")


def test_a_job_of_seekrflow(tmp_path):
    given = {
        "project_id": 4,
        "training_config": {"training_files": ["f1"], "model": "org/base", "n_epochs": 2, "fine_tune_type": "PREFERENCE",
                            "beta": 0.3,
                            "learning_rate": 1e-5, "batch_size": 8, "lora_config": {"r": 4}, "pre_train": False},
        "infrastructure_config": {"accel_type": "A100", "n_accel": 8},
    }  # fmt: skip
    made = import_config(write(tmp_path, given))
    assert made.source == "seekrflow"
    assert made.recipe["loss"] == {"beta": 0.3}
    assert made.recipe["lora"] == {"rank": 4, "alpha": 32.0, "dropout": 0.1}
    assert (made.recipe["pairs_per_step"], made.recipe["method"]) == (8, "dpo")
    assert set(made.left) == {"project_id", "accel_type", "n_accel"}


def test_what_cannot_become_a_recipe_is_one_line(tmp_path):
    least = LEAST["trl"]
    for given, words in [
        ({**least, "loss_type": "nonsense"}, "loss 'nonsense' is not here"),
        ({**least, "max_length": 8, "rpo_alpha": [1]}, "a value is of the wrong kind"),
        ({"a": 1}, "say which with --from"),
        ({**LEAST["openai"], "method": {"type": "reinforcement"}}, "there is dpo and supervised"),
        ({**LEAST["axolotl"], "rl": "grpo"}, "rl: 'grpo' is not here"),
    ]:
        with pytest.raises(InputError, match=words):
            import_config(write(tmp_path, given))
    with pytest.raises(UsageError, match="names no model"):
        import_config(write(tmp_path, {"per_device_train_batch_size": 2}))
    with pytest.raises(UnknownName):
        import_config(write(tmp_path, least), Answers(source="nobody"))
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        import_config(tmp_path / "bad.json")


def test_the_verb_writes_a_recipe_that_loads_with_its_reasons_as_comments(tmp_path):
    file, out = write(tmp_path, {**LEAST["trl"], "reference_free": True}), tmp_path / "recipe.yaml"
    call = CliRunner().invoke(command, [str(file), "--out", str(out)], standalone_mode=False)
    assert call.exception is None, call.output
    assert "not carried: reference_free: dpo here has a reference" in call.output
    assert "# not carried: reference_free" in out.read_text(encoding="utf-8")
    assert load_recipe(out).stages[0].lr == 1e-6
    call = CliRunner().invoke(command, [str(file), "--json"], standalone_mode=False)
    assert json.loads(call.stdout)["not_carried"] == {
        "reference_free": "dpo here has a reference; simpo, orpo and cpo are losses without one"
    }
