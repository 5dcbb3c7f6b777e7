"""The registry: leaves by name, validated options, errors that list what exists."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import pytest
from annotated_types import Gt

from preftune.core.errors import UnknownName, UsageError
from preftune.core.registry import Registry


@pytest.fixture
def table():
    # a package without leaves of its own, so that only the ones below are there
    registry = Registry("thing", "preftune.core")
    registry._is_loaded = True

    @registry.register("one")
    @dataclass(frozen=True)
    class One:
        size: Annotated[float, Gt(0)] = 1.0

    return registry


def test_options_are_validated(table):
    assert table.build("one", {"size": 2}).size == 2.0
    with pytest.raises(UsageError, match=r"thing 'one', option 'size': write a number above 0, got -1"):
        table.build("one", {"size": -1})


def test_unknown_names_and_options_suggest_the_right_one(table):
    with pytest.raises(UnknownName, match=r"no thing 'onee': did you mean 'one'\?"):
        table.build("onee")
    with pytest.raises(UnknownName, match=r"thing 'one' has no option 'siz': did you mean 'size'\?"):
        table.build("one", {"siz": 1})


def test_a_name_is_given_once(table):
    with pytest.raises(ValueError, match="already registered"):
        table.register("one")(object)


def test_threads_that_ask_first_at_the_same_moment_all_see_every_leaf(tmp_path, monkeypatch):
    package = tmp_path / "slow_leaves"
    package.mkdir()
    (package / "__init__.py").write_text("from preftune.core.registry import Registry\ntable = Registry('leaf', 'slow_leaves')\n")
    leaf = (
        "import time\nfrom dataclasses import dataclass\nfrom slow_leaves import table\ntime.sleep(0.05)\n"
        "@table.register('{name}')\n@dataclass(frozen=True)\nclass Leaf:\n    pass\n"
    )
    for name in ("a", "b", "c"):
        (package / f"{name}.py").write_text(leaf.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    from slow_leaves import table

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: table.names(), range(8)))
    assert seen == [["a", "b", "c"]] * 8
