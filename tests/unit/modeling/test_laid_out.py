"""Frozen weights laid out for products: the same numbers as the weights themselves, and never those of other weights."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from preftune.core.recipe import LoraConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import Pack, pack_of
from preftune.modeling import laid_out
from preftune.modeling.adapters import add_lora
from preftune.modeling.forward import Scorer, base_of, decoder_layers
from preftune.modeling.laid_out import LaidOutLinear, lay_out, lay_out_layers

pytestmark = pytest.mark.skipif(
    not laid_out.can_be_laid_out(torch.zeros(16, 16, dtype=torch.bfloat16)), reason="this torch multiplies no bfloat16 by oneDNN"
)


def frozen(outputs: int, inputs: int, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    return layer.requires_grad_(requires_grad=False)


def model_of() -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = add_lora(LlamaForCausalLM(config).to(torch.bfloat16), LoraConfig(rank=4, alpha=8.0), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.train(mode=False)


def a_pack() -> Pack:
    made = torch.Generator().manual_seed(2)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 500, (count,), generator=made).tolist())

    def answer(count: int) -> TokenisedCompletion:
        return TokenisedCompletion(ids(count), (True,) * count)

    return pack_of([TokenisedExample(str(n), ids(20 + n), (answer(9 + n), answer(4))) for n in range(3)])


def scored(scorer: Scorer, model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of a pack and the gradients of their sum."""
    logps = scorer.token_logps(a_pack())
    torch.autograd.backward(logps.sum())
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return logps.detach(), found


@pytest.mark.parametrize("rows", [1, 7, 170, 1024, 2048])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (576, 1536), (37, 20)])
def test_both_products_are_those_of_the_weights(rows: int, outputs: int, inputs: int) -> None:
    layer = frozen(outputs, inputs)
    x, grad = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
    laid = lay_out([layer])
    assert laid is not None
    for found, wide in (
        (laid.forward(x), x.float() @ layer.weight.float().t()),
        (laid.backward(grad), grad.float() @ layer.weight.float()),
    ):
        # one rounding to bfloat16 of a sum taken in float32
        torch.testing.assert_close(found.float(), wide, rtol=2**-8, atol=1e-4 * float(wide.abs().max()))


def test_layers_of_one_input_stand_one_below_the_other() -> None:
    first, second = frozen(24, 32), frozen(8, 32)
    laid = lay_out([first, second])
    x = torch.randn(5, 32).bfloat16()
    assert laid is not None
    assert torch.equal(laid.forward(x), torch.cat([first(x), second(x)], 1))


def test_a_model_scores_and_learns_with_the_same_bits() -> None:
    model = model_of()
    scorer = Scorer(model, shared=True)
    plain, gradients = scored(scorer, model)
    assert scorer.bytes_to_lay_out == 2 * sum(
        one.nbytes for one in base_of(model).parameters() if one.dim() == 2 and not one.requires_grad
    )
    scorer.lay_out_weights()
    logps, others = scored(scorer, model)
    torch.testing.assert_close(logps, plain, rtol=0, atol=1e-6)
    assert gradients
    for name, one in gradients.items():
        torch.testing.assert_close(others[name], one, rtol=0, atol=1e-6 * float(one.abs().max()), msg=name)


def test_the_laid_out_weights_are_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    scorer = Scorer(model, shared=True)
    plain, _ = scored(scorer, model)
    scorer.lay_out_weights()
    product, calls = laid_out._product, []

    def doubled(x: torch.Tensor, laid: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(len(x))
        return product(x, laid, bias) * 2

    monkeypatch.setattr(laid_out, "_product", doubled)
    others, _ = scored(scorer, model)
    # four products a layer and the head's, both ways; nothing below the first layer trains, so one is left out
    assert len(calls) == 2 * (4 * 2 + 1) - 1
    assert float((others - plain).abs().max()) > 0.1


def test_a_weight_that_changed_is_multiplied_as_it_stands() -> None:
    model = model_of()
    scorer = Scorer(model, shared=True)
    scorer.lay_out_weights()
    before, _ = scored(scorer, model)
    with torch.no_grad():
        for layer in decoder_layers(base_of(model)):
            layer.mlp.down_proj.base_layer.weight.mul_(1.5)
            layer.self_attn.k_proj.base_layer.weight = nn.Parameter(
                layer.self_attn.k_proj.base_layer.weight * 0.5, requires_grad=False
            )
    expected, wanted = scored(Scorer(model, shared=True), model)
    found, gradients = scored(scorer, model)
    assert float((expected - before).abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name, one in wanted.items():
        torch.testing.assert_close(gradients[name], one, rtol=0, atol=1e-6 * float(one.abs().max()), msg=name)


def test_merged_adapters_are_seen_though_they_change_data() -> None:
    model = model_of()
    scorer = Scorer(model, shared=True)
    scorer.lay_out_weights()
    before, _ = scored(scorer, model)
    model.merge_adapter()
    with torch.no_grad():
        merged = scorer.token_logps(a_pack())
        expected = Scorer(model, shared=True).token_logps(a_pack())
        model.unmerge_adapter()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert float((merged - before).abs().mean()) < 0.05  # the same function, its weights rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_answers_gives_its_own_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    config = Qwen2Config(  # which has biases
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = Qwen2ForCausalLM(config).to(dtype).train(mode=False).requires_grad_(requires_grad=False)
    for name, one in model.named_parameters():
        if name.endswith("bias"):
            one.data.normal_()
    ids = torch.randint(0, 300, (2, 11))
    with torch.inference_mode():
        expected = model(ids).logits
        linear = [one for one in model.modules() if type(one) is nn.Linear]
        assert lay_out_layers(model, 0.0) == 0
        assert lay_out_layers(model, 1e9) == sum(one.weight.nbytes for one in linear)
        assert {type(one) for one in linear} == {LaidOutLinear}
        found = model(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if dtype == torch.bfloat16 else 2e-6)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
        torch.testing.assert_close(model(ids).logits, expected * 2, rtol=0, atol=1e-5)


def test_what_trains_is_left_alone() -> None:
    trained = frozen(8, 8)
    trained.weight.requires_grad_()
    assert lay_out([trained]) is None
    assert lay_out([frozen(8, 8), trained]) is None
    laid = lay_out([layer := frozen(8, 8)])
    assert laid is not None
    assert laid.is_current
    layer.weight.requires_grad_()
    assert not laid.is_current
