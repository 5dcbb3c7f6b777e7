"""What both systems are given: files, written once, read by both."""

from __future__ import annotations

import gzip
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
TINYSTORIES = DATA / "models" / "tinystories-656k" / "hf"
RASBT = DATA / "rasbt-preference" / "instruction-data-with-preference.json"
HH = DATA / "hh-rlhf" / "helpful-base.test.jsonl.gz"

VOCABULARY = 49_152  # of SmolLM2-135M
MAX_LENGTH = 1024  # TRL's default; longer pairs are left out for both systems
POOL = 400  # transformers' LengthGroupedSampler sorts 50 batches of 8 at a time

Row = dict[str, str]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rasbt_rows() -> tuple[list[Row], list[Row], dict[str, int]]:
    """Training rows, held-out rows, and how many rows were left out, by reason.

    First 1,000 rows without those whose prompt also stands (exactly or nearly) in the last 100; held out: the last 100.
    Rows that preftune refuses (identical completions, characters that the tokenizer drops) are left out for both systems.
    The prompt is raw text that ends in "Answer:", so that no token of the model's tokenizer (its tokens may span blanks
    and newlines) crosses into the answer: TRL drops such a token from the prompt, preftune keeps the prompt whole.
    """
    from preftune.data.split import leaks

    rows = json.loads(RASBT.read_text())

    def prompt(row: Row) -> str:
        return row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")

    def text(row: Row) -> Row:
        return {"prompt": f"{prompt(row)}\nAnswer:", "chosen": row["chosen"], "rejected": row["rejected"]}

    train, heldout = rows[:1000], rows[1000:]
    # a held-out prompt names its nearest training prompt only: look again until none leaks
    while found := leaks([prompt(row) for row in train], [prompt(row) for row in heldout]):
        leaking = {leak.train for leak in found}
        train = [row for at, row in enumerate(train) if at not in leaking]
    left_out = {"leaks": 1000 - len(train)}
    train, heldout = (usable([text(row) for row in part], left_out) for part in (train, heldout))
    return train, heldout, left_out


def usable(rows: Sequence[Row], left_out: dict[str, int]) -> list[Row]:
    """The rows that preftune reads and tokenises with the model's tokenizer; counts the others by reason."""
    from preftune.core.recipe import ModelConfig
    from preftune.data.pipeline import read_examples
    from preftune.data.tokenize import tokenise
    from preftune.modeling.load import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "rows.jsonl", rows)
        read = read_examples([str(path)], style="text")
        tokenizer = load_tokenizer(ModelConfig(name=str(TINYSTORIES)))
        made = tokenise(read.examples, tokenizer, view="pairs", max_length=512, too_long="exclude")
    for one in (*read.excluded, *made.excluded):
        left_out[one.reason] = left_out.get(one.reason, 0) + 1
    kept = {example.provenance.line for example in made.examples}
    return [row for line, row in enumerate(rows, 1) if line in kept]


def hh_lengths() -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected (GPT-2's tokenizer) of every usable helpful-base pair that fits."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "models" / "tokenizer-gpt2" / "tokenizer.json"))
    mark = "\n\nAssistant:"
    found = []
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            at = row["chosen"].rfind(mark) + len(mark)
            prompt, chosen, rejected = row["chosen"][:at], row["chosen"][at:], row["rejected"][at:]
            if row["rejected"][:at] != prompt or chosen == rejected or not chosen.strip() or not rejected.strip():
                continue
            sizes = tuple(len(one.ids) for one in tokenizer.encode_batch([prompt, chosen, rejected]))
            if sizes[0] + max(sizes[1:]) + 1 <= MAX_LENGTH:
                found.append((sizes[0], sizes[1], sizes[2]))
    return found


def word_tokenizer() -> Any:
    """One token a word: `w17` is id 17. So that rows of given lengths go through either system's own text path."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: at for at, word in enumerate([*special, *(f"w{at}" for at in range(len(special), VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=8192
    )


def smol_shape(folder: Path) -> Path:
    """A model of SmolLM2-135M's shape with random weights, float32, and the word tokenizer; made once."""
    if (folder / "tokenizer.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def text_of_lengths(sizes: Sequence[int], rng: random.Random) -> Row:
    """A row of random words with these numbers of tokens; the end token, which either system adds, counts."""
    prompt, chosen, rejected = (
        " ".join(f"w{rng.randrange(4, VOCABULARY)}" for _ in range(size))
        for size in (sizes[0], max(1, sizes[1] - 1), max(1, sizes[2] - 1))
    )
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def speed_rows(folder: Path, steps: int, pairs_per_step: int = 8, seed: int = 0) -> dict[str, Path]:
    """The same pairs in two orders: `shuffled`, and `grouped` by length as a sampler that groups would give them.

    400 pairs (what transformers' LengthGroupedSampler sorts at a time) are sorted by length and `steps` batches taken at
    even distances: so the timed pairs are a fair sample of the data and each grouped batch holds pairs of nearly one
    length. One more batch stands first and is not timed; it is the one that decides the peak of memory in an epoch of
    that order: the longest pairs in `grouped` (that sampler begins with them), the longest pair among others in `shuffled`.
    """
    rng = random.Random(seed)
    pool = hh_lengths()
    rng.shuffle(pool)
    pool = sorted(pool[:POOL], key=lambda sizes: sizes[0] + max(sizes[1:]))
    batches = [pool[at : at + pairs_per_step] for at in range(0, POOL, pairs_per_step)]
    taken = [batches[int((at + 0.5) * len(batches) / steps)] for at in range(steps)]
    rows = [[text_of_lengths(sizes, rng) for sizes in batch] for batch in taken]
    rng.shuffle(rows)  # no order by length over the steps
    flat = [row for batch in rows for row in batch]
    shuffled = rng.sample(flat, len(flat))
    longest = {
        "grouped": batches[-1],
        "shuffled": [pool[-1], *rng.sample(pool[:-1], pairs_per_step - 1)],
    }
    first = {order: [text_of_lengths(sizes, rng) for sizes in batch] for order, batch in longest.items()}
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "grouped": write_rows(folder / "grouped.jsonl", [*first["grouped"], *flat]),
        "shuffled": write_rows(folder / "shuffled.jsonl", [*first["shuffled"], *shuffled]),
    }


def work_folder() -> Path:
    """Where inputs and trained models of the bench go; PREFTUNE_BENCH_FOLDER moves it."""
    folder = Path(os.environ.get("PREFTUNE_BENCH_FOLDER", ROOT / "build" / "bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
