"""Images without a registry: built by buildah on this machine, copied layer by layer into the node's containerd."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lab import programs
from lab.node import ctr
from lab.settings import (
    BASE_IMAGE,
    BUILDER,
    COREDNS_IMAGE,
    IMAGE_PACKAGES,
    PAUSE_IMAGE,
    SOCKET,
    TEMPORARY,
    fail,
    need,
    need_root,
    out,
    say,
    sh,
)

STORAGE = BUILDER / "storage"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def load_own() -> None:
    """The two images of the cluster itself, each one static program: no image builder is needed."""
    present = set(out(*ctr("images", "ls", "-q")).split())
    for image, program in ((PAUSE_IMAGE, "pause"), (COREDNS_IMAGE, "coredns")):
        if image not in present:
            _import_program(image, program)


def load_program(image: str, program: str, name: str) -> None:
    """An image of one static program, under this name; loading it again costs nothing."""
    if image not in set(out(*ctr("images", "ls", "-q")).split()):
        _import_program(image, program, name)


def _import_program(image: str, program: str, name: str = "") -> None:
    archive = program_image(image, programs.path(program), name or program)
    sh(*ctr("images", "import", "-"), input=archive, stdout=subprocess.DEVNULL)


def program_image(image: str, program: Path, name: str) -> bytes:
    """An OCI archive of an image that has one file, its entrypoint."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        _add(archive, name, program.read_bytes(), 0o755)
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    content = blob(layer.getvalue(), "layer.v1.tar")
    settings = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": [f"/{name}"]},
        "rootfs": {"type": "layers", "diff_ids": [content["digest"]]},
    }
    config = blob(json.dumps(settings).encode(), "config.v1+json")
    body = {"schemaVersion": 2, "config": config, "layers": [content]}
    manifest = blob(json.dumps(body).encode(), "manifest.v1+json")
    manifest["annotations"] = {"io.containerd.image.name": image}
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode())
        for digest, data in blobs.items():
            _add(archive, f"blobs/sha256/{digest}", data)
    return whole.getvalue()


def make_base() -> None:
    """A base image like the one that most Python projects start FROM, out of Debian packages alone."""
    need_root()
    need(IMAGE_PACKAGES)
    if BASE_IMAGE in built():
        return
    begin = time.monotonic()
    root = TEMPORARY / "base"
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    packages = "--include=python3,python3-venv,ca-certificates"
    sh("debootstrap", "--variant=minbase", packages, "bookworm", root, _debian_mirror(), stdout=subprocess.DEVNULL)
    for pattern in ("var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*_*"):
        for path in root.glob(pattern):
            path.unlink()
    # Debian's own Python refuses `pip install`; an environment ahead of it in PATH behaves like the usual base image
    sh("chroot", root, "python3", "-m", "venv", "/opt/venv")
    search = "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    quiet = {"stdout": subprocess.DEVNULL}
    buildah("from", "--name", "lab-base", "scratch", **quiet)
    buildah("add", "--quiet", "lab-base", root, "/", **quiet)
    buildah("config", "--cmd", "python3", "--env", "LANG=C.UTF-8", "--env", f"PATH={search}", "lab-base")
    buildah("commit", "--quiet", "--rm", "lab-base", BASE_IMAGE, **quiet)
    shutil.rmtree(root)
    say(f"{BASE_IMAGE}: made in {time.monotonic() - begin:.1f} s")


def build(tag: str, folder: str, options: Sequence[str], *, into_node: bool = True) -> None:
    """Builds a Dockerfile, and loads the image where a node is up. options go to buildah, for example --file, --target.

    The host's network, certificates and package index are used, and none of them stays in the image.
    """
    make_base()
    begin = time.monotonic()
    pip, uv = _index_settings()
    buildah(
        *("bud", "--isolation", "chroot", "--network", "host", "--layers", "--force-rm", "--pull-never", "--quiet"),
        *("-v", f"{CERTIFICATES}:{CERTIFICATES}:ro", "-v", f"{pip}:/etc/pip.conf:ro", "-v", f"{uv}:/etc/uv/uv.toml:ro"),
        *("-t", tag, *options, folder),
        stdout=subprocess.DEVNULL,
    )
    say(f"{tag}: built in {time.monotonic() - begin:.1f} s")
    if into_node and SOCKET.exists():
        load(tag)


def _index_settings() -> tuple[Path, Path]:
    """A pip.conf and a uv.toml that name this machine's certificates and package index."""
    settings = {}
    for line in out(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "extra-index-url", "trusted-host"):
            settings[name] = value.strip("'\"")
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    pip, uv = TEMPORARY / "pip.conf", TEMPORARY / "uv.toml"
    pip.write_text("\n".join(["[global]", f"cert = {CERTIFICATES}", *(f"{k} = {v}" for k, v in settings.items()), ""]))
    index = settings.get("index-url")
    uv.write_text("system-certs = true\n" + (f'index-url = "{index}"\n' if index else ""))
    return pip, uv


def buildah(*words: object, **options: Any) -> None:
    TEMPORARY.mkdir(parents=True, exist_ok=True)
    place = ["--root", STORAGE, "--runroot", BUILDER / "run", "--storage-driver", "overlay"]
    sh("buildah", *place, *words, env=os.environ | {"TMPDIR": str(TEMPORARY)}, **options)


