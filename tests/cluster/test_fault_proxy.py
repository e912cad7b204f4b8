"""The fault-making proxy: it passes everything on unchanged, but for the fault that is asked for."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.api import Api, ApiError, eventually
from cluster.faults import FaultyProxy
from cluster.scene import Scene
from cluster.server import Cluster


@pytest.fixture
def proxy(cluster: Cluster, tmp_path: Path) -> Iterator[FaultyProxy]:
    with FaultyProxy(cluster.api, tmp_path) as made:
        yield made


def test_reads_and_writes_pass_unchanged(proxy: FaultyProxy, scene: Scene) -> None:
    through = Api(proxy.kubeconfig)
    body = {"metadata": {"name": "m"}, "data": {"text": "ä" * 1000}}
    through.create("configmaps", scene.namespace, body)
    assert through.get("configmaps", scene.namespace, "m") == scene.api.get("configmaps", scene.namespace, "m")
    with pytest.raises(ApiError, match="404"):
        through.get("configmaps", scene.namespace, "other")
    assert [(call.method, call.code) for call in proxy.calls] == [("POST", 201), ("GET", 200), ("GET", 404)]


def test_call_is_done_but_unanswered_at_the_cut(proxy: FaultyProxy, scene: Scene) -> None:
    cuts: list[str] = []
    proxy.cut_after, proxy.on_cut = 1, lambda: cuts.append("cut")
    with pytest.raises((OSError, http.client.HTTPException)):
        Api(proxy.kubeconfig).create("configmaps", scene.namespace, {"metadata": {"generateName": "m-"}})
    assert cuts == ["cut"]
    found = scene.api.list("configmaps", scene.namespace)
    assert any(o["metadata"]["name"].startswith("m-") for o in found)


def test_refusals_are_counted(proxy: FaultyProxy, scene: Scene) -> None:
    proxy.refuse(409, 2, lambda call: call.mutating)
    through = Api(proxy.kubeconfig)
    for _ in range(2):
        with pytest.raises(ApiError, match="409"):
            through.create("configmaps", scene.namespace, {"metadata": {"name": "m"}})
    through.create("configmaps", scene.namespace, {"metadata": {"name": "m"}})


def test_watch_goes_through_until_it_is_cut(proxy: FaultyProxy, scene: Scene) -> None:
    through = Api(proxy.kubeconfig)
    version = through.request("GET", "/api/v1/configmaps")["metadata"]["resourceVersion"]
    seen: list[str] = []
    ended = threading.Event()

    def follow() -> None:
        try:
            for event in through.watch("configmaps", version):
                seen.append(event["object"]["metadata"].get("name", ""))
        except (OSError, http.client.HTTPException):
            pass
        ended.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    scene.api.create("configmaps", scene.namespace, {"metadata": {"name": "watched"}})
    eventually(lambda: "watched" in seen, "the watch saw the object")
    proxy.cut_watches()
    assert ended.wait(20), "the watch was not cut"
