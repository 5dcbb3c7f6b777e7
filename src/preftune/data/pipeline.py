"""Files to examples: source, format, checks; every row that is left out is counted with its reason.

Everything streams: one row is held at a time, and of the rows seen a digest each, which finds duplicates and
contradictions. No torch, no tokenizer.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from preftune.core.errors import BadRow, InputError, UsageError
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.files import write_text
from preftune.core.ids import digest_json
from preftune.core.records import Example, Excluded, Messages, Provenance, pair_of
from preftune.data.columns import Columns
from preftune.data.formats.base import ROWS_LOOKED_AT, Format, Style, detect, formats
from preftune.data.sources.base import Row, Source, UnreadableRow, excerpt_of, source_for

ROWS_BETWEEN_REPORTS = 1000
NO_ROW_READ = "unknown"
"""The format of a file of which no row could be read."""

NO_COLUMNS = Columns()
Numbered: TypeAlias = tuple[int, Row | UnreadableRow]


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What files hold.

    Parameters
        examples: the rows that are kept, in order.
        excluded: the rows that are not, in order; ``counts`` knows how many there are where only some are held.
        formats: the format of each file.
        counts: ``rows`` read, examples ``kept`` and, for each reason, how many were left out. A row is an example in most
            formats; a row that is a tree holds many.
    """

    examples: list[Example] = field(default_factory=list)
    excluded: list[Excluded] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def num_excluded(self) -> int:
        """Examples left out, and rows that hold none."""
        return sum(count for reason, count in self.counts.items() if reason not in {"rows", "kept"})


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to generate from, and where it stands."""

    prompt: Messages
    style: Style
    provenance: Provenance
    tools: tuple[Mapping[str, Any], ...] = ()


class Reader:
    """An iterator over the examples of files that counts while it goes.

    Duplicates are left out. Of a contradiction (the same two completions to a prompt, preferred the other way round)
    the later row is left out here; ``read_examples`` removes the earlier one too, and ``counts`` counts both.

    Parameters
        paths: the files, read one after the other.
        format, style: force what is otherwise decided by content. columns: what the files' own columns are called.
        on_excluded: called for each row left out.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        format: str | None = None,  # noqa: A002 - the word of the recipe
        style: Style | None = None,
        columns: Columns = NO_COLUMNS,
        on_excluded: Callable[[Excluded], None] | None = None,
        on_progress: EventSink = ignore,
    ) -> None:
        self._columns = columns
        self.formats: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.contradicted: set[int] = set()
        self._paths = [str(path) for path in paths]
        self._format = format
        self._style = style
        self._on_excluded = on_excluded
        self._on_progress = on_progress
        self._seen: dict[int, tuple[int, int, int, int]] = {}
        self._serial = 0

    def __iter__(self) -> Iterator[Example]:
        for place, path in enumerate(self._paths):
            yield from self._file(path, place)

    def _file(self, path: str, place: int) -> Iterator[Example]:
        _, source = source_for(Path(path))
        name, reader, rows = _recognise(path, source, self._format, self._style, columns=self._columns)
        self.formats[path] = name
        has_rows = False
        for number, row in rows:
            has_rows = True
            self.counts["rows"] += 1
            if self.counts["rows"] % ROWS_BETWEEN_REPORTS == 0:
                self._on_progress(Progress(f"reading {path}", self.counts["rows"], 0))
            for found in _examples(row, reader, _provenance(path, number, row)):
                try:
                    if isinstance(found, BadRow):
                        raise found
                    self._check_new(found, place)
                except BadRow as bad:
                    field = self._columns.given_name(bad.field)
                    self._exclude(Excluded(path, number, bad.reason, bad.detail, field, _excerpt(row)))
                    continue
                self.counts["kept"] += 1
                yield found
        if not has_rows:
            raise InputError(f"{path} is empty: it has no rows")

    def _exclude(self, excluded: Excluded) -> None:
        self.counts[excluded.reason] += 1
        if self._on_excluded is not None:
            self._on_excluded(excluded)

    def _check_new(self, example: Example, place: int) -> None:
        """Refuse an example that repeats or contradicts an earlier one."""
        key, side = _identity(example)
        self._serial += 1  # a row may hold several examples, so its line does not tell them apart
        earlier = self._seen.setdefault(key, (side, place, example.provenance.line, self._serial))
        if earlier[3] == self._serial:
            return
        where = f"line {earlier[2]}" + ("" if earlier[1] == place else f" of {self._paths[earlier[1]]}")
        if earlier[0] == side:
            raise BadRow("duplicate", f"repeats {where}")
        if key not in self.contradicted:
            self.contradicted.add(key)
            self.counts["kept"] -= 1
            detail = f"contradicted by line {example.provenance.line}" + (
                "" if earlier[1] == place else f" of {self._paths[place]}"
            )
            self._exclude(Excluded(self._paths[earlier[1]], earlier[2], "contradictory", detail))
        raise BadRow("contradictory", f"prefers the other completion than {where}")

    def is_contradicted(self, example: Example) -> bool:
        """Whether a later row preferred the other completion."""
        return bool(self.contradicted) and _identity(example)[0] in self.contradicted


