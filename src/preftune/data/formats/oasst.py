"""Open Assistant's trees: every set of ranked answers to one turn is a ranking, with the way to it as the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Message, Messages, Provenance
from preftune.data.formats.base import Row, Style, formats
from preftune.data.formats.pairs import chat_ranking, refuse_text
from preftune.data.formats.turns import assistant, text_field, turns
from preftune.data.sources.base import kind_of

ROLES = {"prompter": "user", "assistant": "assistant"}
MAX_DEPTH = 200


@formats.register("oasst-trees")
@dataclass(frozen=True, slots=True)
class OasstTrees:
    """Conversation trees with the rank of each answer among its siblings (0 = best). Deleted answers and ones without a rank
    are left out; a turn with fewer than two ranked answers gives nothing. One row gives many examples.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has a prompt with replies."""
        prompt = row.get("prompt")
        return isinstance(prompt, Mapping) and "replies" in prompt and row.get("message_tree_id") is not None

    def read(self, row: Row, provenance: Provenance) -> list[Example | BadRow]:
        """Every ranking in a tree."""
        refuse_text(self.style)
        root = row.get("prompt")
        if not isinstance(root, Mapping):
            raise BadRow("wrong_type", f"prompt is {kind_of(root)}, expected a message with replies", field="prompt")
        found = list(_rankings(root, (), provenance, "prompt", 0))
        if not found:
            raise BadRow("no_ranking", "no turn of the tree has two ranked answers", field="prompt")
        return found


def _rankings(
    node: Mapping[str, Any], before: Messages, provenance: Provenance, field: str, depth: int
) -> Iterator[Example | BadRow]:
    try:
        path = (*before, _message(node, field))
        replies = node.get("replies") or []
        if depth > MAX_DEPTH or not isinstance(replies, (list, tuple)) or not all(isinstance(one, Mapping) for one in replies):
            raise BadRow("wrong_type", f"{field}.replies is no list of messages", field=f"{field}.replies")
    except BadRow as bad:
        yield bad
        return
    if path[-1].role == "user":
        ranked = [one for one in replies if isinstance(one.get("rank"), int) and not one.get("deleted")]
        if len(ranked) > 1:
            try:
                answers = [assistant(text_field(one, "text")) for one in ranked]
                ranks = [one["rank"] + 1 for one in ranked]
                yield chat_ranking(path, answers, ranks, provenance, names=(field, f"{field}.replies"))
            except BadRow as bad:
                yield bad
    for place, reply in enumerate(replies):
        if reply.get("replies") and not reply.get("deleted"):
            yield from _rankings(reply, path, provenance, f"{field}.replies.{place}", depth + 1)


def _message(node: Mapping[str, Any], field: str) -> Message:
    role = ROLES.get(str(node.get("role")))
    if role is None:
        raise BadRow("unknown_role", f"{field}.role is {node.get('role')!r}; there is {', '.join(ROLES)}", field=f"{field}.role")
    return turns([{"role": role, "content": text_field(node, "text")}], field)[0]
