"""The starter behind a decoder, and a batcher over it whose events are kept."""

import pytest

from preftune.core.recipe import ModelConfig
from preftune.modeling.adapter_bank import BASE
from preftune.modeling.decoder import SlotDecoder, decoder_of
from preftune.modeling.load import load_model
from preftune.serving.batcher import Batcher, Limits, read_prompt
from preftune.serving.protocol import EngineError, Finished, Piece


@pytest.fixture(scope="session")
def starter():
    return load_model(ModelConfig(name="starter"), precision="float32")


@pytest.fixture(scope="session")
def decoder():
    made = decoder_of(load_model(ModelConfig(name="starter"), precision="float32").model)
    assert isinstance(made, SlotDecoder), made.reason
    return made


class Talk:
    """A batcher and what it said, by request."""

    def __init__(self, decoder, tokenizer, limits):
        self.events = {}
        self.tokenizer, self.positions = tokenizer, min(limits.positions, 512)
        self.batcher = Batcher(decoder, limits, lambda request, event: self.events.setdefault(request, []).append(event))

    def ask(self, ask, adapter=BASE):
        self.batcher.submit(read_prompt(self.tokenizer, ask, self.positions), adapter)

    def run(self):
        steps = 0
        while self.batcher.step():
            steps += 1
        assert self.batcher.is_idle
        return steps

    def text(self, request, choice=0):
        parts = [one for one in self.events[request] if isinstance(one, (Piece, Finished)) and one.choice == choice]
        return "".join(one.text for one in parts)

    def end(self, request, choice=0):
        return next(one for one in self.events[request] if isinstance(one, Finished) and one.choice == choice)

    def error(self, request):
        return next(one for one in self.events[request] if isinstance(one, EngineError))


@pytest.fixture
def talk(decoder, starter):
    return lambda **limits: Talk(decoder, starter.tokenizer, Limits(**{"positions": 512, **limits}))
