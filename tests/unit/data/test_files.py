"""Files of rows as people have them: what can be read is read as it was meant, anything else is explained with the right cure."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.data.loading import load_rows
from nemo_rl.errors import DatasetError

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": 'say "hi", twice', "answer": "hi\nhi"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo; you"}]


def refused(path: Path, *words: str) -> str:
    with pytest.raises(DatasetError) as caught:
        load_rows(path)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_csv(separator: str, rows: list[dict[str, str]], folder: Path, name: str = "a.csv") -> Path:
    with (folder / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


# --- CSV


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_csv_is_that_of_its_first_line(tmp_path: Path, separator: str) -> None:
    assert load_rows(as_csv(separator, ROWS, tmp_path)) == ROWS


def test_a_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b", "answer": "c"}]
    assert load_rows(as_csv("\t", rows, tmp_path, "a.tsv")) == rows
    assert load_rows(file(tmp_path, "one.tsv", "text,with comma\nx,y\n")) == [{"text,with comma": "x,y"}]


def test_a_single_column_may_hold_any_separator(tmp_path: Path) -> None:
    assert load_rows(file(tmp_path, "a.csv", 'text\n"a, b; c"\n')) == [{"text": "a, b; c"}]


@given(rows=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"))] * 2), min_size=1))
def test_whatever_python_writes_as_csv_reads_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    table = [{"prompt": a, "answer": b} for a, b in rows]
    assert load_rows(as_csv(",", table, tmp_path_factory.mktemp("csv"))) == table


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('prompt,completion\na,"he said hi\nb,two\nc,three\n', 2),
        ('prompt,completion\na,one\nb,two\n"c,three\n', 4),
        ('prompt,completion\na,"one\nline"\nb,"two\n\n', 4),
    ],
)
def test_a_quote_that_is_never_closed_is_found_where_it_opens(tmp_path: Path, text: str, line: int) -> None:
    refused(file(tmp_path, "a.csv", text), f"quote in line {line} of", "never closed")


def test_a_quote_that_another_one_closes_much_later_is_found(tmp_path: Path) -> None:
    text = 'prompt,completion\na,"he said hi\nb,two\nc,"three"\n'
    refused(file(tmp_path, "a.csv", text), "behind a closing quote", "begins in line 2", "close each quote")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,answer\na,b\nc\n", ["fewer cells than columns in line 3", "expected 2", "add the missing cells"]),
        ("prompt;answer\na;b;c\n", ["more cells than columns in line 2", "quotes around cells", "semicolons"]),
        ("prompt,answer,prompt\na,b,c\n", ["column 'prompt' twice", "rename one"]),
    ],
)
def test_cells_that_fit_no_column_are_explained(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(file(tmp_path, "a.csv", text), *words)


def test_a_conversation_as_json_in_a_cell_is_read_as_one(tmp_path: Path) -> None:
    path = as_csv(",", [{"messages": json.dumps(CHAT)}, {"messages": json.dumps(CHAT[:1])}], tmp_path)
    assert load_rows(path) == [{"messages": CHAT}, {"messages": CHAT[:1]}]
    lists = [{"text": "[1, 2]"}, {"text": '[{"a": 1}]'}, {"text": '[{"role": broken'}]
    assert load_rows(as_csv(",", lists, tmp_path, "b.csv")) == lists, "what is no conversation stays text"


def test_a_cell_may_be_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    rows = [{"text": "x" * 200_000}]
    assert load_rows(as_csv(",", rows, tmp_path)) == rows


# --- encodings, compression, and what is no data at all


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_encodings_that_say_what_they_are(tmp_path: Path, encoding: str, name: str) -> None:
    text = {"a.csv": "prompt,answer\né,ü\n", "a.jsonl": '{"prompt": "é", "answer": "ü"}\n'}
    text["a.json"] = f"[{text['a.jsonl']}]"
    assert load_rows(file(tmp_path, name, text[name].encode(encoding))) == [{"prompt": "é", "answer": "ü"}]


def test_a_file_of_windows_gets_the_command_that_converts_it(tmp_path: Path) -> None:
    refused(file(tmp_path, "a.csv", "prompt\né\n".encode("cp1252")), "no UTF-8", "iconv -f WINDOWS-1252 -t UTF-8 a.csv")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_gzip_is_read(tmp_path: Path, name: str) -> None:
    plain = name.removesuffix(".gz")
    path = as_csv(",", ROWS, tmp_path) if plain.endswith("csv") else tmp_path / plain
    if plain.endswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif plain.endswith("json"):
        path.write_text(json.dumps(ROWS))
    packed = gzip.compress(path.read_bytes())
    assert load_rows(file(tmp_path, name, packed)) == ROWS
    refused(file(tmp_path, f"cut-{name}", packed[: len(packed) // 2]), "cut off or damaged", "gzip -t")
    refused(file(tmp_path, f"misnamed-{plain}", packed), "compressed with gzip", f"rename it to misnamed-{plain}.gz")


def test_a_pointer_of_git_lfs_is_not_taken_for_data(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
    for name in ("a.csv", "a.jsonl", "a.json", "a.parquet"):
        refused(file(tmp_path, name, pointer), "pointer of Git LFS", "git lfs pull")


def test_a_web_page_is_not_taken_for_data(tmp_path: Path) -> None:
    for text in (
        "\n<!DOCTYPE html><html>404</html>",
        "\ufeff<html>",
        "<!-- x --><html>",
        '<?xml version="1.0"?><Error/>',
    ):
        for name in ("a.csv", "a.jsonl", "a.parquet"):
            refused(file(tmp_path, name, text), "web page", "download the file")


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("a.jsonl", b"PAR1\x15\x04", ["Parquet", "rename it to a.parquet"]),
        ("a.parquet", b'{"prompt": "a"}\n', ["lines of JSON", "rename it to a.jsonl"]),
        ("a.csv", b'{"prompt": "a"}\n', ["lines of JSON", "rename it to a.jsonl"]),
        ("a.tsv", b'[\n {"prompt": "a"}]', ["a list in JSON", "rename it to a.json"]),
        ("a.csv", b"PK\x03\x04\x14", ["sheet of Excel", "save the sheet as CSV"]),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\x00", ["zstd", "zstd -d"]),
        ("a.jsonl", b"BZh91", ["bzip2", "bunzip2"]),
        ("a.json", '[{"prompt": "a"}]'.encode("utf-16-le"), ["UTF-16 without saying so", "iconv -f UTF-16LE"]),
    ],
)
def test_a_file_under_the_name_of_another_format_is_told_by_its_first_bytes(
    tmp_path: Path, name: str, start: bytes, words: list[str]
) -> None:
    refused(file(tmp_path, name, start), *words)


def test_excels_line_that_names_the_separator_is_no_header(tmp_path: Path) -> None:
    assert load_rows(file(tmp_path, "a.csv", 'sep=;\r\nprompt;answer\r\n"a;b";c\r\n')) == [
        {"prompt": "a;b", "answer": "c"}
    ]


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("a.xlsx", "read_excel('a.xlsx')"),
        ("a.zip", "unpack it"),
        ("a.jsonl.zst", "only .gz"),
        ("a.txt", '{"text": "..."}'),
        ("a.pkl", "pickles are not read"),
        ("a.arrow", "save_to_disk"),
        ("a.rows", "convert the file"),
    ],
)
def test_files_of_other_kinds_get_the_cure_for_their_kind(tmp_path: Path, name: str, cure: str) -> None:
    refused(file(tmp_path, name, b"x"), "expected .jsonl, .json, .parquet, .csv", cure)


# --- JSON


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"prompt": {"0": "a", "1": "b"}, "answer": {"0": "c", "1": "d"}}, ['orient="columns"', 'orient="records"']),
        ({"0": {"prompt": "a"}, "1": {"prompt": "b"}}, ['orient="index"', 'orient="records"']),
        ({"columns": ["prompt"], "index": [0], "data": [["a"]]}, ['orient="split"', 'orient="records"']),
        ({"schema": {}, "data": [{"prompt": "a"}]}, ['orient="table"', 'orient="records"']),
        ({"prompt": ["a", "b"], "answer": ["c", "d"]}, ["one list for each column ('prompt', 'answer')", "records"]),
        ({"data": [{"prompt": "a"}, {"prompt": "b"}]}, ["rows under the key 'data'", "'data' alone"]),
        ({"version": 1, "rows": [{"prompt": "a"}]}, ["rows under the key 'rows'"]),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_table_that_is_no_list_of_rows_is_told_by_its_form(
    tmp_path: Path, value: Any, words: list[str], indent: int | None
) -> None:
    said = refused(file(tmp_path, "a.json", json.dumps(value, indent=indent)), *words)
    assert "str()" not in said


def test_one_row_alone_is_a_row(tmp_path: Path) -> None:
    for row in (
        {"messages": CHAT},
        {"prompt": "a", "tools": [{"name": "f"}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ):
        assert load_rows(file(tmp_path, "a.json", json.dumps(row))) == [row]


def test_a_list_of_rows_under_the_name_jsonl_is_read(tmp_path: Path) -> None:
    assert load_rows(file(tmp_path, "a.jsonl", json.dumps(ROWS))) == ROWS
    assert load_rows(file(tmp_path, "b.jsonl", json.dumps(ROWS, indent=2))) == ROWS
    assert load_rows(file(tmp_path, "c.jsonl", "\n\n" + json.dumps(ROWS))) == ROWS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 'a'}", ["Python's quotes", "json.dumps"]),
        ('{"prompt": "a", "ans', ["middle of a row"]),
        ('{"prompt": "a"},', ["the comma at the end"]),
        ("# a comment", ["take out lines that are none"]),
        ('{"prompt": "a", "prompt": "b"}', ["the key 'prompt' twice in one object"]),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", ["nested too deeply"]),
        ('{"prompt": ' + "9" * 5000 + "}", ["a number that cannot be read"]),
    ],
)
def test_lines_that_json_chokes_on_or_would_shorten_are_explained(tmp_path: Path, line: str, words: list[str]) -> None:
    path = file(tmp_path, "a.jsonl", f'{{"prompt": "first"}}\n{line}\n')
    refused(path, "in line 2 of", *words)
    refused(file(tmp_path, "a.json", f"[{line}]"), "a.json")


# --- Parquet, tables, folders


def test_parquet_cut_short_is_explained(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    refused(file(tmp_path, "cut.parquet", whole[:-20]), "no whole Parquet")


def test_tables_in_memory_are_read_as_rows() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["a", None], "score": [1.0, float("nan")], "messages": [CHAT, CHAT]})
    wanted = [{"prompt": "a", "score": 1.0, "messages": CHAT}, {"prompt": None, "score": None, "messages": CHAT}]
    assert load_rows(frame) == wanted
    assert load_rows(pyarrow.Table.from_pylist(ROWS)) == ROWS


def test_tables_lose_no_column() -> None:
    pandas = pytest.importorskip("pandas")
    twice = pandas.DataFrame([["q", "a", "b"]], columns=["prompt", "completion", "completion"])
    for table in (twice, pyarrow.table([["q"], ["a"]], names=["completion", "completion"])):
        with pytest.raises(DatasetError, match=r"the column 'completion' twice in the table.*rename"):
            load_rows(table)
    indexed = pandas.DataFrame({"prompt": ["q"], "completion": ["a"]}).set_index("prompt")
    assert load_rows(indexed) == [{"prompt": "q", "completion": "a"}]


def test_a_transform_of_the_user_makes_the_rows() -> None:
    loaded = datasets.Dataset.from_list(ROWS)
    assert load_rows(loaded.with_format("numpy")) == ROWS
    changed = loaded.with_transform(lambda batch: {"prompt": [text.upper() for text in batch["prompt"]]})
    assert load_rows(changed) == [{"prompt": row["prompt"].upper()} for row in ROWS]


def test_arrays_in_the_cells_of_a_data_frame_become_lists(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    assert load_rows(pandas.read_parquet(tmp_path / "a.parquet")) == [{"messages": CHAT}]


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved")) == load_rows(tmp_path / "saved") == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", "several splits", str(tmp_path / "splits" / "train"))
    file(tmp_path, "a.csv", "prompt\na\n")
    refused(tmp_path, "found a folder", str(tmp_path / "a.csv"))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_list_of_files_is_explained(tmp_path: Path, kind: type) -> None:
    paths = [kind(as_csv(",", ROWS, tmp_path, name)) for name in ("a.csv", "b.csv")]
    with pytest.raises(DatasetError, match=r"found a list of files .*; expected one file or a list of rows"):
        load_rows(paths)


def test_several_data_sets_at_once_are_explained() -> None:
    made = datasets.Dataset.from_list(ROWS)
    with pytest.raises(DatasetError, match=r"found a tuple of 2 data sets; .* validation_dataset="):
        load_rows((made, made))


@pytest.mark.parametrize("files", [{}, {"notes.md": "text"}])
def test_a_folder_that_is_no_data_set_is_explained(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        DatasetError, match=r"found a folder at .* that cannot be read as a data set .* name one of its files"
    ):
        load_rows(str(tmp_path))
