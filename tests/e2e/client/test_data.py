"""Data and models travel through the cluster itself, once; what is too large is refused with what to do instead."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from e2e.client.desk import Desk
from e2e.kubectl import Object
from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.job import names

COUNT = 7_500
WORDS = [f"{random.Random(i).getrandbits(40):x}" for i in range(2000)]


def word_problems() -> list[dict[str, Any]]:
    """As many rows as GSM8K has, of its size, and as hard to compress."""
    draw = random.Random(0)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=45)),
            "completion": f"{number} " + " ".join(draw.choices(WORDS, k=40)),
        }
        for number in range(COUNT)
    ]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 10 MB that has every character."""
    import torch
    from transformers import AutoModelForCausalLM

    from documented import write_language_model

    folder = tmp_path_factory.mktemp("models") / "large"
    write_language_model(folder, chat=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(38_000)
    with torch.no_grad():
        for weights in (model.model.embed_tokens.weight, model.lm_head.weight):
            weights.normal_(std=0.02)
    model.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert 9_500_000 < size < 11_000_000, size
    return folder


def bundles(desk: Desk) -> dict[str, Object]:
    found = desk.kubectl.items("configmaps", "-l", names.LABEL_BUNDLE)
    return {one["metadata"]["name"]: one for one in found}


def test_a_long_list_and_a_model_of_ten_megabytes_travel_and_the_same_call_uploads_nothing(
    desk: Desk, large: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = word_problems()
    keywords = settings | {"algorithm": "sft", "max_sequence_length": 2048, "batch_size": 1}
    result = nemo_rl.train(large, rows, max_steps=1, output_dir="first", **keywords)
    first = capsys.readouterr().out
    assert result.total_steps == 1
    assert f"{COUNT} rows" in first or f"{COUNT:,} rows" in first, first
    assert "uploaded" in first
    before = bundles(desk)
    assert 10_000_000 < sum(len(one["binaryData"][names.BUNDLE_KEY]) for one in before.values()) < 30_000_000

    job: Any = nemo_rl.train(large, rows, max_steps=2, wait=False, **keywords)
    assert "uploaded" in capsys.readouterr().out, "each job has its own"
    before = bundles(desk)
    nemo_rl.train(large, rows, max_steps=2, wait=False, **keywords)
    assert "nothing was uploaded" in capsys.readouterr().out
    after = bundles(desk)
    assert {n: o["metadata"]["uid"] for n, o in after.items()} == {n: o["metadata"]["uid"] for n, o in before.items()}
    job.delete()


@pytest.mark.parametrize("what", ["model", "rows"])
def test_two_hundred_megabytes_are_refused_at_once_with_the_alternatives(
    desk: Desk, tiny: Path, tmp_path: Path, settings: dict[str, Any], what: str
) -> None:
    jobs, before = len(desk.jobs()), set(bundles(desk))
    arguments: dict[str, Any] = {"model": tiny, "dataset": [{"prompt": "1", "completion": "2"}]}
    if what == "model":
        arguments["model"] = tmp_path / "huge"
        arguments["model"].mkdir()
        (tmp_path / "huge" / "config.json").write_text("{}")
        with open(tmp_path / "huge" / "model.safetensors", "wb") as weights:
            for _ in range(200):
                weights.write(os.urandom(1_000_000))
    else:
        arguments["dataset"] = [{"prompt": os.urandom(500_000).hex(), "completion": "2"} for _ in range(200)]
    begin = time.monotonic()
    with pytest.raises(ShipError, match=r"found \d+\.\d MB.*name on the hub.*pvc://claim/path"):
        nemo_rl.train(**arguments, algorithm="sft", max_steps=1, **settings)
    assert time.monotonic() - begin < 60
    assert len(desk.jobs()) == jobs
    assert set(bundles(desk)) <= before, "those of a job that was deleted before may go meanwhile"
