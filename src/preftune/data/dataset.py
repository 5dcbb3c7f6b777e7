"""An immutable dataset version: a folder of Parquet shards and a manifest, named by its content.

    FOLDER/manifest.json        id, rows, digests of the shards, counts, lineage
    FOLDER/data-00000.parquet   columns id, content (one JSON text an example), file, line

The folder appears whole or not at all. The id depends on the examples and their order only, so the same data have the
same id wherever they are prepared. Shards are memory-mapped and read one row group at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from preftune.core.errors import InputError
from preftune.core.files import read_json, write_folder, write_json
from preftune.core.ids import digest_bytes, digest_file
from preftune.core.records import (
    Demonstration,
    Desirability,
    Example,
    Judgement,
    Message,
    Messages,
    Preference,
    Provenance,
    Ranking,
)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ROWS_PER_SHARD = 65_536
ROWS_PER_GROUP = 1_024
JUDGEMENTS: Mapping[str, type[Any]] = {one.__name__: one for one in (Demonstration, Preference, Desirability, Ranking)}


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset version on the disk; iterating and indexing give ``Example``.

    Parameters
        folder: where it lies.
        manifest: id, num_rows, shards, counts, lineage.
    """

    folder: Path
    manifest: Mapping[str, Any]
    _group: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def id(self) -> str:
        """``ds_`` and the digest of the examples in their order."""
        return str(self.manifest["id"])

    def __len__(self) -> int:
        return int(self.manifest["num_rows"])

    def __iter__(self) -> Iterator[Example]:
        for shard in self.manifest["shards"]:
            file = _open(self.folder / shard["name"])
            for group in range(file.num_row_groups):
                yield from _examples(file.read_row_group(group))

    def __getitem__(self, place: int) -> Example:
        if not 0 <= place < len(self):
            raise IndexError(place)
        shard, row = divmod(place, ROWS_PER_SHARD)
        group, row = divmod(row, ROWS_PER_GROUP)
        if self._group.get("key") != (shard, group):  # the last row group is kept: neighbours are asked for together
            file = _open(self.folder / self.manifest["shards"][shard]["name"])
            self._group.update(key=(shard, group), rows=list(_examples(file.read_row_group(group))))
        rows: list[Example] = self._group["rows"]
        return rows[row]


def write_dataset(
    folder: Path,
    examples: Iterable[Example],
    *,
    counts: Mapping[str, int] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Dataset:
    """Write a dataset version; ``folder`` must not exist.

    Parameters
        counts: rows read, kept and left out by reason.
        lineage: where the rows come from: files with their digests and formats, and the steps taken.
    """
    import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types

    if folder.exists():
        raise InputError(f"{folder} exists; a dataset version is never changed, so name another folder")
    rows = iter(examples)
    digests: list[bytes] = []
    shards: list[dict[str, Any]] = []
    with write_folder(folder) as temporary:
        while part := list(islice(rows, ROWS_PER_SHARD)):
            name = f"data-{len(shards):05d}.parquet"
            table = pa.Table.from_pylist([_row(example) for example in part])
            pq.write_table(table, temporary / name, row_group_size=ROWS_PER_GROUP, compression="zstd")
            digests += [example.id.encode() for example in part]
            shards.append({"name": name, "num_rows": len(part), "digest": digest_file(temporary / name)})
        manifest = {
            "format_version": FORMAT_VERSION,
            "id": f"ds_{digest_bytes(*digests)}",
            "num_rows": len(digests),
            "shards": shards,
            "counts": dict(counts or {}),
            "lineage": dict(lineage or {}),
        }
        write_json(temporary / MANIFEST, manifest)
    return Dataset(folder, manifest)


def read_dataset(folder: Path, *, verify: bool = True) -> Dataset:
    """Open a dataset version; with ``verify`` every shard's bytes are compared with the manifest.

    Raises
        InputError: no manifest, another format version, or a shard that is missing or altered.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        version, shards = manifest["format_version"], list(manifest["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no dataset version: {MANIFEST} is missing or cannot be read") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{folder} has format version {version}, this preftune reads {FORMAT_VERSION}")
    for shard in shards:
        path = folder / shard["name"]
        if not path.is_file():
            raise InputError(f"{path} is missing: the dataset version is not whole")
        if verify and digest_file(path) != shard["digest"]:
            raise InputError(f"{path} is not what was written: its digest differs from the manifest's")
    return Dataset(folder, manifest)


def summary_of(examples: Iterable[Example], counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What a run notes of the examples that it trains on: how many, their digest, and the counts of reading."""
    digests = [example.id.encode() for example in examples]
    return {"id": f"ds_{digest_bytes(*digests)}", "num_rows": len(digests), "counts": dict(counts or {})}


def example_to_json(example: Example) -> dict[str, Any]:
    """An example as a JSON value, provenance apart from file and line included."""
    judgement = example.judgement
    said = {name: getattr(judgement, name) for name in judgement.__dataclass_fields__}
    return {
        "prompt": [message.to_dict() for message in example.prompt],
        "completions": [[message.to_dict() for message in one] for one in example.completions],
        "judgement": {"kind": type(judgement).__name__, **said},
        "style": example.style,
        "tools": [dict(tool) for tool in example.tools],
        "annotators": example.provenance.annotators,
        "generators": example.provenance.generators,
        "judges": example.provenance.judges,
    }


def example_from_json(value: Mapping[str, Any], file: str, line: int) -> Example:
    """The example that ``example_to_json`` wrote."""
    people = (tuple(value[key]) for key in ("annotators", "generators", "judges"))
    return Example(
        _messages(value["prompt"]),
        tuple(map(_messages, value["completions"])),
        _judgement(value["judgement"]),
        Provenance(file, line, *people),
        value["style"],
        tuple(value["tools"]),
    )


def _row(example: Example) -> dict[str, Any]:
    content = json.dumps(example_to_json(example), ensure_ascii=False)
    return {"id": example.id, "content": content, "file": example.provenance.file, "line": example.provenance.line}


def _examples(table: Any) -> Iterator[Example]:
    for row in table.select(["content", "file", "line"]).to_pylist():
        yield example_from_json(json.loads(row["content"]), row["file"], row["line"])


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=True)


def _messages(value: Iterable[Mapping[str, Any]]) -> Messages:
    return tuple(
        Message(
            one["role"],
            one["content"],
            tuple(one.get("tool_calls", ())),
            one.get("name"),
            one.get("tool_call_id"),
            one.get("reasoning_content"),
        )
        for one in value
    )


def _judgement(value: Mapping[str, Any]) -> Judgement:
    said = {key: tuple(one) if isinstance(one, list) else one for key, one in value.items() if key != "kind"}
    judgement: Judgement = JUDGEMENTS[value["kind"]](**said)
    return judgement
