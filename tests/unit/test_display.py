"""The live display on a pseudo-terminal, and plain lines everywhere else."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
import time

import pytest

from nemo_rl.display import terminal
from nemo_rl.display.phases import Best, Pace, Phase, phase_of_line
from nemo_rl.display.terminal import LiveDisplay, NullDisplay, PlainDisplay, make_display
from nemo_rl.run.metrics import main_metrics, parse_step_line

COLUMNS, ROWS = 100, 40


class Screen:
    """As much of a terminal as the display uses: text, CR, LF, cursor up, erase line, hide and show the cursor."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = self.column = 0
        self.cursor_visible = True

    def feed(self, text: str) -> Screen:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.startswith("\x1b["):
                self._control(part[2:-1], part[-1])
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + len(part) :]
                self.column += len(part)
        return self

    def narrow(self, width: int) -> Screen:
        """The terminal becomes narrower: lines that are longer are wrapped, and the cursor stays at its text."""
        wrapped: list[str] = []
        for number, line in enumerate(self.lines):
            pieces = [line[at : at + width] for at in range(0, len(line), width)] or [""]
            wrapped += pieces
            if number == self.row:
                self.row, self.column = len(wrapped) - 1, min(self.column, len(pieces[-1]))
        self.lines = wrapped
        return self

    def _control(self, argument: str, kind: str) -> None:
        if kind == "A":
            self.row -= int(argument or 1)
        elif kind == "K":
            self.lines[self.row] = ""
        elif (argument, kind) in (("?25", "l"), ("?25", "h")):
            self.cursor_visible = kind == "h"
        else:
            assert kind == "m", (argument, kind)


def run_on_terminal(code: str, **environment: str) -> tuple[str, int]:
    """What a Python program writes to a terminal, standard output and error together, and its exit code."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux reports the end of the other side as EIO
            break
        if not chunk:
            break
        output += chunk
    os.close(ours)
    return output.decode(), process.wait()


RUN = """
import logging, sys, warnings
logging.basicConfig(level=logging.INFO, format="LOG %(message)s")   # a handler that holds the real standard error
from nemo_rl.display.terminal import make_display
display = make_display()
display.start(3, "GRPO · tiny · [bold]not markup[/bold]")
try:
    for step in (1, 2, 3):
        print("printed", step)
        logging.info("logged %d", step)
        sys.stderr.write(f"error line {step}\\n")
        samples = [{"prompt": f"sort {n}{step}", "completion": "12\\x1b[2J\\x07\\n[red]3[/red]", "reward": 0.25 * n}
                   for n in (1, 2, 3)]
        display.step({"step": step, "reward": 0.5, "reward_std": 0.25, "loss": 0.125, "kl": 0.0,
                      "completion_length": 7.5, "tokens_per_second": 12345.6}, samples)
    display.note("saved a checkpoint")
    if FAIL:
        raise RuntimeError("boom")
finally:
    display.close()
