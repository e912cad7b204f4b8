from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.data import DataModule, train_and_validation
from nemo_rl.data.loading import load_rows
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DatasetSpec
from unit.data import rows_of_known_sets as known

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+1=", "answer": "2"}, {"prompt": "é", "answer": "\n"}]


def write(path: Path, suffix: str) -> Path:
    path = path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n", encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif suffix == ".csv":
        path.write_text('\ufeffprompt,answer\n2+2=,4\n1+1=,2\né,"\n"\n', encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix)
    assert load_rows(str(path)) == load_rows(path) == load_rows(DatasetSpec(path=str(path))) == ROWS


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert load_rows(path) == ROWS
    path.write_text(json.dumps(ROWS[0]), encoding="utf-8")
    assert load_rows(path) == ROWS[:1]


def test_rows_from_memory_are_taken_as_they_are() -> None:
    assert load_rows(ROWS) == load_rows(DatasetSpec(inline=ROWS)) == ROWS
    assert load_rows(ROWS)[0] is ROWS[0]
    assert load_rows(datasets.Dataset.from_list(ROWS)) == ROWS
    assert load_rows(datasets.Dataset.from_list(ROWS).with_format("numpy")) == ROWS
    assert load_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset()) == ROWS
    assert load_rows(iter(ROWS)) == ROWS


def test_endless_rows_are_read_no_further_than_needed() -> None:
    assert load_rows(({"prompt": str(i)} for i in itertools.count()), needed=3) == [
        {"prompt": str(i)} for i in range(3)
    ]


def test_finite_rows_are_read_whole_whatever_is_needed() -> None:
    assert load_rows(ROWS, needed=1) == ROWS


def test_max_rows_limits_any_source(tmp_path: Path) -> None:
    assert load_rows(DatasetSpec(path=str(write(tmp_path, ".jsonl")), max_rows=2)) == ROWS[:2]


class Module(DataModule):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self) -> None:
        self.calls.append("setup")

    def train_rows(self) -> Iterator[dict[str, Any]]:
        self.calls.append("train")
        yield from ROWS

    def validation_rows(self) -> list[dict[str, Any]]:
        return ROWS[:1]


def test_data_module_is_set_up_once_before_its_rows_are_read() -> None:
    module = Module()
    assert load_rows(module) == ROWS
    assert module.calls == ["setup", "train"]
    module = Module()
    train, validation = train_and_validation(module)
    assert (load_rows(train), load_rows(validation)) == (ROWS, ROWS[:1])
    assert module.calls == ["setup", "train"]


def test_data_module_needs_only_training_rows() -> None:
    class Smallest(DataModule):
        def train_rows(self) -> list[dict[str, Any]]:
            return ROWS

    assert train_and_validation(Smallest()) == (ROWS, None)
    with pytest.raises(NotImplementedError, match="DataModule has no train_rows"):
        load_rows(DataModule())


