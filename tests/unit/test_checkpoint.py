"""Checkpoints: exact round trips, complete or absent after a kill, and which ones are kept."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_rl.run.checkpoint import (
    CheckpointStore,
    CorruptCheckpointError,
    find_checkpoints,
    load_into,
    read_checkpoint,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny_model(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        **{
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    return Qwen2ForCausalLM(config)


def lora_model(seed: int = 0):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def train_a_little(model, optimizer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(seed + step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model, **options) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, **options)


def assert_equal_weights(one, other) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Pebble(torch.nn.Linear):
    """The smallest thing that saves like a model, where the weights do not matter."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def save_pretrained(self, path: Path, state_dict: dict) -> None:
        Path(path, "config.json").write_text("{}")


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_resumed_training_continues_bit_by_bit(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    optimizer = adamw(model)
    train_a_little(model, optimizer, 3)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, model=model, tokenizer=None, optimizer=optimizer, state={"cursor": [1, 2.5, None]}, metric=0.5)
    train_a_little(model, optimizer, 3, seed=3)

    again = tiny_model(seed=1, tie_word_embeddings=tied)
    optimizer_again = adamw(again, foreach=False)
    optimizer_again.param_groups[0]["lr"] = 7.0  # the saved hyperparameters return, too
    checkpoint = CheckpointStore(tmp_path, keep=2).latest()
    assert (checkpoint.step, checkpoint.state, checkpoint.metric) == (3, {"cursor": [1, 2.5, None]}, 0.5)
    store.load_model_weights(checkpoint, again)
    store.load_optimizer(checkpoint, optimizer_again)
    train_a_little(again, optimizer_again, 3, seed=3)

    assert_equal_weights(model, again)
    for left, right in zip(optimizer.state.values(), optimizer_again.state.values(), strict=True):
        assert left.keys() == right.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [True, False])
def test_directory_loads_with_auto_model_exactly(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    path = CheckpointStore(tmp_path, keep=1).save(1, model=model, tokenizer=None, state={})
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert_equal_weights(model, loaded)
    assert loaded.dtype == torch.float32
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "best").config.vocab_size == 64


def test_tied_weights_stay_tied_after_loading(tmp_path):
    path = write_checkpoint(tmp_path / "c", 1, model=tiny_model(), tokenizer=None, state={})
    other = tiny_model(seed=1)
    load_into(read_checkpoint(path), other)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_weights_saved_under_other_names_return_exactly(tmp_path):
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, state={})
    other = MixtralForCausalLM(config)
    load_into(read_checkpoint(path), other)
    assert_equal_weights(model, other)


def test_tokenizer_is_saved_beside_the_model(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<eos>", *"abc"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), eos_token="<eos>"
    )
    tokenizer.chat_template = "{{ messages }}"
    path = write_checkpoint(tmp_path / "c", 1, model=tiny_model(), tokenizer=tokenizer, state={})
    loaded = PreTrainedTokenizerFast.from_pretrained(path)
    assert loaded.get_vocab() == words
    assert loaded.chat_template == "{{ messages }}"


def test_saving_changes_neither_model_nor_optimizer(tmp_path):
    for make in (tiny_model, lora_model):
        model, twin = make(), make()
        for m, save in ((model, True), (twin, False)):
            optimizer = adamw(m)
            for steps in (0, 2):  # before the first step, too, when there is no optimizer state yet
                train_a_little(m, optimizer, steps)
                if save:
                    target = tmp_path / f"{make.__name__}-{steps}"
                    write_checkpoint(target, steps, model=m, tokenizer=None, optimizer=optimizer, state={})
            train_a_little(m, optimizer, 2, seed=9)
        assert_equal_weights(model, twin)


def test_optimizer_without_state_round_trips(tmp_path):
    model = tiny_model()
    path = write_checkpoint(tmp_path / "c", 0, model=model, tokenizer=None, optimizer=adamw(model), state={})
    optimizer = adamw(model)
    train_a_little(model, optimizer, 1)
    load_into(read_checkpoint(path), model, optimizer)
    assert not optimizer.state


