"""Every preference loss that TRL has, on the same numbers: value and gradient equal those of TRL's own code.

TRL's code runs in its own environment (bench/peer_trl_formulas.py); no formula of it is written down here. Where the two
differ on purpose, the case says how TRL has to be called to give the same, and a test shows the difference.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formula_cases import CASES, OTHERS
from formula_rows import ROWS, value_of

from preftune.core.errors import UsageError
from preftune.maths.losses import dpo
from preftune.maths.losses.base import losses

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-trl" / "bin" / "python"
pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(not PEER.is_file(), reason="the peer's environment is absent: run bench/environments/make.sh trl"),
]


def asked_of(cases):
    """What the peer's process is asked: the rows, and each case (pair by pair where it has to be)."""
    rows, questions = dict(ROWS), {}
    for name, case in cases.items():
        parts = {name: case.their_rows or case.rows}
        if case.alone:
            parts = {f"{name}#{at}": f"{case.rows}#{at}" for at in range(len(ROWS[case.rows]))}
            rows |= {key: [ROWS[case.rows][at]] for at, key in enumerate(parts.values())}
        for part, key in parts.items():
            questions[part] = {"trainer": case.trainer, "options": case.theirs, "rows": key, "dtype": case.dtype}
    return {"rows": rows, "cases": questions}


