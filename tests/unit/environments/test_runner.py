"""Rewards in their worker process: every shape, every misbehaviour, and nothing left behind."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import functools
import importlib.util
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest

from nemo_rl.environments import (
    Environment,
    RewardCall,
    RewardRunner,
    bind_rewards,
    preflight,
    reward_function,
)
from nemo_rl.environments.execute import BadValue, as_reward, number
from nemo_rl.errors import RewardError
from nemo_rl.run.signals import Interrupted

TIMEOUT = 0.5
PLENTY = 60.0


def calls(*responses: str, **columns) -> list[RewardCall]:
    return [RewardCall("p", text, None, columns, (7, 1, 0, i)) for i, text in enumerate(responses)]


@contextmanager
def running(reward_fn, timeout: float = PLENTY, on_error: str = "raise", **options) -> Iterator[RewardRunner]:
    with RewardRunner(bind_rewards(reward_fn), timeout_seconds=timeout, on_error=on_error, **options) as runner:
        yield runner


def values(runner: RewardRunner, *responses: str, **columns) -> list[float | None]:
    return [outcome.value for outcome in runner.score(calls(*responses, **columns))]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# ---------------------------------------------------------------------- shapes


class Scorer:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, prompt, response):
        return self.scale

    def method(self, prompt, response):
        return self.scale + 1


async def asynchronous(prompt, response):
    await asyncio.sleep(0)
    return 7.0


async def batch_of_coroutines(prompts, responses):
    await asyncio.sleep(0)
    return [13.0 for _ in prompts]


def scaled(scale, prompt, response):
    return scale


def logged(fn):
    @functools.wraps(fn)
    def wrapper(*args, **keywords):
        return fn(*args, **keywords)

    return wrapper


@logged
def decorated(prompt, response, answer):
    return float(answer)


class Sums(Environment):
    def score_batch(self, prompts, responses, answer):
        return numpy.array([float(a) + 1 for a in answer])


SHAPES = {
    "float": (lambda prompt, response: 1.5, 1.5),
    "int": (lambda prompt, response: 2, 2.0),
    "bool": (lambda prompt, response: True, 1.0),
    "numpy": (lambda prompt, response: numpy.float32(3), 3.0),
    "array": (lambda prompt, response: numpy.array(4), 4.0),
    "callable": (Scorer(5.0), 5.0),
    "method": (Scorer(5.0).method, 6.0),
    "async": (asynchronous, 7.0),
    "lambda_of_async": (lambda prompt, response: asynchronous(prompt, response), 7.0),
    "partial": (functools.partial(scaled, 8.0), 8.0),
    "decorated": (decorated, 9.0),
    "batched": (lambda prompts, responses, answer: [float(a) + 1 for a in answer], 10.0),
    "tuple": (lambda prompts, responses: tuple(11 for _ in prompts), 11.0),
    "environment": (Sums, 10.0),
    "async_batched": (batch_of_coroutines, 13.0),
    "columns": (lambda prompt, response, **columns: float(columns["answer"]) + 5, 14.0),
}


def test_every_shape_of_a_reward_gives_its_number():
    with running({name: fn for name, (fn, _) in SHAPES.items()}) as runner:
        outcomes = runner.score(calls("a", "b", answer="9"))
    expected = {name: value for name, (_, value) in SHAPES.items()}
    for outcome in outcomes:
        assert outcome.parts == expected
        assert outcome.value == math.fsum(expected.values())
        assert outcome.error is None


def test_torch_scalars_are_numbers_and_vectors_are_not():
    torch = pytest.importorskip("torch")
    assert number(torch.tensor(0.5)) == 0.5
    with pytest.raises(BadValue, match="expected a number"):
        number(torch.tensor([0.5]))


def test_dicts_are_summed_and_their_parts_kept():
    with running(lambda prompt, response: {"style": 0.5, "truth": numpy.int64(1)}) as runner:
        (outcome,) = runner.score(calls("a"))
    assert (outcome.value, outcome.parts) == (1.5, {"style": 0.5, "truth": 1.0})


def test_the_dict_of_a_reward_of_verl_is_its_score_and_what_is_for_the_log():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return {"score": 0.25, "acc": True, "pred": solution_str}

    with running(compute_score) as runner:
        (outcome,) = runner.score(calls("r", data_source="math", ground_truth="4"))
    assert outcome.value == 0.25


@pytest.mark.parametrize("value", [10**400, {"a": 1e308, "b": 1e308}])
def test_numbers_too_large_for_a_float_are_not_finite(value):
    with pytest.raises(BadValue, match="finite") as caught:
        as_reward(value)
    assert caught.value.cause == "not_finite"


def test_several_rewards_are_weighted_and_logged_by_name():
    rewards = bind_rewards(
        {"a": lambda prompt, response: {"x": 1, "y": 2}, "b": lambda prompt, response: 4}, {"b": 0.5}
    )
    with RewardRunner(rewards, timeout_seconds=PLENTY, on_error="raise") as runner:
        (outcome,) = runner.score(calls("r"))
        assert runner.score([]) == []
    assert outcome.value == 5.0
    assert outcome.parts == {"a": 3.0, "a/x": 1.0, "a/y": 2.0, "b": 4.0}


# ---------------------------------------------------------------------- misbehaviour


def misbehave(prompt, response, path=None):
    """Does what the response says; notes in a file that it was called."""
    if path:
        with open(path, "a") as file:
            file.write(response + "\n")
    match response:
        case "loop":
            while True:
                pass
        case "regex":
            re.fullmatch(r"(a+)+b", "a" * 64)  # holds the GIL for longer than anybody lives
        case "sleep":
            time.sleep(1000)
        case "lock":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        case "exit":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "raise":
            raise ValueError("no parse")
        case "sys.exit":
            sys.exit(1)
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
    return VALUES.get(response, 1.0)


VALUES = {"nan": float("nan"), "inf": -math.inf, "none": None, "text": "1.0", "vector": numpy.zeros(2), "list": [1.0]}
VALUES |= {"empty": {}, "nan part": {"a": 1.0, "b": float("nan")}, "complex": 1j}

FAILURES = {
    "raise": ("exception", "raised ValueError: no parse"),
    "sys.exit": ("exception", "raised SystemExit: 1"),
    "nan": ("not_finite", "returned nan; expected a finite number"),
    "inf": ("not_finite", "returned -inf"),
    "none": ("wrong_type", "returned None (NoneType)"),
    "text": ("wrong_type", "returned '1.0' (str)"),
    "vector": ("wrong_type", "(ndarray)"),
    "list": ("wrong_type", "returned [1.0] (list)"),
    "empty": ("wrong_type", "empty dict"),
    "nan part": ("not_finite", "returned nan for 'b'"),
    "complex": ("wrong_type", "returned 1j"),
    "loop": ("timeout", "took longer than 0.5 s"),
    "regex": ("timeout", "in misbehave: re.fullmatch"),
    "sleep": ("timeout", "in misbehave: time.sleep(1000)"),
    "lock": ("timeout", "in misbehave: lock.acquire()"),
    "exit": ("died", "ended with exit code 3"),
    "segfault": ("died", "SIGSEGV"),
}
QUICK = [name for name, (cause, _) in FAILURES.items() if cause not in ("timeout", "died")]


def test_a_completion_whose_reward_fails_scores_zero_and_the_others_what_they_deserve(tmp_path):
    seen = tmp_path / "seen"
    responses = [text for name in FAILURES for text in (name, f"good after {name}")] + ["interrupt"]
    with running(misbehave, TIMEOUT, "zero") as runner:
        outcomes = runner.score(calls(*responses, path=str(seen)))
        metrics = runner.metrics()
    assert seen.read_text().split("\n")[:-1] == responses  # each was called once, in order
    for response, outcome in zip(responses, outcomes, strict=True):
        if response in FAILURES:
            assert outcome.value == 0.0, response
            assert FAILURES[response][1] in str(outcome.error)
        else:
            assert (outcome.value, outcome.error) == (1.0, None), response
    for cause in ("exception", "not_finite", "wrong_type", "timeout", "died"):
        assert metrics[f"reward_errors/{cause}"] == sum(c == cause for c, _ in FAILURES.values())
    assert metrics["reward_workers/restarts"] == 6


def test_a_completion_whose_reward_fails_is_dropped():
    with running(misbehave, TIMEOUT, "drop") as runner:
        assert values(runner, "nan", "fine", "sleep", "fine", "exit", "fine") == [None, 1.0, None, 1.0, None, 1.0]


def test_a_reward_that_fails_raises_with_the_cause_and_the_completion():
    with running(misbehave, TIMEOUT) as runner:
        for response in [*QUICK, "sleep", "exit"]:
            with pytest.raises(RewardError) as caught:
                runner.score(calls("fine", response, "fine"))
            message = str(caught.value)
            assert FAILURES[response][1] in message
            assert "reward 'misbehave'" in message
            assert "(step 1, prompt 0, sample 1)" in message
            assert f"response: {response!r}" in message
            assert "on_reward_error='zero' or 'drop'" in message
        assert values(runner, "fine") == [1.0]


def test_an_error_names_the_step_of_the_run_not_the_one_that_seeds():
    """Evaluations are seeded as step 0 whenever they are, and steps count from 1."""
    with running(misbehave, TIMEOUT) as runner:
        failing = [dataclasses.replace(call, key=(1, 0, 4, 2), step=7) for call in calls("nan")]
        with pytest.raises(RewardError, match=r"\(step 7, prompt 4, sample 2\)"):
            runner.score(failing)
        with pytest.raises(RewardError, match=r"\(tried before the first step, prompt 4, sample 2\)"):
            runner.score([dataclasses.replace(call, key=(1, 0, 4, 2), step=0) for call in failing])


def test_the_error_of_a_raising_reward_shows_the_lines_of_its_author():
    def inner(text):
        raise KeyError(text)  # the culprit

    def reward(prompt, response):
        try:
            return inner(response)
        except KeyError as error:
            raise RuntimeError("while scoring") from error

    with running(reward) as runner, pytest.raises(RewardError) as caught:
        runner.score(calls("x" * 1000))
    trace = caught.value.traceback
    assert "raise KeyError(text)  # the culprit" in trace
    assert trace.rstrip().endswith("RuntimeError: while scoring")
    assert "execute.py" not in trace
    assert caught.value.__notes__ == [trace.rstrip()]
    assert "x" * 201 not in str(caught.value)


def test_of_several_rewards_only_the_one_that_fails_scores_zero():
    def bad(prompt, response):
        raise ValueError

    rewards = [bad, lambda prompt, response: 2.0]
    with running(rewards, on_error="zero") as runner:
        (outcome,) = runner.score(calls("a"))
    assert (outcome.value, outcome.error) == (2.0, "bad raised ValueError")
    with running(rewards, on_error="drop") as runner:
        assert values(runner, "a") == [None]


def misbehaving_batch(prompts, responses):
    match responses[0]:
        case "sleep":
            time.sleep(1000)
        case "exit":
            os._exit(4)
        case "raise":
            raise ValueError("no batch")
        case "short":
            return [1.0]
        case "number":
            return 1.0
        case "text":
            return "ab"
        case "mixed":
            return [1.0, None]
    return [1.0, 2.0]


@pytest.mark.parametrize("on_error", ["zero", "drop"])
def test_a_batched_reward_that_fails_fails_for_its_batch(on_error):
    lost = 0.0 if on_error == "zero" else None
    with running(misbehaving_batch, TIMEOUT, on_error) as runner:
        for first in ("sleep", "exit", "raise", "short", "number", "text"):
            assert values(runner, first, "b") == [lost, lost]
            assert values(runner, "fine", "b") == [1.0, 2.0]
        assert values(runner, "mixed", "b") == [1.0, lost]
        metrics = runner.metrics()
    assert metrics["reward_errors/wrong_length"] == 2
    assert metrics["reward_errors/timeout"] == 2


async def misbehaving_coroutine(prompt, response):
    match response:
        case "raise":
            raise TimeoutError("its own")
        case "cancel":
            raise asyncio.CancelledError
        case "hang":
            await asyncio.sleep(1000)
        case "stubborn":
            while True:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(1000)
        case "block":
            time.sleep(1000)
    await asyncio.sleep(0)
    return 1.0


def test_async_rewards_that_fail_leave_the_others_alone():
    with running(misbehaving_coroutine, TIMEOUT, "zero") as runner:
        outcomes = runner.score(calls("a", "hang", "raise", "cancel", "b"))
        assert [o.value for o in outcomes] == [1.0, 0.0, 0.0, 0.0, 1.0]
        assert "took longer than 0.5 s" in str(outcomes[1].error)
        assert "raised TimeoutError: its own" in str(outcomes[2].error)
        assert values(runner, "a", "stubborn", "b") == [1.0, 0.0, 1.0]
        assert values(runner, "block", "a", "b") == [0.0, 1.0, 1.0]
    with running(misbehaving_coroutine, PLENTY) as runner, pytest.raises(RewardError, match="its own"):
        runner.score(calls("hang", "raise"))


def test_async_calls_are_in_flight_together():
    waiting: list[str] = []

    async def reward(prompt, response):
        waiting.append(response)
        while len(waiting) < 20:
            await asyncio.sleep(0.001)
        return 1.0

    with running(reward) as runner:
        assert values(runner, *map(str, range(20))) == [1.0] * 20


# ---------------------------------------------------------------------- random numbers


def draws(prompt, response):
    return random.random() + 10 * numpy.random.randint(1000) + len({"a", "b", "c"}) * hash(response) % 7


def test_random_numbers_follow_the_key_of_the_call_alone():
    def make(samples):
        return [RewardCall("p", "r", None, {}, (7, 1, 0, sample)) for sample in samples]

    with running(draws) as runner:
        first = [o.value for o in runner.score(make(range(6)))]
    with running(draws) as runner:
        again = [o.value for o in runner.score(make([5, 4, 0]))]
    assert len(set(first)) == 6
    assert again == [first[5], first[4], first[0]]


def test_a_reward_in_this_process_draws_the_same_and_leaves_its_random_state():
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    marked = reward_function(in_process=True)(lambda prompt, response: random.random() + numpy.random.random())
    with running(marked) as runner:
        here = values(runner, "a", "b")
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before
    with running(lambda prompt, response: random.random() + numpy.random.random()) as runner:
        assert values(runner, "a", "b") == here


# ---------------------------------------------------------------------- processes


def test_nothing_is_left_behind(tmp_path):
    pids = tmp_path / "pids"

    def reward(prompt, response, path):
        child = subprocess.Popen(["sleep", "1000"])
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n{child.pid}\n")
        if response == "hang":
            child.wait()
        return 1.0

    before = threading.active_count()
    with running(reward, TIMEOUT, "zero") as runner:
        assert values(runner, "hang", "fine", path=str(pids)) == [0.0, 1.0]
    found = [int(line) for line in pids.read_text().split()]
    assert len(found) == 4
    assert eventually(lambda: not any(map(is_running, found)))
    assert not any(Path(f"/proc/{pid}").exists() for pid in found[::2])  # reaped, no zombies
    assert eventually(lambda: threading.active_count() <= before)


def test_a_worker_that_ends_between_batches_is_replaced_and_no_call_is_to_blame():
    def reward(prompt, response):
        if response == "later":
            threading.Timer(0.01, os._exit, (3,)).start()
        return float(os.getpid())

    with running(reward) as runner:
        (pid,) = values(runner, "later")
        assert eventually(lambda: not is_running(int(pid)))
        assert values(runner, "a") != [pid]
        assert runner.metrics()["reward_errors/died"] == 0


def test_a_worker_dies_with_its_parent_even_in_a_call(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from nemo_rl.environments import RewardCall, RewardRunner, bind_rewards\n"
        "def reward(prompt, response):\n"
        "    print('worker', os.getpid(), flush=True)\n"
        "    while True: pass\n"
        "runner = RewardRunner(bind_rewards(reward), timeout_seconds=1000, on_error='raise')\n"
        "runner.score([RewardCall('p', 'r')])\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline().split()[1])
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not is_running(pid))


def test_a_script_needs_no_main_guard_and_its_local_modules_travel_as_they_are(tmp_path):
    (tmp_path / "my_settings.py").write_text("GAIN = 1.0\ndef gain():\n    return GAIN\n")
    (tmp_path / "script.py").write_text(
        "import my_settings\n"
        "from nemo_rl.environments import RewardCall, RewardRunner, bind_rewards\n"
        "print('loaded')\n"
        "my_settings.GAIN = 3.0\n"
        "def reward(prompt, response):\n"
        "    print('scoring é')\n"
        "    return my_settings.gain()\n"
        "with RewardRunner(bind_rewards(reward), timeout_seconds=60, on_error='raise') as runner:\n"
        "    print(runner.score([RewardCall('p', 'r')])[0].value)\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path.parent).stdout
    assert sorted(output.split("\n")) == ["", "3.0", "loaded", "scoring é"]


def test_a_local_module_that_cannot_be_packed_travels_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "locked_rewards.py").write_text(
        "import threading\nLOCK = threading.Lock()\ndef reward(prompt, response):\n    with LOCK:\n        return 2.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import locked_rewards

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it needs no thread of this process
        with running(locked_rewards.reward) as runner:
            assert values(runner, "a") == [2.0]


UNIMPORTABLE = """
import os
BONUS = 0.5
def helper(text):
    return len(text) + BONUS
