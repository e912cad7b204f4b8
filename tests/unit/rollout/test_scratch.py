"""What a killed process leaves below the temporary folder, weights of the size of a model, is removed by the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.rollout.vllm import scratch

MAKE = "import sys; from nemo_rl.rollout.vllm import scratch; print(scratch.make('weights-'), flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch.tempfile, "tempdir", None)


def test_folders_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "weights-of-somebody").mkdir()
    (tmp_path / "others").mkdir()
    processes = [
        subprocess.Popen([sys.executable, "-c", MAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [Path(process.stdout.readline().strip()) for process in processes if process.stdout]
    for folder in folders:
        (folder / "model.safetensors").write_bytes(b"x" * 100)
    processes[0].kill()
    processes[0].wait()
    mine = scratch.make("weights-")
    assert not folders[0].exists()
    assert (folders[1] / "model.safetensors").exists(), "its process lives"
    scratch.make("weights-")
    assert mine.exists(), "so does this one"
    scratch.remove(mine)
    assert {path.name for path in tmp_path.iterdir()} >= {"weights-of-somebody", "others"}
    assert not mine.exists()
    for process in processes:
        process.communicate()


def test_a_folder_that_several_hold_stays_until_all_have_ended(tmp_path: Path) -> None:
    folder = tmp_path / "weights-shared"
    folder.mkdir()
    hold = f"import sys; from pathlib import Path; from nemo_rl.rollout.vllm import scratch; scratch.hold(Path({str(folder)!r})); print(1, flush=True); sys.stdin.read()"
    processes = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline()
        processes.append(process)
    for process in processes:
        scratch.remove_abandoned("weights-")
        assert folder.exists()
        process.kill()
        process.communicate()
    scratch.remove_abandoned("weights-")
    assert not folder.exists()
