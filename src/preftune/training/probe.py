"""The probe: a few fixed prompts answered by the policy while it trains, scored by the policy and by its reference.

    r_t = log ref(y_t) - log pi(y_t)             y sampled from pi at temperature 1
    kl  = mean over completions of sum over t of (exp(r_t) - 1 - r_t)

That is the estimator k3 (Schulman 2020, "Approximating KL divergence"): unbiased and never negative, here in nats a
completion of at most ``max_new_tokens`` tokens. The reference of a probe is the model that the stage started from: adapters
switched off, or for full fine-tuning a copy of the start weights that takes the policy's place while it scores
(docs/adr/0021). Sampling has a stream of its own and leaves every generator of the process as it was.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from preftune.core.files import read_json, write_json
from preftune.core.recipe import DecodingConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.core.watching import ProbeConfig
from preftune.data.pack import pack_step
from preftune.modeling.forward import Scorer
from preftune.modeling.generate import sample_tokens
from preftune.modeling.tokenizer import HubTokenizer
from preftune.training.checkpoint import generator_state, restore_generators
from preftune.training.held import HeldWeights
from preftune.training.order import evenly_spaced
from preftune.training.spread import ONE, Spread
from preftune.training.state import StagePlan

SHARE = 0.1  # of a stage's work that a probe may take where its cadence is not given
TOKENS_A_DECODING_STEP = 64  # one decoding step of a batch costs about as much as training on this many tokens
MAX_NEW_TOKENS = 192
EXCERPT = 160


@dataclass(frozen=True, slots=True)
class Writing:
    """How a model writes on the probe: mean length (tokens), entropy (nats a token), distinct bigrams, share that end."""

    length: float
    entropy: float
    distinct_2: float
    eos_rate: float


class Probe:
    """The prompts of a stage's probe and what the start wrote for them.

    Parameters
        config: how many and how long. prompts: token ids. seed: of the sampling, the same at every step, so that two
            probes differ by the policy alone.
        start: of the model, which is the reference. Where it lies on several processes they share the work.

    Attributes
        seconds: spent in probes by this process. sample: the first completion of the last probe, as text.
    """

    def __init__(
        self, config: ProbeConfig, prompts: Sequence[tuple[int, ...]], scorer: Scorer, tokenizer: HubTokenizer, *,
        start: HeldWeights, max_new_tokens: int, tokens_per_pack: int, seed: int,
    ) -> None:  # fmt: skip
        self.prompts = [prompt for prompt in prompts for _ in range(config.samples)]
        self.start = start
        self.seconds = 0.0
        self.sample = ""
        self._scorer, self._tokenizer, self._seed = scorer, tokenizer, seed
        self._tokens_per_pack, self._spread = tokens_per_pack, start.spread
        self._decoding = DecodingConfig(temperature=1.0, max_new_tokens=max_new_tokens, batch_size=64)
        self._start: Writing | None = None

    def cost(self, num_prompts: int) -> float:
        """Tokens of training that cost about as much as one probe of so many prompts."""
        longest = self._decoding.max_new_tokens
        mean = sum(len(prompt) for prompt in self.prompts) / len(self.prompts)
        return num_prompts * (mean + longest) + TOKENS_A_DECODING_STEP * longest

    def begin(self, folder: Path) -> dict[str, float]:
        """What the start writes, from ``probe.json`` where an earlier process wrote it; the metrics of step 0."""
        path = folder / "probe.json"
        ranks = self._spread.ranks
        if ranks.from_first(path.is_file()):
            self._start = Writing(**read_json(path)["start"])
        else:
            with self._apart(), self.start.in_place():
                answers = self._answer()
                self._start = answers.writing(self._score(answers))
            facts = {"prompts": len(self.prompts), "max_new_tokens": self._decoding.max_new_tokens}
            if ranks.is_first:
                write_json(path, facts | {"start": asdict(self._start), "sample": self.sample})
        return self._metrics(self._start, 0.0, 0.0)

    def run(self) -> dict[str, float]:
        """Sample, score twice, and return the metrics; ``begin`` was called before."""
        with self._apart():
            answers = self._answer()
            own = self._score(answers)
            with self.start.in_place():
                ratio = self._score(answers) - own
            k3 = float((torch.expm1(ratio) - ratio).sum())
            return self._metrics(answers.writing(own), k3 / len(self.prompts), k3 / len(ratio))

    def _metrics(self, now: Writing, kl: float, kl_per_token: float) -> dict[str, float]:
        assert self._start is not None
        return {
            "kl": kl,
            "probe/kl_per_token": kl_per_token,
            "probe/entropy": now.entropy,
            "probe/distinct_2": now.distinct_2,
            "probe/length": now.length,
            "probe/length_ratio": now.length / self._start.length,
            "probe/eos_rate": now.eos_rate,
        }

    def _answer(self) -> _Answers:
        tokenizer = self._tokenizer
        ids = self._sampled()
        self.sample = " ".join(tokenizer.decode(ids[0]).split())[:EXCERPT]
        return _Answers(self.prompts, ids, tokenizer.eos_ids)

    def _sampled(self) -> list[list[int]]:
        """The answers to all prompts. Where weights are shared out every rank samples all of them, step by step together."""
        scorer, ranks = self._scorer, self._spread.ranks
        model, decoding, tokenizer = scorer.model, self._decoding, self._tokenizer
        if self._spread.kind == "one":
            return sample_tokens(model, tokenizer, self.prompts, decoding, self._seed)
        if self._spread.kind == "fsdp2":
            return cast(
                list[list[int]],
                scorer.entry(lambda: sample_tokens(model, tokenizer, self.prompts, decoding, self._seed, is_sharded=True)),
            )
        own = range(ranks.rank, len(self.prompts), ranks.size)
        prompts, streams = [self.prompts[place] for place in own], [(self._seed, place) for place in own]
        ids = sample_tokens(model, tokenizer, prompts, decoding, streams) if prompts else []
        told = [json.loads(content) for content in ranks.gather(json.dumps(ids).encode())]
        return [told[place % ranks.size][place // ranks.size] for place in range(len(self.prompts))]

    def _score(self, answers: _Answers) -> Tensor:
        """log p of every token of the answers under the model as it stands: (tokens,) nats, float64."""
        packs = pack_step(answers.examples(), self._tokens_per_pack)
        parts: list[Tensor | None] = [None] * len(packs)
        for turn in self._spread.ranks.turns(packs):
            with self._spread.turn(self._scorer, turn):
                logps = self._scorer.token_logps(turn.pack)
            if turn.index is not None:
                parts[turn.index] = logps.double()
        return self._spread.ranks.joined(parts, [len(pack.targets) for pack in packs], self._scorer.device)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Dropout off, no graph, and every generator afterwards as it was before."""
        started, generators = time.monotonic(), generator_state()
        model = self._scorer.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)
            restore_generators(generators)
            self.seconds += time.monotonic() - started