def test_lora_saves_merged_model_and_adapter(tmp_path):
    model = lora_model()
    path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, state={})
    assert {p.name for p in path.iterdir()} >= {"model.safetensors", "config.json", "adapter", "state.json"}

    ids = torch.arange(12)[None]
    loaded = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    again = lora_model(seed=5)
    load_into(read_checkpoint(path), again)
    assert_equal_weights(model, again)
    # peft's own merge, in place, is the oracle; it comes last because it changes the model.
    assert_equal_weights(model.merge_and_unload(), loaded)


def test_generation_config_that_transformers_refuses_is_saved(tmp_path):
    model = tiny_model()
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError):  # noqa: PT011 — the behaviour of transformers that this guards against
        model.save_pretrained(tmp_path / "plain")
    path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, state={})
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.temperature == 0.6
    assert not model.generation_config.do_sample


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_other_model_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "c", 1, model=tiny_model(), tokenizer=None, state={})
    for changes in ({"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 48}):
        with pytest.raises(ValueError, match="another model"):
            load_into(read_checkpoint(path), tiny_model(**changes))


def test_other_optimizer_is_refused(tmp_path):
    model = tiny_model()
    optimizer = adamw(model)
    train_a_little(model, optimizer, 1)
    path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, optimizer=optimizer, state={})
    with pytest.raises(ValueError, match="parameters by group"):
        load_into(read_checkpoint(path), model, torch.optim.AdamW(model.parameters()))
    wider = tiny_model(intermediate_size=48)
    with pytest.raises(ValueError, match="has shape"):
        CheckpointStore(tmp_path, 1).load_optimizer(read_checkpoint(path), adamw(wider))


def test_full_model_checkpoint_does_not_resume_lora(tmp_path):
    path = write_checkpoint(tmp_path / "c", 1, model=tiny_model(), tokenizer=None, state={})
    with pytest.raises(ValueError, match="lora_rank"):
        load_into(read_checkpoint(path), lora_model())


def test_state_that_is_not_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "c", 1, model=tiny_model(), tokenizer=None, state={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_former_checkpoint_and_names_step_and_path(tmp_path):
    class Broken(Pebble):
        def save_pretrained(self, path, state_dict):
            raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, model=Pebble(), tokenizer=None, state={})
    with pytest.raises(OSError, match="No space left") as caught:
        store.save(2, model=Broken(), tokenizer=None, state={})
    assert "step 2" in caught.value.__notes__[0]
    assert store.latest().step == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "latest", "step-00000001"]


def test_directory_that_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path / "precious", 1, model=Pebble(), tokenizer=None, state={})
    assert (tmp_path / "precious" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "state.json").write_text('{"format": 1, "st'),
        lambda path: (path / "state.json").write_text("[]"),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: os.truncate(path / "model.safetensors", 100),
        lambda path: (path / "trainer_state" / ".metadata").unlink(),
    ],
)
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage):
    store = CheckpointStore(tmp_path, keep=3)
    for step, metric in ((1, 0.1), (2, 0.9)):
        path = store.save(step, model=tiny_model(step), tokenizer=None, state={}, metric=metric)
    damage(path)
    with pytest.raises(CorruptCheckpointError):
        read_checkpoint(path)
    assert store.latest().step == 1
    assert store.best().step == 1
    assert "step-00000002" in caplog.text
    store.save(2, model=tiny_model(7), tokenizer=None, state={}, metric=0.2)  # and is replaced by the replayed step
    assert_equal_weights(AutoModelForCausalLM.from_pretrained(store.latest_path()), tiny_model(7))


def test_checkpoint_of_another_format_is_refused_by_number(tmp_path):
    path = write_checkpoint(tmp_path / "c", 1, model=Pebble(), tokenizer=None, state={})
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(CorruptCheckpointError, match="format 99"):
        read_checkpoint(path)


