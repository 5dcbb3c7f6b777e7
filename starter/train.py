"""Train the starter: a Llama-architecture story teller of about two million parameters, from a fixed seed.

    PYTHONPATH=. python -m starter.train --output src/preftune/starter/model

The result depends on the seed, the arguments and the number of threads, not on the clock. Rows are never cut and never
share a sequence: batches group rows of like length under a token budget, so positions are those of inference. The loss
is on the story and its end token.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from starter.corpus import DEFAULT_TEXT_FOLDER, StoryExample, split_validation, tinystories_examples
from starter.vocabulary import ASSISTANT, BOS, END, MAX_LENGTH, USER, VOCABULARY_SIZE, save_tokenizer, train_tokenizer

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the trained weights depend on, apart from the text."""

    seed: int = 7
    threads: int = 1
    steps: int = 2700
    tokens_per_batch: int = 4096
    lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grammar_stories: int = 50000
    tinystories_repeats: int = 4
    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    intermediate_size: int = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example: ids of request and story, and where the story starts."""

    ids: list[int]
    story_start: int


def load_corpus(settings: Settings, text_folder: Path) -> tuple[list[StoryExample], list[StoryExample]]:
    """Train and validation examples: TinyStories (several times an epoch) and grammar stories (once an epoch)."""
    train, validation = split_validation(tinystories_examples(text_folder, settings.seed))
    if settings.grammar_stories:
        from starter.grammar import grammar_examples

        grammar_train, grammar_validation = split_validation(
            grammar_examples(settings.grammar_stories, settings.seed), every=max(2, settings.grammar_stories // 100)
        )
        train = train * settings.tinystories_repeats + grammar_train
        validation = validation + grammar_validation
    return train, validation


def tokenise(examples: Sequence[StoryExample], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """Rows that fit the context; the ids are those that the chat template gives."""
    prompts = tokenizer([f"{BOS}{USER}{example.prompt}{ASSISTANT}" for example in examples])["input_ids"]
    stories = tokenizer([f"{example.story}{END}" for example in examples])["input_ids"]
    rows = [Row(prompt + story, len(prompt)) for prompt, story in zip(prompts, stories, strict=True)]
    return [row for row in rows if len(row.ids) <= MAX_LENGTH]


def batches(rows: Sequence[Row], tokens_per_batch: int, chooser: random.Random) -> Iterator[list[Row]]:
    """Endless batches of whole rows of like length, `tokens_per_batch` tokens at most with padding counted."""
    while True:
        order = list(range(len(rows)))
        chooser.shuffle(order)
        for start in range(0, len(order), 2048):
            chunk = sorted((rows[index] for index in order[start : start + 2048]), key=lambda row: len(row.ids))
            groups: list[list[Row]] = [[]]
            for row in chunk:
                if (len(groups[-1]) + 1) * len(row.ids) > tokens_per_batch:
                    groups.append([])
                groups[-1].append(row)
            chooser.shuffle(groups)
            yield from groups


def story_loss(model: LlamaForCausalLM, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    """Mean negative log-likelihood of the story tokens of a batch, nats per token."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, row.story_start : len(row.ids)] = ids[index, row.story_start : len(row.ids)]
    # Padding is on the right and attention is causal, so no mask is needed: pads are never seen by a scored token.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model, initialised from the seed."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: Sequence[Row], pad_id: int) -> float:
    """Mean story loss per token over held-out rows, exact over tokens."""
    model.train(False)
    total = count = 0.0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), 16):
        group = ordered[start : start + 16]
        tokens = sum(len(row.ids) - row.story_start for row in group)
        total += float(story_loss(model, group, pad_id)) * tokens
        count += tokens
    model.train()
    return total / max(1.0, count)


def fit(
    model: LlamaForCausalLM, rows: Sequence[Row], validation: dict[str, list[Row]], settings: Settings, pad_id: int
) -> dict[str, float]:
    """Run the steps and return the last validation losses by source."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    stream = batches(rows, settings.tokens_per_batch, random.Random(settings.seed))
    started, seen, running = time.monotonic(), 0, 0.0
    losses: dict[str, float] = {}
    for step in range(settings.steps):
        group = next(stream)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, settings)
        loss = story_loss(model, group, pad_id)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += sum(len(row.ids) for row in group)
        value = float(loss.detach())
        running = value if not step else 0.98 * running + 0.02 * value
        last = step + 1 == settings.steps
        if (step + 1) % 50 == 0 or last:
            speed = seen / (time.monotonic() - started)
            print(f"step {step + 1} train {running:.3f} tokens {seen / 1e6:.2f}M {speed:.0f}/s", flush=True)
        if (step + 1) % 500 == 0 or last:
            losses = {name: round(validation_loss(model, part, pad_id), 4) for name, part in validation.items()}
            print(f"step {step + 1} validation {losses}", flush=True)
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in float16, configuration, generation defaults and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=0.8,
        top_k=0,
        max_new_tokens=200,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(str(folder))  # type: ignore[no-untyped-call]
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Train from the command line; every setting is an option."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("src/preftune/starter/model"))
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT_FOLDER)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    output, text = arguments.pop("output"), arguments.pop("text")
    settings = Settings(**arguments)
    torch.set_num_threads(settings.threads)
    train, validation = load_corpus(settings, text)
    tokenizer = train_tokenizer(part for example in train for part in (example.prompt, example.story))
    rows = tokenise(train, tokenizer)
    held_out = {
        source: tokenise([example for example in validation if example.source == source], tokenizer)
        for source in sorted({example.source for example in validation})
    }
    model = build_model(settings, tokenizer)
    print(f"rows {len(rows)} tokens {sum(len(row.ids) for row in rows) / 1e6:.2f}M", end=" ")
    print(f"parameters {model.num_parameters() / 1e6:.2f}M", flush=True)
    losses = fit(model, rows, held_out, settings, int(tokenizer.pad_token_id))
    save(model, tokenizer, output)
    for path in output.iterdir():
        path.chmod(0o644)
    print(json.dumps({"settings": asdict(settings), "validation": losses}))


if __name__ == "__main__":
    main()
