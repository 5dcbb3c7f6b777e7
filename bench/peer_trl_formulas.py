"""TRL's own loss code on given log-probabilities and logits. Runs inside `.venv-trl`; JSON in, JSON out.

No formula stands here. The methods that TRL trains with (`_compute_loss` of `DPOTrainer`, `KTOTrainer` and TPO,
`get_batch_loss_metrics` of CPO and ORPO, `training_step` of online DPO) are called on an object that was made without
`__init__` and carries the defaults of TRL's own config; the model is a stub that returns the given numbers, so a gradient
is one on exactly those. What TRL offers is read from its source: every name that a branch compares `loss_type` with.

stdin:  {"rows": {KEY: rows}, "cases": {NAME: {"trainer": ..., "options": {...}, "rows": KEY, "dtype": "float64"}}}
stdout: {"cases": {NAME: {"loss": ..., "gradient": [...]}}, "names": {...}, "trainers": [...], "defaults": {...}}
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import os
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # ORPO, CPO, TPO and online DPO warn that they may move

import torch
import trl
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

Case = dict[str, Any]


class Stub(nn.Module):
    """A model that returns what it is made with; ``answer`` is called with the arguments of the forward pass."""

    is_gradient_checkpointing = False

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


def defaults_of(config: type) -> Case:
    """The defaults of a config's fields, without those that have none."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def bare(trainer: type, config: type, options: Case) -> Any:
    """A trainer without a model, data or accelerator: the defaults of its config and what the losses read beside them."""
    values = defaults_of(config)
    unknown = options.keys() - values.keys()
    if unknown:
        raise SystemExit(f"{config.__name__} has no {', '.join(unknown)}")
    made = object.__new__(trainer)
    made.__dict__.update(values | options)  # past properties without a setter
    made.args = SimpleNamespace(**values | options)
    made.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda one: one, gather_for_metrics=lambda one: one, backward=lambda *_: None
    )
    made.model = Stub(lambda: None)
    made.aux_loss_enabled = made.precompute_ref_logps = made.is_encoder_decoder = False
    made._metrics = {"train": defaultdict(list)}
    made._total_train_tokens, made._tp_size = 0, 1
    return made


