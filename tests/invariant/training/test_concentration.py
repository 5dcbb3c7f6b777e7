"""log sum p^2 of each scored token and the tokens of prompts, by every way a pack is scored, against logits written out."""

from dataclasses import replace

import pytest
import torch
from tiny import make_examples

from preftune.core.recipe import ModelConfig
from preftune.data.pack import pack_of
from preftune.maths.losses.orpo import ORPO
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model
from preftune.training.views import Scores, view_of


@pytest.mark.parametrize("way", ["shared", "rows", "logits"])
def test_every_way_gives_it(tiny_model, way):
    model = load_model(ModelConfig(name=str(tiny_model)), precision="float32").model
    examples = make_examples(3)
    expected = []
    for example in examples:
        for completion in example.completions:
            row = torch.tensor([[*example.prompt_ids, *completion.ids]])
            p = torch.softmax(model(input_ids=row).logits[0, len(example.prompt_ids) - 1 : -1].double(), -1)
            expected.append((p**2).sum(-1).log().detach())
    scorer = Scorer(model, shared=way == "shared")
    if way == "logits":
        scorer._spec = None
    pack = pack_of(examples)
    logps, concentration = scorer.token_logps_and_concentration(pack)
    torch.testing.assert_close(concentration.double(), torch.cat(expected), rtol=0, atol=2e-5)
    assert torch.equal(logps, scorer.token_logps(pack)), "and the log-probabilities are what they are without it"
    assert logps.requires_grad
    assert not concentration.requires_grad


@pytest.mark.parametrize("way", ["shared", "rows", "logits"])
def test_every_way_scores_the_prompts_too(tiny_model, way):
    model = load_model(ModelConfig(name=str(tiny_model)), precision="float32").model
    examples = [*make_examples(3), replace(make_examples(1, 4)[0], prompt_ids=(1,))]
    expected = []
    for example in examples:
        row = torch.tensor([example.prompt_ids])
        logps = torch.log_softmax(model(input_ids=row).logits[0, :-1].double(), -1)
        expected.append(logps.gather(1, row[0, 1:, None]).squeeze(1).detach())
    scorer = Scorer(model, shared=way == "shared")
    if way == "logits":
        scorer._spec = None
    pack = pack_of(examples)
    both = scorer.token_logps(pack, with_prompts=True)
    count = len(pack.targets)
    torch.testing.assert_close(both[:count], scorer.token_logps(pack))
    torch.testing.assert_close(both[count:].double(), torch.cat(expected), rtol=0, atol=2e-5)
    view = view_of(ORPO(nll_scope="prompt_and_answer"), [pack], Scores(both[:count], prompts=both[count:]))
    torch.testing.assert_close(view.prompt.logps.double(), torch.stack([one.sum() for one in expected]), rtol=0, atol=1e-4)
    assert view.prompt.num_tokens.tolist() == [len(example.prompt_ids) - 1 for example in examples]