def test_other_sources_have_no_validation_rows_of_their_own() -> None:
    assert train_and_validation("some/name") == ("some/name", None)


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hub of one data set with numbered rows; what was asked of it."""
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        if kwargs["split"].startswith("nowhere"):
            raise ValueError('Unknown split "nowhere". Should be one of ["train"].')
        if kwargs["data_dir"] == "gated":
            raise ConnectionError("401: log in")
        if kwargs["data_dir"] == "preference":
            return datasets.Dataset.from_list(known.HELPSTEER2_PREFERENCE)
        rows = datasets.Dataset.from_list([{"problem": str(i)} for i in range(100)])
        return rows.to_iterable_dataset() if kwargs["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_set_is_asked_for_with_all_that_the_spec_says(hub: list[Any]) -> None:
    assert len(load_rows(DatasetSpec(name="a/b", subset="main", split="test", data_dir="d", max_rows=5))) == 5
    assert hub == [(("a/b", "main"), {"split": "test", "data_dir": "d", "streaming": False})]


def test_hub_name_alone_is_its_training_split(hub: list[Any]) -> None:
    assert len(load_rows("a/b", needed=3)) == 100
    assert hub == [(("a/b", None), {"split": "train", "data_dir": None, "streaming": False})]


def test_huge_set_is_streamed_and_read_no_further_than_needed(hub: list[Any]) -> None:
    assert load_rows("nvidia/OpenMathInstruct-2", needed=3) == [{"problem": str(i)} for i in range(3)]
    assert hub[0][1]["streaming"] is True


def test_slice_of_a_streamed_split_is_taken_here(hub: list[Any]) -> None:
    rows = load_rows(DatasetSpec(name="nvidia/OpenMathInstruct-2", split="train_1M[10:13]"))
    assert rows == [{"problem": str(i)} for i in (10, 11, 12)]
    assert hub[0][1]["split"] == "train_1M"


def test_huge_set_without_any_limit_is_refused(hub: list[Any]) -> None:
    with pytest.raises(
        DatasetError, match=r"found no limit for nvidia/OpenMathInstruct-2, .*; set max_rows, or a split"
    ):
        load_rows("nvidia/OpenMathInstruct-2")


def test_streaming_may_be_chosen_for_any_set(hub: list[Any]) -> None:
    assert len(load_rows(DatasetSpec(name="a/b", streaming=True), needed=4)) == 4
    assert len(load_rows(DatasetSpec(name="a/b", streaming=True, max_rows=2), needed=4)) == 2


@pytest.mark.parametrize(("split", "prompts"), [("train", 3), ("validation", 1), ("val", 1), ("train[:50%]", 3)])
def test_preference_part_of_helpsteer2_is_split_by_its_column(hub: list[Any], split: str, prompts: int) -> None:
    rows = load_rows(DatasetSpec(name="nvidia/HelpSteer2", data_dir="preference", split=split))
    assert len(rows) == prompts
    assert hub[0][1]["split"].startswith("train")


def test_failure_of_the_hub_is_explained(hub: list[Any]) -> None:
    with pytest.raises(
        DatasetError,
        match=r"'a/b' from the hub \(.*split 'train'.*\): ConnectionError: 401: log in; .*; check .*HF_TOKEN",
    ):
        load_rows(DatasetSpec(name="a/b", data_dir="gated"))


def test_a_split_that_the_hub_has_not_is_told_from_other_failures(hub: list[Any]) -> None:
    with pytest.raises(DatasetError, match=r"no split 'nowhere' in the data set 'a/b': Unknown split .*; set split to"):
        load_rows(DatasetSpec(name="a/b", split="nowhere"))


def test_failure_midway_through_a_stream_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking() -> Iterator[dict[str, str]]:
        yield {"prompt": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: breaking())
    with pytest.raises(DatasetError, match="found 'a/b' unreadable midway: ConnectionError: reset by peer"):
        load_rows(DatasetSpec(name="a/b", streaming=True), needed=5)


# --- errors


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": }\n', r"unreadable JSON in line 2 of .*a\.jsonl .*; correct the line"),
        ("a.jsonl", '{"prompt": "x"}\n"y"\n', r"found str \('y'\) as row 1 of .*a\.jsonl; expected a mapping"),
        ("a.jsonl", "\n", "found no rows in .*; expected at least one"),
        ("a.json", '[{"prompt": "x"},\n', r"unreadable JSON in line \d of .*a\.json .*; expected a list of rows"),
        ("a.json", '{"data":\n[]}', "found dict at the top of .*; expected a list of rows"),
        ("a.json", "5", "found int at the top of .*; expected a list of rows"),
        ("a.json", "[1]", r"found int \(1\) as row 0 of"),
        ("a.csv", "prompt,answer\na,b,c\n", "found more cells than columns in line 2 of .*; expected 2"),
        ("a.parquet", "no parquet", "found a file that is no whole Parquet"),
    ],
)
def test_unusable_file_is_explained(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=words):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_file_of_another_encoding_is_explained(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"prompt\n\xff\n" if name == "a.csv" else b'{"prompt": "\xff"}')
    with pytest.raises(DatasetError, match=r"are no UTF-8 .*; convert the file"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.jsonl", r"found no file at missing\.jsonl; expected a \.jsonl, \.json, \.parquet, \.csv file"),
        (
            DatasetSpec(path="pvc://claim/rows.jsonl"),
            "found the path pvc://claim/rows.jsonl, which only means something",
        ),
        ([], "found no rows in the list of rows"),
        ([{"prompt": "a"}, "b"], r"found str \('b'\) as row 1 of the list of rows; expected a mapping"),
        ({"prompt": ["a"]}, "found a dict with the keys 'prompt'; expected a list of rows"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
            "found a DatasetDict with the keys 'train'",
        ),
        (5, "found int as the data set; expected a hub name, a file"),
        (None, "found NoneType as the data set"),
    ],
)
def test_unusable_source_is_explained(source: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        load_rows(source)


def test_file_of_an_unknown_kind_is_explained(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(DatasetError, match=r"found a file ending in '.txt' .*; write each text as a line"):
        load_rows(str(tmp_path / "rows.txt"))
