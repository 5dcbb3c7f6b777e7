"""A continuous batch: the same texts as alone, limits, stops, log-probabilities."""

import dataclasses

import pytest
import torch

from preftune.core.recipe import DecodingConfig
from preftune.core.records import Message
from preftune.modeling.generate import generate
from preftune.modeling.tokenizer import HubTokenizer
from preftune.serving.batcher import read_prompt
from preftune.serving.protocol import Ask, EngineError, Piece, Sampling, Usage

THINGS = ("fox", "cat", "boat", "king", "tree", "duck", "robot", "queen")


def turns(thing):
    return [{"role": "user", "content": f"Write a short story about a {thing}."}]


def greedy(tokens, **more):
    return Sampling(temperature=0.0, max_tokens=tokens, **more)


@pytest.mark.parametrize("limits", [{"rows": 8}, {"rows": 3, "reading": 4}, {"rows": 8, "kept_bytes": 3_000_000}])
def test_every_text_is_what_the_model_writes_alone(talk, starter, limits):
    """Greedy and sampled together, in few rows, in pieces of prompts, and with so little memory that answers are put back."""
    settings = [(0.0, 1.0), (0.9, 1.0), (0.8, 0.9)]
    talk = talk(**limits)
    for number, thing in enumerate(THINGS):
        temperature, top_p = settings[number % 3]
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=number, max_tokens=70)
        talk.ask(Ask(thing, messages=turns(thing), sampling=sampling, is_streamed=number % 2 == 0))
    talk.run()
    for number, thing in enumerate(THINGS):
        temperature, top_p = settings[number % 3]
        decoding = DecodingConfig(temperature=temperature, top_p=top_p, max_new_tokens=70)
        prompt = (Message("user", turns(thing)[0]["content"]),)
        wanted = generate(starter.model, starter.tokenizer, [prompt], decoding, [number])[0]
        assert talk.text(thing) == wanted.text
        assert talk.end(thing).reason == ("stop" if wanted.is_complete else "length")
    assert sum(shelf.room * len(shelf.rows) for shelf in talk.batcher._decoder._shelves.values()) == 0


def test_many_at_once_take_few_steps(talk):
    together, alone = talk(rows=8), talk(rows=1)
    for one in (together, alone):
        for thing in THINGS:
            one.ask(Ask(thing, messages=turns(thing), sampling=greedy(20)))
    assert together.run() <= 21
    assert alone.run() >= 8 * 20


def test_pieces_add_up_to_the_whole(talk):
    talk = talk()
    for is_streamed in (True, False):
        ask = Ask(f"{is_streamed}", messages=turns("fox"), sampling=greedy(40, stop=("\n\n", " the")), is_streamed=is_streamed)
        talk.ask(ask)
    talk.run()
    assert talk.text("True") == talk.text("False")
    assert len([one for one in talk.events["True"] if isinstance(one, Piece)]) > 3
    assert not [one for one in talk.events["False"] if isinstance(one, Piece)]


def test_choices_are_those_of_their_own_streams(talk):
    talk = talk()
    talk.ask(Ask("many", messages=turns("fox"), sampling=Sampling(seed=5, max_tokens=20), n=4))
    talk.run()
    assert len({talk.text("many", choice) for choice in range(4)}) == 4
    assert talk.events["many"][-1] == Usage(11, 80)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_stop_text_ends_before_itself_wherever_tokens_begin(talk, is_streamed):
    talk = talk()
    talk.ask(Ask("free", messages=turns("fox"), sampling=greedy(60)))
    talk.run()
    whole = talk.text("free")
    for number, at in enumerate((7, 23, 61)):
        stop = whole[at : at + 9]
        found = whole.index(stop)
        ask = Ask(
            f"{number}", messages=turns("fox"), sampling=greedy(60, stop=("never", stop)), is_streamed=is_streamed, logprobs=0
        )
        talk.ask(ask)
        talk.run()
        assert talk.text(f"{number}") == whole[:found]
        assert talk.end(f"{number}").reason == "stop"
        tokens = [token for event in talk.events[f"{number}"] if hasattr(event, "logprobs") for token in event.logprobs]
        assert "".join(token.token for token in tokens).startswith(whole[:found])


def test_stop_tokens_minimum_and_ignored_ends(talk, starter):
    talk = talk()
    ids = starter.tokenizer.encode(" fox", add_special_tokens=False)
    asked = {
        "plain": greedy(300), "stopped": greedy(300, stop_ids=tuple(ids)), "more": greedy(400, min_tokens=350),
        "ignored": greedy(400, ignore_eos=True),
    }  # fmt: skip
    for name, sampling in asked.items():
        talk.ask(Ask(name, messages=turns("fox"), sampling=sampling))
    talk.run()
    assert talk.end("plain").reason == "stop"
    assert talk.text("plain").startswith(talk.text("stopped"))
    assert "fox" not in talk.text("stopped")
    assert talk.events["more"][-1].completion_tokens >= 350
    assert talk.events["ignored"][-1].completion_tokens == 400


