"""Any packing of the same pairs, in any order, gives the same step; a mean of micro-batch means does not."""

import pytest
import torch
from tiny import Sorted, labelled, make_examples

from preftune.core.errors import NonFiniteLoss
from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import pack_of, pack_step
from preftune.data.partners import partner_group, with_partners
from preftune.maths.losses.base import BaseLoss, losses
from preftune.maths.metrics import reduce_terms
from preftune.maths.types import LossTerms, Term
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training.optim import Optimiser
from preftune.training.step import Objective, counts_of, evaluate, find_culprits, train_step

LOSSES = {
    "dpo": ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    "dpo with lengths and NLL": ("dpo", {"beta": 3.0, "length_normalised": True, "rpo_alpha": 0.5}),
    "sft": ("sft", {}),
    "orpo": ("orpo", {"lambda_or": 0.5}),
    "orpo with prompts": ("orpo", {"lambda_or": 0.5, "nll_scope": "prompt_and_answer"}),
    "kto": ("kto", {"beta": 0.3, "lambda_u": 0.8}),
    "apo_zero_unpaired": ("apo_zero_unpaired", {"beta": 0.3, "lambda_u": 0.8}),
    "wpo": ("wpo", {"beta": 0.3}),
    "aot": ("aot", {"beta": 0.3}),
    "bco_pair": ("bco_pair", {"beta": 0.3}),
    "mix": ("mix", {"parts": {"dpo": {"weight": 0.8, "beta": 0.3}, "simpo": {}, "sft": {"weight": 0.2}}}),
    "sorted margins": ("sorted", {}),
}
HUGE = 10**6


def objective_of(tiny_model, name, adapter):
    """A policy a little away from its reference, so that no gradient is trivial."""
    model = load_model(ModelConfig(name=str(tiny_model)), precision="float32").model
    if adapter == "lora":
        model = add_lora(model, LoraConfig(rank=4), 0)
    scorer = Scorer(model)
    frozen = {}
    method, options = LOSSES[name]
    examples = make_examples(8, seed=5, completions=1 if method == "sft" else 2)
    if method in {"kto", "apo_zero_unpaired"}:
        examples = with_partners(labelled(examples), 64)
    for example in examples:
        for group in (example, *([partner_group(example)] if example.partner else [])):
            frozen[group.example_id, group.completions] = scorer.token_logps(pack_of([group])).detach()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)

    def reference(pack):
        return torch.cat([frozen[example.example_id, example.completions] for example in pack.examples])

    loss = Sorted() if method == "sorted" else losses.build(method, options)
    return Objective(scorer, loss, reference if loss.needs_reference else None), examples


def optimiser_of(objective):
    return Optimiser(trainable_parameters(objective.scorer.model), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def step_of(tiny_model, name, adapter, packs_of):
    """Metrics, and every trained weight after one step of AdamW's direction by plain gradient, flat."""
    objective, examples = objective_of(tiny_model, name, adapter)
    packs = packs_of(examples)
    optimiser = optimiser_of(objective)
    seen = {}
    step, optimiser.step = (
        optimiser.step,
        lambda lr: seen.update({key: one.grad.clone() for key, one in optimiser.masters.items()}) or step(lr),
    )
    metrics = train_step(objective, packs, optimiser, lr=1e-3, max_grad_norm=None)
    return metrics, torch.cat([gradient.flatten() for gradient in seen.values()]), len(packs)


PACKINGS = {
    "one pack each": lambda rows: pack_step(rows, 1),
    "packs of 64": lambda rows: pack_step(rows, 64),
    "packs of 100, reversed": lambda rows: pack_step(rows[::-1], 100),
    "permuted": lambda rows: [pack_of([rows[i] for i in (3, 0, 6)]), pack_of([rows[i] for i in (7, 1, 5, 2, 4)])],
    "unequal": lambda rows: [pack_of(rows[:1]), pack_of(rows[1:])],
}


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_packing_gives_the_same_step(tiny_model, name, adapter):
    whole, gradient, count = step_of(tiny_model, name, adapter, lambda rows: pack_step(rows, HUGE))
    assert count == 1
    assert gradient.norm() > 1e-3
    for packing, packs_of in PACKINGS.items():
        metrics, other, count = step_of(tiny_model, name, adapter, packs_of)
        assert count > 1, packing
        for key, value in whole.items():
            assert metrics[key] == pytest.approx(value, abs=1e-5), (packing, key)
        assert (other - gradient).abs().max() < 1e-5, packing


def test_means_of_packs_would_differ(tiny_model):
    """The feature off: each pack divides by its own counts, as a mean of micro-batch means does."""
    gradients = []
    for own_counts in (False, True):
        objective, examples = objective_of(tiny_model, "sft", "lora")
        packs = [pack_of(examples[:1]), pack_of(examples[1:])]
        for pack in packs:
            counts = counts_of([pack]) if own_counts else counts_of(packs)
            (reduce_terms(objective(pack)[0], counts) / (len(packs) if own_counts else 1)).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in trainable_parameters(objective.scorer.model).values()]))
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_held_out_metrics_are_exact_over_pairs(tiny_model):
    objective, examples = objective_of(tiny_model, "dpo", "lora")
    whole = evaluate(objective, pack_step(examples, HUGE))
    parts = evaluate(objective, [pack_of(examples[:1]), pack_of(examples[1:3]), pack_of(examples[3:])])
    alone = [evaluate(objective, [pack_of([example])]) for example in examples]
    assert set(whole) == {
        "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_rewards/accuracies",
        "eval_logps/chosen", "eval_logps/rejected", "eval_logps/chosen_change", "eval_logps/rejected_change",
        "eval_logps/chosen_change_per_token", "eval_logps/rejected_change_per_token",
    }  # fmt: skip
    for key, value in whole.items():
        assert parts[key] == pytest.approx(value, abs=1e-4)
        assert sum(one[key] for one in alone) / len(alone) == pytest.approx(value, abs=1e-4)
    of_means = (
        evaluate(objective, [pack_of(examples[:1])])["eval_loss"] + evaluate(objective, [pack_of(examples[1:])])["eval_loss"]
    ) / 2
    assert abs(of_means - whole["eval_loss"]) > 1e-3, "a mean of batch means is another number"
    assert all(one.grad is None for one in trainable_parameters(objective.scorer.model).values())


