"""A streamed answer is the generated one, in whole letters."""

import pytest

from preftune.core.errors import InputError
from preftune.core.recipe import DecodingConfig, ModelConfig
from preftune.core.records import Message
from preftune.modeling.generate import generate
from preftune.modeling.load import load_model
from preftune.modeling.stream import stream

PROMPT = (Message("user", "Write a short story about a fox."),)


@pytest.fixture(scope="module")
def starter():
    return load_model(ModelConfig(name="starter"), precision="float32")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_pieces_add_up_to_the_generated_text(starter, temperature, seed):
    decoding = DecodingConfig(temperature=temperature, top_p=0.95, max_new_tokens=60)
    pieces = list(stream(starter.model, starter.tokenizer, PROMPT, decoding, seed))
    assert len(pieces) > 20
    assert "".join(pieces) == generate(starter.model, starter.tokenizer, [PROMPT], decoding, seed)[0].text


def test_it_stops_where_the_model_has_no_positions(starter):
    decoding = DecodingConfig(temperature=0, max_new_tokens=600)
    pieces = list(stream(starter.model, starter.tokenizer, [5] * 505, decoding, 0))
    assert len(starter.tokenizer.encode("".join(pieces), add_special_tokens=False)) <= 10
    with pytest.raises(InputError, match="512 positions"):
        list(stream(starter.model, starter.tokenizer, [5] * 512, decoding, 0))