# --- which ones are kept --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metrics=st.lists(st.sampled_from([None, math.nan, -1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=7),
    keep=st.integers(1, 3),
)
def test_newest_and_best_are_kept(tmp_path_factory, metrics, keep):
    run_dir = tmp_path_factory.mktemp("run")
    store = CheckpointStore(run_dir, keep=keep)
    seen: list[tuple[int, float | None]] = []
    for step, metric in enumerate(metrics, start=1):
        store.save(step, model=Pebble(), tokenizer=None, state={}, metric=metric)
        seen.append((step, None if metric is None or math.isnan(metric) else metric))
        top = max((m for _, m in seen if m is not None), default=None)
        best = step if top is None else next(s for s, m in seen if m == top)
        assert [c.step for c in store.checkpoints()] == sorted({best, *range(max(1, step - keep + 1), step + 1)})
        assert store.best().step == best
        assert store.latest().step == step
        assert (store.root / "best").resolve() == store.best_path().resolve()
        assert (store.root / "latest").resolve() == store.latest_path().resolve()


def test_pointers_that_a_killed_save_left_behind_are_moved_by_the_next_call(tmp_path):
    """Killed between the checkpoint and its pointers; a run that was at its end saves no more."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, model=tiny_model(step), tokenizer=None, state={}, metric=float(step))
    for name in ("latest", "best"):
        (store.root / name).unlink()
        (store.root / name).symlink_to("step-00000001")
    again = CheckpointStore(tmp_path, keep=3)
    for name in ("latest", "best"):
        assert (again.root / name).resolve().name == "step-00000002"


def test_empty_store_has_neither_latest_nor_best(tmp_path):
    store = CheckpointStore(tmp_path / "absent", keep=1)
    assert store.latest() is store.best() is store.latest_path() is store.best_path() is None


def test_links_survive_moving_the_run(tmp_path):
    CheckpointStore(tmp_path / "a", keep=1).save(1, model=Pebble(), tokenizer=None, state={})
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "checkpoints" / "best" / "state.json").exists()


def test_looking_for_checkpoints_loads_no_torch(tmp_path):
    CheckpointStore(tmp_path, keep=1).save(1, model=Pebble(), tokenizer=None, state={})
    code = (
        "import sys; from pathlib import Path; from nemo_rl.run.checkpoint import CheckpointStore;"
        "print(CheckpointStore(Path(sys.argv[1]), keep=1).best().step, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1", "False"]


# --- several ranks --------------------------------------------------------------------------------------------------

SHARDED_SAVE = """
import os, sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[2])
from nemo_rl.run.dtypes import remember_dtypes
from test_checkpoint import CheckpointStore, Path, adamw, tiny_model, torch, train_a_little
torch.set_num_threads(1)
out, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[3])
other = os.fork()
rank = 0 if other else 1
dist.init_process_group("gloo", store=dist.FileStore(str(out / "rendezvous"), 2), rank=rank, world_size=2)
model = tiny_model()
remember_dtypes(model, fp32=False, as_loaded=dict.fromkeys(model.state_dict(), dtype))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = adamw(model)
train_a_little(model, optimizer, 2)
CheckpointStore(out, keep=1).save(2, model=model, tokenizer=None, optimizer=optimizer, state={}, metric=1.0)
train_a_little(model, optimizer, 1, seed=2)
after = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
if rank == 0:
    torch.save(after, out / "after.pt")
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_of_two_sharded_ranks_resumes_on_one(dtype, tmp_path):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARDED_SAVE, str(tmp_path), here, dtype]
    subprocess.run(command, env=environment, check=True, timeout=120)
    checkpoint = CheckpointStore(tmp_path, keep=1).latest()
    assert AutoModelForCausalLM.from_pretrained(checkpoint.path).dtype == getattr(torch, dtype)
    model = tiny_model(seed=1)
    optimizer = adamw(model)
    load_into(checkpoint, model, optimizer)
    train_a_little(model, optimizer, 1, seed=2)
    after = torch.load(tmp_path / "after.pt")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, after[name], rtol=0, atol=1e-7)


# --- kills ----------------------------------------------------------------------------------------------------------

