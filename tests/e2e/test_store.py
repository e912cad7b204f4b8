"""Jobs whose model, data and output are in an object store: no claim, no file system that nodes share."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

import nemo_rl
from documented import EXAMPLES, example, in_store, write_data, write_models
from e2e.client.desk import Desk
from e2e.kubectl import Object, eventually
from e2e.manifests import demo
from e2e.operator_pod import OperatorPod
from e2e.scene import SECONDS, Scene
from e2e.store import BUCKET, SECRET, ObjectStore, object_store
from nemo_rl.job import names
from nemo_rl.run.stored.head import read_head, read_text
from nemo_rl.storage.store import Store, walk

STEPS = 16
SAVE_EVERY = 2
MODEL = f"s3://{BUCKET}/models/tiny"
RESULTS = f"s3://{BUCKET}/results"
CREDENTIALS = [{"secretRef": {"name": SECRET}}]


@pytest.fixture(scope="module")
def store(new_scene: Any) -> Iterator[ObjectStore]:
    with object_store() as made:
        yield made


@pytest.fixture(scope="module")
def place(new_scene: Any, store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A namespace with the credentials; the variables of this process find the server too. The model is in the store."""
    scene = new_scene("store")
    store.open(scene.kubectl)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        patch.setenv("NEMO_RL_CACHE", str(tmp_path_factory.mktemp("cache")))
        models, rows = Store(MODEL), Store(f"s3://{BUCKET}/rows")
        for path in Path(demo().make_model(tmp_path_factory.mktemp("tiny") / "tiny", seed=0)).iterdir():
            models.write(path.name, path)
        for number in range(4):
            lines = [json.dumps(row) + "\n" for row in scene.manifests.rows[8 * number : 8 * number + 8]]
            rows.write(f"part-{number}.jsonl", "".join(lines).encode())
        yield scene


