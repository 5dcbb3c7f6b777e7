"""A run of the starter whose adapter moved far enough that a wrong merge shows, and random models of every family."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from preftune.app.recipes import make_recipe
from preftune.app.train import train
from preftune.core.recipe import ModelConfig
from preftune.modeling.load import load_model
from preftune.modeling.quiet import quiet

SHAPE = {
    "vocab_size": 2064,  # more rows than the tokenizer has tokens, as real models have
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, starter_model):
    folder = tmp_path_factory.mktemp("delivery")
    given = {
        "name": "tiny", "model": "starter", "method": "dpo", "beta": 0.1, "lr": 2e-2, "max_steps": 3, "pairs_per_step": 4,
        "data": {"train": str(starter_model.parent / "pairs.jsonl"), "limit": 24}, "probe": "off", "evals": 0,
        "output": str(folder / "runs"),
    }  # fmt: skip
    return train(make_recipe(given, folder), probe="off")


@pytest.fixture
def random_model(tmp_path, starter_model):
    """A random model of a family, biases and norms included, with the starter's tokenizer."""

    def make(kind, **changes):
        config, factory, own = KINDS[kind]
        torch.manual_seed(0)
        model = factory(config(**{**SHAPE, **own, **changes}))
        for name, one in model.named_parameters():
            if one.ndim == 1:
                one.data = one.data + 0.3 * torch.randn_like(one)
            assert one.abs().sum() > 0, name
        folder = tmp_path / "model"
        with quiet():
            model.save_pretrained(folder)
            load_model(ModelConfig(name="starter"), precision="float32").tokenizer.raw.save_pretrained(folder)
        return folder

    return make