class Scale:
    by = 2.0
def reward(prompt, response):
    return {"score": helper(response) * Scale.by, "elsewhere": float(os.getpid() != PARENT)}
"""


def made_by_exec(name: str, register: bool, tmp_path: Path) -> Any:
    module = types.ModuleType(name)
    module.PARENT = os.getpid()
    if register:
        sys.modules[name] = module
    exec(UNIMPORTABLE, vars(module))
    return module.reward


def loaded_by_path(name: str, register: bool, tmp_path: Path) -> Any:
    file = tmp_path / f"{name}.py"
    file.write_text(UNIMPORTABLE)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.PARENT = os.getpid()
    if register:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.reward


def made_in_a_dict(name: str, register: bool, tmp_path: Path) -> Any:
    names: dict[str, Any] = {"PARENT": os.getpid(), **({"__name__": name} if register else {})}
    exec(UNIMPORTABLE, names)
    return names["reward"]


@pytest.mark.parametrize("register", [True, False])
@pytest.mark.parametrize("make", [made_by_exec, loaded_by_path, made_in_a_dict])
def test_a_module_that_no_other_process_can_import_travels_by_value(make, register, tmp_path, monkeypatch):
    name = f"made_here_{make.__name__}_{register}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        reward = make(name, register, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it needs no thread of this process
            with running(reward) as runner:
                (outcome,) = runner.score([RewardCall("p", "abc")])
        assert outcome.parts["score"] == 7.0
        assert outcome.parts["elsewhere"] == 1.0
    finally:
        sys.modules.pop(name, None)


def test_signals_to_the_process_group_reach_the_parent_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from nemo_rl.environments import RewardCall, RewardRunner, bind_rewards\n"
        "got = []\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(number, lambda number, frame: got.append(number))\n"
        "def reward(prompt, response):\n"
        "    os.killpg(int(response), signal.SIGTERM)\n"
        "    os.killpg(int(response), signal.SIGINT)\n"
        "    return 1.0\n"
        "runner = RewardRunner(bind_rewards(reward), timeout_seconds=60, on_error='raise')\n"
        "with runner:\n"
        "    outcomes = runner.score([RewardCall('p', str(os.getpgid(0)))] * 2)\n"
        "print([o.value for o in outcomes], sorted(set(got)) == [signal.SIGINT, signal.SIGTERM])\n"
    )
    output = subprocess.check_output([sys.executable, str(script)], text=True, timeout=60, start_new_session=True)
    assert output == "[1.0, 1.0] True\n"


def test_what_a_reward_prints_is_seen(capsys):
    def reward(prompt, response):
        print("to out")
        print("to err", file=sys.stderr)
        return 1.0

    with running(reward) as runner:
        runner.score(calls("a"))
    captured = capsys.readouterr()
    assert captured.out == "to out\n"
    assert captured.err == "to err\n"


def test_a_request_to_stop_ends_the_wait_and_then_the_worker(tmp_path):
    mark = tmp_path / "pid"

    def reward(prompt, response, path):
        Path(path).write_text(str(os.getpid()))
        time.sleep(1000)

    with running(reward, timeout=900) as runner:
        runner.should_stop = lambda: "SIGINT" if mark.exists() and mark.read_text() else None
        with pytest.raises(Interrupted) as caught:
            runner.score(calls("a", path=str(mark)))
        runner.should_stop = lambda: False
        left = runner.submit(calls("b", path=str(mark)))
    assert caught.value.signal == "SIGINT"
    assert not is_running(int(mark.read_text()))
    with pytest.raises(RuntimeError, match="closed"):
        left.result(10)
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(calls("a"))


def test_many_calls_of_several_threads_come_back_in_order():
    def reward(prompt, response, offset):
        return float(response) + offset

    texts = [str(i) for i in range(2000)]
    with running(reward, workers=2) as runner, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda offset: values(runner, *texts, offset=offset), range(4)))
    assert found == [[float(i + offset) for i in range(2000)] for offset in range(4)]


def test_large_texts_pass():
    with running(lambda prompt, response, data: len(response) + len(data)) as runner:
        assert values(runner, "x" * 3_000_000, "y", data=b"z" * 2_000_000) == [5_000_000.0, 2_000_001.0]


# ---------------------------------------------------------------------- in this process


def test_a_reward_that_cannot_travel_runs_here_with_a_warning():
    gate = threading.Lock()
    seen = []

    def reward(prompt, response):
        with gate:
            seen.append(response)
        return 1.0

    runner = RewardRunner(bind_rewards([reward, misbehave]), timeout_seconds=PLENTY, on_error="raise")
    with pytest.warns(UserWarning, match=r"reward 'reward' cannot run in a process of its own.*lock"):
        runner.start()
    with runner:
        assert values(runner, "a", "b") == [2.0, 2.0]
    assert seen == ["a", "b"]


def test_a_call_that_hangs_here_is_left_behind():
    release = threading.Event()
    setups = []

    class Here(Environment):
        in_process = True

        def setup(self):
            setups.append(1)

        def score(self, prompt, response):
            if response == "hang":
                release.wait(60)
            return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with running(Here(), TIMEOUT, "zero") as runner:
            outcomes = runner.score(calls("a", "hang", "b"))
    release.set()
    assert [o.value for o in outcomes] == [1.0, 0.0, 1.0]
    assert "in score: release.wait(60)" in str(outcomes[1].error)
    assert setups == [1]


def test_a_column_that_cannot_travel_is_named_in_the_error():
    with running(lambda prompt, response, thing: 1.0) as runner:
        with pytest.raises(TypeError, match=r"cannot be sent to its process: .*lock"):
            runner.score(calls("a", thing=threading.Lock()))
        assert values(runner, "a", thing=1) == [1.0]


# ---------------------------------------------------------------------- environments


class Counting(Environment):
    def __init__(self, path):
        self.path = path
        self.count = 0

    def setup(self):
        self.note("setup")

    def score(self, prompt, response):
        if response == "exit":
            os._exit(1)
        self.count += 1
        return 1.0

    def get_metrics(self):
        return {"count": self.count, "half": numpy.float64(self.count / 2)}

    def teardown(self):
        self.note("teardown")

    def note(self, word):
        with open(self.path, "a") as file:
            file.write(word + " ")


def test_an_environment_is_set_up_once_keeps_its_state_and_is_torn_down(tmp_path):
    path = tmp_path / "notes"
    with running(Counting(str(path)), on_error="zero") as runner:
        values(runner, "a", "b")
        values(runner, "c")
        assert {k: v for k, v in runner.metrics().items() if "/" not in k} == {"count": 3.0, "half": 1.5}
        assert values(runner, "exit", "a") == [0.0, 1.0]
        assert runner.metrics()["count"] == 1.0
    assert path.read_text().split() == ["setup", "setup", "teardown"]


@pytest.mark.parametrize("in_process", [False, True])
def test_an_environment_that_cannot_be_set_up_ends_the_run_under_any_policy(in_process):
    class Broken(Environment):
        def setup(self):
            raise OSError("no judge")

        def score(self, prompt, response):
            return 1.0

    Broken.in_process = in_process

    with running(Broken, on_error="zero") as runner:
        for _ in range(2):
            with pytest.raises(RewardError, match="'Broken' could not be loaded: OSError: no judge") as caught:
                runner.score(calls("a"))
            assert 'raise OSError("no judge")' in caught.value.traceback


# ---------------------------------------------------------------------- preflight


def test_preflight_raises_or_warns_by_the_policy():
    def reward(prompt, response):
        return 1 / len(response)

    rows = [RewardCall("p", ""), RewardCall("q", "")]
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        preflight(bind_rewards(reward), rows)
    with running(reward, on_error="drop") as runner:
        (warning,) = preflight(runner, rows, "drop")
    assert "failed on 2 of" in warning
    assert "are left out" in warning


def test_preflight_warns_of_a_reward_that_tells_nothing_apart():
    rows = [RewardCall("2+2?", "", None, {"answer": "4"})] * 2
    (warning,) = preflight(bind_rewards(lambda prompt, response: 0.5), rows)
    assert "gave 0.5 to all" in warning
    assert preflight(bind_rewards(lambda prompt, response, answer: answer in response), rows) == []


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds=0"),
        ({"timeout_seconds": math.inf}, "timeout_seconds=inf"),
        ({"on_error": "skip"}, "on_error='skip'"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match="expected") as caught:
        RewardRunner(bind_rewards(misbehave), **{"timeout_seconds": 1.0, "on_error": "zero", **options})
    assert said in str(caught.value)
