"""Published weights: what transformers reads of them, and what a server refuses."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.rollout.vllm import fetch
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE, BadWeights, on_disk
from nemo_rl.rollout.vllm.weights import Published, Publisher, ShardServer
from unit.engine.tiny import make_model

TOKEN = "a token of sixteen and more"


def publish(model: Any, folder: Path, version: int = 1, dtype: torch.dtype = torch.float32) -> Published:
    published = Publisher(folder, dtype).publish(model, version)
    assert published is not None
    return published


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(family)
    published = publish(model, tmp_path)
    model.config.save_pretrained(published.folder)
    (shard,) = published.folder.glob("*.safetensors")
    shard.rename(published.folder / "model.safetensors")  # transformers' name of an only shard
    again = AutoModelForCausalLM.from_pretrained(published.folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    assert published.tied == tied


def test_experts_have_the_names_of_a_checkpoint(tmp_path: Path) -> None:
    """In memory the experts of a layer are one tensor; a server reads them as the hub has them."""
    from safetensors import safe_open
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")

    def content(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as shard:
                found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        return found

    ours, theirs = content(publish(model, tmp_path / "ours").folder), content(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_versions_stay_and_their_names_tell_their_content_apart(tmp_path: Path) -> None:
    model, publisher = make_model("qwen2"), Publisher(tmp_path, torch.bfloat16)
    first = publisher.publish(model, 1)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    others = [publisher.publish(model, version) for version in (2, 3)]
    again = publisher.publish(model, 3)
    assert first is not None and again is not None and others[1] is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-2", "version-3"]
    assert again.name == others[1].name and first.name.split("-")[1] != others[1].name.split("-")[1]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Published, ShardServer]]:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setattr(fetch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    published = publish(make_model("qwen2"), tmp_path / "published")
    server = ShardServer(tmp_path / "published", TOKEN)
    yield published, server
    server.close()


def source(served: tuple[Published, ShardServer]) -> str:
    return f"{served[1].url}/{served[0].folder.name}"


def test_shards_come_by_http_and_are_the_same(served: tuple[Published, ShardServer]) -> None:
    with on_disk(source(served), served[0].files) as files:
        assert [file.read_bytes() for file in files] == [
            (served[0].folder / about["name"]).read_bytes() for about in served[0].files
        ]


def test_a_broken_connection_goes_on_where_it_ended(
    served: tuple[Published, ShardServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = urllib.request.urlopen

    class Broken:
        def __init__(self, answer: Any) -> None:
            self.answer, self.status = answer, answer.status

        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *_: Any) -> None:
            self.answer.close()

        def read(self, size: int) -> bytes:
            if self.answer is None:
                raise ConnectionResetError("reset")
            part, self.answer.read = self.answer.read(1000), lambda size: (_ for _ in ()).throw(ConnectionResetError())
            return bytes(part)

    def opened(request: Any, timeout: float) -> Any:
        asked.append(request.get_header("Range"))
        answer = original(request, timeout=timeout)
        return Broken(answer) if len(asked) == 1 else answer

    monkeypatch.setattr(fetch.urllib.request, "urlopen", opened)
    with on_disk(source(served), served[0].files) as files:
        assert files[0].stat().st_size == served[0].files[0]["size"]
    assert asked == ["bytes=0-", "bytes=1000-"]


@pytest.mark.parametrize("by", ["http", "files"])
@pytest.mark.parametrize(("fault", "says"), [("truncated", "bytes"), ("changed", "its sha256 differs")])
def test_a_damaged_shard_is_refused_before_anything_is_loaded(
    served: tuple[Published, ShardServer], by: str, fault: str, says: str
) -> None:
    file = served[0].folder / served[0].files[0]["name"]
    content = file.read_bytes()
    file.write_bytes(content[:-100] if fault == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    where = source(served) if by == "http" else str(served[0].folder)
    with pytest.raises(BadWeights, match=says), on_disk(where, served[0].files):
        pytest.fail("the shard was given to the model")


def test_names_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(BadWeights, match="is no name of a file"),
        on_disk(str(tmp_path), [{"name": "../x.safetensors"}]),
    ):
        pytest.fail("a file of elsewhere was read")


def test_weights_are_served_to_those_with_the_token_alone(served: tuple[Published, ShardServer]) -> None:
    for header in ({}, {"Authorization": "Bearer another"}):
        request = urllib.request.Request(f"{source(served)}/{served[0].files[0]['name']}", headers=header)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)
    request = urllib.request.Request(f"{served[1].url}/../secret", headers={"Authorization": f"Bearer {TOKEN}"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(request)


def test_every_route_of_a_rollout_server_needs_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    from nemo_rl.rollout.vllm.middleware import RequireToken

    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def call(path: str, headers: list[tuple[bytes, bytes]], kind: str = "http") -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}"}

        asyncio.run(RequireToken(app)({"type": kind, "path": path, "headers": headers}, receive, send))
        return sent

    good = (b"authorization", f"Bearer {TOKEN}".encode())
    bad = (b"authorization", b"Bearer wrong")
    for path in ("/health", "/v1/completions", "/update_weights", "/collective_rpc", "/metrics", "/nemo_rl/adapter"):
        for headers in ([], [bad], [good, bad], [(b"authorization", TOKEN.encode())]):
            assert call(path, headers)[0]["status"] == 401
        assert call(path, [], "websocket")[0]["type"] == "websocket.close"
    assert not reached
    answer = call("/health", [good])[0]
    assert reached == ["/health"] and answer["status"] == 200
    assert b"x-nemo-rl-instance" in dict(answer["headers"])
