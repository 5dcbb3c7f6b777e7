"""Every option with a range, of every section, loss and sink: outside it, one line names the field and the range."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt

from preftune.app.recipes import make_recipe
from preftune.core.errors import UsageError
from preftune.core.recipe import Recipe
from preftune.core.section import Section, bounds_of, range_of, takes_number
from preftune.maths.losses.base import losses
from preftune.tracking.base import sinks

# where a section is reached only with something beside it
BESIDE = {
    ("stages", 0, "generate"): {"prompts": "p.jsonl", "judge": "judge.yaml"},
    ("evaluation",): {"prompts": "p.jsonl", "judge": "judge.yaml"},
}
LOSS_BESIDE = {"mix": {"parts": {"dpo": {"weight": 1.0}, "sft": {"weight": 1.0}}}}


def outside(hint: Any) -> list[Any]:
    """Values just outside a field's bounds, and one that no Literal has."""
    found: list[Any] = []
    is_whole = int in (hint, *get_args(hint), *(inner for one in get_args(hint) for inner in get_args(one)))
    for bound in bounds_of(hint):
        match bound:
            case Gt(gt=value) | Lt(lt=value):
                found.append(value)
            case Ge(ge=value):
                found.append(value - 1 if is_whole else value - 1e-3)
            case Le(le=value):
                found.append(value + 1 if is_whole else value + 1e-3)
    return [int(one) if is_whole else one for one in found]


def literals(hint: Any) -> tuple[Any, ...]:
    """The words that a field takes, where it takes words only."""
    parts = [hint, *get_args(hint)]
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def sections(section: type[Section], place: tuple[Any, ...]):
    """Every section below one, with its place in a recipe."""
    yield section, place
    for name, hint in get_type_hints(section, include_extras=True).items():
        if name not in section.model_fields:
            continue
        inner = section_in(hint)
        if inner is not None:
            yield from sections(inner, (*place, name, 0) if get_origin(hint) is tuple else (*place, name))


def section_in(hint: Any) -> type[Section] | None:
    if isinstance(hint, type) and issubclass(hint, Section):
        return hint
    return next((found for one in get_args(hint) if (found := section_in(one)) is not None), None)


def fields():
    for section, place in sections(Recipe, ()):
        for name, hint in get_type_hints(section, include_extras=True).items():
            if name not in section.model_fields or section_in(hint) is not None:
                continue
            for value in outside(hint):
                yield pytest.param(place, name, value, range_of(hint), id=f"{'.'.join(map(str, (*place, name)))}={value}")
            if literals(hint):
                words = [f"'{one}'" for one in literals(hint)]
                yield pytest.param(place, name, "no such word", words, id=f"{'.'.join(map(str, (*place, name)))} words")


def recipe_with(place: tuple[Any, ...], name: str, value: Any) -> dict[str, Any]:
    """The smallest recipe in which this field has this value."""
    stage: dict[str, Any] = {"method": "dpo", "data": {"train": ["pairs.jsonl"]}}
    recipe: dict[str, Any] = {"model": {"name": "starter"}, "stages": [stage]}
    if place[:3] == ("stages", 0, "generate") or name == "prompts_per_round":
        recipe["stages"][0] = stage = {"method": "generate", "prompts": "p.jsonl", "judge": "judge.yaml"}
    target: Any = recipe
    for depth, part in enumerate(place):
        if isinstance(part, int):
            target = target[part]
            continue
        default = dict(BESIDE.get(place[: depth + 1], {})) if part != "tracking" else [{"name": "tensorboard"}]
        target = target.setdefault(part, default)
    target[name] = value
    return recipe


CASES = list(fields())


@pytest.mark.parametrize(("place", "name", "value", "expected"), CASES)
def test_a_recipe_field_out_of_range_names_itself_and_its_range(place, name, value, expected):
    with pytest.raises(UsageError) as caught:
        make_recipe(recipe_with(place, name, value))
    message = str(caught.value)
    assert "\n" not in message
    assert ".".join(str(part) for part in (*place, name)) in message
    check_words(message, value, expected)


def check_words(message, value, expected):
    assert repr(value) in message
    for words in expected if isinstance(expected, list) else [expected]:
        number = words.rpartition(" ")[2]
        assert words in message or (" and " not in words and number in message), (message, words)


def options(registry):
    for name in registry.names():
        for option, hint in get_type_hints(registry.factory(name), include_extras=True).items():
            if option in {one.name for one in dataclasses.fields(registry.factory(name)) if one.init}:
                for value in outside(hint):
                    yield pytest.param(name, option, value, range_of(hint), id=f"{name}.{option}={value}")
                if literals(hint):
                    words = [f"'{one}'" for one in literals(hint)]
                    yield pytest.param(name, option, "no such word", words, id=f"{name}.{option} words")


LOSS_CASES = list(options(losses))


@pytest.mark.parametrize(("method", "option", "value", "expected"), LOSS_CASES)
def test_a_loss_option_out_of_range_names_itself_and_its_range(method, option, value, expected):
    given = {**LOSS_BESIDE.get(method, {}), option: value}
    with pytest.raises(UsageError) as caught:
        make_recipe({"model": "starter", "method": method, "data": "pairs.jsonl", "loss": given})
    message = str(caught.value)
    assert "\n" not in message
    assert f"option {option!r}" in message
    check_words(message, value, expected)


@pytest.mark.parametrize(("sink", "option", "value", "expected"), list(options(sinks)))
def test_a_sink_option_out_of_range_names_itself(sink, option, value, expected):
    with pytest.raises(UsageError) as caught:
        make_recipe({"model": "starter", "data": "pairs.jsonl", "tracking": [{sink: {option: value}}]})
    assert f"tracking.0: sink {sink!r}, option {option!r}" in str(caught.value)
    check_words(str(caught.value), value, expected)


