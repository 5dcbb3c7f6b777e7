"""What a making of pairs leaves on the disk, so that it can be resumed and read afterwards.

    request.json        model, prompts, decoding, seed and judge: what decides every sample and judgement
    drawn.jsonl         samples in their order, append-only, written batch by batch
    judgements.jsonl    judgements, append-only, written one by one
    samples.jsonl       at the end: every sample with its score and where it comes from
    summary.json        at the end: counts by reason, scores, lengths

A killed process loses the batch that it was sampling and the judgement that it was waiting for, nothing else. Batches
begin at the same samples in every process, so what is sampled after a kill is what would have been sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.core.errors import CheckpointError
from preftune.core.files import append_jsonl, append_rows, read_json, reopen_jsonl, write_json
from preftune.curation.judgement import Judgement, Known

REQUEST = "request.json"


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sample as the model wrote it.

    prompt: digest of the prompt. number: of the sample, from 0. seed: of its stream of random numbers.
    """

    prompt: str
    number: int
    seed: int
    text: str
    num_tokens: int
    is_complete: bool


@dataclass(slots=True)
class Record:
    """The append-only part of a folder, open for writing.

    drawn: samples so far, whole batches. known: for each prompt, the judgements so far.
    """

    folder: Path
    drawn: list[Drawn]
    known: dict[str, Known]

    @classmethod
    def open(cls, folder: Path, request: dict[str, Any], wanted: Sequence[tuple[str, int, int]], batch: int) -> Record:
        """The record in a folder, new or as an earlier process left it.

        Parameters
            request: JSON values that decide samples and judgements.
            wanted: (prompt, number, seed) of every sample, in order. batch: samples that are written at once.

        Raises
            CheckpointError: the folder holds the record of another request.
        """
        path = folder / REQUEST
        if path.exists():
            held = read_json(path)
            other = [key for key in request if held.get(key) != request[key]]
            if other:
                raise CheckpointError(
                    f"{folder} holds samples of another request (another {', '.join(other)}); "
                    "name another file, or delete the folder"
                )
        else:
            write_json(path, request)

        def whole(rows: list[dict[str, Any]]) -> int:
            return len(rows) if len(rows) >= len(wanted) else len(rows) // batch * batch

        drawn = [Drawn(**row) for row in reopen_jsonl(folder / "drawn.jsonl", whole)]
        if [(one.prompt, one.number, one.seed) for one in drawn] != list(wanted[: len(drawn)]):
            raise CheckpointError(
                f"{folder / 'drawn.jsonl'} was altered: its samples are not those that were asked for; delete the folder"
            )
        record = cls(folder, drawn, {})
        for row in reopen_jsonl(folder / "judgements.jsonl"):
            made = Judgement(row["first"], row["second"], row["score"])
            record.known.setdefault(row["prompt"], {})[made.first, made.second] = made
        return record

    def add_samples(self, samples: Sequence[Drawn]) -> None:
        """Append one batch."""
        append_rows(self.folder / "drawn.jsonl", [asdict(one) for one in samples])
        self.drawn += samples

    def add_judgement(self, prompt: str, made: Judgement) -> None:
        """Append one judgement."""
        append_jsonl(self.folder / "judgements.jsonl", {"prompt": prompt, **asdict(made)})
