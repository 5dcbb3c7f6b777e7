"""When a request is sent again, and after how long."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_S = 120.0
AGAIN = frozenset({408, 429, 500, 502, 503, 504})
UNDONE = frozenset({408, 429, 503})  # the server did nothing


@dataclass(frozen=True, slots=True)
class Retries:
    """At most ``times`` more, ``first_s`` seconds apart at first, then twice as long each time up to ``most_s``, less up to a
    quarter at random, so that many clients do not come back at once. What the server says goes before."""

    times: int = 4
    first_s: float = 0.5
    most_s: float = 8.0

    def wait(self, tried: int) -> float | None:
        """Seconds before the next try after ``tried`` failures without an answer; None to give up."""
        if tried > self.times:
            return None
        return min(self.most_s, self.first_s * 2.0 ** (tried - 1)) * (1 - random.random() / 4)

    def wait_after(self, tried: int, status: int, headers: Mapping[str, str], *, is_repeatable: bool) -> float | None:
        """The same after an answer: ``x-should-retry`` decides, else the status; ``Retry-After`` says how long.

        >>> Retries(times=2).wait_after(1, 429, {"retry-after": "1.5"}, is_repeatable=False)
        1.5
        >>> Retries().wait_after(1, 503, {"x-should-retry": "false"}, is_repeatable=True) is None
        True
        """
        said = headers.get("x-should-retry", "").lower()
        is_wanted = status in (AGAIN if is_repeatable else UNDONE)
        if said == "false" or (not is_wanted and said != "true"):
            return None
        usual = self.wait(tried)
        asked = _seconds(headers.get("retry-after", ""))
        if usual is None or asked is None:
            return usual
        return None if asked > LONGEST_S else max(0.0, asked)


def _seconds(text: str) -> float | None:
    """Retry-After as seconds: a number or a date."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None
