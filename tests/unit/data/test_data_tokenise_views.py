"""Which completions of an example each view takes, with what is known of them."""

from dataclasses import replace

import pytest

from chat_tokenizers import tokenizer_of
from preftune.core.records import Demonstration, Desirability, Example, Message, Preference, Provenance, Ranking, unpaired_of
from preftune.data.tokenize import tokenise

PROMPT, FIRST, SECOND = (Message("user", "Where is it?"),), (Message("assistant", "Go away."),), (Message("assistant", "Here."),)
PAIR = Example(PROMPT, (FIRST, SECOND), Preference("second", 2.0, 0.9), Provenance("f", 1))
TIE = replace(PAIR, judgement=Preference("tie", 0.0, 0.7))
GOOD, BAD = (Example(PROMPT, (FIRST,), Desirability(label), Provenance("f", 2)) for label in (True, False))
SHOWN = Example(PROMPT, (FIRST,), Demonstration(), Provenance("f", 3))


def run(*examples, view, needs=()):
    tokenizer = tokenizer_of("chatml")
    return tokenise(examples, tokenizer, view=view, max_length=512, too_long="exclude", needs=frozenset(needs))


def ids_of(example):
    return [one.ids for one in example.completions]


def test_ties_are_kept_for_losses_that_need_them_in_the_order_of_the_data():
    assert run(TIE, view="pairs").counts == {"tie": 1}
    decided, tie = run(PAIR, TIE, view="pairs", needs={"ties"}).examples
    assert (decided.is_tie, tie.is_tie) == (False, True)
    assert ids_of(tie) == ids_of(decided)[::-1], "the decided one has its winner first"
    assert (tie.confidence, decided.strength, decided.confidence) == (0.7, 2.0, 0.9)


def test_a_pair_is_a_desirable_and_an_undesirable_completion_behind_one_prompt():
    pair, good, bad = run(PAIR, GOOD, BAD, view="unpaired").examples
    assert (pair.labels, good.labels, bad.labels) == ((True, False), (True,), (False,))
    assert ids_of(pair)[1] == ids_of(good)[0] == ids_of(bad)[0]
    assert (pair.strength, pair.confidence) == (0.0, None)


def test_a_pair_with_tool_calls_is_labelled_too():
    called = Message("assistant", "Wait.", ({"type": "function", "function": {"name": "look", "arguments": "{}"}},))
    pair = Example(PROMPT, ((called, Message("tool", "kitchen"), *SECOND), FIRST), Preference("first"), Provenance("f", 4))
    assert unpaired_of(pair) == ((pair.completions[0], True), (FIRST, False))
    tokenizer = tokenizer_of("tools")
    result = tokenise([pair], tokenizer, view="unpaired", max_length=512, too_long="exclude")
    assert [one.labels for one in result.examples] == [(True, False)]


def test_what_has_no_label_is_counted():
    assert run(TIE, SHOWN, view="unpaired", needs={"ties"}).counts == {"tie": 1, "not_labelled": 1}


@pytest.mark.parametrize(("example", "reason"), [(GOOD, "not_a_pair"), (SHOWN, "not_a_pair")])
def test_single_completions_are_no_pairs(example, reason):
    assert run(example, view="pairs").counts == {reason: 1}


def test_pairs_have_no_labels():
    assert run(PAIR, view="pairs").examples[0].labels == ()


def test_a_ranking_gives_its_best_against_its_worst():
    third = (Message("assistant", "Perhaps."),)
    ranked = replace(PAIR, completions=(FIRST, third, SECOND), judgement=Ranking((3, 2, 1)))
    (pair,), (labelled,) = (run(ranked, view=view).examples for view in ("pairs", "unpaired"))
    (plain,) = run(PAIR, view="pairs").examples
    assert ids_of(pair) == ids_of(labelled) == ids_of(plain)
    assert labelled.labels == (True, False)
    level = replace(ranked, judgement=Ranking((1, 1, 1)))
    assert run(level, view="pairs").counts == {"not_a_pair": 1}


def test_judgements_that_the_loss_does_not_read_are_counted():
    rows = [replace(PAIR, judgement=Preference("first", *more)) for more in ((0.0, 1.0), (0.0, 0.7), (2.0, 0.9))]
    assert run(*rows, view="pairs").counts == {"kept": 3, "confidence_not_read": 2, "strength_not_read": 1}
    assert run(*rows, view="pairs", needs={"confidence"}).counts == {"kept": 3, "strength_not_read": 1}
    assert run(*rows, view="pairs", needs={"confidence", "strength"}).counts == {"kept": 3}
    assert run(*rows, view="unpaired").counts == {"kept": 3}, "labels of one completion have neither"