def test_logprobs_are_the_models_own(talk, starter):
    """Against a plain forward of prompt and answer: untouched by temperature, bias and truncation; with the prompt echoed too."""
    talk = talk(reading=4)
    text = "Once upon a time there was"
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=1, max_tokens=12, logit_bias={40: 1.0}, presence_penalty=1.0)
    talk.ask(Ask("a", text=text, sampling=sampling, logprobs=3, echo=True))
    talk.run()
    found = talk.end("a").logprobs
    ids = [one.id for one in found]
    with torch.no_grad():
        logps = torch.log_softmax(starter.model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    assert found[0].logprob is None
    for place, one in enumerate(found[1:]):
        assert one.logprob == pytest.approx(float(logps[place, one.id]), abs=1e-4)
        best = torch.topk(logps[place], 3)
        assert [token for *_, token in one.top] == best.indices.tolist()
        assert [logp for _, logp, *_ in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert talk.text("a").startswith(text)
    assert bytes(byte for one in found for byte in one.bytes).decode() == talk.text("a")


def test_scoring_alone_makes_no_tokens(talk):
    talk = talk()
    talk.ask(Ask("a", text="Once upon a time", sampling=greedy(0), logprobs=0, echo=True))
    talk.run()
    assert talk.text("a") == "Once upon a time"
    assert talk.events["a"][-1] == Usage(4, 0)
    assert [one.logprob is None for one in talk.end("a").logprobs] == [True, False, False, False]


def test_the_queue_is_bounded_and_says_when_to_come_back(talk):
    talk = talk(rows=1, waiting=2)
    for name in ("a", "b"):
        talk.ask(Ask(name, messages=turns("fox"), sampling=greedy(5)))
    with pytest.raises(EngineError, match="try again") as refused:
        talk.ask(Ask("c", messages=turns("fox"), sampling=greedy(5)))
    assert refused.value.kind == "overloaded"
    assert refused.value.retry_after >= 1
    talk.run()
    talk.ask(Ask("d", messages=turns("fox"), sampling=greedy(5)))
    talk.run()
    assert talk.text("a") == talk.text("b") == talk.text("d")


def test_a_cancelled_request_leaves_nothing(talk):
    talk = talk(rows=2)
    for name in ("a", "b", "c"):
        talk.ask(Ask(name, messages=turns("fox"), sampling=greedy(30), is_streamed=True))
    for _ in range(5):
        talk.batcher.step()
    for name in ("a", "c"):
        talk.batcher.cancel(name)
    told = len(talk.events["a"])
    talk.run()
    assert len(talk.events["a"]) == told
    assert "c" not in talk.events
    assert talk.events["b"][-1] == Usage(11, 30)
    assert talk.batcher.adapters_in_use() == set()


def test_what_does_not_fit(talk, starter):
    talk = talk(kept_bytes=500_000)
    with pytest.raises(EngineError, match="do not fit") as refused:
        talk.ask(Ask("a", ids=[5] * 300, sampling=greedy(5)))
    assert refused.value.code == "context_length_exceeded"
    talk.ask(Ask("b", ids=[5] * 20, sampling=greedy(200, ignore_eos=True)))
    talk.run()
    assert talk.end("b").reason == "length"
    assert talk.events["b"][-1].completion_tokens < 60  # the memory holds 64 tokens
    for bad, code in (({"ids": [5] * 512}, "context_length_exceeded"), ({"text": ""}, None), ({"ids": [2048]}, None)):
        with pytest.raises(EngineError) as error:
            read_prompt(starter.tokenizer, Ask("c", **bad), 512)
        assert (error.value.kind, error.value.code) == ("bad_request", code)


def test_a_model_of_nonsense_fails_alone(talk, decoder, monkeypatch):
    talk = talk()
    forward = decoder.forward

    def broken(feeds):
        return [
            part * float("nan") if list(feed.ids)[:1] == [77] else part for feed, part in zip(feeds, forward(feeds), strict=True)
        ]

    monkeypatch.setattr(decoder, "forward", broken)
    talk.ask(Ask("good", messages=turns("fox"), sampling=greedy(10)))
    talk.ask(Ask("bad", ids=[77, 5, 6], sampling=greedy(10)))
    talk.run()
    assert talk.error("bad").kind == "failed"
    assert talk.events["good"][-1] == Usage(11, 10)


def test_turns_without_a_template_are_refused(starter):
    raw = starter.tokenizer.raw
    bare = HubTokenizer(type(raw)(tokenizer_object=raw.backend_tokenizer, eos_token=raw.eos_token), (), "bare")
    with pytest.raises(EngineError, match="bare: has no chat template") as refused:
        read_prompt(bare, Ask("a", messages=turns("fox")), 512)
    assert refused.value.code == "no_chat_template"
    with pytest.raises(EngineError, match="role 'judge'"):
        read_prompt(starter.tokenizer, Ask("a", messages=[{"role": "judge", "content": "x"}]), 512)


def test_a_request_survives_the_wire():
    ask = Ask("a", messages=turns("fox"), sampling=Sampling(stop=("x",), stop_ids=(4,), logit_bias={7: 1.5}, seed=3), n=2)
    import json

    assert Ask.from_dict(json.loads(json.dumps(ask.to_dict()))) == ask
    assert dataclasses.replace(ask, n=3) != ask
