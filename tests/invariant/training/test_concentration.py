"""log sum p^2 of each scored token, by every way a pack can be scored, against logits written out."""

import pytest
import torch
from tiny import make_examples

from preftune.core.recipe import ModelConfig
from preftune.data.pack import pack_of
from preftune.modeling.forward import Scorer
from preftune.modeling.load import load_model


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