class Padded:
    """Completions with the log-probability of every token, laid out as TRL's collators do: one row each, padded right.

    The gradient is taken on the flat vector of the policy's log-probabilities, completion after completion.
    """

    def __init__(self, rows: Sequence[Case], dtype: torch.dtype, marker: int = 1) -> None:
        width = max(row["prompt"] + len(row["policy"]) for row in rows)
        self.input_ids = torch.full((len(rows), width), marker)  # tells the stub which rows it is asked for
        self.mask = torch.zeros(len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            self.mask[at, row["prompt"] : row["prompt"] + len(row["policy"])] = 1
        self.policy = self.flat(rows, "policy", dtype).requires_grad_()
        self.reference = self.flat(rows, "reference", dtype)
        self.concentration = self.flat(rows, "concentration", dtype)

    @staticmethod
    def flat(rows: Sequence[Case], key: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for row in rows for value in row.get(key, [])], dtype=dtype)

    def spread(self, flat: Tensor) -> Tensor:
        """(rows, width - 1): the value of each scored token where the token before it stands, 0 elsewhere."""
        mask = self.mask[:, 1:].bool()
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

    def output(self, flat: Tensor) -> Any:
        """What TRL's fused head returns; entropy and logits only reach metrics."""
        zeros = torch.zeros_like(self.spread(flat.detach()))
        concentration = self.spread(self.concentration) if len(self.concentration) else zeros
        return SimpleNamespace(
            log_probs=self.spread(flat), log_sum_sq_probs=concentration, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def sides(rows: Sequence[Case]) -> list[Case]:
    """Chosen completions of all pairs, then the rejected ones: TRL's order."""
    return [{"prompt": row["prompt"]} | row[side] for side in ("chosen", "rejected") for row in rows]


def dpo(rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = bare(DPOTrainer, DPOConfig, options)
    made.loss_types = [made.loss_type] if isinstance(made.loss_type, str) else made.loss_type
    made.loss_weights = made.loss_weights or [1.0] * len(made.loss_types)
    x = Padded(sides(rows), dtype)
    made.ref_model = Stub(lambda **_: x.output(x.reference))
    inputs = {"input_ids": x.input_ids, "attention_mask": torch.ones_like(x.mask), "completion_mask": x.mask}
    return made._compute_loss(Stub(lambda **_: x.output(x.policy)), inputs, False), x.policy


def kto(rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = bare(KTOTrainer, KTOConfig, options)
    made.calculate_KL = made.loss_type == "kto"
    x, partners = Padded([{"prompt": row["prompt"]} | row["completion"] for row in rows], dtype), None
    inputs = {"input_ids": x.input_ids, "attention_mask": torch.ones_like(x.mask), "completion_mask": x.mask}
    if made.calculate_KL:
        partners = Padded([{"prompt": row["prompt"]} | row["partner"] for row in rows], dtype, marker=2)
        ones = torch.ones_like(partners.mask)
        inputs |= {"KL_input_ids": partners.input_ids, "KL_attention_mask": ones, "KL_completion_mask": partners.mask}

    def answer(which: str) -> Callable[..., Any]:
        def of(*, input_ids: Tensor, **_: Any) -> Any:
            asked = x if input_ids[0, 0] == 1 else partners
            return asked.output(getattr(asked, which))

        return of

    made.ref_model = Stub(answer("reference"))
    inputs["label"] = torch.tensor([row["is_desirable"] for row in rows])
    return made._compute_loss(Stub(answer("policy")), inputs, False), x.policy


def online(rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = bare(OnlineDPOTrainer, OnlineDPOConfig, options)
    x = Padded(sides(rows), dtype)
    width = x.mask.shape[1] - 1
    made.ref_model, made.reward_funcs, made.eos_token_ids, made.stats = Stub(lambda: None), [], [0], defaultdict(list)
    made.args.n_gpu, made.args.torch_empty_cache_steps = 1, None
    made._beta = made.args.beta
    made.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids))
    made._generate = lambda *_: (x.input_ids, x.mask, x.input_ids[:, :width], x.mask[:, 1:], None)
    made._forward = lambda model, *_: x.spread(x.reference if model is made.ref_model else x.policy)
    # the first half are the chosen ones, as they would be by any reward that says so
    made._calculate_rewards_from_functions = lambda **_: torch.tensor([1.0] * len(rows) + [0.0] * len(rows))
    kept: list[Tensor] = []
    made.accelerator.backward = lambda loss, **_: kept.append(loss)
    made.training_step(Stub(lambda: None), {"prompt": [""] * len(rows)})
    return kept[0], x.policy


class Logits:
    """Whole sequences with the logits of every position, (sequences, width, vocabulary), padded right."""

    def __init__(self, rows: Sequence[Case], dtype: torch.dtype) -> None:
        self.sequences = [
            (len(row["prompt_ids"]), row["prompt_ids"] + row[side]["ids"]) for side in ("chosen", "rejected") for row in rows
        ]
        width = len(rows[0]["chosen"]["logits"])  # that of the widest sequence of all, here or not
        self.ids = torch.zeros(len(self.sequences), width, dtype=torch.long)
        self.mask, self.scored = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
        for at, (start, ids) in enumerate(self.sequences):
            self.ids[at, : len(ids)] = torch.tensor(ids)
            self.mask[at, : len(ids)] = 1
            self.scored[at, start : len(ids)] = 1
        given = [row[side]["logits"] for side in ("chosen", "rejected") for row in rows]
        self.logits = torch.tensor(given, dtype=dtype).requires_grad_()

    def batch(self) -> Case:
        """The batch of CPO's and ORPO's collator."""
        half = len(self.ids) // 2
        labels = self.ids.masked_fill(self.scored == 0, -100)
        found: Case = {}
        for side, rows in (("chosen", slice(None, half)), ("rejected", slice(half, None))):
            for key, values in (("input_ids", self.ids), ("attention_mask", self.mask), ("labels", labels)):
                found[f"{side}_{key}"] = values[rows]
        return found


def cpo(rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if options.get("loss_type") == "alphapo":  # which the config turns into others
        made = CPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)
        options = options | {"loss_type": made.loss_type, "cpo_alpha": made.cpo_alpha}
    return of_logits(CPOTrainer, CPOConfig, rows, options, dtype)


def orpo(rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return of_logits(ORPOTrainer, ORPOConfig, rows, options, dtype)


def of_logits(trainer: type, config: type, rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made, x = bare(trainer, config, options), Logits(rows, dtype)
    made.pad_token_id = made.padding_value = 0
    model = Stub(lambda *_, **__: SimpleNamespace(logits=x.logits))
    return made.get_batch_loss_metrics(model, x.batch())[0], x.logits


def tpo(rows: Sequence[Case], options: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made, x = bare(TPOTrainer, TPOConfig, options), Logits(rows, dtype)
    inputs = {"input_ids": x.ids, "attention_mask": x.mask, "completion_mask": x.scored}
    return made._compute_loss(Stub(lambda **_: SimpleNamespace(logits=x.logits)), inputs, False), x.logits


TRAINERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "dpo": dpo,
    "kto": kto,
    "online_dpo": online,
    "cpo": cpo,
    "orpo": orpo,
    "tpo": tpo,
}
METHODS: dict[str, tuple[Callable[..., Any], ...]] = {
    "dpo": (DPOTrainer._compute_loss,),
    "kto": (KTOTrainer._compute_loss,),
    "online_dpo": (OnlineDPOTrainer.training_step,),
    "cpo": (CPOTrainer.cpo_loss, CPOTrainer.get_batch_loss_metrics, CPOConfig.__post_init__),
    "orpo": (ORPOTrainer.odds_ratio_loss, ORPOTrainer.get_batch_loss_metrics),
    "tpo": (TPOTrainer._compute_loss,),
}
# read in the same methods for other ends: memory, generation, the optimiser
NO_LOSS = {"gradient_checkpointing_kwargs", "torch_empty_cache_steps", "use_vllm", "optim", "gradient_accumulation_steps"}
NO_LOSS |= {"missing_eos_penalty", "n_gpu", "bf16", "fp16", "gradient_checkpointing", "loss_type", "f_divergence_type"}
CONFIGS = {
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "online_dpo": OnlineDPOConfig,
    "cpo": CPOConfig,
    "orpo": ORPOConfig,
    "tpo": TPOConfig,
}


def compared_with(method: Callable[..., Any], name: str) -> list[str]:
    """Every constant that the source of a method compares ``name`` or ``self.name`` with."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
        if isinstance(node, ast.Compare) and getattr(node.left, "attr", getattr(node.left, "id", "")) == name:
            found |= {one.value for part in node.comparators for one in ast.walk(part) if isinstance(one, ast.Constant)}
    return sorted(found)


def options_read(trainer: str) -> list[str]:
    """Fields of its own config that the source of a trainer's loss reads from ``self`` or ``self.args``."""
    fields = {field.name for field in dataclasses.fields(CONFIGS[trainer])} - NO_LOSS
    found: set[str] = set()
    for method in METHODS[trainer]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "self.args"}:
                found.add(node.attr)
    return sorted(found & fields)


def facts() -> Case:
    """What TRL offers: names of losses and divergences by trainer, every trainer it has, defaults of the configs."""
    names = {
        trainer: sorted({one for way in ways for one in compared_with(way, "loss_type")}) for trainer, ways in METHODS.items()
    }
    names["divergence"] = compared_with(DPOTrainer._compute_loss, "f_divergence_type")
    root = Path(trl.__file__).parent
    trainers = sorted(path.stem.removesuffix("_trainer") for path in root.rglob("*_trainer.py"))
    kept = {"beta", "cpo_alpha", "simpo_gamma", "label_smoothing", "alpha", "ld_alpha", "desirable_weight", "undesirable_weight"}
    defaults = {
        name: {key: value for key, value in defaults_of(config).items() if key in kept} for name, config in CONFIGS.items()
    }
    options = {trainer: options_read(trainer) for trainer in METHODS}
    return {"version": trl.__version__, "names": names, "options": options, "trainers": trainers, "defaults": defaults}


def run(asked: Case) -> Case:
    found = {}
    for name, case in asked["cases"].items():
        dtype = getattr(torch, case.get("dtype", "float64"))
        torch.set_default_dtype(dtype)  # TRL makes scalars of options (`torch.tensor(self.label_smoothing)`) in the default
        loss, leaf = TRAINERS[case["trainer"]](asked["rows"][case["rows"]], case["options"], dtype)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found[name] = {"loss": loss.item(), "gradient": gradient.double().flatten().tolist()}
    return {"cases": found, **facts()}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.load(sys.stdin))
    json.dump(answer, sys.stdout)
