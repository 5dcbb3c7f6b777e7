"""Sample stories from a trained starter, in batches, and say which ended by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled story: its text, its length in tokens with the end token, and whether it ended by itself."""

    text: str
    num_tokens: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Sampler:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> Sampler:
        """Load a model folder for sampling in float32."""
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
        return cls(model, AutoTokenizer.from_pretrained(str(folder)))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], temperature: float, seed: int, max_new_tokens: int = 200, batch_size: int = 96
    ) -> list[Sample]:
        """One story for each prompt, in the order given; write a prompt k times for k samples."""
        torch.manual_seed(seed)
        texts = [
            self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        samples: list[Sample] = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
            output = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
            )
            samples += [self._read(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]
        return samples

    def _read(self, ids: list[int]) -> Sample:
        end = self.tokenizer.eos_token_id
        is_complete = end in ids
        kept = ids[: ids.index(end)] if is_complete else ids
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Sample(text, len(kept) + is_complete, is_complete)
