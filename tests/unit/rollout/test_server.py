"""The server as a child process: what it is started with, what its failures are in words, and that it never outlives the run.

A few lines stand for vLLM here; tests/real_vllm starts the real one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_rl.errors import RolloutLost
from nemo_rl.rollout.vllm import serve
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.serve import arguments
from nemo_rl.rollout.vllm.server import ServerProcess

HEALTHY = """
import http.server, os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # as vLLM's engine is a process of its own
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        good = self.headers["Authorization"] == "Bearer " + os.environ["NEMO_RL_ROLLOUT_TOKEN"]
        self.send_response(200 if good else 401); self.end_headers()
        self.wfile.write(repr([sys.argv, dict(os.environ)]).encode() if self.path == "/what" else b"")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def server(folder: Path, vllm: str | None) -> ServerProcess:
    process = ServerProcess(sys.executable, folder / "model", ["--dtype", "float32"], folder / "log" / "vllm.log")
    if vllm is not None:
        package = process.kit / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        (process.kit / "vllm" / "__init__.py").touch()
        (package / "api_server.py").write_text(vllm)
    return process


def test_it_is_started_in_its_own_interpreter_and_ends_with_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    process = server(tmp_path, HEALTHY)
    process.start(lambda: None, 900)
    assert process.process is not None
    group = process.process.pid
    environment = Path(f"/proc/{group}/environ").read_bytes().decode().split("\0")
    assert not any(entry.startswith("RANK=") for entry in environment), "the server is no rank of the trainer"
    assert f"PYTHONPATH={process.kit}" in environment
    assert "VLLM_ENGINE_READY_TIMEOUT_S=900" in environment, "vLLM's own limit for a start is no shorter than the run's"
    command = Path(f"/proc/{group}/cmdline").read_bytes().decode()
    assert process.token not in command, "everybody on the machine reads command lines"
    process.close()
    assert gone(group)
    assert not process.kit.exists()


def test_its_port_stays_its_own_also_while_it_is_started_anew(tmp_path: Path) -> None:
    """Else a connection of some other program may get it meanwhile, and the server does not start."""
    process = server(tmp_path, HEALTHY)
    process.start(lambda: None, 60)
    port, free = process.port, []
    assert process.process is not None and port is not None
    os.killpg(process.process.pid, signal.SIGKILL)
    process.process.wait()

    def try_to_take() -> None:
        with contextlib.suppress(OSError), socket.socket() as other:
            other.bind(("127.0.0.1", port))
            free.append(port)

    try_to_take()
    process.start(try_to_take, 60)
    assert process.port == port and not free
    process.close()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))


def gone(group: int) -> bool:
    """Whether no process of the group is left, within a minute; it takes a few seconds."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_it_ends_when_the_trainer_is_killed(tmp_path: Path) -> None:
    script = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parents[3] / "tests")]!r}
from pathlib import Path
from unit.rollout.test_server import HEALTHY, server
process = server(Path({str(tmp_path)!r}), HEALTHY)
process.start(lambda: None, 60)
print(process.process.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    os.killpg(group, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert gone(group)


@pytest.mark.parametrize(
    ("vllm", "kind", "says"),
    [
        (None, ValueError, "has no vLLM; install it there"),
        ("raise RuntimeError('Tensor out of memory')", RolloutLost, "out of memory.*lower gpu_memory_fraction"),
        ("raise ValueError('Model architectures [X] are not supported')", RolloutLost, "vLLM has no such model"),
        (
            "raise SystemExit('api_server.py: error: unrecognized arguments: --x')",
            RolloutLost,
            "another version of vLLM",
        ),
        ("import os; os.kill(os.getpid(), 9)", RolloutLost, "was killed by signal 9 before it was ready"),
    ],
)
def test_a_server_that_does_not_start_is_said_with_its_cure(
    tmp_path: Path, vllm: str | None, kind: type[Exception], says: str
) -> None:
    process = server(tmp_path, vllm)
    with pytest.raises(kind, match=says):
        process.start(lambda: None, 60)
    process.close()


FIRST = """
import os, sys
if not os.path.exists(sys.argv[sys.argv.index("--model") + 1]):
    os.mkdir(sys.argv[sys.argv.index("--model") + 1])
    sys.exit("{words}")