def test_the_walk_finds_what_there_is():
    places = {".".join(map(str, (*case.values[0], case.values[1]))) for case in CASES}
    assert {
        "stages.0.lr",
        "stages.0.warmup",
        "stages.0.lora.rank",
        "stages.0.reference.sync.alpha",
        "evaluation.margin",
    } <= places
    assert {"stages.0.generate.guards.max_length_ratio", "evaluation.decoding.top_p", "stages.0.probe.prompts"} <= places
    assert {("dpo", "beta"), ("simpo", "gamma"), ("kto", "lambda_d")} <= {case.values[:2] for case in LOSS_CASES}
    assert len(CASES) > 40
    assert len(LOSS_CASES) > 20


def test_nan_and_infinity_are_outside_every_range():
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match=r"^lr: write a number above 0 or null, got "):
            make_recipe({"model": "starter", "data": "pairs.jsonl", "lr": value})
        with pytest.raises(UsageError, match="option 'beta': write a number above 0, got "):
            make_recipe({"model": "starter", "data": "pairs.jsonl", "beta": value})


WRONG = ("no such word", True, -1, 2.5, [{"a": 1}], {"no such key": 1})


def wrong_types():
    """Each field of every section with values of other types than it takes, sections themselves too."""
    for section, place in sections(Recipe, ()):
        for name in get_type_hints(section):
            if name in section.model_fields and (place, name) != ((), "stages"):
                for value in WRONG:
                    yield pytest.param(place, name, value, id=f"{'.'.join(map(str, (*place, name)))}={value}")


def test_a_value_of_another_type_is_refused_by_the_field_s_name_or_taken_as_it_is():
    """No value of the wrong type is a traceback or becomes another value; what it takes is said in plain words."""
    refused = 0
    for case in wrong_types():
        place, name, value = case.values
        try:
            made = make_recipe(recipe_with(place, name, value))
        except UsageError as error:
            message, refused = str(error), refused + 1
            assert "\n" not in message
            assert name in message or {"adapter": "lora", "name": "tracking", "options": "option"}.get(name, name) in message, (
                case.id,
                message,
            )
            for word in ("Input should", "valid ", "instance of", "dictionary", "Extra inputs", ".str:"):
                assert word not in message, (case.id, message)
            continue
        found: Any = made.model_dump()
        for part in (*place, name):
            found = found[part]
        is_short = isinstance(found, dict | list | tuple) or name in {
            "probe",
            "train",
            "prompts",
            "judge",
            "pairs",
            "pairs_judge",
        }
        assert (
            is_short or found in {"on", "off"} or (found == value and type(found) is type(value)) or str(value) in str(found)
        ), (
            case.id,
            found,
        )
        assert not (value is True and type(found) in (int, float)), case.id
    assert refused > 250


@pytest.mark.parametrize("method", losses.names())
def test_yes_is_no_number_for_a_loss(method):
    settable = {one.name for one in dataclasses.fields(losses.factory(method)) if one.init}
    for option, hint in get_type_hints(losses.factory(method), include_extras=True).items():
        if option in settable and takes_number(hint):
            with pytest.raises(UsageError, match=rf"option '{option}': write a number.*, got True"):
                make_recipe({"model": "starter", "data": "p.jsonl", "method": method, "loss": {option: True}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stages": [{"method": ["dpo"]}]}, "stages.0.method: no loss ['dpo']"),
        ({"stages": [{"method": {"dpo": 1}}]}, "stages.0.method: no loss {'dpo': 1}"),
        ({"data": {"train": 3}}, "data.train: write a list, each entry text, got 3"),
        ({"data": [1]}, "data.train: write a list, each entry text, got 1"),
        ({"data": {"train": "p.jsonl", "format": "trl"}}, "data.format: no format 'trl': there is alpaca"),
        ({"seed": -1}, "seed: write a whole number at least 0 and below 9,223,372,036,854,775,808, got -1"),
        ({"seed": 2**63}, "seed: write a whole number at least 0"),
        ({"rounds": 101}, "rounds: write a whole number at least 1 and at most 100, got 101"),
        ({"rounds": "2"}, "rounds: write a whole number at least 1 and at most 100, got '2'"),
        ({"prompts_per_round": "2"}, "prompts_per_round: write a whole number above 0 or null, got '2'"),
        ({"pairs_per_step": True}, "pairs_per_step: write a whole number above 0, got True"),
        ({"lora": {"target_modules": 3}}, "lora.target_modules: write text or a list, each entry text, got 3"),
        ({"lora": 3}, "lora: write a mapping of keys and values, got 3"),
        ({"max_steps": 1.5}, "max_steps: write a whole number above 0 or null, got 1.5"),
        ({"evaluation": {"prompts": "p"}}, "evaluation.judge: is missing; write text or a mapping of keys and values"),
        ({"stages": [{"method": "dpo"}, {"method": "dpo", "beta": -1}]}, "stages.1: loss 'dpo', option 'beta': write a number"),
        (
            {"stages": [{"method": "generate", "prompts": "p", "judge": "j", "decoding": {"topp": 1}}]},
            "unknown key 'stages.0.generate.decoding.topp': did you mean 'top_p'",
        ),
    ],
)  # fmt: skip
def test_what_was_a_traceback_or_unclear_is_one_plain_line(given, words):
    with pytest.raises(UsageError) as caught:
        make_recipe({"model": "starter", **given})
    assert str(caught.value).startswith(words)
