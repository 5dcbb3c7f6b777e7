"""What a recipe may say of its reference, and how each contradiction is refused."""

import pytest

from preftune.app.recipes import make_recipe
from preftune.core.errors import RecipeError, UsageError
from preftune.core.references import ReferenceConfig, SyncConfig

DPO = {"model": "starter", "method": "dpo", "data": "pairs.jsonl"}


def stage_of(**keys):
    return make_recipe({**DPO, **keys}).stages[0]


def test_the_short_forms():
    assert stage_of().reference is None
    assert stage_of(reference="frozen").reference == ReferenceConfig(policy="frozen")
    followed = stage_of(reference={"sync": {"every": 8}}).reference
    assert followed == ReferenceConfig(policy="frozen", sync=SyncConfig(alpha=0.6, every=8))
    again = make_recipe({"model": "starter", "stages": [stage_of(reference="frozen").model_dump(mode="json")]})
    assert again.stages[0].reference == ReferenceConfig(policy="frozen")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"reference": "adapter_off", "adapter": "full"}, "reference.policy: adapter_off needs adapter: lora, got adapter: full"),
        (
            {"reference": {"policy": "cached", "sync": {}}},
            "reference.sync: a reference that follows is a copy, got policy: cached",
        ),
        ({"reference": {"policy": "none", "sync": {}}}, "reference.sync: .* got policy: none; write policy: frozen"),
        ({"reference": {"policy": "adapter_off", "model": "x"}}, "reference.model: policy adapter_off has no model of its own"),
        ({"reference": {"policy": "none", "model": "x"}}, "reference.model: policy none has no model"),
        ({"reference": {"sync": {}, "model": "x"}}, "reference.model: a reference that follows the policy starts where"),
        ({"reference": "frozn"}, r"^reference.policy: write 'cached', 'adapter_off', 'frozen' or 'none', got 'frozn'"),
        (
            {"reference": {"sync": {"alpha": 0.5}}, "lora": {"dora": True}},
            r"reference.sync.alpha: below 1 it averages .*, got 0.5 with lora.dora: true; write alpha: 1, or lora.dora: false",
        ),
        (
            {"reference": {"sync": {"alpha": 0}}},
            r"reference.sync.alpha: write a number above 0 and at most 1, got 0",
        ),
        (
            {"reference": {"sync": {"alpha": 1.5}}},
            r"reference.sync.alpha: write a number above 0 and at most 1, got 1.5",
        ),
        ({"reference": {"sync": {"every": 0}}}, r"reference.sync.every: write a whole number above 0, got 0"),
        ({"reference": {"snc": {}}}, "unknown key 'reference.snc': did you mean 'sync'"),
        ({"reference": "cached", "method": "simpo"}, "reference: simpo takes no reference, got policy: cached; leave it out"),
        ({"reference": "none", "method": "kto"}, "reference.policy: none is for losses over pairs, and kto measures"),
    ],
)
def test_contradictions_name_the_field_in_one_line(keys, words):
    with pytest.raises(UsageError, match=words) as caught:
        stage_of(**keys)
    assert "\n" not in str(caught.value)


def test_the_stage_is_named_where_there_are_several():
    stages = [{"method": "sft"}, {"method": "dpo", "adapter": "full", "reference": "adapter_off"}]
    with pytest.raises(RecipeError, match=r"^stages\.1\.reference\.policy: "):
        make_recipe({"model": "starter", "data": "pairs.jsonl", "stages": stages})
    with pytest.raises(RecipeError, match=r"^stages\.0\.reference: sft takes no reference"):
        make_recipe({"model": "starter", "data": "pairs.jsonl", "reference": "cached", "stages": [{"method": "sft"}]})


def test_no_reference_is_fine_where_none_is_taken():
    assert stage_of(reference="none", method="simpo").reference == ReferenceConfig(policy="none")