@pytest.fixture(scope="module")
def peer():
    done = subprocess.run(
        [PEER, "bench/peer_trl_formulas.py"], cwd=ROOT, input=json.dumps(asked_of(CASES)), capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def theirs_of(peer, name, case):
    """TRL's loss and gradient on the same leaf."""
    if not case.alone:
        found = peer["cases"][name]
        return found["loss"], found["gradient"]
    parts = [peer["cases"][f"{name}#{at}"] for at in range(len(ROWS[case.rows]))]
    count = len(parts)
    pieces = [pieces_of(case, at, part["gradient"]) for at, part in enumerate(parts)]
    gradient = [value / count for side in (0, 1) for piece in pieces for value in piece[side]]
    return sum(part["loss"] for part in parts) / count, gradient


def pieces_of(case, at, gradient):
    """The gradient of a single pair, by side: TRL's order is all chosen ones before all rejected ones."""
    row = ROWS[case.rows][at]
    split = len(gradient) // 2 if case.rows == "sequences" else len(row["chosen"]["policy"])
    return gradient[:split], gradient[split:]


def compare(peer, name, case, loss=None):
    """Fails unless value and gradient agree."""
    made = loss or losses.build(case.method, case.ours)
    value, gradient = value_of(made, case.rows, getattr(torch, case.dtype), case.state)
    their_value, their_gradient = theirs_of(peer, name, case)
    assert value == pytest.approx(their_value, rel=case.rtol)
    scale = max(map(abs, their_gradient))
    assert scale > 1e-4
    assert len(gradient) == len(their_gradient)
    assert max(abs(one - other) for one, other in zip(gradient, their_gradient, strict=True)) <= case.rtol * scale


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_peers(peer, name):
    compare(peer, name, CASES[name])


# ---- the harness sees what it is for


def test_a_planted_difference_is_caught(peer):
    """A beta that is off by a billionth, and a loss with the right value and half of its gradient."""
    with pytest.raises(AssertionError):
        compare(peer, "dpo", CASES["dpo"], dpo.DPO(beta=0.3 * (1 + 1e-9)))

    class Half(dpo.DPO):
        def __call__(self, logps):
            return super().__call__(replace(logps, policy_rejected=logps.policy_rejected.detach()))

    with pytest.raises(AssertionError):
        compare(peer, "dpo", CASES["dpo"], Half(beta=0.3))
    compare(peer, "dpo", CASES["dpo"], dpo.DPO(beta=0.3))


@pytest.mark.parametrize("name", CASES)
def test_no_case_is_equal_by_chance(peer, name):
    """With the other options at their defaults or another weight the same comparison fails."""
    case = CASES[name]
    other = {"kto": {"beta": 0.05}, "sft": None, "mix": {"parts": {"dpo": {"beta": 0.05}}}, "ipo": {"tau": 0.05}}
    changed = other.get(case.method, {"lambda_or": 0.05} if case.method == "orpo" else {"beta": 0.05})
    loss = losses.build("dpo") if changed is None else losses.build(case.method, changed)
    with pytest.raises(AssertionError):
        compare(peer, name, case, loss)


# ---- nothing of TRL's is forgotten

# the model's own loss of a mixture of experts, which no formula here is part of
NOT_A_LOSS = {("option of dpo", "router_aux_loss_coef"), ("option of kto", "router_aux_loss_coef")}


def test_every_loss_and_trainer_of_the_peer_is_covered(peer):
    offered = {(trainer, name) for trainer, names in peer["names"].items() for name in names} | {("orpo", "orpo")}
    offered |= {(f"option of {trainer}", name) for trainer, names in peer["options"].items() for name in names}
    covered = {name for case in CASES.values() for name in case.names}
    missing = offered - covered - NOT_A_LOSS
    assert not missing, f"TRL {peer['version']} has losses that no case compares: {sorted(missing)}"
    assert not NOT_A_LOSS & covered, "these are compared now"
    assert not NOT_A_LOSS - offered, "TRL has these no more"
    trainers = set(peer["trainers"]) - set(" ".join(OTHERS.values()).split())
    assert trainers == {case.trainer for case in CASES.values()}, "a trainer of TRL that nobody looked at"


def test_a_name_that_no_case_covers_is_reported(peer):
    grown = peer | {"names": peer["names"] | {"dpo": [*peer["names"]["dpo"], "newest"]}}
    with pytest.raises(AssertionError, match="newest"):
        test_every_loss_and_trainer_of_the_peer_is_covered(grown)


# ---- where the two differ, and by what


def test_the_peers_defaults_for_simpo_are_another_objective(peer):
    """Its `simpo` keeps CPO's NLL term of weight 1, and beta and gamma are those of no SimPO recipe."""
    assert peer["defaults"]["cpo"] == {"alpha": 0.0, "beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0, "simpo_gamma": 0.5}
    with pytest.raises(AssertionError):
        compare(peer, "CPO-SimPO", CASES["CPO-SimPO"], losses.build("simpo", {"beta": 2.0, "gamma": 0.8}))


def test_the_peers_orpo_counts_the_prompt(peer):
    """Its NLL is over prompt and answer; the paper's, and the default here, over the answer."""
    with pytest.raises(AssertionError):
        compare(peer, "orpo", CASES["orpo"], losses.build("orpo", {"lambda_or": 0.25}))


def test_the_peers_ipo_divides_by_length(peer):
    """The paper's h is over whole completions, the default here; TRL's DPOTrainer divides, its online trainer does not."""
    with pytest.raises(AssertionError):
        compare(peer, "ipo by length", CASES["ipo by length"], losses.build("ipo", {"tau": 0.4}))


def test_the_peer_takes_divergences_by_length():
    """What cancels in their derivation does not cancel there, so it is refused here."""
    for name, options in (("ipo", {"tau": 0.4}), ("dpo", {"beta": 4.0})):
        with pytest.raises(UsageError, match="divergence"):
            losses.build(name, options | {"length_normalised": True, "divergence": "forward_kl"})


def test_the_peers_alpha_divergence_takes_no_float64(peer):
    """Why that case alone is compared in float32: TRL looks its largest exponent up by dtype."""
    assert [name for name, case in CASES.items() if case.dtype == "float32"] == ["dpo, alpha divergence"]
    wrong = replace(CASES["dpo, alpha divergence"], ours={"beta": 0.3, "divergence": "alpha", "divergence_alpha": 0.3})
    with pytest.raises(AssertionError):
        compare(peer, "dpo, alpha divergence", wrong)


def test_the_peer_weights_any_loss_as_wpo(peer):
    """Its `use_weighting` multiplies whatever `loss_type` says; the paper's objective, and ours, is DPO."""
    with pytest.raises(AssertionError):
        compare(peer, "wpo", CASES["wpo"], losses.build("dpo", {"beta": 0.3}))


def test_the_peers_bco_has_no_running_mean(peer):
    with pytest.raises(AssertionError):
        compare(peer, "bco", replace(CASES["bco"], state={"mean": 0.1, "count": 2.0}))
