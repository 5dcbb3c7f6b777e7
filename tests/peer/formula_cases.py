"""What is compared with the peer: each loss in the words of both systems."""

from dataclasses import dataclass, field

from formula_rows import SHIFT


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
    # the other losses over pairs
    "hinge": Case("dpo", {"beta": 0.3, "loss_type": "hinge"}, "hinge", {"beta": 0.3}),
    "robust": Case(
        "dpo", {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2}, "robust", {"beta": 0.3, "label_smoothing": 0.2}
    ),
    "exo": Case(
        "dpo", {"beta": 0.3, "loss_type": "exo_pair", "label_smoothing": 0.1}, "exo_pair", {"beta": 0.3, "label_smoothing": 0.1}
    ),
    "nca": Case("dpo", {"beta": 0.3, "loss_type": "nca_pair"}, "nca_pair", {"beta": 0.3}),
    "sppo": Case("dpo", {"beta": 0.07, "loss_type": "sppo_hard"}, "sppo_hard", {"beta": 0.07}),
    # without a probability the soft form is the hard one
    "sppo, soft": Case("dpo", {"beta": 0.07, "loss_type": "sppo_hard"}, "sppo_soft", {"beta": 0.07}),
    "apo zero": Case("dpo", {"beta": 0.3, "loss_type": "apo_zero"}, "apo_zero", {"beta": 0.3}),
    "apo down": Case("dpo", {"beta": 0.3, "loss_type": "apo_down"}, "apo_down", {"beta": 0.3}),
    "discopop": Case("dpo", {"beta": 0.3, "loss_type": "discopop"}, "discopop", {"beta": 0.3}),
    "discopop, softer": Case(
        "dpo", {"beta": 0.3, "loss_type": "discopop", "discopop_tau": 0.4}, "discopop", {"beta": 0.3, "tau": 0.4}
    ),
    # both weight what lies beyond the shorter completion in policy and reference alike
    "ld-dpo": Case("dpo", {"beta": 0.3, "ld_alpha": 0.5}, "ld_dpo", {"beta": 0.3, "alpha": 0.5}),
    "MPO": Case(
        "dpo", {"beta": 0.3, "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, "mix",
        {"parts": {"dpo": {"weight": 0.8, "beta": 0.3}, "bco_pair": {"weight": 0.2, "beta": 0.3}, "sft": {"weight": 1.0}}},
    ),
    "mix of hinge and ipo": Case(
        "dpo", {"beta": 0.3, "loss_type": ["hinge", "ipo"], "loss_weights": [0.4, 0.6]}, "mix",
        {"parts": {"hinge": {"weight": 0.4, "beta": 0.3}, "ipo": {"weight": 0.6, "tau": 0.3, "length_normalised": True}}},
    ),
    # f-divergences; TRL's alpha is 1 minus the paper's, and its code for it takes no float64
    **{
        f"{name}, {theirs}": Case(
            "dpo", {"beta": 0.3, "loss_type": loss_type, "f_divergence_type": theirs} | more, name,
            {"beta": 0.3, "divergence": ours} | same,
        )
        for theirs, ours in (("forward_kl", "forward_kl"), ("js_divergence", "jensen_shannon"))
        for name, loss_type, more, same in (
            ("dpo", "sigmoid", {}, {}),
            ("hinge", "hinge", {}, {}),
            ("robust", "robust", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
            ("exo_pair", "exo_pair", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
            ("discopop", "discopop", {}, {}),
        )
    },
    "dpo, alpha divergence": Case(
        "dpo", {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, "dpo",
        {"beta": 0.3, "divergence": "alpha", "divergence_alpha": 0.7}, rtol=FLOAT32, dtype="float32",
    ),
    # reference-free ones; the NLL of CPO is over the tokens of the micro-batch, which is the whole step here
    "cpo": Case("cpo", {"beta": 0.3}, "cpo", {"beta": 0.3}, "sequences"),
    "cpo, smoothed": Case(
        "cpo", {"beta": 0.3, "cpo_alpha": 0.4, "label_smoothing": 0.1}, "cpo",
        {"beta": 0.3, "alpha": 0.4, "label_smoothing": 0.1}, "sequences",
    ),
    "alphapo": Case(
        "cpo", {"beta": 2.5, "loss_type": "alphapo", "alpha": 0.25, "simpo_gamma": 0.4}, "alphapo",
        {"beta": 2.5, "alpha": 0.25, "gamma": 0.4}, "sequences",
    ),
    "hinge, reference-free": Case(
        "cpo", {"beta": 0.3, "loss_type": "hinge", "cpo_alpha": 0.0}, "hinge", {"beta": 0.3}, "sequences"
    ),
    "TPO without its gold answer": Case(
        "tpo", {"beta": 0.3, "tpo_alpha": 0.0, "label_smoothing": 0.1}, "cpo",
        {"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.1}, "sequences",
    ),
    "hinge of TPO": Case("tpo", {"beta": 0.3, "loss_type": "hinge", "tpo_alpha": 0.0}, "hinge", {"beta": 0.3}, "sequences"),
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
        state={"mean": 0.3 * SHIFT, "count": 8.0},
    ),
    # TRL multiplies any of its losses by these weights; the paper's objective is DPO
    "wpo": Case("dpo", {"beta": 0.3, "use_weighting": True}, "wpo", {"beta": 0.3}),
    "kto, reference point below 0": Case("kto", {"beta": 0.2}, "kto", {"beta": 0.2}, "negative"),
}  # fmt: skip

# trainers of TRL that this table is not about
OTHERS = {
    "no loss over preference data: rewards, distillation, policy gradients": (
        "a2po async_distillation async_grpo distillation gkd gmpo gold grpo iw_opd reward rloo sdft sdpo server_distillation"
    ),
    "the base of the others, and SFT, whose loss is compared through DPOTrainer's loss_type sft": "base sft",
}
