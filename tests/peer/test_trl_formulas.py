"""Every preference loss that TRL has, on the same numbers: value and gradient equal those of TRL's own code.

TRL's code runs in its own environment (bench/peer_trl_formulas.py); no formula of it is written down here. Where the two
differ on purpose, the case says how TRL has to be called to give the same, and a test shows the difference.
"""

import json
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import formula_rows
import pytest
import torch
from formula_rows import ROWS, value_of

from preftune.maths.losses import dpo
from preftune.maths.losses.base import losses

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-trl" / "bin" / "python"
pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(not PEER.is_file(), reason="the peer's environment is absent: run bench/environments/make.sh trl"),
]


@dataclass(frozen=True)
class Case:
    """One loss in both systems' words.

    alone: TRL is called with one pair at a time and its losses are averaged, because it averages tokens over a micro-batch
        where the paper averages them over each completion.
    their_rows: where TRL is given other numbers than we are. state: of a loss that has one, else its first.
    rtol: relative to the largest value; 1e-12 where both compute in float64.
    """

    trainer: str
    theirs: dict
    method: str
    ours: dict = field(default_factory=dict)
    rows: str = "pairs"
    alone: bool = False
    their_rows: str = ""
    state: dict | None = None
    rtol: float = 1e-12
    dtype: str = "float64"

    @property
    def names(self):
        """What of TRL's it covers: (trainer, loss type), ("divergence", name) and ("option of TRAINER", name)."""
        given = self.theirs.get("loss_type", {"kto": "kto", "orpo": "orpo"}.get(self.trainer, "sigmoid"))
        listed = [given] if isinstance(given, str) else given
        divergence = self.theirs.get("f_divergence_type", "reverse_kl")
        options = {(f"option of {self.trainer}", name) for name in self.theirs.keys() - {"loss_type", "f_divergence_type"}}
        return {(self.trainer, name) for name in listed} | {("divergence", divergence)} | options