@dataclass(frozen=True, slots=True)
class _Answers:
    """Sampled token ids behind their prompts."""

    prompts: Sequence[tuple[int, ...]]
    ids: Sequence[Sequence[int]]
    eos_ids: frozenset[int]

    def examples(self) -> list[TokenisedExample]:
        """One example a completion, every token of it scored."""
        return [
            TokenisedExample(f"probe-{index}", prompt, (TokenisedCompletion(tuple(ids), (True,) * len(ids)),))
            for index, (prompt, ids) in enumerate(zip(self.prompts, self.ids, strict=True))
        ]

    def writing(self, own: Tensor) -> Writing:
        """How these answers are written; ``own``: (tokens,) their log-probabilities under the model that wrote them."""
        bigrams = [pair for ids in self.ids for pair in itertools.pairwise(ids)]
        return Writing(
            length=sum(len(ids) for ids in self.ids) / len(self.ids),
            entropy=-float(own.mean()),
            distinct_2=len(set(bigrams)) / max(1, len(bigrams)),
            eos_rate=sum(ids[-1] in self.eos_ids for ids in self.ids) / len(self.ids),
        )


def make_probe(
    stage: StagePlan, scorer: Scorer, trained: Mapping[str, nn.Parameter], num_steps: int, spread: Spread = ONE
) -> tuple[Probe, frozenset[int]] | None:
    """The probe of a stage and the steps after which it runs; None where it is switched off."""
    config = stage.config.probe
    if config is None:
        return None
    rows = list({example.prompt_ids: example for example in stage.select or stage.train}.values())
    order = np.random.default_rng([stage.seed, len(rows)]).permutation(len(rows))
    prompts = [rows[place].prompt_ids for place in order[: config.prompts]]
    longest = config.max_new_tokens or usual_length(stage.train)
    # with adapters nothing is copied: they are switched off
    kept = trained if stage.config.adapter == "full" else {}
    start = HeldWeights(scorer.model, kept, is_adapter_off=True, spread=spread)
    probe = Probe(
        config, prompts, scorer, stage.loaded.tokenizer, start=start, max_new_tokens=longest,
        tokens_per_pack=stage.config.tokens_per_pack, seed=stage.seed,
    )  # fmt: skip
    mean = sum(example.num_tokens for example in stage.train) / len(stage.train)
    work = num_steps * stage.config.pairs_per_step * mean
    count = num_probes(config, stage.config.evals, work, probe.cost(len(probe.prompts)))
    return probe, evenly_spaced(num_steps, count, with_end=True)


def num_probes(config: ProbeConfig, evals: int, work: float, each: float) -> int:
    """Probes after the first one: what the recipe says, or no more than a tenth of the stage's work affords.

    Parameters
        evals: of the stage. work: tokens of its training. each: tokens that one probe counts as.
    """
    return max(1, min(int(SHARE * work / each), evals)) if config.evals is None else config.evals


def usual_length(examples: Sequence[TokenisedExample]) -> int:
    """Tokens that nine in ten completions have and a quarter more, at most ``MAX_NEW_TOKENS``."""
    lengths = [len(completion.ids) for example in examples for completion in example.completions]
    return int(min(MAX_NEW_TOKENS, max(8, np.ceil(1.25 * np.quantile(lengths, 0.9)))))
