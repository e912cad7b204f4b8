"""`helm test`: asks a freshly installed nemo-rl whether it works. Runs in the operator's image, by the standard library."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import ssl
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
API = "/apis/nemo-rl.io/v1alpha1"
WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "four"]
WIDTH = 16


class Refused(Exception):
    """The API server's answer is no success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def call(method: str, path: str, body: object = None) -> dict:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    with open(f"{ACCOUNT}/token") as token:
        headers = {"Authorization": f"Bearer {token.read().strip()}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"https://{host}:{port}{path}", data, headers, method=method)
    tls = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    try:
        with urllib.request.urlopen(request, timeout=30, context=tls) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise Refused(error.code, json.loads(text)["message"] if text[:1] == "{" else text) from error


def tiny_model() -> dict[str, bytes]:
    """A Llama of a few thousand random weights, with a tokenizer of a few words, as files."""
    draw = random.Random(0)
    projections = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
    projections |= {"mlp.gate_proj": (32, WIDTH), "mlp.up_proj": (32, WIDTH), "mlp.down_proj": (WIDTH, 32)}
    shapes = {"model.embed_tokens.weight": (len(WORDS), WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in projections.items()}
    shapes |= {f"model.layers.0.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in sorted(shapes.items()):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = [draw.gauss(0, 0.1) if len(shape) > 1 else 1.0 for _ in range(count)]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + 4 * count]}
        data += struct.pack(f"<{count}f", *values)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "dtype": "float32",
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": WORDS[i], **special} for i in range(3)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "<unk>"},
    }
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    texts = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **names},
    }
    files = {name: json.dumps(content).encode() for name, content in texts.items()}
    return files | {"model.safetensors": struct.pack("<Q", len(head)) + head + data}


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as inner, tarfile.open(fileobj=inner, mode="w") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def job(name: str, **spec: object) -> dict:
    rows = [{"prompt": "one two", "completion": "three four"}]
    smallest = {"model": "tiny", "algorithm": "sft", "dataset": {"inline": rows}, "resources": {"gpusPerNode": 0}}
    return {
        "apiVersion": "nemo-rl.io/v1alpha1",
        "kind": "RLTrainingJob",
        "metadata": {"name": name},
        "spec": {**smallest, **spec},
    }


def definition_established() -> None:
    found = call("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rltrainingjobs.nemo-rl.io")
    conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
    assert conditions.get("Established") == "True", f"found {conditions}, expected Established"


def operator_ready() -> None:
    path = f"/apis/apps/v1/namespaces/{os.environ['OPERATOR_NAMESPACE']}/deployments/{os.environ['DEPLOYMENT']}"
    end = time.monotonic() + 120
    while True:
        status = call("GET", path).get("status", {})
        if status.get("readyReplicas"):
            return
        assert time.monotonic() < end, f"not ready within 120 s: {status.get('conditions')}"
        time.sleep(1)


def good_job_accepted() -> None:
    call("POST", f"{JOBS}?dryRun=All&fieldValidation=Strict", job("helm-test-good"))


def bad_job_refused() -> None:
    answer = "accepted"
    try:
        call("POST", f"{JOBS}?dryRun=All&fieldValidation=Strict", job("helm-test-bad", algorithm="grpo"))
    except Refused as error:
        answer = error.message
    assert "grpo needs a reward" in answer, f"expected that a GRPO job without a reward is refused; found: {answer}"


def job_trains() -> None:
    """A job of one step, from its submission to Complete; it goes with its claim, whatever happens."""
    archive = packed(tiny_model())
    name, digest = f"helm-test-{random.randrange(16**6):06x}", hashlib.sha256(archive).hexdigest()
    output: dict[str, object] = {"size": "1Gi", "retain": False}
    if os.environ.get("STORAGE_CLASS"):
        output["storageClassName"] = os.environ["STORAGE_CLASS"]
    made = call(
        "POST",
        JOBS,
        job(
            name,
            model="bundle://model",
            bundles=[{"name": "model", "sha256": digest, "configMaps": [f"{name}-model"]}],
            training={"maxSteps": 1, "batchSize": 1},
            output=output,
            backoffLimit=0,
        ),
    )
    try:
        owner = {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": name, "uid": made["metadata"]["uid"]}
        part = {
            "metadata": {"name": f"{name}-model", "ownerReferences": [owner]},
            "immutable": True,
            "binaryData": {"part": base64.b64encode(archive).decode()},
        }
        call("POST", f"/api/v1/namespaces/{NAMESPACE}/configmaps", part)
        wait_for_success(name)
    finally:
        call("DELETE", f"{JOBS}/{name}")


def wait_for_success(name: str) -> None:
    end = time.monotonic() + float(os.environ["TRAIN_SECONDS"])
    said = ""
    while True:
        status = call("GET", f"{JOBS}/{name}").get("status", {})
        if status.get("phase") == "Succeeded":
            assert status["result"]["totalSteps"] == 1, status["result"]
            return
        news = f"{status.get('phase')}: {status.get('message')}"
        if news != said:
            print(f"  {name} is {news}", flush=True)
            said = news
        assert status.get("phase") != "Failed", f"the job failed: {json.dumps(status.get('failure'), indent=1)}"
        assert time.monotonic() < end, f"not complete within {os.environ['TRAIN_SECONDS']} s; {news}"
        time.sleep(1)


NAMESPACE = os.environ.get("TEST_NAMESPACE", "default")
JOBS = f"{API}/namespaces/{NAMESPACE}/rltrainingjobs"
CHECKS = {
    "the definition of RLTrainingJob is established": definition_established,
    "the operator is ready": operator_ready,
    "a good job is accepted": good_job_accepted,
    "a bad job is refused": bad_job_refused,
    "a job of one step trains to its end": job_trains,
}


def main() -> int:
    failed = 0
    for what, check in CHECKS.items():
        if check is job_trains and os.environ.get("TRAIN") != "true":
            continue
        try:
            check()
        except (AssertionError, Refused, OSError) as error:
            failed += 1
            print(f"not ok - {what}: {error}", flush=True)
        else:
            print(f"ok - {what}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
