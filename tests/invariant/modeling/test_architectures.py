"""Packs with shared prefixes give the log-probs and gradients of plain rows, for every family; the others fall back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BASIC, GPT2_LIKE, build, gradients, largest, plain_logps, relative, row_logps, small_pack

from preftune.modeling.attention import SHARED, CannotShare
from preftune.modeling.block import read_block
from preftune.modeling.forward import Scorer, decoder_layers
from preftune.modeling.layout import PairLayout

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}
MLA = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
MIXED = ["sliding_attention", "full_attention"]

# family -> model type, settings, and settings that each switch one feature off
SHARED_FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "llama": ("llama", BASIC, ()),
    "llama-tied": ("llama", {**BASIC, "tie_word_embeddings": True}, ()),
    "qwen2": ("qwen2", BASIC, ()),
    "qwen3": ("qwen3", {**BASIC, "head_dim": 8}, ()),
    "mistral": ("mistral", {**BASIC, "head_dim": 8, "sliding_window": 7}, ({"sliding_window": None},)),
    "gemma2": (
        "gemma2",
        {**BASIC, **GEMMA, "layer_types": MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        ({"sliding_window": 64}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}),
    ),
    "gemma3": ("gemma3_text", {**BASIC, **GEMMA, "layer_types": MIXED}, ({"sliding_window": 64},)),
    "phi3": ("phi3", {**BASIC, "sliding_window": 7}, ({"sliding_window": None},)),
    "gpt2": ("gpt2", GPT2_LIKE, ()),
    "granite": (
        "granite",
        {**BASIC, "logits_scaling": 2.0, "attention_multiplier": 0.6, "residual_multiplier": 0.8, "embedding_multiplier": 3.0},
        ({"logits_scaling": 1.0}, {"attention_multiplier": 0.1}),
    ),
    "cohere": ("cohere", {**BASIC, "logit_scale": 0.25}, ({"logit_scale": 1.0},)),
    "phi": ("phi", BASIC, ()),
    "mixtral": ("mixtral", {**BASIC, **MOE, "sliding_window": None}, ()),
    "qwen2-moe": ("qwen2_moe", {**BASIC, **QWEN_MOE}, ()),
    "qwen3-moe": ("qwen3_moe", {**BASIC, **QWEN_MOE, "head_dim": 8}, ()),
    "gpt-oss": ("gpt_oss", {**BASIC, **MOE, "head_dim": 8, "sliding_window": 7, "layer_types": MIXED}, ({"sliding_window": 64},)),
    "olmo2": ("olmo2", BASIC, ()),
    "deepseek-v3": ("deepseek_v3", {**BASIC, **MLA}, ()),
}

FUSED_FAMILIES = {"llama", "llama-tied", "qwen2", "mistral"}  # whose layers run as blocks


@pytest.mark.parametrize("family", SHARED_FAMILIES)
def test_shared_rows_equal_plain_rows(family: str) -> None:
    kind, settings, switches = SHARED_FAMILIES[family]
    pack = small_pack()
    model = build(kind, settings)
    expected = plain_logps(model, pack)

    for switch in switches:  # every feature matters on this pack: off, the numbers move
        other = build(kind, {**settings, **switch})
        assert largest(plain_logps(other, pack), expected) > 1e-2, switch
    positions = torch.from_numpy(pack.positions)[None]
    assert largest(row_logps(model, pack, position_ids=positions), expected) > 1e-2  # completions that see each other

    wanted = gradients(model, expected)
    scorer = Scorer(model, shared=True)
    restart_off = row_logps(model, pack, pair_layout=PairLayout(pack.groups), position_ids=torch.arange(len(pack.ids))[None])
    assert largest(restart_off, expected) > 1e-2  # positions that do not restart

    got = scorer.token_logps(pack)
    assert scorer.is_shared
    blocks = f"+{scorer.num_blocks}blocks/eager" if family in FUSED_FAMILIES else ""
    assert scorer.kernel == f"shared/{SHARED}{blocks}/fused"
    assert scorer.num_blocks == (model.config.num_hidden_layers if family in FUSED_FAMILIES else 0)
    assert got.dtype == torch.float32
    assert largest(got, expected) < 1e-4
    assert relative(gradients(model, got), wanted) < 1e-4
    with torch.no_grad():
        assert torch.equal(scorer.token_logps(pack), got)  # evaluation and training are one arithmetic


def test_a_layer_that_only_looks_like_a_block_keeps_its_own_forward() -> None:
    kind, settings, _ = SHARED_FAMILIES["granite"]  # the children of Llama's layer, and multipliers between them
    model = build(kind, settings)
    assert all(read_block(layer) is not None for layer in decoder_layers(model))
    assert Scorer(model, shared=True).num_blocks == 0


def test_sinks_take_probability() -> None:
    kind, settings, _ = SHARED_FAMILIES["gpt-oss"]
    model = build(kind, settings)
    pack = small_pack()
    with torch.no_grad():
        before = plain_logps(model, pack)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
        assert largest(plain_logps(model, pack), before) > 1e-2
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(1.0)
        assert largest(Scorer(model, shared=True).token_logps(pack), plain_logps(build_like(model), pack)) < 1e-4


def build_like(model: Any) -> Any:
    kind, settings, _ = SHARED_FAMILIES["gpt-oss"]
    plain = build(kind, settings)
    plain.load_state_dict(model.state_dict())
    return plain


def test_bias_of_the_head_counts() -> None:
    model = build("phi", BASIC)
    pack = small_pack()
    with torch.no_grad():
        expected = plain_logps(model, pack)
        bias = model.lm_head.bias.clone()
        model.lm_head.bias.zero_()
        assert largest(plain_logps(model, pack), expected) > 1e-2
        model.lm_head.bias.copy_(bias)
        assert largest(Scorer(model).token_logps(pack), expected) < 1e-4


LONGROPE = {
    "original_max_position_embeddings": 10,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 10,
    },
}
MAMBA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "intermediate_size": 64,
    "time_step_rank": 4,
}
ROW_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("falcon", {**BASIC, "new_decoder_architecture": False, "multi_query": True}, "does not call"),
    "falcon-alibi": ("falcon", {**BASIC, "alibi": True, "multi_query": True}, "does not call"),
    "bloom": ("bloom", {**BASIC, "n_layer": 2, "n_head": 4}, "does not call"),
    "mpt": ("mpt", {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "does not call"),
    "gptj": ("gptj", {**GPT2_LIKE, "rotary_dim": 4}, "does not call"),
    "gpt-neo": (
        "gpt_neo",
        {**BASIC, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 7},
        "does not call",
    ),
    "mamba": ("mamba", MAMBA, "does not call"),
    "lfm2": ("lfm2", {**BASIC, "layer_types": ["conv", "full_attention"]}, "conv"),
    "phi3-longrope": ("phi3", {**BASIC, **LONGROPE}, "longest row"),
    "nemotron": ("nemotron", BASIC, ""),
    "stablelm": ("stablelm", BASIC, ""),
    "phimoe-window": ("phimoe", {**BASIC, **MOE, "sliding_window": 7}, "window"),
}


@pytest.mark.filterwarnings("ignore")  # these families warn about their own slow paths
@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_other_families_fall_back(family: str) -> None:
    kind, settings, reason = ROW_FAMILIES[family]
    model = build(kind, settings)
    pack = small_pack()
    expected = plain_logps(model, pack)
    wanted = gradients(model, expected)

    scorer = Scorer(model)
    assert not scorer.is_shared
    assert reason in scorer.reason
    assert scorer.reason
    got = scorer.token_logps(pack)
    assert largest(got, expected) < 1e-4
    assert relative(gradients(model, got), wanted) < 1e-4
    with pytest.raises(CannotShare, match="cannot share prefixes"):
        Scorer(model, shared=True)


def test_a_model_that_shares_may_be_told_not_to() -> None:
    model = build("llama", BASIC)
    pack = small_pack()
    scorer = Scorer(model, shared=False)
    assert not scorer.is_shared
    assert scorer.reason == "switched off"
    assert largest(scorer.token_logps(pack), plain_logps(model, pack)) < 1e-4
