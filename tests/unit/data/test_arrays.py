"""Large data sets as arrays: small at rest, equal to what is tokenised at once, made once for all who ask."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_rl.data import pool, spool, token_cache
from nemo_rl.data.encode import Encoder
from nemo_rl.data.prepare import prepare
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DPOSpec, GRPOSpec, SFTSpec, TrainingSpec

MakeTokenizer = Callable[..., Any]
SETTINGS: dict[str, Any] = {"grpo": GRPOSpec(max_new_tokens=8), "sft": SFTSpec(), "dpo": DPOSpec()}


def rows_of(count: int, algorithm: str = "sft") -> list[dict[str, Any]]:
    """Rows of different lengths, some of which are left out."""
    rows = []
    for n in range(count):
        prompt = " " if n % 45 == 4 else f"question {n} " + "fox " * (n % 7)
        answers = {"chosen": f"yes {n}", "rejected": f"yes {n}" if n % 40 == 5 else f"no {n}"}
        rows.append({"prompt": prompt, **(answers if algorithm == "dpo" else {"completion": f"answer {n}"})})
    return rows


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Processes and files also for few rows; returns the cache's folder."""
    monkeypatch.setattr(pool, "PARALLEL_ROWS", 50)
    monkeypatch.setattr(pool, "CHUNK", 16)
    monkeypatch.setattr(pool, "_cpus", lambda: 2)
    monkeypatch.setattr("nemo_rl.data.prepare.CACHED_ROWS", 50)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return token_cache.cache_folder()


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.exists() else set()


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_processes_and_files_change_nothing(
    make_tokenizer: MakeTokenizer,
    templates: dict[str, str],
    algorithm: str,
    quick: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, training = make_tokenizer(templates["chatml"]), TrainingSpec(max_sequence_length=90)
    rows = rows_of(120, algorithm)
    found = prepare(algorithm, rows, tokenizer, training, SETTINGS[algorithm])
    assert isinstance(found.examples.arrays.ids, np.memmap)
    again = prepare(algorithm, rows, tokenizer, training, SETTINGS[algorithm])
    assert len(entries(quick)) == 1
    monkeypatch.setattr("nemo_rl.data.prepare.CACHED_ROWS", 10**9)
    monkeypatch.setattr(pool, "PARALLEL_ROWS", 10**9)
    plain = prepare(algorithm, rows, tokenizer, training, SETTINGS[algorithm])
    assert not isinstance(plain.examples.arrays.ids, np.memmap)
    assert list(found.examples) == list(again.examples) == list(plain.examples)
    assert found.report == again.report == plain.report
    assert found.report.dropped
    assert found.fingerprint == plain.fingerprint


def test_error_in_a_process_is_the_one_that_would_be_raised_here(make_tokenizer: MakeTokenizer, quick: Path) -> None:
    training = TrainingSpec(max_sequence_length=40, overlong_rows="error")
    rows = [*rows_of(90), {"prompt": "fox " * 99, "completion": "a"}]
    with pytest.raises(DatasetError, match=r"found \d+ tokens in usable row 88; expected at most 40"):
        prepare("sft", rows, make_tokenizer(), training, SFTSpec())
    assert entries(quick) == set(), "nothing half-made is left"


def test_killed_process_is_said(make_tokenizer: MakeTokenizer, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a process that tokenises rows was killed"):
        prepare("sft", rows_of(80), make_tokenizer(), TrainingSpec(), SFTSpec())


def test_tokens_take_few_bytes_at_rest(make_tokenizer: MakeTokenizer) -> None:
    rows = [{"prompt": "fox " * 150, "completion": "dog " * 150}] * 50
    for algorithm in ("sft", "grpo"):
        arrays = prepare(algorithm, rows, make_tokenizer(), TrainingSpec(), SETTINGS[algorithm]).examples.arrays
        assert arrays.nbytes / len(arrays.ids) < 6


def test_key_holds_all_that_decides_the_tokens(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    def key(tokenizer: Any, training: Any = None, settings: Any = None, rows: str = "rows") -> Any:
        encoder = Encoder("sft", tokenizer, training or TrainingSpec(), settings or SFTSpec())
        return token_cache.cache_key(encoder, rows)

    added = make_tokenizer()
    added.add_tokens(["fox"])
    keys = [
        key(make_tokenizer()),
        key(make_tokenizer(templates["chatml"])),
        key(make_tokenizer(templates["llama"])),
        key(make_tokenizer(adds_bos=True)),
        key(make_tokenizer(eos=None)),
        key(added),
        key(make_tokenizer(), rows="other"),
        key(make_tokenizer(), TrainingSpec(max_sequence_length=99)),
        key(make_tokenizer(), TrainingSpec(overlong_rows="truncate")),
        key(make_tokenizer(), TrainingSpec(chat_template_kwargs={"enable_thinking": False})),
        key(make_tokenizer(), settings=SFTSpec(train_on_prompt=True)),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(make_tokenizer(), TrainingSpec(max_steps=3, learning_rate=1e-3)) == keys[0]


def test_template_that_writes_the_date_is_kept_for_its_own_time_only(make_tokenizer: MakeTokenizer) -> None:
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def key() -> Any:
        return token_cache.cache_key(Encoder("sft", dated, TrainingSpec(), SFTSpec()), "rows")

    assert key() is None, "without a clock nobody knows which day it was"
    days = []
    for day in (1, 2):
        dated._nemo_rl_started = datetime.datetime(2026, 1, day)
        days.append(key())
    assert None not in days
    assert days[0] != days[1]


def test_folder_that_cannot_be_written_is_no_obstacle(
    make_tokenizer: MakeTokenizer, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    prepared = prepare("sft", rows_of(80), make_tokenizer(), TrainingSpec(), SFTSpec())
    assert not isinstance(prepared.examples.arrays.ids, np.memmap)


def test_entries_that_nobody_opens_are_removed(make_tokenizer: MakeTokenizer, quick: Path) -> None:
    prepare("sft", rows_of(60), make_tokenizer(), TrainingSpec(), SFTSpec())
    (old,) = entries(quick)
    os.utime(quick / old, (0, 0))
    prepare("sft", rows_of(61), make_tokenizer(), TrainingSpec(), SFTSpec())
    (new,) = entries(quick)
    assert new != old


RANK = """
import sys, pathlib
sys.path[:0] = sys.argv[1:3]
from conftest import build_tokenizer
from unit.data.test_arrays import rows_of
from nemo_rl.data.encode import Encoder
from nemo_rl.job.spec import SFTSpec, TrainingSpec
import nemo_rl.data.prepare as p
p.CACHED_ROWS = 50
made = Encoder.__call__
def counted(self, *arguments):
    with open(sys.argv[3], "a") as file:
        file.write("made\\n")
    return made(self, *arguments)
Encoder.__call__ = counted
examples = p.prepare("sft", rows_of(120), build_tokenizer(), TrainingSpec(), SFTSpec()).examples
print(sum(sum(e.ids) for e in examples))
"""


def test_ranks_of_a_machine_tokenise_once(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", RANK, str(here), str(here.parent.parent), str(tmp_path / "made")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {rank.communicate(timeout=300)[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(printed) == 1
    assert (tmp_path / "made").read_text().count("made") == 1


# --- rows beyond memory


@pytest.fixture
def small_spools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "GROUP", 8)
    monkeypatch.setattr(spool, "HELD", 16)


@pytest.mark.parametrize("count", [0, 7, 15, 16, 17, 24, 61])
def test_a_spool_reads_as_the_list_it_was_made_of(count: int, small_spools: None) -> None:
    items = [{"n": n, "text": "x" * n} for n in range(count)]
    found = spool.Spool(items)
    assert len(found) == count
    assert (found._file is not None) == (count >= 16), "the others are in memory"
    assert list(found) == items == list(found)
    assert [found[i] for i in range(-count, count)] == items + items
    for part in (slice(None), slice(3, 20), slice(20, 3), slice(8, 16), slice(1, None, 3), slice(None, None, -1)):
        assert found[part] == items[part], part
    with pytest.raises(IndexError):
        found[count]
    found.extend(items)
    assert list(found) == items + items


def test_what_cannot_be_written_stays_in_memory(
    small_spools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items: list[Any] = [{"n": n} for n in range(20)] + [{"f": lambda: 1}] * 30
    assert list(spool.Spool(items)) == items
    assert not caplog.records
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert list(spool.Spool(range(50))) == list(range(50))
    assert "rows are kept in memory" in caplog.text


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_rows_of_a_file_give_what_a_list_gives(
    make_tokenizer: MakeTokenizer,
    templates: dict[str, str],
    algorithm: str,
    small_spools: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = make_tokenizer(templates["chatml"])
    rows = rows_of(120, algorithm)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed, read = (
        prepare(algorithm, source, tokenizer, TrainingSpec(), SETTINGS[algorithm]) for source in (rows, str(file))
    )
    assert read.fingerprint == listed.fingerprint
    assert read.report == listed.report
    assert read.examples == listed.examples


def test_memory_does_not_grow_with_the_rows_of_a_file(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    """Python objects that exist at the same time, of four times as many rows in a file."""
    tokenizer, peaks = make_tokenizer(), []
    monkey = pytest.MonkeyPatch()
    with monkey.context() as changed:
        changed.setattr(spool, "HELD", 128)
        changed.setattr(pool, "CHUNK", 128)
        changed.setenv("XDG_CACHE_HOME", str(tmp_path))
        changed.setattr("nemo_rl.data.prepare.CACHED_ROWS", 50)
        for count in (1000, 4000):
            file = tmp_path / f"{count}.jsonl"
            with file.open("w") as stream:
                for n in range(count):
                    stream.write(json.dumps({"prompt": f"question {n}", "completion": "fox " * 50}) + "\n")
            prepare("sft", str(file), tokenizer, TrainingSpec(), SFTSpec())  # what is loaded on first use
            for entry in token_cache.cache_folder().iterdir():
                shutil.rmtree(entry, ignore_errors=True)
            tracemalloc.start()
            found = prepare("sft", str(file), tokenizer, TrainingSpec(), SFTSpec())
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(found.examples) == count
    assert peaks[1] < 1.5 * peaks[0], peaks
