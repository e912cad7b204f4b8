from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.backends.kubernetes.ship import archive as archives
from nemo_rl.backends.kubernetes.ship.archive import Archive, pack, unique_config_maps
from nemo_rl.backends.kubernetes.ship.data import ROWS_FILE, ship_directory, ship_file, ship_rows
from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.job import names
from nemo_rl.worker import bundles


def mount(archive: Archive, folder: Path) -> Path:
    """Lays the ConfigMaps out as the kubelet projects them."""
    folder.mkdir(parents=True)
    for index, manifest in enumerate(archive.config_maps()):
        (folder / names.bundle_part(index)).write_bytes(base64.b64decode(manifest["binaryData"][names.BUNDLE_KEY]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        for info, data in members:
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


# --- archive and ConfigMaps ---


def test_what_is_packed_arrives_in_the_pod_byte_for_byte(tmp_path: Path) -> None:
    files = {"a/b.txt": b"x" * 10, "ü/" + "long" * 60 + ".bin": os.urandom(2_000_000), "empty": b""}
    archive = pack(files)
    assert len(archive.parts) == 3
    mount(archive, tmp_path / "root" / "data")
    folder = bundles.open_bundle("data", archive.sha256, tmp_path / "new", root=tmp_path / "root")
    assert contents(folder) == files


def test_equal_content_has_equal_bytes_and_names_whatever_the_order_and_times(tmp_path: Path) -> None:
    one = pack({"a": b"1", "b": b"2"})
    for name, data, time in (("b", b"2", 1), ("a", b"1", 2_000_000_000)):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (time, time))
    other = pack({"b": tmp_path / "b", "a": tmp_path / "a"})
    assert one == other
    assert one.config_map_names == other.config_map_names
    assert pack({"a": b"1", "b": b"3"}).config_map_names != one.config_map_names


def test_config_maps_are_immutable_labelled_and_small_enough() -> None:
    archive = pack({"weights": os.urandom(3_000_000)})
    manifests = archive.config_maps()
    assert [m["metadata"]["name"] for m in manifests] == [f"b-{archive.sha256[:12]}-{i}" for i in range(4)]
    for manifest in manifests:
        assert (manifest["apiVersion"], manifest["kind"], manifest["immutable"]) == ("v1", "ConfigMap", True)
        assert manifest["metadata"]["labels"][names.LABEL_BUNDLE] == archive.sha256[:12]
        assert len(base64.b64decode(manifest["binaryData"][names.BUNDLE_KEY])) <= names.BUNDLE_PART_BYTES
        assert len(json.dumps(manifest)) < 1_500_000
    spec = archive.spec("code", python="3.11")
    assert spec.sha256 == hashlib.sha256(archive.data).hexdigest()
    assert spec.config_maps == archive.config_map_names


def test_equal_bundles_share_their_config_maps() -> None:
    assert len(unique_config_maps([pack({"a": b"1"}), pack({"a": b"1"}), pack({"a": b"2"})])) == 2


def test_a_whole_bundle_fits_the_specification() -> None:
    assert -(-names.MAX_BUNDLE_BYTES // names.BUNDLE_PART_BYTES) <= 32


# --- limits ---


def test_seven_thousand_five_hundred_rows_and_ten_megabytes_of_model_travel(tmp_path: Path) -> None:
    words = [f"{i * 7919 % 10007:04x}" for i in range(10_000)]
    rows = [{"prompt": " ".join(words[i % 9000 : i % 9000 + 120]), "answer": str(i)} for i in range(7_500)]
    shipped = ship_rows(rows)
    assert shipped.uri("data") == f"bundle://data/{ROWS_FILE}"
    assert len(shipped.archive.data) < names.MAX_BUNDLE_BYTES
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(os.urandom(10_000_000))
    model = ship_directory(tmp_path / "model")
    assert model.uri("model") == "bundle://model"
    assert len(model.archive.parts) == 12


def test_two_hundred_megabytes_are_refused_at_once_with_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as sparse:
        sparse.truncate(200_000_000)
    monkeypatch.setattr(archives, "_add", lambda *_: pytest.fail("nothing may be read"))
    with pytest.raises(ShipError, match=r"200\.0 MB.*hub.*pvc://claim/path"):
        ship_directory(tmp_path)


def test_reading_stops_when_the_compressed_limit_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    add = archives._add
    monkeypatch.setattr(archives, "_add", lambda made, name, *rest: (read.append(name), add(made, name, *rest)))
    block = os.urandom(6_000_000)
    for i in range(9):
        (tmp_path / f"part-{i}.bin").write_bytes(block[i:] + block[:i])
    with pytest.raises(ShipError, match=r"54\.0 MB, which is more than 16\.8 MB compressed.*pvc://"):
        ship_directory(tmp_path)
    assert len(read) == 3


def test_endless_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        while True:
            yield {"prompt": "x" * 1_000_000}

    with pytest.raises(ShipError, match=r"the dataset: found 13\d\.\d MB"):
        ship_rows(rows())


# --- data ---

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(min_size=1, max_size=5), JSON, max_size=3), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_rows_read_back_exactly_equal(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    bundles.unpack(ship_rows(rows).archive.data, folder)
    lines = (folder / ROWS_FILE).read_text(encoding="utf-8").split("\n")
    assert repr([json.loads(line) for line in lines[:-1]]) == repr(rows)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "the float nan"),
        ({1, 2}, "found set"),
        ((1, 2), "found tuple"),
        (b"x", "found bytes"),
        ({"deep": [{"x": object()}]}, "found object"),
        ({1: "a"}, "key of type int"),
        ("half \ud800", "surrogate"),
        (Path("x"), "pathlib"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_row_and_column(value: Any, found: str) -> None:
    with pytest.raises(ShipError, match=f"row 1, column 'c.*{found}"):
        ship_rows([{"c": 1}, {"c": value}])


@pytest.mark.parametrize("rows", [[], ["text"], [{1: 2}]])
def test_what_is_no_list_of_rows_is_refused(rows: list[Any]) -> None:
    with pytest.raises(ShipError, match=r"the dataset.*expected"):
        ship_rows(rows)


def test_a_file_travels_under_its_name_and_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    shipped = ship_file(tmp_path / "train.jsonl")
    assert shipped.uri("data") == "bundle://data/train.jsonl"
    for name, told in (("missing.jsonl", "found no file"), ("notes.txt", "expected a file that ends in .jsonl")):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(ShipError, match=told):
            ship_file(tmp_path / name)
    for place in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ShipError, match="found no"):
            ship_directory(place)


# --- the pod's side ---


CODE = pack({"code/reward.py": random.Random(1).randbytes(1_000_000)})


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_changed_byte_of_any_part_is_detected(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    archive = CODE
    root = tmp_path_factory.mktemp("root")
    mount(archive, root / "code")
    part = root / "code" / names.bundle_part(data.draw(st.integers(0, len(archive.parts) - 1)))
    held = bytearray(part.read_bytes())
    held[data.draw(st.integers(0, len(held) - 1))] ^= data.draw(st.integers(1, 255))
    part.write_bytes(held)
    with pytest.raises(bundles.BundleDigestMismatch) as caught:
        bundles.open_bundle("code", archive.sha256, root / "new", root=root)
    assert archive.sha256 in str(caught.value)
    assert not (root / "new").exists(), "nothing is unpacked"


@pytest.mark.parametrize("present", [[], [1], [0, 2]])
def test_missing_parts_are_said(tmp_path: Path, present: list[int]) -> None:
    (tmp_path / "code").mkdir()
    for index in present:
        (tmp_path / "code" / names.bundle_part(index)).write_bytes(b"x")
    with pytest.raises(bundles.BundleError, match="expected 000"):
        bundles.join_parts(tmp_path / "code")


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("/etc/passwd"),
        member("../outside"),
        member("a/../../outside"),
        member("a\\b"),
        member("link", type=tarfile.SYMTYPE, linkname="/etc"),
        member("hard", type=tarfile.LNKTYPE, linkname="ok"),
        member("device", type=tarfile.CHRTYPE),
        member("pipe", type=tarfile.FIFOTYPE),
        member("folder", type=tarfile.DIRTYPE),
    ],
    ids=lambda info: info.name,
)
def test_nothing_but_plain_files_below_the_folder_is_unpacked(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    with pytest.raises(bundles.BundleError, match="refused"):
        bundles.unpack(tar((member("ok"), b"fine"), (bad, b"")), tmp_path / "new")
    assert contents(tmp_path) == {"new/ok": b"fine"}


def test_a_zip_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    bomb = gzip.compress(tar_of_zeros(bundles.MAX_UNPACKED_BYTES + 1), compresslevel=1)
    assert len(bomb) < names.MAX_BUNDLE_BYTES
    with pytest.raises(bundles.BundleError, match="refused"):
        bundles.unpack(bomb, tmp_path / "new")
    assert sum(map(len, contents(tmp_path).values())) == 0


def test_a_bomb_hidden_in_a_long_name_is_refused(tmp_path: Path) -> None:
    header = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=400_000_000).tobuf(tarfile.GNU_FORMAT)
    bomb = gzip.compress(header + bytes(200_000_000), compresslevel=1)
    with pytest.raises(bundles.BundleError):
        bundles.unpack(bomb, tmp_path / "new")