KILLED_SAVES = textwrap.dedent(
    """
    # Forks savers and kills them: at a chosen file operation of the save, or after a random time. Prints what is left.
    import json, os, random, shutil, signal, sys, time, traceback
    from pathlib import Path
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from nemo_rl.run.checkpoint import CheckpointStore, load_into

    torch.set_num_threads(1)
    config = Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)
    model = Qwen2ForCausalLM(config)
    TRAINED = list(model.parameters())[:3]
    optimizer = torch.optim.AdamW(TRAINED)
    EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.rmtree"}

    def fill(step):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float(step))
            for p in TRAINED:
                optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": p * 2.0, "exp_avg_sq": p * 3.0}

    def save(root, step):
        fill(step)
        CheckpointStore(root, keep=1).save(step, model=model, tokenizer=None, optimizer=optimizer,
                                           state={"n": step}, metric=1.0 if step == 1 else 0.0)

    def forked(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return pid

    def save_and_die(root, steps, at):
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        for step in steps:
            save(root, step)

    def check(root, allowed):
        names = [p.name for p in (root / "checkpoints").iterdir()]
        store = CheckpointStore(root, keep=1)
        leftovers = [p.name for p in store.root.iterdir() if p.name.startswith(".")]
        assert not leftovers, (leftovers, names)
        found = store.checkpoints()
        steps = [c.step for c in found]
        assert 1 in steps, (steps, names)                            # the best one is never lost
        assert len(list(store.root.glob("step-*"))) == len(found)    # no half checkpoint under a real name
        assert max(steps) in allowed, (steps, allowed)
        for checkpoint in found:
            assert checkpoint.state == {"n": checkpoint.step}
            load_into(checkpoint, model, optimizer)
            for p in model.parameters():
                assert bool((p == checkpoint.step).all())
            for p in TRAINED:
                assert bool((optimizer.state[p]["exp_avg_sq"] == checkpoint.step * 3.0).all())
        save(root, 9)                                                # the next save works
        assert store.latest().step == 9 and store.best().step == 1
        return max(steps)

    base, seed = Path(sys.argv[1]), int(sys.argv[2])
    draw = random.Random(seed)
    outcomes = {}
    for name, before, stride in (("new", [1, 2], 4), ("replace", [1, 3], 6)):
        seed_dir = base / name
        for step in before:
            save(seed_dir, step)
        at, killed = draw.randint(1, stride), True
        while killed:
            root = base / f"{name}-{at}"
            shutil.copytree(seed_dir, root, symlinks=True)
            _, status = os.waitpid(forked(lambda: save_and_die(root, [3], at)), 0)
            killed = os.WIFSIGNALED(status)
            assert killed or status == 0, status
            step = check(root, {before[-1], 3})
            outcomes.setdefault(name, []).append(step)
            shutil.rmtree(root)
            at += stride
    timed = []
    for attempt in range(12):
        root = base / f"random-{attempt}"
        save(root, 1)
        pid = forked(lambda: [save(root, step) for step in (2, 3, 4, 5, 6)])
        time.sleep(draw.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        timed.append(check(root, {1, 2, 3, 4, 5, 6}))
        shutil.rmtree(root)
    print(json.dumps({**outcomes, "timed": timed}))
    """
)


