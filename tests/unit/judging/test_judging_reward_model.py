"""The reward model judge with a real classifier, made here."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import preftune
from preftune.core.errors import InputError, UsageError
from preftune.core.records import Message
from preftune.judging.base import Candidate, load_judge, names_of
from preftune.judging.reward_model import RewardModelJudge

PROMPT = (Message("user", "Tell a story."),)
TEXTS = ("Once upon a time.", "No.", "A cat sat on the mat and looked at the moon for a long time.", "The dog ran.")
CANDIDATES = [Candidate(text, 3, True) for text in TEXTS]


def classifier(folder: Path, outputs: int) -> Path:
    """A Llama classifier with random weights and the starter's tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    starter = Path(preftune.__file__).parent / "starter" / "model"
    torch.manual_seed(outputs)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_labels=outputs
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(starter / name, folder / name)
    return folder


def test_batched_is_alone_and_the_score_is_bradley_terry(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "rm", 1)
    judge = RewardModelJudge(str(folder), batch_size=4)
    alone = [judge.score(PROMPT, one) for one in CANDIDATES]
    assert len(set(alone)) == len(alone)
    requests = [(PROMPT, one, other) for one in CANDIDATES for other in CANDIDATES]
    verdicts = judge.judge_many(requests)
    for place, verdict in enumerate(verdicts):
        assert verdict is not None
        first, second = alone[place // 4], alone[place % 4]
        assert verdict.score == pytest.approx(1 / (1 + math.exp(second - first)), abs=1e-5)
        assert verdict.label == ("tie" if place // 4 == place % 4 else "first" if first > second else "second")
    assert judge(PROMPT, CANDIDATES[0], CANDIDATES[1]).score == pytest.approx(verdicts[1].score, abs=1e-5)  # type: ignore[union-attr] # there, see above


def test_the_identity_is_the_weights(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "rm", 1)
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    one, other = (load_judge({"name": "reward_model", "model": str(path)}, tmp_path) for path in (folder, copied))
    assert one.identity == other.identity
    changed = load_judge({"name": "reward_model", "model": str(copied), "max_length": 64}, tmp_path)
    assert changed.identity != one.identity
    assert names_of(changed)[1] == names_of(one)[1]
    other_weights = classifier(tmp_path / "two", 2)
    assert names_of(load_judge({"name": "reward_model", "model": str(other_weights)}, tmp_path))[1] != names_of(one)[1]


def test_which_output_is_the_reward_must_be_said(tmp_path: Path) -> None:
    folder = str(classifier(tmp_path / "rm", 2))
    with pytest.raises(UsageError, match="2 outputs; say which one"):
        RewardModelJudge(folder).score(PROMPT, CANDIDATES[0])
    scores = [RewardModelJudge(folder, label=label).score(PROMPT, CANDIDATES[0]) for label in (0, 1)]
    assert scores[0] != scores[1]
    with pytest.raises(UsageError, match="label 2 does not exist"):
        RewardModelJudge(folder, label=2).score(PROMPT, CANDIDATES[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weights"):
        load_judge({"name": "reward_model", "model": str(tmp_path / "empty")}, tmp_path).identity  # reading it raises
