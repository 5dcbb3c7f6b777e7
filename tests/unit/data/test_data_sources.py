"""Containers: rows with their numbers, one bad row at a time, one line for a file that cannot be read."""

import gzip
import json
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from preftune.core.errors import InputError
from preftune.data.sources.base import UnreadableRow, kind_of, source_for, sources
from preftune.data.sources.jsonl import JsonLines

ROWS = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(3)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path):
    name, source = source_for(path)
    return name, list(source.rows(path))


def good(path, name):
    found, rows = read(path)
    assert found == name
    return [row for _, row in rows]


def reasons(path):
    return [(number, row.reason if isinstance(row, UnreadableRow) else "ok") for number, row in read(path)[1]]


def test_there_is_one_source_for_each_container():
    assert sources.names() == ["csv", "json", "jsonl", "parquet"]


# --- JSON Lines ---------------------------------------------------------------------------------------------------


def test_a_line_separator_inside_a_row_does_not_cut_it(tmp_path):
    text = json.dumps({"prompt": "a\u2028b\x85c\x0bd"}, ensure_ascii=False)
    assert len(text.splitlines()) > 1  # what str.splitlines would do
    path = write(tmp_path / "a.jsonl", text + "\n" + text + "\n")
    assert good(path, "jsonl") == [{"prompt": "a\u2028b\x85c\x0bd"}] * 2