def built() -> set[str]:
    """Names of the images that the builder has."""
    return {name for record in _records() for name in record.get("names", ())}


def _records() -> list[dict[str, Any]]:
    index = STORAGE / "overlay-images/images.json"
    return list(json.loads(index.read_text())) if index.exists() else []


def image_id(image: str) -> str:
    """The builder's id of an image; it changes with the content."""
    record = next((r for r in _records() if image in r.get("names", ())), None)
    if record is None:
        fail(f"no image {image}; the builder has: {', '.join(sorted(built())) or 'none'}")
    return str(record["id"])


def load(image: str) -> None:
    """Copies an image from the builder to containerd: uncompressed, and only the layers that it lacks.

    The builder keeps a layer as a folder and a `tar-split` file that tells how to make its archive again, byte for
    byte; so a layer goes straight from that folder into containerd, with no archive between.
    """
    begin = time.monotonic()
    record = next((r for r in _records() if image in r.get("names", ())), None)
    if record is None:
        fail(f"no image {image}; the builder has: {', '.join(sorted(built())) or 'none'}")
    data = (STORAGE / "overlay-images" / record["id"] / "manifest").read_bytes()
    manifest = json.loads(data)
    chain = _layer_chain(record["layer"])
    present = set(out(*ctr("content", "ls", "-q")).split())
    importer = subprocess.Popen(ctr("images", "import", "-"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert importer.stdin is not None
    sent = 0
    with tarfile.open(fileobj=importer.stdin, mode="w|", bufsize=1 << 20, copybufsize=1 << 20) as archive:
        for name, content in _small_parts(image, record["id"], data, manifest).items():
            _add(archive, name, content)
        for blob in manifest["layers"]:
            if blob["digest"] not in present:
                member = tarfile.TarInfo("blobs/sha256/" + blob["digest"][7:])
                member.size = blob["size"]
                archive.addfile(member, LayerArchive(chain[blob["digest"]]))  # type: ignore[arg-type]
                sent += blob["size"]
    importer.stdin.close()
    if importer.wait():
        fail(f"{image}: containerd did not take it")
    say(f"{image}: loaded in {time.monotonic() - begin:.1f} s, {sent / 1e6:.0f} MB new")


def _layer_chain(top: str) -> dict[str, str]:
    """Digest of a layer → the builder's name of it."""
    layers = {entry["id"]: entry for entry in json.loads((STORAGE / "overlay-layers/layers.json").read_text())}
    chain, layer = {}, top
    while layer:
        chain[layers[layer]["diff-digest"]] = layer
        layer = layers[layer].get("parent")
    return chain


def _small_parts(image: str, record: str, data: bytes, manifest: dict[str, Any]) -> dict[str, bytes]:
    """Everything of an OCI archive but the layers."""
    digest = hashlib.sha256(data).hexdigest()
    entry = {"mediaType": manifest["mediaType"], "digest": f"sha256:{digest}", "size": len(data)}
    entry["annotations"] = {"io.containerd.image.name": image}
    config = str(manifest["config"]["digest"])
    file = base64.b64encode(config.encode()).decode()
    return {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        f"blobs/sha256/{digest}": data,
        f"blobs/sha256/{config[7:]}": (STORAGE / "overlay-images" / record / f"={file}").read_bytes(),
    }


class LayerArchive(io.RawIOBase):
    """A layer's archive, read from the builder's folder in the order that its tar-split file tells."""

    def __init__(self, layer: str) -> None:
        self.folder = STORAGE / "overlay" / layer / "diff"
        self.entries = gzip.open(STORAGE / "overlay-layers" / f"{layer}.tar-split.gz", "rt")  # noqa: SIM115
        self.part: BinaryIO = io.BytesIO()

    def read(self, size: int = -1) -> bytes:
        pieces = []
        while size:
            piece = self.part.read(size)
            if piece:
                pieces.append(piece)
                size -= len(piece)
                continue
            line = self.entries.readline()
            if not line:
                break
            self.part.close()
            self.part = self._open(json.loads(line))
        return b"".join(pieces)

    def _open(self, entry: dict[str, Any]) -> BinaryIO:
        if entry["type"] == 2:
            # headers and padding of the archive, as they were
            return io.BytesIO(base64.b64decode(entry["payload"]))
        if entry.get("size"):
            name = entry.get("name") or os.fsdecode(base64.b64decode(entry["name_raw"]))
            return open(self.folder / name, "rb")
        return io.BytesIO()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    archive.addfile(member, io.BytesIO(data))


def _debian_mirror() -> str:
    """The first mirror that apt on this machine uses."""
    folder = Path("/etc/apt/sources.list.d")
    for file in [*folder.glob("*.sources"), Path("/etc/apt/sources.list"), *folder.glob("*.list")]:
        for line in file.read_text().splitlines() if file.exists() else ():
            words = [word for word in line.split() if not word.startswith("[")]
            if len(words) > 1 and words[0] in ("URIs:", "deb"):
                return words[1]
    fail("apt has no source to make the base image from; add one to /etc/apt/sources.list")
