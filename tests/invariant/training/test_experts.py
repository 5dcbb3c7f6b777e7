"""The auxiliary loss of a mixture of experts: transformers' own number, its gradient on the policy, never in the reference."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import make_examples, make_model, make_plan
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from preftune.core.errors import RecipeError, UsageError
from preftune.core.files import read_jsonl
from preftune.core.recipe import LoraConfig, ModelConfig, build_recipe
from preftune.data.pack import pack_of
from preftune.maths.losses.base import BaseLoss
from preftune.maths.types import LossTerms, Term
from preftune.modeling.activations import keep_layer_inputs
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.modeling.routers import Routers
from preftune.training.loop import run_stage
from preftune.training.step import Objective, train_step

PLAIN = LoraConfig(rank=4, alpha=8)
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "mixtral": lambda **own: MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=48, num_local_experts=4, **own)),
    "qwen2_moe": lambda **own: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=48, **own
        )
    ),
}


@pytest.fixture
def experts(tmp_path):
    def make(family="mixtral", **own):
        folder = make_model(tmp_path / "model")
        torch.manual_seed(0)
        for stale in ("model.safetensors", "config.json"):
            (folder / stale).unlink()
        FAMILIES[family](**own).save_pretrained(folder)
        return folder

    yield make
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


def loaded(folder):
    return load_model(ModelConfig(name=str(folder)), precision="float32").model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_value_and_gradient_are_those_of_transformers(experts, family, is_checkpointed):
    """One row, so that both see the same tokens; the log-probs' own slopes are 0, so all gradient is the auxiliary loss's."""
    folder = experts(family)
    pack = pack_of(make_examples(1, completions=1))
    model = loaded(folder)
    theirs = model(input_ids=torch.from_numpy(pack.ids)[None], output_router_logits=True).aux_loss
    torch.autograd.backward(0.3 * theirs)
    expected = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    other = loaded(folder)
    scorer = Scorer(other, shared=True)
    if is_checkpointed:
        keep_layer_inputs(other)
    scorer.routers = Routers(other)
    assert scorer.routers.num == 2
    with scorer.routers.weighing(0.3):
        logps = scorer.token_logps(pack)
        torch.autograd.backward(logps * 0, torch.ones_like(logps))
        value = scorer.routers.last
    assert value.item() == pytest.approx(theirs.item(), rel=1e-5)
    got = {name: one.grad for name, one in other.named_parameters() if one.grad is not None}
    assert expected
    for name, one in expected.items():
        torch.testing.assert_close(got[name], one, rtol=1e-4, atol=1e-6)


def test_a_pack_counts_each_token_once_and_no_padding(experts):
    """Two pairs in one pack: the statistic is over the tokens of the layout, prompts once."""
    model = loaded(experts())
    pack = pack_of(make_examples(2))
    scorer = Scorer(model, shared=True)
    scorer.routers = Routers(model)
    heard = []
    gate = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.gate"))
    gate.register_forward_hook(lambda _module, _given, found: heard.append(found[0]))
    with scorer.routers.weighing(1.0):
        scorer.token_logps(pack)
    assert [one.shape for one in heard] == [(len(pack.ids), 4)]
    assert 2.0 - 1e-4 <= float(scorer.routers.last) <= 8.0, "k where all are used alike, at most k times the experts"


def test_packs_of_a_step_weigh_by_their_tokens(experts):
    """Value and gradient: two unequal packs, beside each pack's own auxiliary loss."""
    model, rows = loaded(experts()), make_examples(6)
    packs = [pack_of(rows[:1]), pack_of(rows[1:])]
    scorer = Scorer(model, shared=True)
    scorer.routers, scorer.router_weight = Routers(model), 0.5
    sizes = [len(pack.ids) for pack in packs]
    own = []
    for pack, size in zip(packs, sizes, strict=True):
        with scorer.routers.weighing(0.5 * size / sum(sizes)):
            logps = scorer.token_logps(pack)
            torch.autograd.backward(logps * 0, torch.ones_like(logps))
            own.append(float(scorer.routers.last))
    expected = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    seen = {}

    class Nothing(BaseLoss):
        needs_reference = False

        def __call__(self, logps):
            zeros = logps.policy_chosen * 0
            return LossTerms({"nothing": Term(zeros, "pair")}, zeros.detach(), zeros.detach())

    def clip(max_norm):
        seen.update({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
        return torch.zeros(())

    optimiser = SimpleNamespace(clip=clip, step=lambda lr: None)
    metrics = train_step(Objective(scorer, Nothing(), None), packs, optimiser, lr=0.0, max_grad_norm=None)
    aux = sum(value * size for value, size in zip(own, sizes, strict=True)) / sum(sizes)
    assert metrics["aux_loss"] == pytest.approx(aux, rel=1e-6)
    assert abs(aux - sum(own) / 2) > 1e-4, "a mean over packs is another number"
    assert metrics["loss"] == pytest.approx(0.5 * aux, rel=1e-6)
    for name, one in expected.items():
        torch.testing.assert_close(seen[name], one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("method", "adapter"), [("dpo", "full"), ("dpo", "lora"), ("aot", "full")])
def test_the_policy_alone_is_balanced_and_it_is_logged(tmp_path, experts, method, adapter):
    """aot takes the whole step in two passes."""
    folder = experts()
    rows, results = {}, {}
    for name, weight in (("without", 0.0), ("with", 2.0)):
        changes = {"method": method, "loss": {}, "adapter": adapter, "lora": PLAIN, "warmup": 0.0, "max_steps": 6, "lr": 5e-3}
        plan = make_plan(tmp_path, folder, folder=name, router_aux_loss_coef=weight, **changes)
        results[name] = run_stage(plan)
        rows[name] = [row for row in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in row]
    assert "aux_loss" not in rows["without"][0]
    first = rows["with"][0]
    assert first["rewards/margins"] == 0.0, "the reference is as it was"
    assert first["loss"] == pytest.approx(rows["without"][0]["loss"] + 2.0 * first["aux_loss"], rel=1e-5)
    assert first["grad_norm"] != rows["without"][0]["grad_norm"]
    assert rows["with"][-1]["aux_loss"] < first["aux_loss"], "experts are used more alike"
    assert results["with"].facts["router_aux_loss_coef"] == 2.0
    assert results["with"].reference_forwards == 0, "the scores of the run without it are those of the run with it"


def test_the_weight_comes_from_the_model_where_it_outputs_its_routers(tmp_path, experts):
    folder = experts(output_router_logits=True, router_aux_loss_coef=0.07)
    assert run_stage(make_plan(tmp_path, folder, folder="own", max_steps=1, lora=PLAIN)).facts["router_aux_loss_coef"] == 0.07
    quiet = run_stage(make_plan(tmp_path, folder, folder="none", max_steps=1, lora=PLAIN, router_aux_loss_coef=0.0))
    assert quiet.facts["router_aux_loss_coef"] == 0.0
    whole = run_stage(make_plan(tmp_path, folder, folder="whole", max_steps=1, adapter="full"))
    assert json.loads((whole.final / "config.json").read_text())["output_router_logits"] is True, "saved as it was"


def test_a_dense_model_has_nothing_to_balance(tmp_path, tiny_model):
    with pytest.raises(UsageError, match=r"router_aux_loss_coef: 0.1 balances the experts of a mixture.* LlamaForCausalLM"):
        run_stage(make_plan(tmp_path, tiny_model, router_aux_loss_coef=0.1))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("router_aux_loss_coef", -0.1, "at least 0"),
        ("gradient_checkpointing", "sometimes", "'auto', 'on' or 'off'"),
        ("activation_offloading", "cloud", "'off', 'host' or 'disk'"),
    ],
)
def test_values_out_of_range_name_the_key_and_the_range(key, value, words):
    with pytest.raises(RecipeError) as refused:
        build_recipe({"model": "m", "data": "d.jsonl", "method": "dpo", key: value}, {"dpo": ()})
    assert key in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
