import json

import pytest

from horizon.config.schema import OnBadData
from horizon.data.skipping import BadRecords
from horizon.data.tables import TABLES, read_records
from horizon.errors import DataError

ROWS = [{"text": 'one, "quoted"\nline'}, {"text": "é 😀"}, {"text": ""}]


def records(file, on_error="stop"):
    bad = BadRecords(OnBadData(on_error))
    return list(read_records(file, bad)), bad


def write(file, rows):
    """The same records in the format that the extension names."""
    suffix = file.suffix
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
        file.write_text(f"n{mark}text\n" + "".join(f"{n}{mark}{text}\n" for n, text in enumerate(quoted)), newline="")
    else:
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


@pytest.mark.parametrize("suffix", TABLES)
def test_every_kind_of_table_gives_the_same_records_in_order(tmp_path, suffix):
    file = tmp_path / f"f{suffix}"
    write(file, ROWS)
    found, bad = records(file)
    assert [record.fields["text"] for record in found] == [row["text"] for row in ROWS]
    assert bad.count == 0 and all(record.where.startswith(f"{file}:") for record in found)


def test_lines_are_counted_from_one_blank_ones_too(tmp_path):
    file = tmp_path / "f.jsonl"
    write(file, ROWS)
    assert [record.where for record in records(file)[0]] == [f"{file}:{line}" for line in (1, 3, 5)]


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    file = tmp_path / "f.json"
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [record.fields["text"] for record in records(file)[0]] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', r"f\.jsonl:3: not JSON \(.* at column \d+\)"),
        (b"[]", r"f\.jsonl:3: expected an object with fields, found a list"),
        (b'{"messages": "\xff"}', r"f\.jsonl:3:1: not UTF-8 text"),
        (b"[" * 100_000, r"f\.jsonl:3: "),
    ],
)
def test_a_line_that_is_no_record_is_named_or_left_out_and_counted(tmp_path, line, reason):
    file = tmp_path / "f.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n[\n')
    with pytest.raises(DataError, match=reason + r".*\(data\.on_error=skip leaves such records out\)"):
        records(file)
    found, bad = records(file, "skip")
    assert [record.fields["text"] for record in found] == ["a", "b"]
    assert bad.count == 2 and bad.first.startswith(f"{file}:3:")


def test_a_csv_line_with_other_columns_is_named(tmp_path):
    file = tmp_path / "f.csv"
    file.write_text("text,n\na,1\nb\nc,3,4\nd,4\n")
    with pytest.raises(DataError, match=r"f\.csv:3: 1 values, but the first line names 2 columns"):
        records(file)
    found, bad = records(file, "skip")
    assert [record.fields["text"] for record in found] == ["a", "d"] and bad.count == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("f.json", b"[{}, ]", r"f\.json:1: not JSON"),
        ("f.csv", b'a,b\n"x', r"f\.csv:\d: not CSV"),
        ("f.parquet", b"PAR1 not", r"f\.parquet: not Parquet"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_named_whatever_is_skipped(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        records(tmp_path / name, "skip")
