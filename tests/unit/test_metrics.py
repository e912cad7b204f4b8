"""metrics.jsonl and completions.jsonl hold each step exactly once; a step line can be read back."""

from __future__ import annotations

import math
import string
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_rl.errors import LeaseLost
from nemo_rl.run.lease import Claim, Lease
from nemo_rl.run.metrics import (
    SAMPLE_CHARACTERS,
    MetricsLog,
    parse_sample_line,
    parse_step_line,
    read_history,
    sample_line,
    step_line,
)


def write_steps(run_dir, steps, *, resume_step=0, run="a"):
    log = MetricsLog(run_dir, resume_step=resume_step, tensorboard=False)
    for step in steps:
        log.log_completions(step, [{"completion": f"{run}{step}", "reward": 0.5}, {"completion": "two", "reward": 1.0}])
        log.log({"step": step, "loss": step / 3, "run": run})
    log.close()


def test_each_step_is_one_line_and_exact(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    assert read_history(tmp_path / "metrics.jsonl") == [{"step": s, "loss": s / 3, "run": "a"} for s in (1, 2, 3)]
    assert [r["step"] for r in read_history(tmp_path / "completions.jsonl")] == [1, 1, 2, 2, 3, 3]


@settings(deadline=None)
@given(
    first=st.integers(0, 6),
    resume=st.integers(0, 6),
    torn=st.sampled_from(["", "{", '{"step": 9', '{"step": 9, "loss": 1}', "\x00\x00\x00", "[]\n", '{"loss": 1}\n']),
)
def test_each_step_is_there_exactly_once_after_a_resume(tmp_path_factory, first, resume, torn):
    run_dir = tmp_path_factory.mktemp("run")
    resume = min(first, resume)
    write_steps(run_dir, range(1, first + 1))
    for name in ("metrics.jsonl", "completions.jsonl"):
        with open(run_dir / name, "a") as stream:
            stream.write(torn)
    write_steps(run_dir, range(resume + 1, 9), resume_step=resume, run="b")
    history = read_history(run_dir / "metrics.jsonl")
    assert [(r["step"], r["run"]) for r in history] == [(s, "a" if s <= resume else "b") for s in range(1, 9)]
    completions = read_history(run_dir / "completions.jsonl")
    assert [r["completion"] for r in completions[::2]] == [f"{'a' if s <= resume else 'b'}{s}" for s in range(1, 9)]
    assert (run_dir / "metrics.jsonl").read_text().count("\n") == 8


def test_lines_are_on_the_file_at_once(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    log.log({"step": 1})
    log.sync()
    assert len(read_history(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_missing_steps_are_warned_about(tmp_path, caplog):
    write_steps(tmp_path, [1, 2])
    MetricsLog(tmp_path, resume_step=5, tensorboard=False).close()
    assert "ends at step 2" in caplog.text
    assert len(read_history(tmp_path / "metrics.jsonl")) == 2


def test_a_step_is_refused_the_second_time(tmp_path):
    write_steps(tmp_path, [1, 2])
    log = MetricsLog(tmp_path, resume_step=2, tensorboard=False)
    with pytest.raises(ValueError, match="step 2 was logged already"):
        log.log({"step": 2})
    log.close()


def test_numbers_of_torch_and_numpy_and_what_is_not_finite(tmp_path):
    import numpy
    import torch

    log = MetricsLog(tmp_path, resume_step=0, tensorboard=False)
    log.log({"step": 1, "a": torch.tensor(0.5), "b": numpy.float32(0.25), "c": math.nan, "d": -math.inf, "e": None})
    log.log_completions(1, [{"completion": "ünï \ud800 \u2028\n", "rewards": {"x": math.nan, "y": torch.tensor(2)}}])
    log.close()
    assert read_history(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": 0.5, "b": 0.25, "c": None, "d": None, "e": None}
    ]
    completions = [{"step": 1, "completion": "ünï \ud800 \u2028\n", "rewards": {"x": None, "y": 2}}]
    assert read_history(tmp_path / "completions.jsonl") == completions
    assert "ünï" in (tmp_path / "completions.jsonl").read_text(encoding="utf-8")


def test_history_of_an_absent_file_is_empty(tmp_path):
    assert read_history(tmp_path / "metrics.jsonl") == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        log = MetricsLog(tmp_path, resume_step=resume, tensorboard=True)
        for step in steps:
            log.log({"step": step, "loss": value, "note": "text is no scalar", "kl": None})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_tensorboard_has_groups_the_run_s_name_samples_and_settings(tmp_path):
    """Read by TensorBoard's own reader, as its pages do."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.metadata import (
        PLUGIN_NAME,
        SESSION_START_INFO_TAG,
        parse_session_start_info_plugin_data,
    )
    from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXT
    from tensorboard.util.tensor_util import make_ndarray

    run = tmp_path / "outputs" / "sums"
    settings = {"algorithm": "grpo", "settings.learning_rate": 1e-6, "settings.shuffle": True, "rewards": '["a|b"]'}
    log = MetricsLog(run, resume_step=0, tensorboard=True, settings=settings)
    scalars = {
        "reward": 0.5,
        "reward/format": 0.1,
        "validation_reward": 0.25,
        "completion_length": 7.0,
        "step_seconds": 1.0,
    }
    log.log({"step": 1, **scalars, "environment/calls": 3, "rollout_kl": 0.1})
    log.log_completions(1, [{"prompt": "2+2=", "completion": "# <b>4</b>\nyes", "reward": 0.5}])
    log.close()
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "outputs" / "sums" / "tensorboard")).Reload()
    assert list(found.Runs()) == ["sums"]
    events = found.GetAccumulator("sums")
    assert set(events.Tags()["scalars"]) == {
        *("train/reward", "reward/format", "validation/reward", "completions/completion_length", "speed/step_seconds"),
        *("environment/calls", "rollout/rollout_kl"),
    }
    texts = {
        tag: make_ndarray(events.Tensors(tag)[0].tensor_proto)[0].decode() for tag in events.PluginTagToContent(TEXT)
    }
    assert texts["samples/1"] == "reward 0.5\n\nprompt\n\n    2+2=\n\ncompletion\n\n    # <b>4</b>\n    yes"
    assert "| algorithm | grpo |" in texts["settings"]
    assert '["a\\|b"]' in texts["settings"]
    content = events.PluginTagToContent(PLUGIN_NAME)[SESSION_START_INFO_TAG]
    start = parse_session_start_info_plugin_data(content)
    assert start.hparams["settings.learning_rate"].number_value == 1e-6
    assert start.hparams["settings.shuffle"].bool_value is True
    assert start.hparams["algorithm"].string_value == "grpo"


def test_tensorboard_goes_on_in_the_folder_that_a_run_has(tmp_path):
    """Also after the run's folder got another name, and of a run that an earlier version began."""
    run = tmp_path / "a"
    MetricsLog(run, resume_step=0, tensorboard=True).close()
    moved = run.rename(tmp_path / "b")
    MetricsLog(moved, resume_step=0, tensorboard=True).close()
    assert [path.name for path in (moved / "tensorboard").iterdir()] == ["a"]
    assert len(list((moved / "tensorboard" / "a").iterdir())) == 2
    early = tmp_path / "early" / "tensorboard"
    early.mkdir(parents=True)
    (early / "events.out.tfevents.0000000001.host.1.0").touch()
    MetricsLog(early.parent, resume_step=0, tensorboard=True).close()
    assert len(list(early.iterdir())) == 2


def test_an_attempt_that_lost_the_lease_adds_nothing_to_the_event_files(tmp_path, monkeypatch):
    """Also when it was stopped after it had asked whether the lease holds, and before it wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def begin(attempt, resume_step):
        lease = Claim.on(tmp_path / "x", "uid", attempt).take()
        return MetricsLog(tmp_path / "x", resume_step=resume_step, tensorboard=True, lease=lease)

    def content():
        return {path.name: path.read_bytes() for path in (tmp_path / "x" / "tensorboard" / "x").iterdir()}

    lost = begin(1, 0)
    for step in (1, 2):
        lost.log({"step": step, "loss": 1.0})
    later = begin(2, 1)
    later.log({"step": 2, "loss": 2.0})
    before = content()
    with pytest.raises(LeaseLost, match="to attempt 2"):
        lost.log({"step": 3, "loss": 1.0})
    monkeypatch.setattr(Lease, "check", lambda self: None)
    lost.log({"step": 3, "loss": 1.0})
    lost.close()
    assert len(before) == 2
    assert content() == before
    with pytest.raises(LeaseLost, match="to attempt 2"):
        MetricsLog(tmp_path / "x", resume_step=0, tensorboard=True, lease=Claim.on(tmp_path / "x", "uid", 1).of(1))
    later.log({"step": 3, "loss": 2.0})
    later.close()
    events = EventAccumulator(str(tmp_path / "x" / "tensorboard" / "x")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_missing_tensorboard_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from nemo_rl.run.metrics import MetricsLog\n"
        "MetricsLog(sys.argv[1], resume_step=0, tensorboard=True)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "pip install 'tensorboard>=2.20'" in out.stderr


# --- step lines -----------------------------------------------------------------------------------------------------


def test_step_line_is_readable_and_in_a_stable_order():
    metrics = {
        "zeta": 1, "loss": 0.123456, "step": 12, "epoch": 0, "reward": 0.61, "generation_seconds": 1.5,
        "tokens_per_second": 12345.6, "learning_rate": 1e-6, "step_seconds": 2.0, "reward/format": 1.0,
    }  # fmt: skip
    line = (
        "step=12/500 epoch=0 reward=0.61 loss=0.1235 learning_rate=1e-06 tokens_per_second=12350 step_seconds=2 "
        "reward/format=1 zeta=1"
    )
    assert step_line(metrics, 500) == line
    assert step_line(dict(reversed(metrics.items())), 500) == line
    assert step_line({"step": 3}) == "step=3"


names = st.text(string.ascii_letters + string.digits + '_/ .="%ä\n', min_size=1, max_size=12).filter(
    lambda name: name not in ("step", "total_steps") and not name.endswith("_seconds")
)
numbers = st.floats(allow_nan=True, allow_infinity=True, width=64) | st.integers() | st.booleans() | st.none()


@settings(deadline=None)
@given(
    st.integers(0, 10**9),
    st.none() | st.integers(1, 10**9),
    st.dictionaries(names, numbers | st.text(max_size=8), max_size=6),
)
@example(1, None, {"huge": 1.7975e308})
@example(1, 2, {"note": 'a "quoted" = line\r\n\u2028'})
def test_step_line_reads_back(step, total, metrics):
    line = step_line({"step": step, **metrics}, total)
    assert len(line.splitlines()) == 1
    parsed = parse_step_line(line + "\n")
    assert parsed.pop("step") == step
    assert parsed.pop("total_steps", None) == total
    assert parsed.keys() == metrics.keys()
    for name, value in metrics.items():
        if isinstance(value, float):
            rounded = float(f"{value:.4g}")
            assert parsed[name] == (rounded if math.isfinite(rounded) else value if math.isfinite(value) else None)
        else:
            assert parsed[name] == value


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        " step=1/2",
        "step=one",
        "step=1/2 hello",
        "step=1/2 a=b c",
        "step=1/2x",
        "mystep=1/2",
        "step=1/2  a=1",
    ],
)
def test_other_lines_are_no_step_lines(line):
    assert parse_step_line(line) is None


@settings(deadline=None)
@given(st.integers(1, 10**9), st.none() | st.floats(-100, 100), st.text(max_size=300), st.text(max_size=300))
@example(3, 0.5, '2+2=\n"?"', "\x1b[31m4\u2028")
def test_a_sample_line_is_one_line_and_reads_back(step, reward, prompt, completion):
    line = sample_line(step, {"prompt": prompt, "completion": completion, "reward": reward, "tokens": 3})
    assert len(line.splitlines()) == 1
    assert line.isascii()
    found = parse_sample_line(line + "\n")
    assert found["step"] == step
    assert found["reward"] == (None if reward is None else float(f"{reward:.4g}"))
    for name, text in (("prompt", prompt), ("completion", completion)):
        assert len(found[name]) <= SAMPLE_CHARACTERS
        assert text.startswith(found[name].removesuffix("…"))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "sample",
        "sample of text",
        "sample step=1 reward=0.5",
        'sample step=1 reward="high" prompt="a" completion="b"',
        'sample step=1 reward=1 prompt=2 completion="b"',
        'sample step=null reward=1 prompt="a" completion="b"',
        'a sample step=1 reward=1 prompt="a" completion="b"',
    ],
)
def test_other_lines_are_no_sample_lines(line):
    assert parse_sample_line(line) is None
