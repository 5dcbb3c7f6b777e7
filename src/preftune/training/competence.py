"""Whether a model can do the task at all: before preferences are tuned, the completions must be within its reach.

Two measurements on a few training examples. The mean negative log-likelihood per token of chosen completions, against
the entropy of those tokens' frequencies: a model that is no better than a table of frequencies has not learned this
kind of text (wrong model, wrong template, random weights). And greedy answers that end by themselves: a model that never
ends a turn has not learned to answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from preftune.core.errors import Finding
from preftune.core.recipe import DecodingConfig, StageConfig
from preftune.core.records import TokenisedCompletion, TokenisedExample
from preftune.data.pack import pack_of
from preftune.modeling.forward import Scorer
from preftune.modeling.generate import generate
from preftune.modeling.tokenizer import HubTokenizer

NUM_EXAMPLES = 32
NUM_ANSWERS = 16
MIN_TOKENS = 2_000
MAX_ANSWER = 256
MAX_WORK = 2e12
"""Floating-point operations that the likelihood may cost; a large model sees fewer examples."""
NO_PROBE = 'go on with --no-probe (in a job\'s body "no_probe": true; in another API\'s, "preftune": {"no_probe": true})'
"""How a refusal by a probe is overruled; said wherever one refuses."""
FROM_BASE = frozenset({"sft", "orpo", "cpo"})
"""Methods that teach the answer too: models that do not end their turns yet are what they are for."""


@dataclass(frozen=True, slots=True)
class Competence:
    """What was measured.

    Parameters
        nll: mean over chosen tokens, nats. entropy: of the frequencies of chosen tokens, nats, None for too few.
        num_tokens: tokens behind ``nll``. num_answers, num_ended: greedy answers, and those that ended by themselves;
            0 of 0 where none were asked for.
    """

    nll: float
    entropy: float | None
    num_tokens: int
    num_answers: int = 0
    num_ended: int = 0


def chosen_of(example: TokenisedExample) -> TokenisedCompletion | None:
    """The completion that the model should be able to write: the chosen, demonstrated or a desirable one."""
    if example.labels:
        return next((one for one, label in zip(example.completions, example.labels, strict=True) if label), None)
    return example.completions[0]


def unigram_entropy(examples: Sequence[TokenisedExample]) -> float | None:
    """Entropy of the frequencies of scored chosen tokens in nats, corrected for few tokens (Miller and Madow 1955).

    H = -sum p log p + (K - 1) / (2 N),    K different tokens among N
    """
    counts: Counter[int] = Counter()
    for example in examples:
        completion = chosen_of(example)
        if completion is not None:
            counts.update(token for token, scored in zip(completion.ids, completion.scored, strict=True) if scored)
    if counts.total() < MIN_TOKENS:
        return None
    numbers = np.fromiter(counts.values(), dtype=np.float64)
    total = numbers.sum()
    shares = numbers / total
    return float(-(shares * np.log(shares)).sum() + (len(numbers) - 1) / (2 * total))


def choose_examples(examples: Sequence[TokenisedExample], num_parameters: int) -> list[TokenisedExample]:
    """A few examples, evenly spaced, each with its chosen completion alone; fewer for a large model."""
    count = min(NUM_EXAMPLES, len(examples))
    places = [round(k * (len(examples) - 1) / max(1, count - 1)) for k in range(count)]
    found: list[TokenisedExample] = []
    work = 0.0
    for place in dict.fromkeys(places):
        completion = chosen_of(examples[place])
        if completion is None or not completion.num_scored:
            continue
        one = replace(examples[place], completions=(completion,), labels=(), partner=None)
        work += 2.0 * num_parameters * one.num_tokens
        if found and work > MAX_WORK:
            break
        found.append(one)
    return found


def measure_competence(
    model: nn.Module,
    examples: Sequence[TokenisedExample],
    entropy: float | None,
    *,
    tokenizer: HubTokenizer | None = None,
) -> Competence:
    """Measure a model as it was loaded.

    Parameters
        examples: of ``choose_examples``. entropy: of the whole stage's data, ``unigram_entropy``.
        tokenizer: ask for greedy answers to the first of their prompts too; None leaves that out.
    """
    scorer = Scorer(model, shared=False)  # the model's own attention: what trains is set up later
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logps = scorer.token_logps(pack_of([example]))
            total -= float(logps.double().sum())
            count += len(logps)
    measured = Competence(total / max(1, count), entropy, count)
    if tokenizer is None or not examples:
        return measured
    asked = examples[:NUM_ANSWERS]
    longest = max(len(one.completions[0].ids) for one in asked)
    decoding = DecodingConfig(temperature=0, max_new_tokens=min(MAX_ANSWER, 2 * longest + 16), batch_size=NUM_ANSWERS)
    answers = generate(model, tokenizer, [one.prompt_ids for one in asked], decoding, 0)
    return replace(measured, num_answers=len(answers), num_ended=sum(answer.is_complete for answer in answers))


def check_competence(config: StageConfig, measured: Competence) -> list[Finding]:
    """What the measurement says: a blocker for preferences, a warning for sft, nothing where all is well."""
    findings: list[Finding] = []
    if measured.num_tokens and measured.entropy is not None and not measured.nll < measured.entropy:
        fact = (
            f"stage {config.name}: the model gives chosen completions {measured.nll:.2f} nats a token, "
            f"no better than their token frequencies do ({measured.entropy:.2f})"
        )
        way_out = f"train an sft stage on such completions first, check model and chat template, or {NO_PROBE}"
        findings.append(Finding("warning" if config.method == "sft" else "blocker", "cannot_do_the_task", fact, way_out))
    if config.method not in FROM_BASE and 2 * measured.num_ended < measured.num_answers:
        fact = (
            f"stage {config.name}: {measured.num_ended} of {measured.num_answers} greedy answers to training prompts end "
            "by themselves"
        )
        way_out = "train an sft stage first, and check that the chat template ends a turn with the model's end token"
        findings.append(Finding("warning", "does_not_stop", fact, way_out))
    return findings