def test_line_numbers_count_blank_lines_and_carriage_returns_do_no_harm(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\r\n\n{"a": 2}')
    assert read(path)[1] == [(2, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_hold_the_same_rows(tmp_path, ending):
    content = lines(ROWS).encode()
    packed = gzip.compress(content) if ending == ".gz" else zstandard.compress(content)
    assert good(write(tmp_path / f"a.jsonl{ending}", packed), "jsonl") == ROWS
    table = gzip.compress(b"a,b\n1,2\n") if ending == ".gz" else zstandard.compress(b"a,b\n1,2\n")
    assert good(write(tmp_path / f"a.csv{ending}", table), "csv") == [{"a": "1", "b": "2"}]
    for cut in (packed[: len(packed) // 2], b"no archive at all"):
        with pytest.raises(InputError, match=r"is no whole (gzip|zstd) file"):
            read(write(tmp_path / f"cut.jsonl{ending}", cut))


def test_zstd_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.zst", zstandard.compress(lines(ROWS).encode()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"install preftune\[zstd\]"):
        read(path)


def test_invalid_utf8_is_a_bad_row_with_its_byte(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n')
    rows = read(path)[1]
    assert [number for number, row in rows if not isinstance(row, UnreadableRow)] == [1, 3]
    bad = rows[1][1]
    assert (bad.reason, bad.detail) == ("invalid_utf8", "byte 16 (0xff) is not UTF-8")
    assert path.read_bytes()[16] == 0xFF


def test_invalid_json_is_a_bad_row_with_its_column(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": }\n[1]\n3\n{"a": ' + "9" * 5000 + "}\n" + "[" * 200_000 + "\n")
    rows = read(path)[1]
    assert [row.reason for _, row in rows[1:]] == [
        "invalid_json",
        "not_an_object",
        "not_an_object",
        "invalid_json",
        "invalid_json",
    ]
    assert rows[1][1].detail.startswith("column 7: ")
    assert rows[1][1].excerpt == '{"a": }'
    assert rows[2][1].detail == "is a list, not an object with fields"


def test_files_with_invalid_json_on_most_lines_are_read_row_by_row(tmp_path):
    content = "".join("{'prompt': 1}\n" if number % 5 else json.dumps(ROWS[0]) + "\n" for number in range(1, 26))
    for name in ("a.jsonl", "a.json"):
        found = reasons(write(tmp_path / name, content))
        assert [reason for _, reason in found].count("ok") == 5
        assert [number for number, reason in found if reason == "ok"] == [5, 10, 15, 20, 25]


def test_byte_order_marks_at_the_head_are_skipped(tmp_path):
    for marks in (1, 2):
        path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" * marks + lines(ROWS).encode())
        assert good(path, "jsonl") == ROWS
        path = write(tmp_path / "b.json", b"\xef\xbb\xbf" * marks + json.dumps(ROWS).encode())
        assert good(path, "json") == ROWS
    with pytest.raises(InputError, match="is empty"):
        read(write(tmp_path / "c.jsonl", b"\xef\xbb\xbf"))
    path = write(tmp_path / "b.csv", b"\xef\xbb\xbfa,b\n1,2\n")
    assert good(path, "csv") == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_an_empty_file_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match=r"is empty$"):
        read(write(tmp_path / name, b""))


def test_files_that_are_not_there_or_not_readable_are_one_line(tmp_path):
    for path, why in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "is a folder; name a file"),
        (write(tmp_path / "a.jsonl", "x".encode("utf-16")), "is UTF-16; save it as UTF-8"),
        (write(tmp_path / "a.docx", b"hello"), "unknown kind of file '.docx'; there is .csv, .json, .jsonl"),
    ]:
        with pytest.raises(InputError) as caught:
            read(path)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_one_huge_line_is_refused_without_being_held(tmp_path):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(200 << 20)
    tracemalloc.start()
    with pytest.raises(InputError, match="line 1: longer than 16 MiB, the limit for a row"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_huge_object_is_refused_without_being_held(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(200 << 20)
    tracemalloc.start()
    with pytest.raises(InputError, match="one JSON object of more than 64 MiB; write its rows as JSON Lines"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_a_line_that_is_too_long_is_one_bad_row(tmp_path):
    content = b'{"a": 1}\n' + b"x" * 3000 + b'\n{"a": 3}\n'
    path = write(tmp_path / "a.jsonl", content)
    rows = list(JsonLines(max_row_bytes=1000).rows(path))
    assert [number for number, _ in rows] == [1, 2, 3]
    assert rows[1][1].reason == "row_too_long"
    assert rows[2][1] == {"a": 3}
    assert [row for _, row in JsonLines(max_row_bytes=len('{"a": 1}')).rows(write(path, '{"a": 1}\n{"a": 2}\n'))] == [
        {"a": 1},
        {"a": 2},
    ]


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
def test_a_list_is_recognised_by_content(tmp_path, name, indent):
    assert good(write(tmp_path / name, json.dumps(ROWS, indent=indent)), "json") == ROWS


def test_json_lines_in_a_json_file_are_recognised(tmp_path):
    assert good(write(tmp_path / "a.json", lines(ROWS)), "jsonl") == ROWS
    broken = '{"prompt": \n' + lines(ROWS)
    assert reasons(write(tmp_path / "b.json", broken)) == [(1, "invalid_json"), (2, "ok"), (3, "ok"), (4, "ok")]


def test_an_object_that_holds_a_list(tmp_path):
    for content in (json.dumps({"version": 1, "data": ROWS}, indent=1), json.dumps({"data": ROWS})):
        assert good(write(tmp_path / "a.json", content), "json") == ROWS
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert good(write(tmp_path / "b.json", json.dumps(row, indent=1)), "json") == [row]
    with pytest.raises(InputError, match=r"several lists \(test, train\)"):
        read(write(tmp_path / "c.json", json.dumps({"train": ROWS, "test": ROWS}, indent=1)))


def test_elements_larger_than_a_block_and_elements_that_are_no_objects(tmp_path):
    big = {"text": "é" * 3_000_000}
    path = write(tmp_path / "a.json", json.dumps([big, 12, "x", big, None, -1.5e3], ensure_ascii=False))
    rows = [row for _, row in read(path)[1]]
    assert rows[0] == rows[3] == big
    assert [row.reason for row in (rows[1], rows[2], rows[4], rows[5])] == ["not_an_object"] * 4


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[{"a": 1}, {"a": 2', "line 1: "),
        ('[{"a": 1},\n {"a": 2}\n', "line 3: ends before ',': the file is cut"),
        ('[{"a": 1} {"a": 2}]', "expected ',', found '{'"),
        ('[{"a": 1}] x', "there is more after the list"),
        ('[{"a": 1},\n\n {"a": oh}]', "line 3: Expecting value"),
        ('{"a": [1, 2,\n', "line 2 column 1"),
        ("hello\n", "is not JSON: line 1: begins with 'h', expected a list or an object"),
        (b'[{"a": "\xff"}]', "is not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_is_broken_is_one_line(tmp_path, content, why):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_list_is_streamed(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "x" * 20_000}] * 1000))
    _, source = source_for(path)
    tracemalloc.start()
    assert sum(1 for _ in source.rows(path)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000
    assert peak < 10_000_000


# --- Parquet and CSV ----------------------------------------------------------------------------------------------


def test_parquet_rows(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"é{number}"}], "n": number} for number in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    found = read(tmp_path / "a.parquet")[1]
    assert [row for _, row in found] == rows
    assert [number for number, _ in found] == list(range(1, 601))
    (tmp_path / "a.parquet").rename(tmp_path / "b.data")
    assert read(tmp_path / "b.data")[0] == "parquet"
    content = (tmp_path / "b.data").read_bytes()
    for broken in (content[:-100], b"PAR1" + content[50:-4], b"hello"):
        with pytest.raises(InputError, match="is no readable Parquet file"):
            read(write(tmp_path / "c.parquet", broken))


def test_csv_rows(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,chosen\r\n"a\nb","say ""x"""\r\n\r\nc,d,e\r\nf\r\ng,h\r\n')
    assert reasons(path) == [(3, "ok"), (5, "wrong_columns"), (6, "wrong_columns"), (7, "ok")]
    assert read(path)[1][0][1] == {"prompt": "a\nb", "chosen": 'say "x"'}
    assert good(write(tmp_path / "a.tsv", "a\tb\n1\t2\n"), "csv") == [{"a": "1", "b": "2"}]


def test_csv_with_long_fields_and_bytes_that_are_no_utf8(tmp_path):
    long = "x" * 200_000  # longer than the csv module's own limit
    path = write(tmp_path / "a.csv", b"a,b\n" + long.encode() + b",1\n\xe9t\xe9,2\n")
    rows = read(path)[1]
    assert rows[0][1] == {"a": long, "b": "1"}
    assert (rows[1][1].reason, rows[1][1].field) == ("invalid_utf8", "a")
    with pytest.raises(InputError, match="is not CSV"):
        read(write(tmp_path / "b.csv", 'a,b\n"never closed,1\n'))
    with pytest.raises(InputError, match="no column names"):
        read(write(tmp_path / "c.csv", "\n\n1,2\n"))


def test_kinds_of_values_in_words():
    assert [kind_of(value) for value in (False, 3, 2.5, "x", {}, b"")] == [
        "a boolean (false)",
        "a number (3)",
        "a number (2.5)",
        "text",
        "an object",
        "a bytes",
    ]
