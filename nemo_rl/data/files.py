"""Reading the rows of a file: JSON Lines, JSON, Parquet and CSV as people have them, compressed or not, and folders of `save_to_disk`."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nemo_rl.errors import DatasetError
from nemo_rl.job import names, uris

ROWS = 'a list of rows such as [{"prompt": "2+2=", "answer": "4"}]'
PARQUET_BATCH_ROWS = 1024
"""Rows of a Parquet file that are held as Python objects at a time."""
_LFS = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--", b"<?xml")
_OTHER_FORMATS = {
    b"PK\x03\x04": ("a zip archive or a sheet of Excel", "unpack it, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("a file compressed with zstd", "unpack it first, with: zstd -d"),
    b"BZh": ("a file compressed with bzip2", "unpack it first, with: bunzip2"),
    b"\xfd7zXZ\x00": ("a file compressed with xz", "unpack it first, with: unxz"),
    b"ARROW1": ("a file of Arrow", "write it as Parquet"),
    b"%PDF": ("a PDF", "write its text as rows"),
}
"""What the first bytes of files say that is not read under any name, and the cure."""
_LARGEST_CELL = 2**31 - 1
"""Characters that a cell of a .csv may hold; Python's default of 131,072 is less than a long document."""


def is_local(source: str) -> bool:
    """Whether a text that names a data set means something on this machine rather than a name on the hub."""
    if uris.is_readable(source):
        return True
    path = Path(source).expanduser()
    return _suffix(path) in _READERS or path.is_file() or _is_saved_dataset(path)


