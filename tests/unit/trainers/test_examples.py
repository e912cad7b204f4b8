"""The six documented examples run as they stand: the folders that their model and data set names mean lie beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from documented import EXAMPLES, example, helpsteer2, openmath, write_models, write_rows


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_models(folder)
    write_rows(folder / "nvidia" / "HelpSteer2", "train", helpsteer2(24))
    write_rows(folder / "nvidia" / "OpenMathInstruct-2", "train_1M", openmath(48))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("heading", EXAMPLES)
def test_documented_example_trains(
    heading: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Qwen", "nvidia"):
        (tmp_path / name).symlink_to(hub / name)
    (tmp_path / "example.py").write_text(example(heading))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMO_RL_BACKEND", "local")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    result = runpy.run_path("example.py", run_name="__main__")["result"]

    from transformers import AutoModelForCausalLM

    trained = [row for row in result.history if row["step"] > 0]  # with validation data there is a step 0
    assert result.total_steps == len(trained) >= 1
    assert result.metrics["grad_norm"] > 0 or heading == "Full configuration"
    AutoModelForCausalLM.from_pretrained(result.checkpoint_path)
    assert "step=1/" in capsys.readouterr().out
