"""Numbers and hostile text as a reader sees them; the same in every form of the report."""

from __future__ import annotations

import re
import unicodedata

from preftune.statistics.intervals import Interval

MAX_TEXT = 6000  # characters of one text in a report; the whole text is in completions.jsonl
_DIRECTION = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C], None)


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.7841)
    '78.4 %'
    """
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference of shares in percentage points.

    >>> points(0.0885)
    '8.8 points'
    """
    return f"{100 * share:.1f} points"


def interval_text(interval: Interval) -> str:
    """Both ends in per cent.

    >>> interval_text(Interval(0.72, 0.83, "wilson"))
    '[72.0 %, 83.0 %]'
    """
    return f"[{percent(interval.low)}, {percent(interval.high)}]"


def number(value: object) -> str:
    """A figure of four digits at most after the leading ones; anything else as text.

    >>> [number(value) for value in (0.693147, 12345.678, 3, 2e-05, True, "sft")]
    ['0.6931', '12,346', '3', '2e-05', 'yes', 'sft']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return clean(str(value))


def fact(value: object, name: str) -> str:
    """A setting or measure by its name: bytes in GB, seconds in words, anything else as a number.

    >>> fact(754561024, "peak_memory_bytes"), fact(283.3, "seconds"), fact(16, "rank")
    ('0.75 GB', '4 min 43 s', '16')
    """
    if isinstance(value, (int, float)) and name.endswith("bytes"):
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, (int, float)) and name.endswith("seconds"):
        return duration(float(value))
    return number(value)


def fact_name(name: str) -> str:
    """The name of a fact in words.

    >>> fact_name("peak_memory_bytes")
    'peak memory'
    """
    return clean(name).removesuffix("_bytes").replace("_", " ")


def duration(seconds: float) -> str:
    """A time span in words.

    >>> [duration(value) for value in (0.42, 42, 192, 7260)]
    ['0.4 s', '42 s', '3 min 12 s', '2 h 1 min']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clean(text: str) -> str:
    r"""Text that any reader, file and parser can take: control characters become visible, lone surrogates U+FFFD.

    Line breaks and tabs stay; marks that turn the direction of what follows are dropped, because a report shows
    text of both directions in boxes of their own.

    >>> clean("a\x00b\x1b\ud800\u202e") == "a\u2400b\u241b\ufffd"
    True
    """
    shown = text.replace("\r\n", "\n").replace("\r", "\n").translate(_DIRECTION)
    return "".join(_visible(letter) for letter in shown)


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """At most ``limit`` characters, and a note of how many are left out.

    >>> shorten("abcdef", 4)
    'abcd … (2 more characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def fenced(text: str) -> str:
    """Text as a Markdown code block that nothing in it can close.

    >>> print(fenced("a ``` b"))
    ````text
    a ``` b
    ````
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def in_table(text: str) -> str:
    """Text for one cell of a Markdown table: one line, no markup.

    >>> in_table("a|b\\nc <b>")
    'a\\\\|b c &lt;b&gt;'
    """
    line = " ".join(clean(text).split())
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\\", "\\\\"), ("|", "\\|"), ("`", "\\`"), ("[", "\\[")):
        line = line.replace(sign, escaped)
    return line


def _visible(letter: str) -> str:
    code = ord(letter)
    if letter in "\n\t" or 0x20 <= code < 0x7F:
        return letter
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    category = unicodedata.category(letter)
    # Surrogates cannot be written as UTF-8, and HTML forbids C1 controls and the noncharacters at the end of a plane.
    return "\ufffd" if category in {"Cs", "Cc"} or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF else letter