FLOAT32 = 2e-6  # where TRL leaves float64 itself
CASES = {
    "dpo": Case("dpo", {"beta": 0.3}, "dpo", {"beta": 0.3}),
    "dpo by length": Case(
        "dpo", {"beta": 4.0, "loss_type": "sigmoid_norm"}, "dpo", {"beta": 4.0, "length_normalised": True}
    ),
    # TRL divides IPO's log-ratios by length, the paper does not; both forms are here, and online DPO has the paper's
    "ipo by length": Case("dpo", {"beta": 0.4, "loss_type": "ipo"}, "ipo", {"tau": 0.4, "length_normalised": True}),
    "ipo": Case("online_dpo", {"beta": 0.4, "loss_type": "ipo"}, "ipo", {"tau": 0.4}),
    "online dpo": Case("online_dpo", {"beta": 0.3}, "dpo", {"beta": 0.3}),
    "sft": Case("dpo", {"loss_type": "sft"}, "sft"),
    "mix": Case(
        "dpo",
        {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        "mix",
        {"parts": {"dpo": {"weight": 0.8, "beta": 0.3}, "sft": {"weight": 0.2}}},
    ),
    # the RPO term is by each completion's own length
    "dpo with NLL": Case(
        "dpo", {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, "dpo",
        {"beta": 0.3, "rpo_alpha": 0.5}, alone=True,
    ),
    "simpo": Case(
        "cpo", {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0}, "simpo", {"beta": 2.0, "gamma": 0.8},
        "sequences",
    ),
    "simpo, smoothed": Case(
        "cpo", {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0, "label_smoothing": 0.2}, "simpo",
        {"beta": 2.0, "gamma": 0.8, "label_smoothing": 0.2}, "sequences",
    ),
    # what TRL's defaults make of simpo: an NLL term of weight 1 stays on
    "CPO-SimPO": Case(
        "cpo", {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.8}, "mix",
        {"parts": {"simpo": {"beta": 2.0, "gamma": 0.8}, "sft": {}}}, "sequences",
    ),
    "TPO-L without its gold answer": Case(
        "tpo", {"beta": 2.0, "loss_type": "tpo-l", "tpo_l_gamma": 0.8, "tpo_alpha": 0.0}, "simpo", {"beta": 2.0, "gamma": 0.8},
        "sequences",
    ),
    # formulas that TRL has without a reference: the same with a reference that gives every completion probability 1
    "ipo, reference-free": Case(
        "cpo", {"beta": 0.4, "loss_type": "ipo", "cpo_alpha": 0.0}, "ipo", {"tau": 0.4, "length_normalised": True}, "sequences",
    ),
    "ipo of TPO": Case(
        "tpo", {"beta": 0.4, "loss_type": "ipo", "tpo_alpha": 0.0}, "ipo", {"tau": 0.4, "length_normalised": True}, "sequences",
    ),
    # TRL's odds ratio is rounded to float32, its NLL counts the prompt and averages over the micro-batch
    "orpo": Case(
        "orpo", {"beta": 0.25}, "orpo", {"lambda_or": 0.25, "nll_scope": "prompt_and_answer"}, "sequences", alone=True,
        rtol=FLOAT32,
    ),
    "kto": Case(
        "kto", {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.9}, "kto",
        {"beta": 0.2, "lambda_d": 1.2, "lambda_u": 0.9}, "labelled",
    ),
    "apo on labelled answers": Case(
        "kto", {"beta": 0.2, "loss_type": "apo_zero_unpaired", "desirable_weight": 1.2, "undesirable_weight": 0.9},
        "apo_zero_unpaired", {"beta": 0.2, "lambda_d": 1.2, "lambda_u": 0.9}, "labelled",
    ),
    # TRL sorts a micro-batch, which is the whole step here
    "aot": Case("dpo", {"beta": 0.3, "loss_type": "aot", "label_smoothing": 0.1}, "aot", {"beta": 0.3, "label_smoothing": 0.1}),
    "aot unpaired": Case(
        "dpo", {"beta": 0.3, "loss_type": "aot_unpaired", "label_smoothing": 0.1}, "aot_unpaired",
        {"beta": 0.3, "label_smoothing": 0.1},
    ),
    # TRL dropped the running mean of the rewards: this is the loss at the mean 0
    "bco": Case("dpo", {"beta": 0.3, "loss_type": "bco_pair"}, "bco_pair", {"beta": 0.3}),
    # at another mean it is TRL's with every reference log-probability moved by the mean over beta
    "bco, shifted": Case(
        "dpo", {"beta": 0.3, "loss_type": "bco_pair"}, "bco_pair", {"beta": 0.3}, their_rows="shifted",
        state={"mean": 0.3 * formula_rows.SHIFT, "count": 8.0},
    ),
    # TRL multiplies any of its losses by these weights; the paper's objective is DPO
    "wpo": Case("dpo", {"beta": 0.3, "use_weighting": True}, "wpo", {"beta": 0.3}),
    "hinge": Case("dpo", {"beta": 0.3, "loss_type": "hinge"}, "hinge", {"beta": 0.3}),
    "robust": Case(
        "dpo", {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2}, "robust", {"beta": 0.3, "label_smoothing": 0.2}
    ),
    # TRL takes epsilon's logarithm in float32
    "exo": Case(
        "dpo", {"beta": 0.3, "loss_type": "exo_pair", "label_smoothing": 0.125}, "exo_pair",
        {"beta": 0.3, "label_smoothing": 0.125}, rtol=FLOAT32,
    ),
    "nca": Case("dpo", {"beta": 0.3, "loss_type": "nca_pair"}, "nca_pair", {"beta": 0.3}),
    "sppo": Case("dpo", {"beta": 0.3, "loss_type": "sppo_hard"}, "sppo_hard", {"beta": 0.3}),
    # without a probability the soft form is the hard one
    "sppo, soft": Case("dpo", {"beta": 0.3, "loss_type": "sppo_hard"}, "sppo_soft", {"beta": 0.3}),
    "apo-zero": Case("dpo", {"beta": 0.3, "loss_type": "apo_zero"}, "apo_zero", {"beta": 0.3}),
    "apo-down": Case("dpo", {"beta": 0.3, "loss_type": "apo_down"}, "apo_down", {"beta": 0.3}),
    "discopop": Case(
        "dpo", {"beta": 0.3, "loss_type": "discopop", "discopop_tau": 0.4}, "discopop", {"beta": 0.3, "tau": 0.4}
    ),
    "ld-dpo": Case("dpo", {"beta": 0.3, "ld_alpha": 0.4}, "ld_dpo", {"beta": 0.3, "alpha": 0.4}),
    "forward KL": Case("dpo", {"beta": 0.3, "f_divergence_type": "forward_kl"}, "dpo", {"beta": 0.3, "divergence": "forward_kl"}),
    "Jensen-Shannon": Case(
        "dpo", {"beta": 0.3, "f_divergence_type": "js_divergence"}, "dpo", {"beta": 0.3, "divergence": "jensen_shannon"}
    ),
    "hinge, forward KL": Case(
        "dpo", {"beta": 0.3, "loss_type": "hinge", "f_divergence_type": "forward_kl"}, "hinge",
        {"beta": 0.3, "divergence": "forward_kl"},
    ),
    # TRL's coefficient is 1 - alpha, and its code knows no float64
    "alpha divergence": Case(
        "dpo", {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, "dpo",
        {"beta": 0.3, "divergence": "alpha", "divergence_alpha": 0.7}, rtol=FLOAT32, dtype="float32",
    ),
    "cpo": Case("cpo", {"beta": 0.3}, "cpo", {"beta": 0.3}, "sequences"),
    "cpo, smoothed": Case(
        "cpo", {"beta": 0.3, "cpo_alpha": 0.5, "label_smoothing": 0.1}, "cpo",
        {"beta": 0.3, "alpha": 0.5, "label_smoothing": 0.1}, "sequences",
    ),
    "hinge, reference-free": Case(
        "cpo", {"beta": 0.3, "loss_type": "hinge", "cpo_alpha": 0.0}, "hinge", {"beta": 0.3}, "sequences"
    ),
    "hinge of TPO": Case("tpo", {"beta": 0.3, "loss_type": "hinge", "tpo_alpha": 0.0}, "hinge", {"beta": 0.3}, "sequences"),
    "TPO without its gold answer": Case(
        "tpo", {"beta": 0.3, "label_smoothing": 0.1, "tpo_alpha": 0.0}, "cpo",
        {"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.1}, "sequences",
    ),
    # `loss_type: alphapo` is TRL's spelling of simpo with an alpha and without the NLL
    "alphapo": Case(
        "cpo", {"beta": 2.0, "loss_type": "simpo", "alpha": 0.3, "simpo_gamma": 0.8, "cpo_alpha": 0.0}, "alphapo",
        {"beta": 2.0, "alpha": 0.3, "gamma": 0.8}, "sequences",
    ),
    "kto, reference point below 0": Case("kto", {"beta": 0.2}, "kto", {"beta": 0.2}, "negative"),
}  # fmt: skip

# trainers of TRL that this table is not about
OTHERS = {
    "no loss over preference data: rewards, distillation, policy gradients": (
        "a2po async_distillation async_grpo distillation gkd gmpo gold grpo iw_opd reward rloo sdft sdpo server_distillation"
    ),
    "the base of the others, and SFT, whose loss is compared through DPOTrainer's loss_type sft": "base sft",
}


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
SPELLINGS = {("cpo", "alphapo")}  # set in the config: simpo with an alpha, which has a case
NOT_HERE = NOT_A_LOSS | SPELLINGS


def test_every_loss_and_trainer_of_the_peer_is_covered(peer):
    offered = {(trainer, name) for trainer, names in peer["names"].items() for name in names} | {("orpo", "orpo")}
    offered |= {(f"option of {trainer}", name) for trainer, names in peer["options"].items() for name in names}
    covered = {name for case in CASES.values() for name in case.names}
    missing = offered - covered - NOT_HERE
    assert not missing, f"TRL {peer['version']} has losses that no case compares: {sorted(missing)}"
    assert not NOT_HERE & covered, "these are compared now"
    assert not NOT_HERE - offered, "TRL has these no more"
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