def tar_of_zeros(size: int) -> bytes:
    return member("zeros", size=size).tobuf() + bytes(size + 512)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_garbage_is_no_bundle(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("garbage") / "new"
    with contextlib.suppress(bundles.BundleError):
        bundles.unpack(data, folder)
    assert contents(folder) == {}


def test_a_name_given_twice_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(bundles.BundleError, match="no valid"):
        bundles.unpack(tar((member("a"), b"1"), (member("a"), b"2")), tmp_path / "new")
    with pytest.raises(bundles.BundleError, match="not empty"):
        bundles.unpack(pack({"a": b"1"}).data, tmp_path / "new")


def test_a_pickle_of_another_python_is_never_read(tmp_path: Path) -> None:
    manifest = {"format": 1, "kind": "pickle", "entries": {"reward": "code/reward.pkl"}, "python": "3.2"}
    (tmp_path / bundles.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(bundles.PythonMismatch, match=r"Python 3\.2, found Python 3"):
        bundles.load_entry(tmp_path)  # the file is not even there
    with pytest.raises(bundles.PythonMismatch):
        bundles.open_bundle("code", "0" * 64, tmp_path / "new", root=tmp_path, python="3.2")


def test_an_unknown_entrypoint_a_bundle_of_data_and_a_newer_format_are_said(tmp_path: Path) -> None:
    with pytest.raises(bundles.BundleError, match="found a bundle of data"):
        bundles.load_entry(tmp_path)
    (tmp_path / bundles.MANIFEST).write_text(json.dumps({"format": 2}))
    with pytest.raises(bundles.BundleError, match="found bundle format 2, expected 1"):
        bundles.load_entry(tmp_path)
    (tmp_path / bundles.MANIFEST).write_text(
        json.dumps({"format": 1, "kind": "source", "entries": {"a": "a", "b": "b"}})
    )
    with pytest.raises(bundles.BundleError, match="found entrypoint 'c', expected one of a, b"):
        bundles.load_entry(tmp_path, "c")
