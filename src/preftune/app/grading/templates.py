"""Texts that users write with places for a row's columns: Jinja for Together's, ``{{item.x}}`` for OpenAI's."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from preftune.core.errors import InputError, PreftuneError

MAX_TEMPLATE = 20_000
MAX_TEXT = 1_000_000
SECONDS = 2.0
_PLACE = re.compile(r"\{\{\s*(item|sample)\.([\w.\-]{1,200})\s*\}\}")


def render(template: str, row: Mapping[str, Any]) -> str:
    """A Jinja template over a row's columns, in the immutable sandbox, for at most SECONDS and MAX_TEXT characters.

    Raises
        InputError: the template is too long, is no Jinja, names a column that is not there, or takes too long.

    >>> render("Say {{ word|upper }}", {"word": "hi"})
    'Say HI'
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(template) > MAX_TEMPLATE:
        raise InputError(f"template: {len(template):,} characters are more than {MAX_TEMPLATE:,}")
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    parts: list[str] = []
    size = 0
    try:
        with _in_time():
            for part in environment.from_string(template).generate(**{str(key): value for key, value in row.items()}):
                size += len(part)
                if size > MAX_TEXT:
                    raise InputError(f"template: its text has more than {MAX_TEXT:,} characters")
                parts.append(part)
    except (TemplateError, ArithmeticError, TypeError, ValueError, MemoryError) as error:
        raise InputError(f"template: {' '.join(str(error).split()) or type(error).__name__}") from None
    return "".join(parts)


def check_jinja(template: str, where: str) -> None:
    """InputError for a template that is too long or no Jinja; nothing is run."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(template) > MAX_TEMPLATE:
        raise InputError(f"{where}: {len(template):,} characters are more than {MAX_TEMPLATE:,}")
    try:
        ImmutableSandboxedEnvironment(autoescape=False).parse(template)
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: no Jinja: {error.message}") from None


def fill(template: str, item: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """A text with ``{{item.x}}`` and ``{{sample.y}}`` replaced; nothing else in it means anything.

    Raises
        InputError: a place that the row does not have.

    >>> fill("{{ item.q }} -> {{sample.output_text}}", {"q": "2+2"}, {"output_text": "4"})
    '2+2 -> 4'
    """
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"template: {len(template):,} characters are more than {MAX_TEMPLATE:,}")

    def one(found: re.Match[str]) -> str:
        value: Any = item if found.group(1) == "item" else sample
        for name in found.group(2).split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise InputError(f"template: the row has no {found.group(1)}.{found.group(2)}")
            value = value[name]
        return value if isinstance(value, str) else str(value)

    return _PLACE.sub(one, template)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Break off after SECONDS; only the main thread of a process can be broken off, so only there is it done."""
    if threading.current_thread() is not threading.main_thread():
        raise PreftuneError("templates are rendered in the main thread, where they can be stopped")

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise InputError(f"template: it takes longer than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
