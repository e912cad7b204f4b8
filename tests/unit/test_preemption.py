"""SIGTERM and SIGINT set a flag; the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from nemo_rl.run.signals import StopSignals

PRELUDE = """
import os, signal, sys, threading, time
from nemo_rl.run.signals import Interrupted, StopSignals
def wait_for(signals):
    print("ready", flush=True)
    deadline = time.monotonic() + 30
    while not signals.requested and time.monotonic() < deadline:
        time.sleep(0.01)
"""


def start(code: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_first_signal_is_a_flag_that_check_raises(name):
    process = start(
        """
with StopSignals() as signals:
    signals.check()
    wait_for(signals)
    try:
        signals.check()
    except Interrupted as interrupted:
        print(signals.requested, interrupted.signal, interrupted)
"""
    )
    process.send_signal(getattr(signal, name))
    out, err = process.communicate()
    assert out == f"{name} {name} {name} was received\n"
    assert (process.returncode, err) == (0, "")


def test_second_sigterm_ends_even_a_native_call():
    # `sleep` in one C call that restarts after signals, as a long matrix product would.
    process = start(
        """
with StopSignals() as signals:
    wait_for(signals)
    print("ready", flush=True)
    time.sleep(60)
"""
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.communicate()


def test_second_sigint_is_a_keyboard_interrupt():
    process = start(
        """
try:
    with StopSignals() as signals:
        wait_for(signals)
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", signals.requested)
"""
    )
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "interrupted SIGINT\n"


def test_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == "SIGTERM"
    assert {number: signal.getsignal(number) for number in before} == before


def test_handlers_are_restored_after_an_exception():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), StopSignals():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_set_no_handlers():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def work() -> None:
        with StopSignals() as signals:
            inside.append(signal.getsignal(signal.SIGTERM))
            signals.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_ignored_sigint_stays_ignored():
    process = start(
        """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    print("ready", flush=True)
    wait_for(signals)
    print(signals.requested)
"""
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0].splitlines()[-1] == "SIGTERM"


def test_forked_worker_dies_of_sigterm_and_the_parent_goes_on():
    process = start(
        """
print("ready", flush=True)
with StopSignals() as signals:
    here, there = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(there, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(here, 1)
    os.kill(worker, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), signals.requested)
"""
    )
    assert process.communicate()[0] == f"{-signal.SIGTERM} None\n"