def plain_download(uri: str, folder: Path) -> Path:
    """By obstore alone, as anybody would."""
    import obstore

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    source = obstore.store.S3Store(bucket, prefix=prefix, client_options={"allow_http": True})
    for page in obstore.list(source):
        for entry in page:
            target = folder / entry["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(obstore.get(source, entry["path"]).bytes()))
    return folder


@pytest.mark.long
def test_two_nodes_without_a_claim_go_on_after_the_loss_of_a_pod_of_both_and_of_the_operator(
    place: Scene, operator: OperatorPod, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    manifest = place.manifests.grpo(
        "afar",
        steps=STEPS,
        pause=0.15,
        model=MODEL,
        bundles=[],
        dataset={"path": f"s3://{BUCKET}/rows/part-*.jsonl"},
        output={"uri": RESULTS},
        training={"saveEvery": SAVE_EVERY},
        resources={"nodes": 2, "ephemeralStorage": "2Gi"},
        envFrom=CREDENTIALS,
    )
    job = place.apply(manifest)
    job.until(lambda status: status["checkpoint"]["latestStep"] >= SAVE_EVERY, "a checkpoint")
    assert not place.kubectl.items("persistentvolumeclaims")
    job.kill_worker(index=1)

    def one_more(status: Object) -> bool:
        """Whether the second attempt has saved beyond what it went on from."""
        return status["attempt"] == 2 and status["checkpoint"]["latestStep"] > status["attempts"][1]["fromStep"]

    job.until(one_more, "a checkpoint of the second attempt")
    both = [pod["metadata"]["name"] for pod in job.pods(attempt=2)]
    assert len(both) == 2
    place.kubectl("delete", "pod", *both, "--grace-period=0", "--force")

    job.until(
        lambda status: status["attempt"] == 3 and status["progress"]["step"] > status["attempts"][2]["fromStep"],
        "a step of the third attempt",
    )
    killed = operator.kill()
    eventually(
        lambda: (found := operator.ready()) and found["metadata"]["uid"] != killed, "another operator pod", SECONDS
    )
    status = job.phase("Succeeded")
    first, second, third = status["attempts"]
    assert (first["cause"], first["counted"], second["counted"], third["cause"]) == ("Error", True, False, "Succeeded")
    assert 0 < second["fromStep"] < third["fromStep"] < STEPS

    run = Store(f"{RESULTS}/afar")
    head = read_head(run)
    assert head is not None
    assert (head["generation"], head["holder"], head["record"]["status"]) == (3, None, "finished")
    steps = [json.loads(line)["step"] for line in (read_text(run, "metrics.jsonl") or b"").splitlines()]
    assert steps == list(range(1, STEPS + 1)), "each step once"
    last = status["checkpoint"]["latest"]
    assert last.startswith(f"{RESULTS}/afar/checkpoints/step-{STEPS:08d}")
    assert last in place.kubectl("get", names.PLURAL, "afar", "-o", "wide")
    loaded = AutoModelForCausalLM.from_pretrained(plain_download(last, tmp_path))
    assert loaded.config.hidden_size == 128


def test_train_with_an_address_as_output_returns_a_folder_that_loads(
    place: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    desk = Desk(tmp_path, place)
    monkeypatch.chdir(tmp_path)
    for name, value in desk.environment.items():
        monkeypatch.setenv(name, value)
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in place.manifests.rows]
    result = nemo_rl.train(
        MODEL,
        rows,
        algorithm="sft",
        output_dir=RESULTS,
        name="from-here",
        max_steps=3,
        max_epochs=9,
        batch_size=4,
        gpus=0,
        env_from=CREDENTIALS,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert result.checkpoint_uri is not None and result.checkpoint_path is not None
    assert result.checkpoint_uri.startswith(f"{RESULTS}/from-here/checkpoints/step-00000003")
    assert Path(result.checkpoint_path).is_relative_to(tmp_path)
    assert [row["step"] for row in result.history] == [1, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(result.checkpoint_path).config.hidden_size == 128
    assert AutoTokenizer.from_pretrained(result.checkpoint_path).eos_token == "<|endoftext|>"
    assert result.trainer.current_step == 3
    (found,) = [job for job in desk.jobs() if job["metadata"]["name"] == "from-here"]
    assert not place.kubectl.items("persistentvolumeclaims")
    secret = place.kubectl.json("secret", SECRET)["data"]["AWS_SECRET_ACCESS_KEY"]
    assert secret not in json.dumps(found)


@pytest.fixture(scope="module")
def hub(place: Scene, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the names in the documented examples mean, in the store."""
    folder, address = tmp_path_factory.mktemp("hub"), f"s3://{BUCKET}/hub"
    write_models(folder)
    write_data(folder)
    for name, path in walk(folder):
        Store(address).write(name, path)
    return address


@pytest.fixture(scope="module")
def submitted(place: Scene, hub: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The jobs of all six, at once. What an example does with its result is left out: it is not there yet."""
    desk = Desk(tmp_path_factory.mktemp("desk"), place)
    more = f", gpus=0, env_from={CREDENTIALS!r}, env={{'OMP_NUM_THREADS': '1'}}, wait=False"
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk.folder)
        for name, value in desk.environment.items():
            patch.setenv(name, value)
        for heading in EXAMPLES:
            name = heading.lower().replace(" ", "-")
            code = in_store(example(heading), hub, RESULTS, f", name={name!r}{more}")
            script = desk.folder / f"{name}.py"
            script.write_text(code[: code.index("\n", code.index(more))] + "\n")
            found[heading] = runpy.run_path(str(script), run_name="__main__")["result"]
        yield found


@pytest.mark.store_examples
@pytest.mark.parametrize("heading", EXAMPLES)
def test_a_documented_example_is_a_job_with_model_data_and_output_in_the_store(submitted: dict[str, Any], heading: str):
    from transformers import AutoModelForCausalLM

    job = submitted[heading]
    result = job.result()
    assert result.checkpoint_uri.startswith(f"{RESULTS}/{job.name}/checkpoints/step-")
    assert result.total_steps == len([row for row in result.history if row["step"] > 0]) >= 1
    AutoModelForCausalLM.from_pretrained(result.checkpoint_path)
    spec = job.resource["spec"]
    assert spec["model"].startswith(f"s3://{BUCKET}/hub/") and spec["dataset"]["path"].startswith(f"s3://{BUCKET}/hub/")


@pytest.mark.store_examples
def test_train_in_a_notebook_returns_a_folder_that_loads(
    place: Scene, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    desk = Desk(tmp_path, place)
    for name, value in (desk.environment | {"IPYTHONDIR": str(tmp_path / "ipython")}).items():
        monkeypatch.setenv(name, value)
    more = f", name='from-a-notebook', gpus=0, env_from={CREDENTIALS!r}, env={{'OMP_NUM_THREADS': '1'}}"
    load = "AutoModelForCausalLM.from_pretrained(result.checkpoint_path).config.hidden_size"
    cells = [in_store(example("SFT"), hub, RESULTS, more), f"from transformers import AutoModelForCausalLM\n{load}"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=2 * SECONDS, kernel_name="python3", resources=where).execute()
    (told,) = (output for output in book.cells[-1].outputs if output.output_type == "execute_result")
    assert told.data["text/plain"] == "32"


@pytest.mark.store_examples
def test_a_machine_without_keys_has_the_result_through_a_pod_of_the_job(
    submitted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    job = nemo_rl.attach(submitted["SFT"].name)
    job.wait()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    job.output_dir = tmp_path / "out"
    result = job.fetch()
    assert result.checkpoint_uri.startswith(f"{RESULTS}/{job.name}/checkpoints/step-")
    assert Path(result.checkpoint_path).is_relative_to(tmp_path)
    assert result.history[-1]["step"] == result.total_steps
    AutoModelForCausalLM.from_pretrained(result.checkpoint_path)
