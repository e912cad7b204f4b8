"""The six documented examples with model, data and output in an object store."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from documented import EXAMPLES, example, in_store, write_data, write_models
from nemo_rl.run.stored.head import read_head, read_text
from nemo_rl.storage.store import Store, walk
from storage.server import S3

HUB = "s3://bucket/hub"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_models(folder)
    write_data(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("heading", EXAMPLES)
def test_a_documented_example_trains_from_and_to_a_store(
    heading: str, hub: Path, store_environment: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    for name, path in walk(hub):
        if Store(HUB).stat(name) is None:
            Store(HUB).write(name, path)
    output = f"s3://bucket/examples/{heading.replace(' ', '-')}"
    code = in_store(example(heading), HUB, output)
    assert code.count("s3://bucket/") == 3, "model, data and output"
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMO_RL_BACKEND", "local")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    result = runpy.run_path("example.py", run_name="__main__")["result"]

    trained = [row["step"] for row in result.history if row["step"] > 0]  # with validation data there is a step 0
    assert result.total_steps == len(trained) >= 1
    assert result.checkpoint_uri.startswith(f"{output}/checkpoints/step-")
    weights = AutoModelForCausalLM.from_pretrained(result.checkpoint_path).state_dict()
    store = Store(output)
    head = read_head(store)
    assert head is not None and head["holder"] is None and head["record"]["status"] == "finished"
    lines = (read_text(store, "metrics.jsonl") or b"").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [row["step"] for row in result.history]
    plain = tmp_path / "plain"
    for entry in Store(result.checkpoint_uri).list():
        if "/" not in entry.path:
            plain.mkdir(exist_ok=True)
            (plain / entry.path).write_bytes(Store(result.checkpoint_uri).read(entry.path)[0])
    for name, tensor in AutoModelForCausalLM.from_pretrained(plain).state_dict().items():
        assert tensor.equal(weights[name])
