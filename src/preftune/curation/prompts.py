"""Which prompts pairs are made from: each once, none of the verdict set, a stated part of the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from preftune.core.ids import digest_json
from preftune.core.recipe import GenerateConfig
from preftune.data.minhash import normalise
from preftune.data.pipeline import PromptRow, read_prompts


def text_of_prompt(row: PromptRow) -> str:
    """The prompt as plain text, as it is compared with other prompts."""
    return "\n".join(message.content for message in row.prompt)


def prompt_digest(row: PromptRow) -> str:
    """Digest of what the model is asked; file and line do not count."""
    return digest_json([row.style, [message.to_dict() for message in row.prompt], [dict(tool) for tool in row.tools]])


def choose_prompts(config: GenerateConfig, verdict: Sequence[str] = ()) -> tuple[list[PromptRow], Counter[str]]:
    """The prompts to sample from, and how many were left out for each reason of ``pairing.REASONS``.

    Prompts that differ in case, width and blanks alone are one prompt. ``skip`` and ``limit`` count what is left, so that
    two parts of a file never share a prompt.

    Parameters
        verdict: prompts as text that prove a result and must not be trained on.

    Raises
        InputError: the file cannot be read, has a bad row, or holds no prompt.
    """
    left_out: Counter[str] = Counter()

    def repeated(row: PromptRow) -> None:
        del row
        left_out["duplicate_prompt"] += 1

    rows = read_prompts(config.prompts, on_repeated=repeated)
    forbidden = {normalise(text) for text in verdict}
    seen: set[str] = set()
    kept: list[PromptRow] = []
    for row in rows:
        text = normalise(text_of_prompt(row))
        if text in forbidden:
            left_out["in_verdict_set"] += 1
        elif text in seen:
            left_out["duplicate_prompt"] += 1
        else:
            kept.append(row)
        seen.add(text)
    end = None if config.limit is None else config.skip + config.limit
    return kept[config.skip : end], left_out
