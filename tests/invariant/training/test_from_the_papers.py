"""From token ids to the gradient of every trained weight: a step equals the paper's formula on a plain forward pass, in float64.

The formulas (paper_losses.py) know no packs, no views and no normaliser; the plain pass is transformers' own model, one row
for each completion. So whatever goes wrong between a pack and a gradient shows here, whichever part of it is at fault.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from paper_losses import LABELLED, PAIRS, Pair, Side
from tiny import labelled, make_examples, make_model

from preftune.core.recipe import LoraConfig, ModelConfig
from preftune.data.pack import pack_of, pack_step
from preftune.data.partners import with_partners
from preftune.maths.losses.base import losses
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training.step import Objective, evaluate, train_step

NEAR = 1e-5  # relative: transformers' norms and rotations are float32 even in a float64 model
PACKINGS = {
    "one pack": lambda rows: pack_step(rows, 10**6),
    "unequal, out of order": lambda rows: [pack_of(rows[:1]), pack_of(rows[1:4][::-1]), pack_of(rows[4:])],
}


def with_context(example, at):
    """Every third completion has tokens that nobody wrote: context, not scored."""
    sides = (
        replace(one, scored=tuple(place not in (1, 2) for place in range(len(one.ids))))
        if (at + side) % 3 == 2 and len(one.ids) > 4
        else one
        for side, one in enumerate(example.completions)
    )
    return replace(example, completions=tuple(sides))


ROWS = [with_context(one, at) for at, one in enumerate(make_examples(8, seed=5))]
PAIR_ROWS = [
    replace(one, confidence=(None, 0.9, 0.6)[at % 3], strength=(0.0, 1.0, 2.0, 0.5)[at % 4]) for at, one in enumerate(ROWS)
]
TIED_ROWS = [replace(one, is_tie=at % 4 == 3) for at, one in enumerate(PAIR_ROWS)]
LABELLED_ROWS = with_partners(labelled(ROWS), 64)
DEMONSTRATIONS = [with_context(one, at) for at, one in enumerate(make_examples(8, seed=5, completions=1))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference, and a policy some steps away from it, in float64."""
    folder = make_model(tmp_path_factory.mktemp("papers"))
    made = []
    for _ in range(2):
        model = add_lora(load_model(ModelConfig(name=str(folder)), precision="float32").model, LoraConfig(rank=4), 0)
        made.append(model.double().eval())
    generator = torch.Generator().manual_seed(1)
    for one in trainable_parameters(made[0]).values():
        one.data += 0.05 * torch.randn(one.shape, generator=generator)
    return SimpleNamespace(policy=made[0], reference=made[1])


def side_of(models, prompt, completion):
    """A completion by a row of its own through the model as transformers runs it."""
    ids = torch.tensor([[*prompt, *completion.ids]])
    places = [place for place, is_scored in enumerate(completion.scored) if is_scored]

    def every(model):
        return torch.log_softmax(model(input_ids=ids).logits[0], -1)

    policy = every(models.policy)
    with torch.no_grad():
        reference = every(models.reference)
    rows, targets = [len(prompt) - 1 + place for place in places], [completion.ids[place] for place in places]
    concentration = torch.stack([policy[row].detach().exp().square().sum().log() for row in rows])
    return Side(policy[rows, targets], reference[rows, targets], concentration), policy[range(len(prompt) - 1), prompt[1:]]


def pairs_of(models, rows):
    found = []
    for one in rows:
        (chosen, prompt), (rejected, _) = (side_of(models, one.prompt_ids, side) for side in one.completions)
        found.append(Pair(chosen, rejected, prompt, one.confidence or 1.0, one.strength, one.is_tie))
    return found


def gradient_of(model, loss):
    parts = torch.autograd.grad(loss, list(trainable_parameters(model).values()), retain_graph=True)
    return torch.cat([one.flatten() for one in parts])


@pytest.fixture(scope="module")
def plain(models):
    """The plain passes, shared by all formulas; the scorers change how the models attend, so they come last."""
    found = SimpleNamespace(
        pairs=pairs_of(models, PAIR_ROWS),
        tied=pairs_of(models, TIED_ROWS),
        labelled=[side_of(models, one.prompt_ids, side)[0] for one in LABELLED_ROWS for side in one.completions],
        partners=[side_of(models, one.prompt_ids, one.partner)[0] for one in LABELLED_ROWS],
        demonstrations=[side_of(models, one.prompt_ids, one.completions[0])[0] for one in DEMONSTRATIONS],
    )
    models.scorer, models.reference_scorer = Scorer(models.policy), Scorer(models.reference)
    assert models.scorer.is_shared
    return found


def step_of(models, method, options, packs):
    """Loss and gradient of a training step as the loop takes it, and the held-out loss of the same examples."""
    trained, seen = trainable_parameters(models.policy), {}

    def clip(max_norm):
        seen["gradient"] = torch.cat([one.grad.flatten().clone() for one in trained.values()])
        return seen["gradient"].norm()

    def step(lr):
        for one in trained.values():
            one.grad = None

    def scores(pack):
        with torch.no_grad():
            return models.reference_scorer.token_logps(pack)

    loss = losses.build(method, options)
    objective = Objective(models.scorer, loss, scores if loss.needs_reference else None)
    state = {}
    metrics = train_step(objective, packs, SimpleNamespace(clip=clip, step=step), lr=0.0, max_grad_norm=None, loss_state=state)
    held_out = evaluate(objective.at(state), packs)["eval_loss"]
    assert bool(state) is (method in {"bco_pair", "mix"}), "the running mean is kept"
    return metrics["loss"], held_out, seen["gradient"]


def compare(models, expected, method, options, rows):
    gradient = gradient_of(models.policy, expected)
    assert gradient.norm() > 1e-6
    for name, packs_of in PACKINGS.items():
        loss, held_out, got = step_of(models, method, options, packs_of(rows))
        assert loss == pytest.approx(expected.item(), rel=NEAR), name
        assert held_out == pytest.approx(expected.item(), rel=NEAR), name
        assert (got - gradient).abs().max() < NEAR * gradient.abs().max(), name


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_is_the_papers(models, plain, name):
    method, options, formula = PAIRS[name]
    is_tied = "ties" in losses.build(method, options).needs
    expected = formula(plain.tied if is_tied else plain.pairs)
    compare(models, expected, method, options, TIED_ROWS if is_tied else PAIR_ROWS)


@pytest.mark.parametrize("name", LABELLED)
def test_a_step_of_labelled_completions_is_the_papers(models, plain, name):
    assert sum(one.r.item() for one in plain.partners) > 0, "a reference point that its bound does not hide"
    labels = [label for one in LABELLED_ROWS for label in one.labels]
    expected = LABELLED[name](plain.labelled, labels, plain.partners)
    compare(models, expected, name, {"beta": 0.3, "lambda_d": 1.2, "lambda_u": 0.8}, LABELLED_ROWS)


def test_a_step_of_demonstrations_is_the_papers(models, plain):
    sides = plain.demonstrations
    compare(models, -sum(one.p for one in sides) / sum(one.length for one in sides), "sft", {}, DEMONSTRATIONS)


def test_every_registered_loss_is_here():
    assert {method for method, _, _ in PAIRS.values()} | set(LABELLED) | {"sft"} == set(losses.names())
