"""Every alert is given in a run made to have its fault; a healthy run is silent."""

import numpy as np
import pytest
from tiny import VOCAB, make_examples, make_plan

from preftune.core.events import Noted
from preftune.core.files import read_jsonl
from preftune.core.records import Provenance, TokenisedCompletion, TokenisedExample
from preftune.training.diagnose import Diagnosis
from preftune.training.loop import run_stage

PROBE = {"prompts": 8, "max_new_tokens": 24, "evals": 2}


def example(index, prompt, chosen, rejected):
    both = tuple(TokenisedCompletion(ids := (*side, 2), (True,) * len(ids)) for side in (chosen, rejected))
    return TokenisedExample(f"made-{index}", (1, *prompt), both, provenance=Provenance("made.jsonl", index + 1))


def drawn(generator, low, high=None):
    size = low if high is None else int(generator.integers(low, high))
    return tuple(int(token) for token in generator.integers(3, VOCAB, size))


def nearly_the_same(count, seed=0):
    """Answers that differ in one late token: pushing one down pushes both down."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        shared = drawn(generator, 10)
        rows.append(example(index, drawn(generator, 3, 9), (*shared, 5), (*shared, 6)))
    return rows


def never_ends(count, seed=0):
    """Long chosen answers that were cut, so that none has an end token, against short ones that end."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        prompt, long = (1, *drawn(generator, 3, 9)), drawn(generator, 8, 16)
        short = (*drawn(generator, 1, 4), 2)
        both = (TokenisedCompletion(long, (True,) * len(long), is_cut=True), TokenisedCompletion(short, (True,) * len(short)))
        rows.append(TokenisedExample(f"cut-{index}", prompt, both, provenance=Provenance("cut.jsonl", index + 1)))
    return rows


def alerts_of(tmp_path, model, train, **changes):
    """Warnings of a run, by code."""
    seen = []
    settings = {"adapter": "full", "checkpoints": 0, "probe": PROBE, "schedule": "constant", "warmup": 0.0, "pairs_per_step": 8}
    run_stage(make_plan(tmp_path, model, train, changes.pop("select", []), **{**settings, **changes}), seen.append)
    return {event.code: event.message for event in seen if isinstance(event, Noted) and event.level == "warning"}


def test_displacement(tmp_path, tiny_model):
    found = alerts_of(tmp_path, tiny_model, nearly_the_same(32), lr=5e-3, epochs=12.0)
    assert "nats a token against the reference" in found["likelihood_displacement"]
    assert "length_exploitation" not in found


def test_length(tmp_path, tiny_model):
    probe = PROBE | {"max_new_tokens": 120}
    found = alerts_of(tmp_path, tiny_model, never_ends(64), lr=3e-3, epochs=5.0, probe=probe)
    assert "times as long as at the start" in found["length_exploitation"]
    assert "likelihood_displacement" not in found


def test_saturation(tmp_path, tiny_model):
    found = alerts_of(tmp_path, tiny_model, make_examples(4), lr=5e-3, epochs=40.0, pairs_per_step=4)
    assert "the pairs are learnt" in found["saturation"]
    assert "no_learning" not in found


def test_no_learning(tmp_path, tiny_model):
    found = alerts_of(tmp_path, tiny_model, make_examples(96), lr=1e-8, epochs=2.0)
    assert list(found) == ["no_learning"]


@pytest.mark.parametrize(("apart", "said"), [(0.05, True), (5.0, False)])
def test_a_small_beta_makes_small_margins_of_large_differences(apart, said):
    """SPPO's beta of 1e-3 makes a margin of 0.005 of 5 nats: that run learns, one of 0.05 nats does not."""
    diagnosis = Diagnosis("pairs", 30, 8)
    row = {"rewards/margins": 1e-3 * apart, "rewards/accuracies": 0.8, "logps/chosen_change": apart, "logps/rejected_change": 0.0}
    for step in range(1, 31):
        diagnosis.see({"step": step, "loss": 0.5, **row})
    found = [note.code for note in diagnosis.see({"step": 30, "eval_loss": 0.5})]
    assert ("no_learning" in found) is said


def test_collapse(tmp_path, tiny_model):
    found = alerts_of(tmp_path, tiny_model, nearly_the_same(32), lr=1e-2, epochs=6.0)
    assert "no longer writes as it did at the start" in found["collapse"]


def test_a_healthy_run_is_silent(tmp_path, tiny_model):
    held_out = make_examples(16, 1, prefix="select")
    assert alerts_of(tmp_path, tiny_model, make_examples(96), select=held_out, lr=3e-4, epochs=2.0) == {}


def test_said_once_then_when_it_is_worse_and_never_twice_after_a_resume():
    def row(step, fall):
        changes = {"eval_logps/chosen_change_per_token": -fall, "eval_logps/rejected_change_per_token": -2 * fall}
        return {"step": step, "eval_loss": 0.5, **changes}

    falls = [0.05, 0.12, 0.13, 0.19, 0.2, 0.3]
    diagnosis = Diagnosis("pairs", 60, 8)
    said = [bool(diagnosis.see(row(10 * index, fall))) for index, fall in enumerate(falls)]
    assert said == [False, True, False, True, False, True]
    again = Diagnosis("pairs", 60, 8)
    for index, fall in enumerate(falls[:3]):
        again.see(row(10 * index, fall))
    assert [bool(again.see(row(10 * index, falls[index]))) for index in (3, 4, 5)] == said[3:]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_kl_is_that_of_the_policy_against_its_start(tmp_path, tiny_model, adapter):
    """0 at the start; after training the k3 estimate agrees with the exact divergence of the two models on the same texts."""
    run_stage(make_plan(tmp_path, tiny_model, make_examples(32), [], adapter=adapter, lr=3e-3, probe=PROBE | {"samples": 8}))
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "kl" in row]
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] == pytest.approx(exact_divergence(tiny_model, tmp_path / "run" / "final", PROBE), rel=0.25)
    assert rows[-1]["kl"] > 0.05


def exact_divergence(start, final, probe):
    """Sum over positions of KL(policy || start) over the whole vocabulary, mean over texts sampled by the policy itself."""
    import torch

    from preftune.core.recipe import ModelConfig
    from preftune.modeling.load import load_model

    policy, frozen = (load_model(ModelConfig(name=str(one)), precision="float32").model for one in (final, start))
    prompts = pick_as_the_probe(probe)
    total, count = 0.0, 0
    torch.manual_seed(5)
    with torch.no_grad():
        for prompt in prompts * 4:
            ids = list(prompt)
            for _ in range(probe["max_new_tokens"]):
                p, q = (model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for model in (policy, frozen))
                total += float((p.exp() * (p - q)).sum())
                token = int(torch.multinomial(p.exp(), 1))
                ids.append(token)
                if token == 2:
                    break
            count += 1
    return total / count


def pick_as_the_probe(probe):
    """The prompts that the probe of seed 0 draws from these examples."""
    rows = list(dict.fromkeys(one.prompt_ids for one in make_examples(32)))
    order = np.random.default_rng([0, len(rows)]).permutation(len(rows))
    return [rows[place] for place in order[: probe["prompts"]]]
