import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedkola.errors import DataError, PlanError
from fedkola.evaluation.tasks.tables import read

TEXTS = ["first, with a comma", 'second "quoted"', "third\nin two lines"]


def write(folder: Path, name: str) -> Path:
    """The same three records in the format of the name."""
    path = folder / name
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        content = "".join(json.dumps({"text": t, "label": "A"}) + "\n" for t in TEXTS).encode()
    elif kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": TEXTS, "label": ["A"] * 3}), sink)
        content = sink.getvalue().to_pybytes()
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [f"text{mark}label"]
        lines += ['"' + t.replace('"', '""') + f'"{mark}A' for t in TEXTS]
        content = "\r\n".join(lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_format_gives_the_same_columns(tmp_path, suffix, packed):
    table = read(write(tmp_path, f"notes.{suffix}{packed}"))

    assert table.columns == {"text": TEXTS, "label": ["A"] * 3}
    assert table.stem == "notes"
    assert len(table) == 3


def test_rows_are_numbered_as_in_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\u2028lines"}\n', encoding="utf-8")

    assert read(path).lines == [1, 3]


def test_a_field_absent_from_one_object_is_null_there(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "label": "A"}\n')

    assert read(path).columns["label"] == [None, "A"]


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\none,A\n")

    assert list(read(path).columns) == ["text", "label"]


def test_a_long_document_fits_a_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")

    assert len(str(read(path).columns["text"][0])) == 300_000


def test_other_encodings_are_read_when_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text\nMénière\n".encode("cp1252"))

    assert read(path, encoding="cp1252").columns["text"] == ["Ménière"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.csv", b"text,label\n", "has no records"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is a JSON list; give one object a line"),
        ("a.csv", "text\nMénière\n".encode("cp1252"), r"byte 6 is 0xe9 .*set task.encoding"),
        ("a.csv", "text\nx\n".encode("utf-16"), "such as utf-16"),
        ("a.csv", b"text,label\none,A,B\n", "line 2 has 3 fields and the header has 2"),
        ("a.csv", b"text,label\none\n", "line 2 has 1 fields"),
        ("a.csv", b'text,label\n"one,A\n', "line 2 is malformed"),
        ("a.csv", b"text,text\none,A\n", "names a column twice"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-4], "not a whole gzip file"),
        ("a.xlsx", b"x", "give a file ending in .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_a_defect_is_named_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=message):
        read(path)


def test_an_absent_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"is a folder; give a file, or a pattern"):
        read(tmp_path / "folder.csv")


def test_an_encoding_that_does_not_exist_is_a_mistake_of_the_plan(tmp_path):
    with pytest.raises(PlanError, match="'utf-9' is no encoding"):
        read(write(tmp_path, "a.csv"), encoding="utf-9")


def test_a_missing_column_names_those_found_and_the_nearest(tmp_path):
    table = read(write(tmp_path, "a.csv"))

    with pytest.raises(
        DataError,
        match=r"no column 'txt'; its columns are text, label; nearest is text; set task.text",
    ):
        table.column("txt", "task.text")