def read_examples(
    paths: Sequence[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the recipe
    style: Style | None = None,
    columns: Columns = NO_COLUMNS,
    strict: bool = False,
    limit: int | None = None,
    on_progress: EventSink = ignore,
) -> ReadResult:
    """All examples of some files, and every row that was left out.

    Parameters
        format: a registered format; otherwise recognised by content, file by file.
        style: ``text`` or ``chat``, where the format leaves it open. columns: what the files' own columns are called.
        strict: refuse files with a bad row (duplicates and contradictions are bad rows too).
        limit: stop after so many examples.

    Raises
        InputError: a file cannot be read, holds nothing to learn from, or (strict) has bad rows.
    """
    excluded: list[Excluded] = []
    reader = Reader(paths, format=format, style=style, columns=columns, on_excluded=excluded.append, on_progress=on_progress)
    examples = list(itertools.islice(_with_completions(reader), limit))
    examples = [example for example in examples if not reader.is_contradicted(example)]
    if strict and excluded:
        first = min(excluded, key=lambda row: (list(reader.formats).index(row.file), row.line))
        others = len(excluded) - 1
        more = f", and {others} more bad row{'s' if others > 1 else ''}" if others else ""
        raise InputError(
            f"{first.file} line {first.line}: {first.reason}: {first.detail}{more}; correct them, or leave out strict"
        )
    return ReadResult(examples, excluded, reader.formats, dict(reader.counts))


def check_files(
    paths: Sequence[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the recipe
    style: Style | None = None,
    columns: Columns = NO_COLUMNS,
    max_reported: int = 1000,
    on_example: Callable[[Example], None] | None = None,
    on_progress: EventSink = ignore,
) -> ReadResult:
    """The counts of ``read_examples`` in constant memory: no example and at most ``max_reported`` bad rows are held."""
    excluded: list[Excluded] = []

    def keep(row: Excluded) -> None:
        if len(excluded) < max_reported:
            excluded.append(row)

    reader = Reader(paths, format=format, style=style, columns=columns, on_excluded=keep, on_progress=on_progress)
    for example in reader:
        if on_example is not None:
            on_example(example)
    return ReadResult([], excluded, reader.formats, dict(reader.counts))


def iter_examples(
    path: str,
    *,
    format: str | None = None,  # noqa: A002 - the word of the recipe
    style: Style | None = None,
) -> Iterator[Example]:
    """The examples of one file, one at a time; see ``Reader`` for what is left out and to count it."""
    return iter(Reader([path], format=format, style=style))


def _provenance(path: str, number: int, row: Row | UnreadableRow) -> Provenance:
    """Where a row is from: its place, and who wrote and who judged its completions, where it names them."""
    if isinstance(row, UnreadableRow):
        return Provenance(path, number)
    generators, judges = (
        tuple(one for one in found if isinstance(one, str)) if isinstance(found := row.get(name), list) else ()
        for name in ("generators", "judges")
    )
    return Provenance(path, number, (), generators, judges)


def read_prompts(
    path: str,
    *,
    style: Style | None = None,
    limit: int | None = None,
    on_excluded: Callable[[Excluded], None] | None = None,
    on_repeated: Callable[[PromptRow], None] | None = None,
) -> list[PromptRow]:
    """The different prompts of a file, in order: of a prompts file, or of one with completions, which are not read.

    A prompt text of a prompts file is one user turn, because such files hold requests; ``style="text"`` makes it raw
    text. Files with completions keep the style of their examples.

    Raises
        InputError: the file cannot be read or holds no prompt; a bad row, unless ``on_excluded`` takes it.
    """

    def refuse(row: Excluded) -> None:
        raise InputError(f"{row.file} line {row.line}: {row.reason}: {row.detail}")

    found: dict[str, PromptRow] = {}
    excluded: list[Excluded] = []
    _, source = source_for(Path(path))
    name, reader, rows = _recognise(path, source, None, style, prefer="prompts")
    for number, row in rows:
        for example in _examples(row, reader, Provenance(path, number)):
            if isinstance(example, BadRow):
                excluded.append(Excluded(path, number, example.reason, example.detail, example.field, _excerpt(row)))
                continue
            key = digest_json([example.style, [message.to_dict() for message in example.prompt]])
            row_found = PromptRow(example.prompt, example.style, example.provenance, example.tools)
            if found.setdefault(key, row_found) is not row_found and on_repeated is not None:
                on_repeated(row_found)
        for bad_row in excluded:
            (on_excluded or refuse)(bad_row)
        excluded.clear()
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise InputError(f"{path} holds no prompt (read as {name})")
    return list(found.values())


def write_excluded(path: Path, excluded: Iterable[Excluded]) -> None:
    """Write ``excluded.jsonl``: one line for each row that was left out."""
    write_text(path, "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in excluded))


def _with_completions(reader: Reader) -> Iterator[Example]:
    for example in reader:
        if not example.completions:
            file = example.provenance.file
            raise InputError(f"{file} holds prompts without completions: it serves evaluation, not training")
        yield example


def _recognise(
    path: str, source: Source, name: str | None, style: Style | None, prefer: str | None = None, columns: Columns = NO_COLUMNS
) -> tuple[str, Format, Iterator[Numbered]]:
    """The format of a file by its first good rows, its reader, and all rows of the file from the first one on."""
    rows: Iterator[Numbered] = source.rows(Path(path))
    if columns:
        rows = _mapped(rows, columns, path)
    if name is None:
        looked_at: list[Numbered] = []
        good: list[Row] = []
        for numbered in rows:
            looked_at.append(numbered)
            if not isinstance(numbered[1], BadRow):
                good.append(numbered[1])
            if len(good) == ROWS_LOOKED_AT or len(looked_at) == ROWS_LOOKED_AT * 10:
                break
        if good:
            name = prefer if prefer and any(map(formats.build(prefer).matches, good)) else detect(good, path)
            rows = itertools.chain(looked_at, rows)
        else:
            return NO_ROW_READ, formats.build("prompts"), _only_bad(path, looked_at, rows)
    if style == "text" and name in {"messages", "openai-preference"}:
        raise UsageError(f"{path}: format {name} is conversational; leave out style: text")
    return name, formats.build(name, {"style": style}), rows


def _mapped(rows: Iterator[Numbered], columns: Columns, path: str) -> Iterator[Numbered]:
    is_checked = False
    for number, row in rows:
        if isinstance(row, UnreadableRow):
            yield number, row
            continue
        if not is_checked:
            columns.check(row, path)
            is_checked = True
        yield number, columns.apply(row)


def _only_bad(path: str, looked_at: list[Numbered], rows: Iterator[Numbered]) -> Iterator[Numbered]:
    """Rows of a file whose beginning has no good one: refused where a good one follows so late."""
    for number, row in itertools.chain(looked_at, rows):
        if not isinstance(row, BadRow):
            raise InputError(f"{path}: none of the first {len(looked_at)} rows can be read; name its format")
        yield number, row


def _examples(row: Row | UnreadableRow, reader: Format, provenance: Provenance) -> Iterator[Example | BadRow]:
    """Every example of a row, or what is bad about it."""
    if isinstance(row, UnreadableRow):
        yield row
        return
    try:
        found = reader.read(row, provenance)
    except BadRow as bad:
        yield bad
        return
    for one in (found,) if isinstance(found, Example) else found:
        try:
            yield one if isinstance(one, BadRow) else _checked(one)
        except BadRow as bad:
            yield bad


def _checked(example: Example) -> Example:
    """The example, if all of it is text that can be written; ``BadRow`` otherwise."""
    messages = [*example.prompt, *(message for completion in example.completions for message in completion)]
    try:
        for message in messages:
            message.content.encode()
            if len(message.to_dict()) > 2:
                json.dumps(message.to_dict(), ensure_ascii=False).encode()
        if example.tools:
            json.dumps([dict(tool) for tool in example.tools], ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        raise BadRow("invalid_unicode", "the row holds characters that are no Unicode text (lone surrogates)") from None
    return example


def _excerpt(row: Row | UnreadableRow) -> str:
    return row.excerpt if isinstance(row, UnreadableRow) else excerpt_of(row)


def _identity(example: Example) -> tuple[int, int]:
    """What an example is about, and what it says of it; 64 bits each.

    Of a pair: the prompt with the two completions in either order, and the chosen one. Else: its content hash.
    """
    pair = pair_of(example)
    if pair is None:
        return int(example.id[:16], 16), 0
    chosen, rejected = (digest_json([message.to_dict() for message in side]) for side in (pair.chosen, pair.rejected))
    prompt = [example.style, [message.to_dict() for message in example.prompt], [dict(tool) for tool in example.tools]]
    return int(digest_json([prompt, sorted([chosen, rejected])])[:16], 16), int(chosen[:16], 16)