def test_bfloat16_full_fine_tuning_adds_up_in_float32(tiny_model):
    """Masters receive float32 sums: packing moves the step by rounding of the activations only."""
    gradients = []
    for tokens in (1, HUGE):
        model = load_model(ModelConfig(name=str(tiny_model)), precision="bfloat16").model
        scorer = Scorer(model)
        examples = make_examples(8, seed=5, completions=1)
        optimiser = Optimiser(trainable_parameters(model), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        packs = pack_step(examples, tokens)
        objective = Objective(scorer, losses.build("sft"), None)
        for pack in packs:
            reduce_terms(objective(pack)[0], counts_of(packs)).backward()
        assert all(one.grad is None for one in model.parameters())
        assert {one.grad.dtype for one in optimiser.masters.values()} == {torch.float32}
        gradients.append(torch.cat([one.grad.flatten() for one in optimiser.masters.values()]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


class NanLoss(BaseLoss):
    """Not a number for pairs whose chosen completion has this many tokens."""

    def __init__(self, count):
        self.count = count

    def __call__(self, logps):
        values = torch.where(logps.chosen_tokens == self.count, torch.nan, logps.policy_chosen)
        return LossTerms({"bad": Term(values, "pair")}, logps.policy_chosen.detach(), logps.policy_rejected.detach())


class NanGradient(NanLoss):
    """A finite loss with a gradient that is none: the derivative of sqrt(0 x) is 0 times infinity."""

    def __call__(self, logps):
        bad = (0 * logps.policy_chosen).sqrt()
        rows = zip(bad.unbind(), logps.policy_chosen.unbind(), logps.chosen_tokens.tolist(), strict=True)
        values = torch.stack([one if count == self.count else good for one, good, count in rows])
        return LossTerms({"bad": Term(values, "pair")}, logps.policy_chosen.detach(), logps.policy_rejected.detach())


@pytest.mark.parametrize("kind", [NanLoss, NanGradient])
def test_a_step_that_is_not_finite_changes_nothing_and_names_the_examples(tiny_model, kind):
    objective, examples = objective_of(tiny_model, "dpo", "lora")
    count = examples[3].completions[0].num_scored
    guilty = [example for example in examples if example.completions[0].num_scored == count]
    assert 0 < len(guilty) < len(examples)
    bad = Objective(objective.scorer, kind(count), objective.reference)
    optimiser = optimiser_of(bad)
    before = {name: one.detach().clone() for name, one in optimiser.masters.items()}
    with pytest.raises(NonFiniteLoss, match="nan"):
        train_step(bad, pack_step(examples, 64), optimiser, lr=1e-3, max_grad_norm=1.0)
    assert all(torch.equal(before[name], one) for name, one in optimiser.masters.items())
    assert not optimiser.tensors(), "the optimiser has no state: it took no step"
    found = find_culprits(bad, pack_step(examples, 64), optimiser)
    assert {example.example_id for example, _ in found} == {example.example_id for example in guilty}
    word = "loss nan" if kind is NanLoss else "gradient norm nan"
    assert all(word in gave for _, gave in found)
    train_step(objective, pack_step(examples, 64), optimiser, lr=1e-3, max_grad_norm=1.0)  # and it can go on
    assert not all(torch.equal(before[name], one) for name, one in optimiser.masters.items())
