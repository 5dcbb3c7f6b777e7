"""Scores of a Hugging Face sequence classifier: a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from preftune.core.errors import InputError, UsageError
from preftune.core.ids import digest_file, digest_json
from preftune.core.records import Message, Messages

WEIGHTS = ("*.safetensors", "*.bin", "*.json")


def reward_folder(model: str, revision: str | None) -> Path:
    """The folder of a reward model: itself, or the snapshot of a hub id, fetched if it has to be."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model, revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"reward model {model!r}: no such folder, and the hub does not give it: {said}") from None


def reward_digest(folder: Path) -> str:
    """Digest of the weights, the tokenizer and the settings in a folder."""
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not any(file.suffix != ".json" for file in files):
        raise InputError(f"reward model {folder}: no weights in it (*.safetensors or *.bin)")
    return digest_json([[file.name, digest_file(file)] for file in files])


class RewardScorer:
    """A sequence classifier that gives a conversation one number.

    Parameters
        folder: of a model that transformers loads for sequence classification, with its tokenizer.
        label: index of the output that is the reward; None where there is one output.
        batch_size, max_length: conversations at once, and tokens of each; longer ones lose their beginning.

    Raises
        InputError: it cannot be loaded as a sequence classifier.
        UsageError: several outputs and no label, or a label that does not exist.
    """

    def __init__(self, folder: Path, *, label: int | None, batch_size: int, max_length: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"reward model {folder}: no sequence classifier: {' '.join(str(error).split())[:300]}") from None
        outputs = int(self._model.config.num_labels)
        if label is None and outputs != 1:
            raise UsageError(f"reward model {folder}: it has {outputs} outputs; say which one is the reward with label:")
        if label is not None and not 0 <= label < outputs:
            raise UsageError(f"reward model {folder}: label {label} does not exist, it has {outputs} outputs")
        self._label = label or 0
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._tokenizer.padding_side, self._tokenizer.truncation_side = "right", "left"
        self._batch_size, self._max_length = batch_size, max_length
        self._model.eval()

    def scores(self, conversations: Sequence[tuple[Messages, str]]) -> list[float]:
        """The reward of every (prompt, completion), in order; the same alone as in a batch up to rounding."""
        texts = [self._text(prompt, completion) for prompt, completion in conversations]
        found: list[float] = []
        with torch.no_grad():
            for start in range(0, len(texts), self._batch_size):
                part = self._tokenizer(
                    texts[start : start + self._batch_size],
                    padding=True,
                    truncation=True,
                    max_length=self._max_length,
                    return_tensors="pt",
                )
                inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
                found += [float(one) for one in self._model(**inputs).logits[:, self._label]]
        return found

    def _text(self, prompt: Messages, completion: str) -> str:
        if self._tokenizer.chat_template:
            rows = [one.to_dict() for one in (*prompt, Message("assistant", completion))]
            return str(self._tokenizer.apply_chat_template(rows, tokenize=False))
        return "\n\n".join([*(one.content for one in prompt), completion])
