"""A run belongs to the cluster, not to the client: it outlives kills, interrupts and cut connections without a gap."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest

from e2e.client.cutting_proxy import CuttingProxy
from e2e.client.desk import Desk
from e2e.scene import SECONDS

CUT_SECONDS = 5.0
CELL = """
import time

import nemo_rl


def near(prompt: str, response: str, answer: str) -> float:
    return sum(a == b for a, b in zip(response, answer)) / len(answer)


class Counting(nemo_rl.Callback):
    def on_step_end(self, trainer, step, metrics):
        time.sleep({pause})
        for number in range({lines}):
            print(f"counted {{(step - 1) * {lines} + number}}", flush=True)


rows = {rows}
result = nemo_rl.train(
    "{model}", rows, near, max_steps={steps}, max_epochs=1000, batch_size=2, num_generations_per_prompt=2,
    max_new_tokens=4, gpus=0, size="1Gi", callbacks=[Counting()], output_dir="{output}",
)
assert [row["step"] for row in result.history] == list(range(1, {steps} + 1)), result.history
assert result.total_steps == {steps}
print("all of it", result.checkpoint_path)
"""


def write_cell(desk: Desk, tiny: Path, rows: list[dict[str, str]], name: str, **more: object) -> str:
    text = CELL.format(model=tiny, rows=rows[:4], output=f"outputs/{name}", **more)
    (desk.folder / f"{name}.py").write_text(text)
    return f"{name}.py"


def step_of(line: str) -> int:
    found = re.match(r"step=(\d+)/", line)
    return int(found[1]) if found else 0


def test_a_client_that_is_killed_and_one_that_is_interrupted_find_the_one_run_again(
    desk: Desk, tiny: Path, rows: list[dict[str, str]]
) -> None:
    cell = write_cell(desk, tiny, rows, "killed", steps=40, pause=0.3, lines=1)
    seen = random.randint(3, 12)
    first = desk.start(cell)
    first.until(lambda line: step_of(line) >= seen, f"step {seen}")
    first.kill()
    (job,) = desk.jobs()

    second = desk.start(cell)
    second.until(lambda line: "found this very job" in line, "the job again")
    second.until(lambda line: step_of(line) > seen, "a later step")
    second.send(signal.SIGINT)
    assert second.end() != 0
    assert f"nemo_rl.attach('{job['metadata']['name']}'" in second.text
    assert "goes on" in second.text

    third = desk.start(cell)
    assert third.end(2 * SECONDS) == 0, third.text
    assert "all of it" in third.text
    counted = [int(line.split()[1]) for line in third.lines if line.startswith("counted")]
    assert counted == list(range(40)), "also what was printed before it came back"
    (again,) = desk.jobs()
    assert again["metadata"]["uid"] == job["metadata"]["uid"]
    assert again["status"]["attempt"] == 1


@pytest.mark.long
def test_a_log_that_is_cut_every_five_seconds_loses_and_doubles_no_line(
    desk: Desk, tiny: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    steps, lines = 70, 40
    cell = write_cell(desk, tiny, rows, "cut", steps=steps, pause=0.3, lines=lines)
    with CuttingProxy(desk.kubeconfig, CUT_SECONDS) as proxy:
        kubeconfig = proxy.write_kubeconfig(tmp_path / "kubeconfig")
        program = desk.start(cell, KUBECONFIG=str(kubeconfig))
        program.until(lambda line: step_of(line) >= 1, "the first step")
        cuts = proxy.cuts
        program.until(lambda line: step_of(line) >= steps, "the last step")
        cuts = proxy.cuts - cuts
        assert program.end(2 * SECONDS) == 0, program.text[-4000:]
    assert cuts >= 3
    counted = [int(line.split()[1]) for line in program.lines if line.startswith("counted")]
    assert counted == list(range(steps * lines))
    assert [step for line in program.lines if (step := step_of(line))] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [{"prompt": f"{digits}=", "answer": "".join(sorted(digits))} for digits in ("312", "4321", "907", "5510")]
