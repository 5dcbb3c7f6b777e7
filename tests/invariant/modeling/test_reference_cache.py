"""The reference cache: what is in its key and what is not, and what a crash may cost."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BASIC, build, small_pack
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from preftune.core.errors import CheckpointError
from preftune.core.recipe import LoraConfig
from preftune.core.records import TokenisedExample
from preftune.data.pack import pack_of, pack_step
from preftune.modeling.adapters import add_lora, trainable_parameters
from preftune.modeling.forward import Scorer
from preftune.modeling.reference import ENTRY, ReferenceCache, ReferenceIdentity, reference_logps, weights_digest

PACK = small_pack()
COMPLETIONS = 6


def scorer_of(
    settings: dict[str, Any] | None = None, *, seed: int = 0, lora: LoraConfig | None = None, lora_seed: int = 0
) -> Scorer:
    model = build("llama", settings or BASIC, seed=seed)
    return Scorer(model if lora is None else add_lora(model, lora, lora_seed))


def filled(folder: Path, scorer: Scorer | None = None) -> tuple[ReferenceCache, Scorer]:
    scorer = scorer or scorer_of()
    cache = ReferenceCache(folder, ReferenceIdentity.of(scorer))
    cache.fill(PACK, scorer)
    return cache, scorer


def flat(cache: ReferenceCache) -> np.ndarray:
    return np.concatenate([part for example in PACK.examples for part in cache.scores(example)])


def test_scores_are_those_of_the_scorer_and_outlive_the_object(tmp_path: Path) -> None:
    cache, scorer = filled(tmp_path)
    with torch.no_grad():
        expected = scorer.token_logps(PACK).numpy()
    assert cache.num_forwards == COMPLETIONS
    assert np.array_equal(flat(cache), expected)
    again = ReferenceCache(tmp_path, cache.identity)
    assert again.lookup(PACK.examples) == []
    assert np.array_equal(flat(again), expected)
    again.fill(PACK, scorer)
    assert again.num_forwards == 0


def test_adapters_of_any_rank_and_seed_trained_or_not_have_the_base_as_reference(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    for lora, seed in ((LoraConfig(rank=2), 0), (LoraConfig(rank=8, alpha=1.0), 5), (LoraConfig(dora=True), 1)):
        scorer = scorer_of(lora=lora, lora_seed=seed)
        if lora.dora:  # its layers keep their own forward, which rounds otherwise: scored again, of the same weights
            assert scorer.num_blocks == 0
            assert ReferenceIdentity.of(scorer).weights == cache.identity.weights
            continue
        with torch.no_grad():
            for parameter in trainable_parameters(scorer.model).values():
                parameter.add_(0.1)
        assert ReferenceIdentity.of(scorer) == cache.identity
        fresh = ReferenceCache(tmp_path / "other", cache.identity)
        fresh.fill(PACK, scorer)
        np.testing.assert_allclose(flat(fresh), flat(cache), atol=1e-6)


def changed_bit(scorer: Scorer) -> Scorer:
    with torch.no_grad():
        weight = next(iter(scorer.model.parameters()))
        weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
    return scorer


def test_a_reference_has_no_dropout_even_where_its_adapters_are_on() -> None:
    """One that follows the policy keeps adapters; the policy's dropout is not its own."""
    scorer = scorer_of(lora=LoraConfig(rank=4, dropout=0.5))
    for parameter in trainable_parameters(scorer.model).values():
        parameter.data += 0.05
    scorer.model.train()
    first, second = (reference_logps(scorer, PACK, nullcontext) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert scorer.model.training, "the policy's is put back"
    assert not torch.equal(scorer.token_logps(PACK), first)


def test_whatever_moves_the_scores_is_in_the_identity(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    others = {
        "weights": ReferenceIdentity.of(scorer_of(seed=1)),
        "one bit": ReferenceIdentity.of(changed_bit(scorer_of())),
        "settings": ReferenceIdentity.of(scorer_of({**BASIC, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})),
        "kernel": ReferenceIdentity.of(Scorer(build("llama", BASIC), shared=False)),
        "dtype": ReferenceIdentity.of(Scorer(build("llama", BASIC).bfloat16())),
        "versions": dataclasses.replace(cache.identity, versions=(("torch", "1.0"),)),
        "adapter": dataclasses.replace(cache.identity, adapter="stage 1"),
    }
    digests = {name: identity.digest for name, identity in others.items()}
    assert len({*digests.values(), cache.identity.digest}) == len(others) + 1, digests
    for identity in others.values():
        assert len(ReferenceCache(tmp_path, identity).lookup(PACK.examples)) == 3


def test_names_and_dtype_of_storage_are_not_in_the_digest() -> None:
    model = build("llama", BASIC)
    before = weights_digest(model)
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    assert weights_digest(model) == before
    assert weights_digest(add_lora(model, LoraConfig(rank=4), 0)) == before


def test_buffers_that_are_saved_are_weights() -> None:
    """DeepSeek V3 adds a buffer to the scores of its experts: another one is another model, with other log-probabilities."""
    torch.manual_seed(0)
    shape = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = DeepseekV3Config(**BASIC | shape | ranks | {"num_key_value_heads": 4, "first_k_dense_replace": 1})
    model = DeepseekV3ForCausalLM(config).eval()
    before = weights_digest(model)
    assert weights_digest(add_lora(copy.deepcopy(model), LoraConfig(rank=4), 0)) == before
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        scores = model(input_ids=ids).logits
        (bias,) = (one for name, one in model.named_buffers() if name.endswith("e_score_correction_bias"))
        bias[:4] += 5.0  # sigmoids, which it is added to, are below 1
        assert not torch.equal(model(input_ids=ids).logits, scores)
    assert weights_digest(model) != before


@pytest.mark.parametrize("part", ["prompt", "ids", "scored"])
def test_every_token_is_in_the_key(tmp_path: Path, part: str) -> None:
    cache, _ = filled(tmp_path)
    example = PACK.examples[0]
    first = example.completions[0]
    changes: dict[str, TokenisedExample] = {
        "prompt": dataclasses.replace(example, prompt_ids=(*example.prompt_ids[:-1], 3)),
        "ids": dataclasses.replace(
            example, completions=(dataclasses.replace(first, ids=(*first.ids[:-1], 3)), *example.completions[1:])
        ),
        "scored": dataclasses.replace(
            example, completions=(dataclasses.replace(first, scored=(False, *first.scored[1:])), *example.completions[1:])
        ),
    }
    assert cache.lookup([changes[part]]) == [changes[part]]
    with pytest.raises(CheckpointError, match="score them first"):
        cache.scores(changes[part])


def test_ids_and_provenance_are_not(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    assert cache.lookup([dataclasses.replace(PACK.examples[0], example_id="another", strength=3.0)]) == []


def test_completions_are_shared_between_examples_and_orders(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path)
    example = PACK.examples[2]
    turned = dataclasses.replace(example, completions=tuple(reversed(example.completions)))
    assert cache.lookup([turned]) == []
    for one, other in zip(cache.scores(turned), reversed(cache.scores(example)), strict=True):
        assert np.array_equal(one, other)


def test_packing_does_not_matter_beyond_rounding(tmp_path: Path) -> None:
    cache, scorer = filled(tmp_path / "a")
    other = ReferenceCache(tmp_path / "b", cache.identity)
    for pack in pack_step(PACK.examples, 20):
        other.fill(pack, scorer)
    np.testing.assert_allclose(flat(other), flat(cache), atol=1e-5)


def one_by_one(folder: Path) -> tuple[ReferenceCache, Scorer]:
    scorer = scorer_of()
    cache = ReferenceCache(folder, ReferenceIdentity.of(scorer))
    for example in PACK.examples:
        cache.fill(pack_of([example]), scorer)
    return cache, scorer


@pytest.mark.parametrize("suffix", [".logps", ".index"])
@pytest.mark.parametrize("count", [1, 7])
def test_a_cut_file_costs_the_last_example_only(tmp_path: Path, suffix: str, count: int) -> None:
    cache, scorer = one_by_one(tmp_path)
    (path,) = cache.folder.glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-count])
    again = ReferenceCache(tmp_path, cache.identity)
    assert again.lookup(PACK.examples) == [PACK.examples[-1]]
    again.fill(pack_of([PACK.examples[-1]]), scorer)
    assert again.num_forwards == 3
    assert ReferenceCache(tmp_path, cache.identity).lookup(PACK.examples) == []


def test_a_flipped_byte_costs_its_example_only(tmp_path: Path) -> None:
    cache, _ = one_by_one(tmp_path)
    for suffix in (".logps", ".index"):
        (path,) = cache.folder.glob(f"*{suffix}")
        content = bytearray(path.read_bytes())
        at = 4 if suffix == ".logps" else ENTRY.itemsize + 1  # in a value of the first record, in the key of the second
        content[at] ^= 0x40
        path.write_bytes(bytes(content))
        missing = ReferenceCache(tmp_path, cache.identity).lookup(PACK.examples)
        assert missing == [PACK.examples[0]]  # its first two completions are the first two records
        content[at] ^= 0x40
        path.write_bytes(bytes(content))
    assert ReferenceCache(tmp_path, cache.identity).lookup(PACK.examples) == []


def test_lost_values_are_missing_not_wrong(tmp_path: Path) -> None:
    cache, _ = one_by_one(tmp_path)
    (path,) = cache.folder.glob("*.logps")
    path.unlink()
    assert len(ReferenceCache(tmp_path, cache.identity).lookup(PACK.examples)) == 3


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    scorer = scorer_of()
    identity = ReferenceIdentity.of(scorer)
    one, two, reader = (ReferenceCache(tmp_path, identity) for _ in range(3))
    one.fill(pack_of(PACK.examples[:2]), scorer)
    two.fill(pack_of(PACK.examples[1:]), scorer)
    assert len(reader.lookup(PACK.examples)) == 3
    reader.refresh()
    assert reader.lookup(PACK.examples) == []
    one.refresh()
    assert one.lookup(PACK.examples) == []
    one.fill(PACK, scorer)
    assert one.num_forwards == 3  # nothing new


def test_what_was_scored_before_a_kill_is_kept(tmp_path: Path) -> None:
    """A process that dies without a chance to clean up, between two packs."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_reference_cache import PACK, ReferenceCache, ReferenceIdentity, pack_of, scorer_of
scorer = scorer_of()
cache = ReferenceCache(Path({str(tmp_path)!r}), ReferenceIdentity.of(scorer))
cache.fill(pack_of(PACK.examples[:2]), scorer)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    cache = ReferenceCache(tmp_path, ReferenceIdentity.of(scorer_of()))
    assert cache.lookup(PACK.examples) == [PACK.examples[2]]