"""
"""The first start ends with these words; a folder tells the next one that it is not the first."""


def test_a_machine_that_was_too_busy_for_a_start_is_given_another(tmp_path: Path) -> None:
    """vLLM's engine ends where one of its threads has not begun within 10 s: seen at a load of 28."""
    words = "    assert addresses.coordinator_input is not None\\nAssertionError"
    process = server(tmp_path, FIRST.format(words=words) + HEALTHY)
    process.start(lambda: None, 60).get("/health")
    assert process.log.read_text().count("AssertionError") == 1
    process.close()


def test_words_of_an_earlier_start_are_no_reason_of_this_one(tmp_path: Path) -> None:
    process = server(tmp_path, FIRST.format(words="Tensor out of memory") + "raise ValueError('of this start')")
    with pytest.raises(RolloutLost, match=r"out of memory.*lower gpu_memory_fraction"):
        process.start(lambda: None, 60)
    with pytest.raises(RolloutLost, match="ValueError: of this start; all of its log") as raised:
        process.start(lambda: None, 60)
    assert "out of memory" not in str(raised.value)
    process.close()


def test_one_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    process = server(tmp_path, "import time; print('loading', flush=True); time.sleep(60)")
    with pytest.raises(
        RolloutLost, match=r"not ready within 3 s; its last words: loading .* raise rollout's timeout_seconds"
    ):
        process.start(lambda: None, 3)
    process.close()


def test_an_interpreter_that_is_none_is_said(tmp_path: Path) -> None:
    process = ServerProcess("/no/such/python", tmp_path, [], tmp_path / "log")
    with pytest.raises(ValueError, match="rollout_python='/no/such/python' cannot be run"):
        process.start(lambda: None, 5)
    process.close()


def test_what_a_server_imports_of_this_package_needs_the_standard_library_alone(tmp_path: Path) -> None:
    """vLLM's interpreter has none of our dependencies, and a plugin is loaded in each of its processes."""
    modules = [f"nemo_rl.rollout.vllm.{name}" for name in ("plugin", "serve", "middleware", "fetch")]
    script = (
        f"import sys, {', '.join(modules)}; from importlib.metadata import entry_points; "
        "assert [e.value for e in entry_points(group='vllm.general_plugins')] == ['nemo_rl.rollout.vllm.plugin:register'], 1; "
        "own = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(own - sys.stdlib_module_names - {'__main__', 'nemo_rl'}))"
    )
    process = server(tmp_path, None)
    environment = {"PYTHONPATH": str(process.kit), "NEMO_RL_ROLLOUT_TOKEN": "x" * 16}
    # -S: without site-packages, as in an environment without anything of ours
    found = subprocess.run([sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True)
    process.close()
    assert (found.stdout.strip(), found.stderr) == ("[]", "")


def test_what_the_caller_gives_is_kept_and_the_rest_is_ours() -> None:
    found = arguments(["--model", "m", "--host=0.0.0.0", "--logprobs-mode", "raw_logprobs"])
    assert found[:4] == ["--model", "m", "--host=0.0.0.0", "--logprobs-mode"]
    assert "127.0.0.1" not in found and found.count("--logprobs-mode") == 1
    assert "nemo_rl.rollout.vllm.middleware.RequireToken" in found
    assert arguments(["--model", "m"])[arguments(["--model", "m"]).index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("eager", [True, False])
def test_what_is_not_to_be_compiled_needs_no_compiler(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU build compiles its sampler in spite of --enforce-eager, and ends where there is no g++: seen in a pod."""
    monkeypatch.setattr(os, "environ", {TOKEN_VARIABLE: "x" * 32})
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["serve", "--model", "m", *(["--enforce-eager"] if eager else [])])
    monkeypatch.setattr("runpy.run_module", lambda *given, **more: None)
    serve.main()
    assert os.environ.get("TORCH_COMPILE_DISABLE") == ("1" if eager else None)