@pytest.mark.slow
def test_killed_save_leaves_a_complete_checkpoint_or_none(tmp_path):
    """SIGKILL at every fourth or sixth file operation that a save makes, and at 12 random moments."""
    script = tmp_path / "killed_saves.py"
    script.write_text(KILLED_SAVES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert out.returncode == 0, out.stderr
    outcomes = json.loads(out.stdout.splitlines()[-1])
    assert len(outcomes["new"]) > 8
    assert outcomes["new"] == sorted(outcomes["new"])  # step 2 until the rename, step 3 from then on
    assert {2, 3} == set(outcomes["new"])
    assert set(outcomes["replace"]) == {3}  # a checkpoint that is being replaced is never lost
    assert len(set(outcomes["timed"])) > 1
    assert find_checkpoints(tmp_path / "new")


# --- what somebody else wrote


class Evil:
    """A pickle that opens a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (eval, (f"open({str(self.marker)!r}, 'w').write('ran')",))


def saved_with_optimizer(folder: Path):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    write_checkpoint(folder, 1, model=model, tokenizer=None, optimizer=optimizer, state={})
    return model, optimizer


def forge(folder: Path, name: str, content: bytes) -> None:
    """Puts content in the place of a file, in such a way that the checkpoint looks complete."""
    (folder / name).write_bytes(content)
    record = json.loads((folder / "state.json").read_text())
    record["files"][name] = len(content)
    (folder / "state.json").write_text(json.dumps(record))


def test_a_forged_index_of_the_optimizer_runs_nothing(tmp_path: Path):
    import pickle

    model, optimizer = saved_with_optimizer(tmp_path / "c")
    forge(tmp_path / "c", "trainer_state/.metadata", pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"\.metadata names builtins\.eval, which no index of tensors needs"):
        load_into(read_checkpoint(tmp_path / "c"), model, optimizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("builtins", "eval"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("nemo_rl.run.wire", "read_token"),
        ("codecs", "encode"),
        ("importlib", "import_module"),
    ],
)
def test_a_forged_index_can_name_no_function(module: str, name: str):
    import io

    from nemo_rl.run import unpickle

    with pytest.raises(ValueError, match="which no index of tensors needs"):
        unpickle.load(io.BytesIO(b"c" + f"{module}\n{name}\n".encode() + b"."), "it")
    short = lambda text: b"\x8c" + bytes([len(text)]) + text.encode()  # noqa: E731
    with pytest.raises(ValueError, match="which no index of tensors needs"):
        unpickle.load(io.BytesIO(b"\x80\x04" + short(module) + short(name) + b"\x93."), "it")


@pytest.mark.parametrize("named", [b"cbuiltins\nValueError\n", b"ctorch\nSize\n", b"ctorch\nfloat32\n"])
@pytest.mark.parametrize("attribute", [b"__class__", b"__init__", b"__dict__"])
def test_getattr_in_a_forged_index_reads_no_attribute(named: bytes, attribute: bytes):
    """Some versions of Python write members of enumerations by it; what stands in for it gives nothing else."""
    import io

    from nemo_rl.run import unpickle

    assert unpickle.load(io.BytesIO(b"cbuiltins\ngetattr\n."), "it") is not getattr
    with pytest.raises(unpickle.ForbiddenPickle, match="no member of an enumeration"):
        unpickle.load(io.BytesIO(b"cbuiltins\ngetattr\n(" + named + b"V" + attribute + b"\ntR."), "it")


def test_a_forged_index_cannot_lead_out_of_its_folder(tmp_path: Path):
    import pickle

    model, optimizer = saved_with_optimizer(tmp_path / "c")
    path = tmp_path / "c" / "trainer_state" / ".metadata"
    index = pickle.loads(path.read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../../other"
    forge(tmp_path / "c", "trainer_state/.metadata", pickle.dumps(index))
    with pytest.raises(ValueError, match="which is not in its folder"):
        load_into(read_checkpoint(tmp_path / "c"), model, optimizer)


@pytest.mark.parametrize("content", ["a pickle", "a damaged archive", "zeros"])
def test_forged_tensors_of_the_optimizer_run_nothing(content: str, tmp_path: Path):
    import pickle

    model, optimizer = saved_with_optimizer(tmp_path / "c")
    (tensors,) = (tmp_path / "c" / "trainer_state").glob("*.distcp")
    name = f"trainer_state/{tensors.name}"
    forged = {"a pickle": pickle.dumps(Evil(tmp_path / "ran")), "a damaged archive": b"PK\x03\x04", "zeros": b""}
    filling = b" " if content == "a pickle" else b"\0"
    forge(tmp_path / "c", name, forged[content] + filling * tensors.stat().st_size)
    with pytest.raises(ValueError, match=r"trainer_state hold something else than the optimizer's tensors .* was run"):
        load_into(read_checkpoint(tmp_path / "c"), model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_forged_weights_run_nothing(tmp_path: Path):
    model, optimizer = saved_with_optimizer(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "ran"), tmp_path / "c" / "pytorch_model.bin")
    record = json.loads((tmp_path / "c" / "state.json").read_text())
    del record["files"]["model.safetensors"]
    (tmp_path / "c" / "state.json").write_text(json.dumps(record))
    with pytest.raises((OSError, ValueError)):
        load_into(read_checkpoint(tmp_path / "c"), model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_what_torch_pickles_itself_is_read_the_same(tmp_path: Path):
    import pickle

    from nemo_rl.run import unpickle

    saved_with_optimizer(tmp_path / "c")
    path = tmp_path / "c" / "trainer_state" / ".metadata"
    with open(path, "rb") as stream:
        found = unpickle.load(stream, "it")
    expected = pickle.loads(path.read_bytes())
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
