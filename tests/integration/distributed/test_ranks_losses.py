"""Two gloo processes and one take the same steps with each kind of loss: what it reads, what it sums over, what it remembers.

test_ranks.py varies the model, its reference and how both are spread, with losses that read little; here the losses vary.
"""

import pytest
import torch
from ranked import plan_of, together
from test_ranks import assert_same, slug
from tiny import make_model

from preftune.core.files import read_json, read_jsonl
from preftune.maths.losses.base import losses
from preftune.training.loop import run_stage

pytestmark = pytest.mark.slow

BASE = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "pairs_per_step": 5,  # 11 examples: steps of 5, 5 and 1, so that one rank has nothing in the last
    "tokens_per_pack": 60,
    "count": 11,
    "epochs": 1.0,
    "lr": 1e-3,
    "warmup": 0.0,
    "checkpoints": 2,
    "evals": 1,
    "probe": None,
    "kind": "said",
}
MPO = {"dpo": {"weight": 0.8}, "bco_pair": {"weight": 0.5}, "sft": {"weight": 0.2}, "odpo": {"weight": 0.3}}
METHODS = {
    "single tokens": ("ld_dpo", {"alpha": 0.4}, {}),
    "concentration": ("wpo", {}, {}),
    "prompts": ("orpo", {"nll_scope": "prompt_and_answer"}, {}),
    "ranks of the step": ("aot", {"label_smoothing": 0.1}, {}),
    "a state": ("bco_pair", {}, {}),
    "a mix with a state": ("mix", {"parts": MPO | {"orpo": {"weight": 0.1, "nll_scope": "prompt_and_answer"}}}, {}),
    "ties": ("rao_kupper", {}, {"kind": "tied"}),
    "tokens of chosen ones": ("cpo", {"alpha": 0.5}, {}),
    "tokens": ("sft", {}, {"kind": "demonstrations"}),
    "weights by label": ("kto", {"lambda_u": "auto"}, {"kind": "labelled"}),
}
SPREADS = ("ddp", "fsdp2")
CASES = {
    f"{name}, {spread}": BASE | {"method": method, "loss": options, "distributed": spread} | more
    for name, (method, options, more) in METHODS.items()
    for spread in SPREADS
}
FAULT = "the factor of the averaging in the second pass"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("ranks")
    make_model(work / "model")
    for name in METHODS:
        run_stage(plan_of(work, CASES[f"{name}, ddp"] | {"folder": f"{slug(name)}-one"}))
    broken = CASES["ranks of the step, ddp"] | {"folder": "broken", "fault": FAULT}
    together(work, [*(case | {"folder": f"{slug(name)}-two"} for name, case in CASES.items()), broken])
    return work


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes_take_the_steps_of_one(work, name, spread):
    case = CASES[f"{name}, {spread}"]
    one, two = work / f"{slug(name)}-one", work / f"{slug(f'{name}, {spread}')}-two"
    assert_same(one, two, case)
    rows = [row for row in read_jsonl(one / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    assert len({row["loss"] for row in rows}) == 3, "it trains"
    states = [read_json(folder / "checkpoints" / "step-000002" / "manifest.json")["loss_state"] for folder in (one, two)]
    assert states[0] == pytest.approx(states[1], abs=1e-6)
    assert bool(states[0]) is (case["method"] in {"bco_pair", "mix"})


def test_the_second_pass_is_averaged_too(work):
    with pytest.raises(AssertionError):
        assert_same(work / "ranks-of-the-step-one", work / "broken", CASES["ranks of the step, ddp"])


def test_the_methods_cover_what_a_loss_may_read():
    built = [losses.build(method, options) for method, options, _ in METHODS.values()]
    assert frozenset().union(*(one.needs for one in built)) == {
        "tokens", "concentration", "prompt", "ties", "mismatched", "confidence", "strength",
    }  # fmt: skip
