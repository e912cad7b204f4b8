"""Weights that are read from a real S3 server by ranges: each rank its part, the values those of plain safetensors."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_rl.errors import StorageError
from nemo_rl.job import names
from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model import ranges
from nemo_rl.model.load import load_sharded
from nemo_rl.model.ranges import WeightsInStore
from nemo_rl.run.identity import model_identity
from nemo_rl.run.sources import local_model
from nemo_rl.storage import left
from nemo_rl.storage.left import left_in_store
from nemo_rl.storage.store import Store
from storage.server import Faults
from unit.distributed.conftest import Launcher, assert_same_run
from unit.trainers.conftest import write_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)


def draw_tensor(draw: random.Random) -> Tensor:
    shape = [draw.choice((1, 2, 3, 7, 20)) for _ in range(draw.randrange(4))]
    dtype = draw.choice(DTYPES)
    return torch.randn(shape).mul(9).to(dtype)


def draw_key(draw: random.Random, shape: list[int]) -> Any:
    def one(size: int) -> Any:
        begin, end = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
        return draw.choice((slice(None), slice(begin, end), slice(begin, None), slice(-1, None)))

    parts = tuple(one(size) for size in shape[: draw.randrange(len(shape) + 1)])
    return draw.choice((parts, (*parts, ...), ...)) if parts else ...


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit by bit, so that numbers that are none count too."""
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and bytes(
        found.contiguous().reshape(-1).view(torch.uint8).numpy()
    ) == bytes(expected.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("part_bytes", [1024, 8 << 20])
def test_any_part_of_any_tensor_is_what_plain_safetensors_reads(
    store_environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """With small parts every way to put a tensor together is taken."""
    draw = random.Random(part_bytes)
    torch.manual_seed(0)
    monkeypatch.setattr(ranges, "PART_BYTES", part_bytes)
    monkeypatch.setattr(left, "PART_BYTES", part_bytes)
    file = tmp_path / "model.safetensors"
    save_file({f"t{i}": draw_tensor(draw) for i in range(10)}, file, metadata={"format": "pt"})
    store = Store(f"s3://bucket/parts-{part_bytes}")
    store.write("config.json", b"{}")
    store.write(file.name, file)
    folder = local_model(store.uri, in_parts=True)
    place = left_in_store(folder)
    assert place is not None
    found = WeightsInStore(place, folder / file.name)
    with safe_open(file, framework="pt") as plain:
        assert sorted(found.keys()) == sorted(plain.keys())
        assert found.metadata() == plain.metadata()
        for name in plain.keys():  # noqa: SIM118
            part, expected = found.get_slice(name), plain.get_slice(name)
            assert (part.get_shape(), part.get_dtype()) == (expected.get_shape(), expected.get_dtype())
            whole = plain.get_tensor(name)
            assert same(found.get_tensor(name), whole)
            for _ in range(3):
                key = draw_key(draw, part.get_shape())
                assert same(part[key], whole[key]), (name, key, part.get_shape())
    place.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 7 MB in several files, with the characters' tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("tokenizer"))).save_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 3000}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2)
        Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="3MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def put(model: Path, uri: str) -> Store:
    store = Store(uri)
    for path in model.iterdir():
        store.write(path.name, path)
    return store


def weights_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_ranks_read_each_byte_of_the_weights_once_and_train_as_from_files(
    faults: Faults, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pod without `cache.claim`, where nothing that was read stays for a later run."""
    monkeypatch.setenv(names.ATTEMPT_VARIABLE, "1")
    store = put(model, "s3://bucket/two-ranks")
    launcher = Launcher()
    try:
        for source, run in ((store.uri, "stored"), (str(model), "files")):
            codes = launcher.run(
                2, tmp_path / run, seconds=600, algorithm="sft", model=source, keywords={"max_steps": 1}
            )
            assert codes == [0, 0], (tmp_path / f"{run}.log0").read_text()[-4000:]
    finally:
        launcher.server.kill()
        launcher.server.wait()
    assert_same_run(tmp_path / "stored", tmp_path / "files", 1, tolerance=0)
    beginnings = 2 * len(list(model.glob("*.safetensors"))) * ((1 << 18) + 3 * (1 << 16))
    size = weights_below(model)
    read = sum(count for path, count in faults.sent.items() if path.endswith(".safetensors"))
    assert size <= read < 1.5 * size + beginnings, "each rank its half, and what tells models apart"
    assert weights_below(tmp_path / "cache") < size / 50


def test_a_model_is_the_same_one_in_parts_and_whole(store_environment: Any, model: Path) -> None:
    store = put(model, "s3://bucket/identity")
    in_parts = local_model(store.uri, in_parts=True)
    assert weights_below(in_parts) < weights_below(model) / 50
    assert model_identity(str(in_parts)) == model_identity(str(local_model(store.uri))) == model_identity(str(model))
    for file in in_parts.glob("*.safetensors"):
        with pytest.raises(SafetensorError):  # nobody takes what is left out for zeros
            safe_open(file, framework="pt").__enter__()


def test_what_is_written_anew_or_cut_off_is_an_error_in_words(store_environment: Any, model: Path) -> None:
    store = put(model, "s3://bucket/anew")
    folder = local_model(store.uri, in_parts=True)
    file = min(folder.glob("*.safetensors"))
    place = left_in_store(folder)
    assert place is not None
    store.write(file.name, max(model.glob("*.safetensors")))
    weights = WeightsInStore(place, file)
    with pytest.raises(StorageError, match="was written anew while it was read"):
        weights.get_tensor(weights.keys()[0])
    whole = (model / file.name).read_bytes()
    store.write(file.name, whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="half a file"):
        local_model(store.uri, in_parts=True)
    store.write(file.name, b"<html>")
    with pytest.raises(StorageError, match="no file of safetensors"):
        local_model(store.uri, in_parts=True)


def test_a_read_that_the_store_refuses_ends_loading_with_what_it_said(faults: Faults, model: Path) -> None:
    store = put(model, "s3://bucket/refused")
    folder = str(local_model(store.uri, in_parts=True))
    faults.choose = lambda method, path: "denied" if path.endswith(".safetensors") else None
    shard: Any = lambda model: SimpleNamespace(own_memory=lambda: None)  # noqa: E731
    with pytest.raises(StorageError, match="have no right to"):
        load_sharded(folder, TrainingSpec(), torch.device("cpu"), shard)


def test_a_server_without_ranges_gives_whole_files_and_says_so(
    faults: Faults, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = put(model, "s3://bucket/whole-files")
    faults.without_ranges = True
    with caplog.at_level(logging.WARNING):
        folder = local_model(store.uri, in_parts=True)
    assert left_in_store(folder) is None
    for path in model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert "so each node reads the whole model to its disk" in caplog.text
    assert "answers a range with the whole object" in caplog.text
