"""Rows of a file as preftune's training sees them, and as the peer's does."""

from __future__ import annotations

from collections.abc import Sequence

from preftune.core.ports import ChatTokenizer
from preftune.core.records import TokenisedExample, View
from preftune.data.pipeline import read_examples
from preftune.data.tokenize import tokenise


def rows_of(path: str, tokenizer: ChatTokenizer, max_length: int, view: View = "pairs") -> list[TokenisedExample]:
    """Every row of the file; a row that preftune would leave out is an error here, for TRL would train it."""
    read = read_examples([path], style="text")
    made = tokenise(read.examples, tokenizer, view=view, max_length=max_length, too_long="exclude")
    if read.excluded or made.excluded or made.counts.get("boundary_appended"):
        first = [*read.excluded, *made.excluded][:1]
        raise SystemExit(f"{path}: {read.counts} {made.counts} {first}: the two systems would not see the same rows")
    return made.examples


def ids_of(example: TokenisedExample) -> dict[str, Sequence[int]]:
    """The columns of TRL's tokenised dataset."""
    chosen, rejected = example.completions
    return {"prompt_ids": example.prompt_ids, "chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