def read_file(name: str) -> Iterator[Any]:
    """The rows of a file, in order, without holding all of them. Raises `DatasetError` for what cannot be read as rows.

    Addresses of object stores and web servers are read through copies on this machine; a pattern or a folder is all its files.
    """
    if uris.is_readable(name):
        from nemo_rl.data.remote import local_files

        return itertools.chain.from_iterable(read_file(str(file)) for file in local_files(name))
    if "://" in name and not name.startswith(("pvc://", "bundle://")):
        raise DatasetError(f"found the path {name!r}: {uris.problem(name, uris.READABLE)}")
    if "://" in name:
        raise DatasetError(
            f"found the path {name}, which only means something within a pod; expected a local file; download it "
            "first, or run the job on the cluster"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DatasetError(
            f"found no file at {path}; expected a {SUFFIXES} file; check the path (for a hub data set: its name)"
        )
    reader = _READERS.get(_suffix(path))
    if reader is None:
        shown = path.suffix or "nothing"
        raise DatasetError(f"found a file ending in {shown!r} ({path}); expected {SUFFIXES}; {_convert(path)}")
    _refuse_what_only_looks_like_data(path)
    return reader(path)


def _suffix(path: Path) -> str:
    """The ending that tells the format: of data.jsonl.gz it is .jsonl."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] == ".gz":
        endings.pop()
    return endings[-1] if endings else ""


def _convert(path: Path) -> str:
    """How a file of a format that is not read becomes one that is."""
    ending = path.suffix.lower()
    if ending in (".xlsx", ".xls", ".ods"):
        return f'save it as CSV, or convert it with pandas.read_excel({path.name!r}).to_json("rows.jsonl", orient="records", lines=True)'
    if ending in (".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz"):
        return "unpack it first (only .gz is read as it is)"
    if ending == ".txt":
        return 'write each text as a line {"text": "..."} of a .jsonl file'
    if ending in (".arrow", ".feather"):
        return "pass the folder that save_to_disk wrote, or write it as Parquet"
    if ending in (".pkl", ".pickle", ".pt"):
        return "write the rows as .jsonl; pickles are not read, since reading one runs its code"
    if ending in (".yaml", ".yml"):
        return "write the rows as .jsonl"
    return "convert the file"


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """The text of a file: UTF-8 with or without a byte order mark, or UTF-16 with one, as Excel's "Unicode text"."""
    with _open_bytes(path) as head:
        start = head.read(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline=newline)


def _refuse_what_only_looks_like_data(path: Path) -> None:
    """A pointer of git-lfs, a web page, an empty file: what stands in a data file's place when fetching it went wrong."""
    try:
        with _open_bytes(path) as stream:
            head = stream.read(512)
    except (EOFError, gzip.BadGzipFile) as error:
        raise _broken_gzip(path, error) from error
    except OSError as error:
        raise DatasetError(
            f"found {path} unreadable ({error.strerror or error}); expected a {SUFFIXES} file that you may read; check "
            "its permissions"
        ) from error
    if head.startswith(_LFS):
        raise DatasetError(
            f"found a pointer of Git LFS in {path} instead of the data; expected {SUFFIXES}; fetch the data with: "
            "git lfs pull"
        )
    bare = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if bare.lower().startswith(_PAGES):
        raise DatasetError(
            f"found a web page in {path}; expected {SUFFIXES}; download the file itself (on a hub: the link called "
            '"raw" or "resolve")'
        )
    if head.startswith(b"\x1f\x8b"):
        raise DatasetError(
            f"found {path} compressed with gzip; expected a name that says so; rename it to {path.name}.gz"
        )
    for mark, (what, cure) in _OTHER_FORMATS.items():
        if head.startswith(mark):
            raise DatasetError(f"found {what} in {path}; expected {SUFFIXES}; {cure}")
    _refuse_another_name(path, head, bare)


def _refuse_another_name(path: Path, head: bytes, bare: bytes) -> None:
    """A file whose first bytes are those of another format that is read too, or of text in another encoding."""
    ending, is_json = _suffix(path), bare.startswith((b'{"', b'[{"', b"[\n", b"{\n", b"[\r\n", b"{\r\n"))
    other = None
    if head.startswith(b"PAR1"):
        other = ("Parquet", ".parquet")
    elif is_json:
        other = ("a list in JSON", ".json") if bare.startswith(b"[") else ("lines of JSON", ".jsonl")
    tabular = ending in (".csv", ".tsv", ".parquet")
    if other is not None and (tabular if is_json else ending != ".parquet") and ending != other[1]:
        raise DatasetError(
            f"found {other[0]} in {path}; expected what its name says ({ending}); rename it to {path.stem}{other[1]}"
        )
    if ending != ".parquet" and not head.startswith(tuple(_BYTE_ORDER_MARKS)) and b"\x00" in head[:4]:
        wide = "UTF-16LE" if head[1:2] == b"\x00" else "UTF-16BE"
        raise DatasetError(
            f"found text in {path} that is in UTF-16 without saying so; expected UTF-8; convert it with: iconv -f {wide} "
            f"-t UTF-8 {path.name}"
        )


def _not_text(path: Path, error: UnicodeDecodeError) -> DatasetError:
    return DatasetError(
        f"found bytes in {path} that are no UTF-8 ({error.reason}); expected UTF-8; convert the file, for a file of "
        f"Windows with: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
    )


# --- JSON


def _read_jsonl(path: Path) -> Iterator[Any]:
    with _open_text(path) as lines:
        try:
            first = True
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if first and line.lstrip().startswith("["):
                    # a list of rows, under the name of lines of rows
                    yield from _read_json(path)
                    return
                first = False
                yield _parsed(line, path, number)
        except UnicodeDecodeError as error:
            raise _not_text(path, error) from error
        except (EOFError, gzip.BadGzipFile) as error:
            raise _broken_gzip(path, error) from error


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return _loads(line)
    except json.JSONDecodeError as error:
        shown = line.strip()
        raise DatasetError(
            f"found unreadable JSON in line {number} of {path} ({error.msg} at column {error.colno}: "
            f"{shown[:60]!r}); expected one JSON object in each line; {_json_cure(shown)}"
        ) from error
    except _Unreadable as problem:
        raise DatasetError(
            f"found {problem} in line {number} of {path}; expected one JSON object in each line; correct the line"
        ) from problem


def _json_cure(line: str) -> str:
    if line.startswith("{'") or line.startswith("[{'"):
        return "these are Python's quotes: write each row with json.dumps(row), not with str(row)"
    if not line.startswith(("{", "[")):
        return "a row begins with {: take out lines that are none (comments, a message of a server), or rename a table to .csv"
    if line.endswith(("},", "],")):
        return "take the comma at the end of each line away, or put all rows into one list ([...])"
    if not line.endswith(("}", "]")):
        return "the line ends in the middle of a row: write the file anew, one row a line"
    return "correct the line"


class _Unreadable(ValueError):
    """What Python's JSON reader takes or chokes on although no row can be meant by it; its text says what was found."""


def _loads(text: str) -> Any:
    """`json.loads` that neither drops the first of two equal keys nor fails on nesting with an error of its own."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise _Unreadable("values that are nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except _Unreadable:
        raise
    except ValueError as error:  # a number of more digits than Python converts
        raise _Unreadable(f"a number that cannot be read ({str(error)[:80]})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Unreadable(f"the key {twice!r} twice in one object")
    return found


def _read_json(path: Path) -> Iterator[Any]:
    try:
        with _open_text(path) as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise _broken_gzip(path, error) from error
    if not text.strip():
        return iter(())
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):
            # One object in each line, under the name .json: the hub's own habit.
            return _read_jsonl(path)
        raise DatasetError(
            f"found unreadable JSON in line {error.lineno} of {path} ({error.msg}); expected a list of rows; correct "
            "the file"
        ) from error
    except _Unreadable as problem:
        raise DatasetError(f"found {problem} in {path}; expected a list of rows; correct the file") from problem
    if isinstance(value, list):
        return iter(value)
    if isinstance(value, dict) and not (shape := _not_a_row(value)) and "\n" not in text.strip():
        return iter([value])
    if isinstance(value, dict) and shape:
        raise DatasetError(f"found {shape[0]} in {path}; expected {ROWS}; {shape[1]}")
    raise DatasetError(
        f"found {type(value).__name__} at the top of {path}; expected a list of rows; put the rows into a list"
    )


def _not_a_row(value: dict[str, Any]) -> tuple[str, str] | None:
    """What a single object at the top of a file is, and its cure, where it is a whole table and not one row."""
    records = 'write one row after the other, with pandas: df.to_json(path, orient="records")'
    cells = list(value.values())
    if {"columns", "data"} <= value.keys() and isinstance(value["data"], list):
        return 'a table of pandas (orient="split")', records
    if {"schema", "data"} <= value.keys() and isinstance(value["data"], list):
        return 'a table of pandas (orient="table")', records
    if cells and all(isinstance(cell, dict) and cell for cell in cells):
        if all(key.lstrip("-").isdigit() for cell in cells for key in cell):
            return 'columns of pandas (its default, orient="columns")', records
        if all(key.lstrip("-").isdigit() for key in value):
            return 'rows by number (pandas, orient="index")', records
    lists = [name for name, cell in value.items() if isinstance(cell, list) and cell]
    of_rows = [
        name for name in lists if all(isinstance(row, dict) for row in value[name]) and not _is_chat(value[name])
    ]
    if of_rows and not any(isinstance(cell, str) for cell in cells):
        return f"the rows under the key {of_rows[0]!r}", f"keep the list under {of_rows[0]!r} alone"
    plain = [name for name in lists if not any(isinstance(item, (dict, list)) for item in value[name])]
    if len(plain) > 1 and len(plain) == len(value) and len({len(value[name]) for name in plain}) == 1:
        return f"one list for each column ({', '.join(map(repr, plain[:4]))})", records
    return None


def _is_chat(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)


def _broken_gzip(path: Path, error: Exception) -> DatasetError:
    return DatasetError(
        f"found {path} cut off or damaged ({error}); expected a whole .gz file; fetch it again (gzip -t checks it)"
    )


# --- CSV


def _read_csv(path: Path) -> Iterator[Any]:
    """Rows of text. The separator is that of the first line; a cell that holds a conversation as JSON is read as one."""
    csv.field_size_limit(_LARGEST_CELL)
    try:
        with _open_text(path, newline="") as lines:
            header = lines.readline()
            told = header.strip("\r\n\ufeff").lower().removeprefix("sep=") if header.lower().startswith("sep=") else ""
            separator = "\t" if _suffix(path) == ".tsv" else _separator(header)
            if told in _NAMES:  # Excel's way of saying it, in a line of its own
                separator = told
            else:
                lines.seek(0)
            yield from _csv_rows(csv.reader(lines, delimiter=separator, strict=True), path, separator)
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise _broken_gzip(path, error) from error


def _csv_rows(reader: Any, path: Path, separator: str) -> Iterator[dict[str, Any]]:
    columns: list[str] | None = None
    begin = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _broken_csv(path, begin, reader.line_num, separator, error) from error
        if not cells:
            pass  # an empty line
        elif columns is None:
            columns = _header(cells, path)
        elif len(cells) != len(columns):
            more = len(cells) > len(columns)
            raise DatasetError(
                f"found {'more' if more else 'fewer'} cells than columns in line {begin} of {path} ({len(cells)} "
                f"instead of {len(columns)}); expected {len(columns)}; "
                + (
                    f"put double quotes around cells that contain {_NAMES[separator]}"
                    if more
                    else "add the missing cells, empty ones if there is no value"
                )
            )
        else:
            yield {column: _cell(cell) for column, cell in zip(columns, cells, strict=True)}
        begin = reader.line_num + 1


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def _separator(header: str) -> str:
    """What separates the cells of a first line: a comma, unless there is none and another separator stands there."""
    outside = "".join(header.split('"')[::2])
    return "," if "," in outside else max(";\t|", key=outside.count) if any(c in outside for c in ";\t|") else ","


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DatasetError(
            f"found the column {twice!r} twice in {path}; expected each name once in the first line; rename one of them"
        )
    return names


def _broken_csv(path: Path, begin: int, line: int, separator: str, error: csv.Error) -> DatasetError:
    if "end of data" in str(error):
        return DatasetError(
            f"found a quote in line {begin} of {path} that is never closed, so that everything to the end of the file "
            "would be one cell; expected a closing quote; close it, or write a quote within a cell twice"
        )
    if "expected after" in str(error):
        return DatasetError(
            f"found text behind a closing quote in line {line} of {path}"
            + (f" (in the cell that begins in line {begin})" if line != begin else "")
            + f"; expected {_NAMES[separator]} between cells; write a quote within a cell twice, and close each quote"
        )
    return DatasetError(
        f"found an unreadable line {line} in {path} ({error}); expected cells separated by {_NAMES[separator]}; "
        "correct the file"
    )


def _cell(text: str) -> Any:
    """A cell's text; where it is a conversation written as JSON, as exported tables hold it, the conversation."""
    if text.startswith(("[{", "[ {")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, list) and _is_chat(value):
            return value
    return text


# --- Parquet, and folders of the datasets library


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        source = pyarrow.parquet.ParquetFile(path)
        for batch in source.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            yield from batch.to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DatasetError(
            f"found a file that is no whole Parquet ({path}: {error}); expected Parquet; write it anew"
        ) from error


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_folder(path: Path) -> Iterator[Any]:
    """The rows of a folder that `datasets.Dataset.save_to_disk` wrote."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        shown = ", ".join(str(path / split) for split in splits)
        raise DatasetError(
            f"found several splits in the folder {path}; expected one data set; name one of its folders: {shown}"
        )
    if not _is_saved_dataset(path):
        files = sorted(p.name for p in path.iterdir() if _suffix(p) in _READERS)
        cure = f"name one file, such as {path / files[0]}" if files else f"put a {SUFFIXES} file there and name it"
        raise DatasetError(f"found a folder at {path}; expected a file, or a folder that save_to_disk wrote; {cure}")
    import datasets

    return iter(datasets.load_from_disk(str(path)).with_format(None))


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
assert tuple(_READERS) == names.DATA_SUFFIXES
SUFFIXES = ".jsonl, .json, .parquet, .csv"
