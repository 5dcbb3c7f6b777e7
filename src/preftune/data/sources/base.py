"""What a source is, how files are opened, and how the container is recognised by content.

A source yields ``(number, row)``: the line in JSON Lines and CSV files, the row in arrays and Parquet files, both
from 1. A row that cannot be read is yielded as an ``UnreadableRow``, so that one bad row never ends a file; a file
that cannot be read raises ``InputError`` with one line.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol, TypeAlias, cast

from preftune.core.errors import BadRow, InputError
from preftune.core.registry import Registry

Row: TypeAlias = dict[str, Any]

MAX_ROW_BYTES = 16 << 20
"""Longest row that is read: 16 MiB, far beyond what any model's context holds."""

HEAD_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
ZSTD_BLOCK_BYTES = 1 << 12  # small, because a few bytes may stand for many
EXCERPT_CHARACTERS = 160


class UnreadableRow(BadRow):
    """A row that is not even a mapping; ``excerpt`` shows its beginning."""

    def __init__(self, reason: str, detail: str, *, excerpt: str = "", field: str | None = None) -> None:
        super().__init__(reason, detail, field=field)
        self.excerpt = excerpt


class Source(Protocol):
    """Reads one kind of file in constant memory."""

    suffixes: ClassVar[tuple[str, ...]]

    def rows(self, path: Path) -> Iterator[tuple[int, Row | UnreadableRow]]:
        """Number (from 1) and content of every row, in order."""


sources: Registry[Source] = Registry("source", "preftune.data.sources", "preftune.sources")


def source_for(path: Path) -> tuple[str, Source]:
    """Name and reader of the container of a file, by its ending and, for JSON, by its content.

    Raises
        InputError: no such file, a folder, an empty file, or a kind of file that is not read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in {".gz", ".zst"}:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    known = {ending: name for name in sources.names() for ending in sources.factory(name).suffixes}
    name = known.get(suffix)
    if name is not None and name not in {"json", "jsonl"}:
        with reading(path) as file:
            if not file.read(1):
                raise InputError(f"{path} is empty")
        return name, sources.build(name)
    with reading(path) as file:
        head = file.read(HEAD_BYTES)
    while head.startswith(BOM):
        head = head[len(BOM) :]
    if not head.strip():
        raise InputError(f"{path} is empty")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16; save it as UTF-8")
    if head.startswith(b"PAR1"):
        return "parquet", sources.build("parquet")
    if name is None and head.lstrip()[:1] not in {b"[", b"{"}:
        raise InputError(
            f"{path}: unknown kind of file {suffix!r}; there is {', '.join(sorted(known))}, the text ones also .gz, .zst"
        )
    name = _json_container(head, is_lines=name != "json")
    return name, sources.build(name)


def _json_container(head: bytes, *, is_lines: bool) -> str:
    """``jsonl`` or ``json``, by what the first lines are; the ending decides only where the content does not."""
    lines = [line for line in head.split(b"\n") if line.strip()]
    first_is_whole = _parses(lines[0], (dict, list))
    if first_is_whole and len(lines) > 1:
        return "jsonl"
    if sum(_parses(line, dict) for line in lines[1:22]) >= 2:
        return "jsonl"  # a broken first line; in a list of objects all lines but the last end in a comma
    if lines[0].lstrip()[:1] == b"[":
        return "json"
    return "jsonl" if is_lines else "json"


def _parses(line: bytes, kind: type | tuple[type, ...]) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False


@contextmanager
def reading(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed by its ending; every failure becomes one line of ``InputError``."""
    try:
        with path.open("rb") as raw:
            if path.suffix.lower() == ".gz":
                with gzip.open(raw, "rb") as file:
                    yield cast(IO[bytes], file)
            elif path.suffix.lower() == ".zst":
                with _zstandard(path, raw) as file:
                    yield file
            else:
                yield raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; name a file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is no whole gzip file: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


@contextmanager
def _zstandard(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{path}: reading .zst files needs zstandard; install preftune[zstd]") from None
    try:
        yield cast(IO[bytes], io.BufferedReader(_ZstdStream(raw, zstandard.ZstdDecompressor())))
    except (zstandard.ZstdError, EOFError) as error:
        raise InputError(f"{path} is no whole zstd file: {one_line(error)}") from None


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one frame after another; unlike the package's own stream it notices a file that is cut."""

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw = raw
        self._decompressor = decompressor
        self._frame: Any = None
        self._waiting = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is decompressed; 0 at the end of the last frame."""
        while not self._waiting:
            block = self._raw.read(ZSTD_BLOCK_BYTES)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file is cut")
                return 0
            while block:
                self._frame = self._frame or self._decompressor.decompressobj()
                self._waiting += self._frame.decompress(block)
                block = b""
                if self._frame.eof:
                    block, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size


def parse_row(line: bytes, offset: int) -> Row | UnreadableRow:
    """One JSON object from one line; ``offset`` is the place of its first byte in the file."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte {offset + error.start} (0x{line[error.start]:02x}) is not UTF-8"
        return UnreadableRow("invalid_utf8", detail, excerpt=excerpt_of(line.decode("utf-8", "replace")))
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return UnreadableRow("invalid_json", f"column {error.colno}: {error.msg}", excerpt=excerpt_of(text))
    except RecursionError:
        return UnreadableRow("invalid_json", "nested too deeply to be read", excerpt=excerpt_of(text))
    except ValueError as error:
        return UnreadableRow("invalid_json", one_line(error), excerpt=excerpt_of(text))
    return check_row(row)


def check_row(row: Any) -> Row | UnreadableRow:
    """The row itself where it is a mapping."""
    if isinstance(row, dict):
        return row
    return UnreadableRow("not_an_object", f"is {kind_of(row)}, not an object with fields", excerpt=excerpt_of(row))


def kind_of(value: Any) -> str:
    """A JSON value in the words of an error message.

    >>> kind_of(True), kind_of([]), kind_of(None)
    ('a boolean (true)', 'a list', 'null')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, (int, float)):
        return f"a number ({value!r:.20})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"


def excerpt_of(value: Any) -> str:
    """The beginning of a value, for a report: one line of valid Unicode."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > EXCERPT_CHARACTERS:
        text = text[:EXCERPT_CHARACTERS] + "…"
    return " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")


def one_line(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
