"""Logits of mixed, growing batches are those of a plain forward of each conversation alone, for every family."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_architectures import ROW_FAMILIES, SHARED_FAMILIES
from tiny_models import BASIC, GPT2_LIKE, VOCABULARY, build
from torch import Tensor

from preftune.core.errors import InputError
from preftune.modeling.adapter_bank import BASE, read_factors
from preftune.modeling.decoder import Feed, PlainDecoder, SlotDecoder, decoder_of

LENGTHS = (5, 19, 9, 3)


def conversations(seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def walk(decoder: Any, rows: list[list[int]], adapters: list[int]) -> list[Tensor]:
    """Log-probs after every token: prompts of half a row are read in pieces of 4, rows join one by one and leave when done."""
    got: list[list[Tensor]] = [[] for _ in rows]
    opened: dict[int, Any] = {}
    at = [0] * len(rows)
    step = 0
    while any(place < len(ids) for place, ids in zip(at, rows, strict=True)):
        if step < len(rows):
            opened[step] = decoder.open(adapters[step])
        growing = [n for n in opened if at[n] >= len(rows[n]) // 2]
        reading = [n for n in opened if at[n] < len(rows[n]) // 2]
        feeds = [Feed(opened[n], rows[n][at[n] : at[n] + 1]) for n in growing]
        feeds += [Feed(opened[n], rows[n][at[n] : min(at[n] + 4, len(rows[n]) // 2)], "all") for n in reading]
        for number, part in zip([*growing, *reading], decoder.forward(feeds), strict=True):
            got[number].append(part)
            at[number] += len(part)
            if number in reading and at[number] >= len(rows[number]) // 2:
                decoder.settle(opened[number])
            if at[number] == len(rows[number]):
                decoder.close(opened.pop(number))
        step += 1
    return [torch.log_softmax(torch.cat(parts), -1) for parts in got]


def alone(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), -1)


@pytest.mark.parametrize("family", SHARED_FAMILIES)
def test_batches_equal_plain_forwards(family: str) -> None:
    kind, settings, _ = SHARED_FAMILIES[family]
    expected = [alone(build(kind, settings), ids) for ids in conversations()]
    decoder = decoder_of(build(kind, settings))
    assert isinstance(decoder, SlotDecoder), decoder.reason
    for got, wanted in zip(walk(decoder, conversations(), [BASE] * 4), expected, strict=True):
        assert (got - wanted).abs().max() < 2e-4


@pytest.mark.filterwarnings("ignore")  # these families warn about their own slow paths
@pytest.mark.parametrize("family", ["falcon-alibi", "mamba", "lfm2", "phi3-longrope", "phimoe-window"])
def test_other_families_are_answered_one_by_one(family: str) -> None:
    kind, settings, _ = ROW_FAMILIES[family]
    expected = [alone(build(kind, settings), ids) for ids in conversations()]
    decoder = decoder_of(build(kind, settings))
    assert isinstance(decoder, PlainDecoder)
    assert decoder.reason
    for got, wanted in zip(walk(decoder, conversations(), [BASE] * 4), expected, strict=True):
        if family != "phi3-longrope":  # its positions depend on the length of the row: every token has its own forward pass
            assert (got - wanted).abs().max() < 1e-4
        assert (got[-1] - wanted[-1]).abs().max() < 1e-4


def saved_adapter(folder: Path, kind: str, settings: dict[str, Any], seed: int, **options: Any) -> Any:
    """PEFT's own adapter with random weights in a folder, and PEFT's own model of it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(build(kind, settings), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(build(kind, settings), str(folder)).eval()


ADAPTERS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "llama",
        BASIC,
        [
            {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
            {
                "r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "up_proj", "lm_head"],
                "rank_pattern": {"layers.1.self_attn.v_proj": 7}, "alpha_pattern": {"up_proj": 1},
            },
        ],
    ),
    ("gpt2", GPT2_LIKE, [{"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}] * 3),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "options"), ADAPTERS, ids=["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")  # PEFT's advice
def test_every_row_of_a_mixed_batch_has_its_own_adapter(
    tmp_path: Path, kind: str, settings: dict[str, Any], options: list[dict[str, Any]]
) -> None:
    rows = conversations()
    expected = [alone(build(kind, settings), rows[0])]
    decoder = decoder_of(build(kind, settings))
    adapters = [BASE]
    for number, one in enumerate(options):
        folder = tmp_path / str(number)
        expected.append(alone(saved_adapter(folder, kind, settings, number, **one), rows[number + 1]))
        adapters.append(decoder.bank.add(read_factors(str(folder))))
    for got, wanted in zip(walk(decoder, rows, adapters), expected, strict=True):
        assert (got - wanted).abs().max() < 2e-4
    plain = walk(decoder, rows, [BASE] * 4)
    assert all((got - wanted).abs().max() > 0.1 for got, wanted in zip(plain[1:], expected[1:], strict=True))
    decoder.bank.remove(adapters[1])
    again = walk(decoder, rows, [BASE, BASE, *adapters[2:]])
    assert (again[3] - expected[3]).abs().max() < 2e-4


@pytest.mark.filterwarnings("ignore")  # PEFT's advice
def test_an_adapter_of_another_model_and_one_of_no_numbers_are_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path / "a", "llama", BASIC, 0, target_modules=["q_proj"])
    factors = dict(read_factors(str(tmp_path / "a")))
    other = decoder_of(build("llama", {**BASIC, "hidden_size": 64}))
    with pytest.raises(InputError, match="another model's"):
        other.bank.add(factors)
    with pytest.raises(InputError, match="another model's"):
        decoder_of(build("gpt2", GPT2_LIKE)).bank.add(factors)
    name, (a, b) = next(iter(factors.items()))
    with pytest.raises(InputError, match="not finite"):
        decoder_of(build("llama", BASIC)).bank.add({name: (a * float("inf"), b)})


def test_a_row_may_be_forked_before_and_after_it_is_settled() -> None:
    ids = conversations()[1]
    wanted = alone(build("llama", BASIC), ids)
    decoder = decoder_of(build("llama", BASIC))
    row = decoder.open()
    decoder.forward([Feed(row, ids[:10], "none")])
    twin = decoder.fork(row)
    decoder.settle(row)
    late = decoder.fork(row)
    other = [(token + 1) % VOCABULARY for token in ids]
    decoder.forward([Feed(row, [other[10]])])
    decoder.close(row)
    for one in (twin, late):
        got = decoder.forward([Feed(one, ids[10:], "all")])[0]
        assert (torch.log_softmax(got, -1) - wanted[10:]).abs().max() < 2e-4


def test_what_a_row_leaves_behind_does_not_reach_the_next() -> None:
    """Not even not-a-number: a masked place is no protection from it."""
    decoder = decoder_of(build("llama", BASIC))
    long, short = conversations()[1], conversations()[0]
    rows = [decoder.open(), decoder.open()]
    decoder.forward([Feed(rows[0], long, "none"), Feed(rows[1], short, "none")])
    for row in rows:
        decoder.settle(row)
    for keys, values in rows[0].shelf.layers:
        keys[rows[0].place] = float("nan")
        values[rows[0].place] = float("nan")
    decoder.close(rows[0])
    got = decoder.forward([Feed(rows[1], [7])])[0]
    wanted = alone(build("llama", BASIC), [*short, 7])[-1]
    assert (torch.log_softmax(got[0], -1) - wanted).abs().max() < 2e-4