print("after")
"""


def test_terminal_shows_panel_below_everything_that_is_printed():
    output, code = run_on_terminal(f"FAIL = False\n{RUN}")
    assert code == 0, output
    screen = Screen().feed(output)
    lines = [line.rstrip() for line in screen.lines]
    assert lines[0] == "GRPO · tiny · [bold]not markup[/bold]"
    for step in (1, 2, 3):
        for text in (f"printed {step}", f"LOG logged {step}", f"error line {step}"):
            assert lines.count(text) == 1, (text, lines)
    assert lines.count("saved a checkpoint") == 1
    bars = [line for line in lines if "3/3" in line]
    assert len(bars) == 1, lines
    assert lines.index("saved a checkpoint") < lines.index(bars[0]) < lines.index("after")
    text = "\n".join(lines)
    for shown in ("reward 0.5 ± 0.25", "best reward 0.5 at 1", "kl 0", "length 7.5", "tokens/s 12,346"):
        assert text.count(shown) == 1, shown
    assert text.count("sort 13") == text.count("sort 23") == 1
    assert "sort 33" not in text  # two samples are enough
    assert "[red]3[/red]" in text
    assert "12·[2J·" in text  # the model's control characters do not reach the terminal
    assert screen.cursor_visible
    assert "\x1b[2J" not in output


def test_what_is_told_breaks_between_words():
    told = "the data ends first: " + "40 rows in batches of 2 are 20 steps; " * 5 + "raise max_epochs to train longer"
    code = f"""
        from nemo_rl.display.terminal import make_display
        display = make_display()
        display.note({told!r})
        display.start(3, {told!r})
        display.close()
    """
    output, exit_code = run_on_terminal(code)
    assert exit_code == 0, output
    lines = [line.rstrip() for line in Screen().feed(output).lines]
    assert max(map(len, lines)) <= COLUMNS
    for word in set(told.split()):
        assert sum(line.split().count(word) for line in lines) == 2 * told.split().count(word), (word, lines)


def test_terminal_is_left_in_order_after_an_exception():
    output, code = run_on_terminal(f"FAIL = True\n{RUN}")
    assert code == 1
    screen = Screen().feed(output)
    assert screen.cursor_visible
    assert screen.lines[-2].rstrip() == "RuntimeError: boom"


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_terminal_that_wants_plain_text_gets_lines(environment):
    output, code = run_on_terminal(f"FAIL = False\n{RUN}", **environment)
    assert code == 0
    assert "\x1b" not in output
    steps = [parse_step_line(line) for line in output.splitlines()]
    assert [s["step"] for s in steps if s] == [1, 2, 3]


def test_forked_worker_prints_past_the_panel():
    output, code = run_on_terminal(
        """
        import os, sys
        from nemo_rl.display.terminal import LiveDisplay
        display = LiveDisplay()
        display.start(1, "header")
        assert sys.stdout is not sys.__stdout__
        with display._console._lock:    # the refreshing thread may hold it at the moment of a fork
            worker = os.fork()
            if worker == 0:
                print("from the worker", flush=True)
                os._exit(0 if sys.stdout is sys.__stdout__ else 3)
            status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        display.close()
        sys.exit(status)
        """
    )
    assert code == 0, output
    assert "from the worker" in output


def test_resumed_run_shows_where_it_is():
    stream = io.StringIO()
    display = LiveDisplay(stream)
    display.start(10, "header")
    display.step({"step": 8, "loss": 1.0, "step_seconds": 40.0}, [])
    display.step({"step": 9, "loss": 1.0, "step_seconds": 60.0}, [])
    (task,) = display._progress.tasks
    display.close()
    assert (task.completed, task.total) == (9, 10)
    assert task.fields["left"] == "· 50 s left"  # the pace is of this process alone, also of steps of more than 30 s


def test_time_left_counts_validation_and_is_absent_where_nothing_is_known():
    pace = Pace()
    assert pace.left(10) is None
    pace.step({"step": 1, "step_seconds": 2.0, "validation_seconds": 4.0})
    pace.step({"step": 1, "step_seconds": 100.0})  # the same step again, with its samples
    pace.step({"step": 2, "step_seconds": 2.0})
    assert pace.left(10) == pytest.approx(40.0)
    assert pace.left(0) is None


def test_best_is_of_the_validation_data_where_there_is_any_and_low_for_losses():
    best = Best()
    best.see({"step": 1, "reward": 0.9})
    assert best.words() == ("best reward", "0.9 at 1")
    best.see({"step": 2, "reward": 0.5, "validation_reward": 0.4})
    best.see({"step": 3, "reward": 0.95})
    best.see({"step": 4, "reward": 0.5, "validation_reward": 0.3})
    assert best.words() == ("best validation reward", "0.4 at 2")
    losses = Best()
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        losses.see({"step": step, "loss": loss})
    assert losses.words() == ("best loss", "2 at 2")


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        ({"reward": 0.5, "loss": 1e-9, "kl": 0.1, "truncated_fraction": 0.25}, ["reward", "kl", "cut off"]),
        ({"preference_accuracy": 0.75, "reward_margin": 0.1, "loss": 0.7}, ["accuracy", "margin", "loss"]),
        ({"loss": 0.7, "validation_loss": 0.8, "learning_rate": 2e-5}, ["loss", "validation loss", "learning rate"]),
    ],
)
def test_each_algorithm_shows_what_matters_to_it(metrics, names):
    assert [name for name, _ in main_metrics({"step": 1, **metrics})] == names


def test_terminal_shows_what_is_done_within_a_step_and_before_the_first():
    output, code = run_on_terminal(
        """
        import time
        from nemo_rl.display.phases import Phase
        from nemo_rl.display.terminal import make_display
        display = make_display()
        display.phase(Phase("loading the model"))
        time.sleep(0.6)
        display.start(2, "header")
        rollout = Phase("rollout", 8, "prompts")
        display.phase(rollout)
        for _ in range(3):
            rollout.add(done=1, tokens=1000)
            time.sleep(0.3)
        display.step({"step": 1, "reward": 0.5, "step_seconds": 3.0}, [])
        display.close()
        """
    )
    assert code == 0, output
    assert "loading the model: " in output
    assert re.search(r"rollout: [123],000 tokens, [123] of 8 prompts, \d s", output)
    screen = "\n".join(Screen().feed(output).lines)
    assert "rollout" not in screen  # what is over is not shown
    assert "3 s left" in screen
    assert "best reward 0.5 at 1" in screen


def test_a_terminal_that_becomes_narrower_keeps_one_panel():
    output, code = run_on_terminal(
        """
        import os, sys, termios
        from nemo_rl.display.terminal import make_display
        display = make_display()
        display.start(4, "header")
        samples = [{"prompt": "sort 31", "completion": "13", "reward": 0.5}]
        for step in (1, 2, 3, 4):
            display.step({"step": step, "reward": 0.5, "loss": 0.1, "learning_rate": 1e-6, "step_seconds": 3.0}, samples)
            if step == 2:
                with display._live._lock:       # nothing is drawn between the mark and the change
                    os.write(1, b"<narrow>")
                    termios.tcsetwinsize(1, (40, 47))
        display.close()
        print("after")
        """
    )
    assert code == 0, output
    before, after = output.split("<narrow>")
    screen = Screen().feed(before)
    assert sum("sort 31" in line for line in screen.lines) == 1
    text = [line.rstrip() for line in screen.narrow(47).feed(after).lines]
    assert max(map(len, text)) <= 47
    assert [line for line in text if "4/4" in line and "step" in line], text
    for mark in ("/4", "sort 31", "╭", "╰"):
        assert sum(mark in line for line in text) == 1, (mark, text)
    assert text[0] == "header"
    assert [line for line in text if line][-1] == "after"


def test_narrow_terminal_gets_more_rows_of_whole_cells():
    cells = [("reward", "0.5"), ("validation reward", "0.25"), ("kl", "0.1")]
    assert terminal._rows(cells, 100) == [cells]
    assert terminal._rows(cells, 30) == [cells[:1], cells[1:2], cells[2:]]


def test_plain_lines_break_a_long_silence_with_what_is_done(monkeypatch):
    monkeypatch.setattr(terminal, "QUIET_SECONDS", (0.2, 30.0))
    stream = io.StringIO()
    display = PlainDisplay(stream)
    phase = Phase("rollout", 4, "prompts")
    display.phase(phase)
    phase.add(done=1, tokens=50)
    deadline = time.monotonic() + 20
    while not stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.2)
    display.close()
    (line,) = stream.getvalue().splitlines()  # the second silence is longer
    assert re.fullmatch(r"… rollout: 50 tokens, 1 of 4 prompts, \d+ s", line)
    assert parse_step_line(line) is None
    assert phase_of_line(line).words() == line.removeprefix("… ")
    assert phase_of_line("step=1 reward=2") is None


def test_close_gives_log_handlers_their_streams_back():
    import logging

    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test.display")
    logger.addHandler(handler)
    before = (sys.stdout, sys.stderr, handler.stream)
    display = LiveDisplay(io.StringIO())
    display.start(1, "header")
    display.close()
    display.close()
    assert (sys.stdout, sys.stderr, handler.stream) == before
    logger.removeHandler(handler)


METRICS = {
    "epoch": 0,
    "reward": 0.5,
    "reward_std": 0.25,
    "loss": 1e-9,
    "grad_norm": 0.1,
    "learning_rate": 1e-6,
    "entropy": 2.0,
}
METRICS |= {"completion_length": 7.5, "truncated_fraction": 0.0, "reward_errors": 0, "flat_group_fraction": 0.5}
METRICS |= {"tokens_per_second": 1234.5, "step_seconds": 2.0, "clip_fraction": 0.0}


def test_plain_lines_are_short_and_say_how_long_the_rest_takes(capsys):
    display = make_display("info")
    display.start(100, "GRPO · tiny")
    display.step({"step": 40, **METRICS}, [])
    line = capsys.readouterr().out.splitlines()[1]
    assert line == (
        'step=40/100 reward=0.5 reward_std=0.25 completion_length=7.5 learning_rate=1e-06 step_seconds=2 left="2 min"'
    )
    display.step({"step": 41, **METRICS, "truncated_fraction": 0.25, "validation_reward": 0.75}, [])
    line = capsys.readouterr().out
    assert "validation_reward=0.75" in line
    assert "truncated_fraction=0.25" in line
    assert {n: v for n, v in parse_step_line(line).items() if n in METRICS} == {
        n: v for n, v in (METRICS | {"truncated_fraction": 0.25}).items() if n in parse_step_line(line)
    }


@pytest.mark.parametrize("options", [{"complete": True}, {}])
def test_in_pods_and_for_debugging_lines_have_everything_of_every_step(options, capsys):
    display = make_display("info" if options else "debug", log_every=10, **options)
    display.start(3, "GRPO · tiny")
    for step in (1, 2, 3):
        display.step({"step": step, **METRICS}, [])
    lines = [parse_step_line(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(set(line) == {"step", "total_steps", *METRICS} - {"step_seconds"} | {"step_seconds"} for line in lines)


def test_log_every_leaves_the_first_the_last_and_those_that_evaluate(capsys):
    display = make_display("info", log_every=4)
    display.start(11, "header")
    for step in range(2, 12):  # a run that goes on after step 1
        display.step({"step": step, "loss": 1.0, **({"validation_loss": 2.0} if step == 6 else {})}, [])
    steps = [parse_step_line(line)["step"] for line in capsys.readouterr().out.splitlines()[1:]]
    assert steps == [2, 4, 6, 8, 11]


def test_pipe_gets_one_parseable_line_per_step(capsys):
    display = make_display("info")
    assert isinstance(display, PlainDisplay)
    display.start(2, "GRPO · tiny")
    display.step({"step": 1, "reward": 0.5}, [{"prompt": "a", "completion": "b", "reward": 1.0}])
    display.note("note")
    display.close()
    assert capsys.readouterr().out == "GRPO · tiny\nstep=1/2 reward=0.5\nnote\n"


@pytest.mark.parametrize(("level", "kind"), [("debug", PlainDisplay), ("warning", NullDisplay), ("error", NullDisplay)])
def test_log_level_decides_whether_anything_is_shown(level, kind, capsys):
    display = make_display(level)
    assert type(display) is kind
    display.start(1, "header")
    display.step({"step": 1}, [])
    display.note("note")
    display.close()
    assert (capsys.readouterr().out == "") == (kind is NullDisplay)
