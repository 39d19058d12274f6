"""Signals that end a program: where they count, where they wait, and how often they are told."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

from neuroal_jax.machine.interrupts import held, interrupt, interrupts

pytestmark = pytest.mark.usefixtures("default_signals")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def wait(seconds=5.0):
    """Long enough for an interrupt that is raised again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_that_ends_a_program_is_an_interrupt(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupts() as state:
        send(number)
        wait()
    assert state.requested
    assert signal.getsignal(number) == before


def test_what_the_caller_ignores_or_handles_stays(monkeypatch):
    came = []
    before = {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: lambda number, frame: came.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in before.items()}
    try:
        with interrupts():
            send(signal.SIGHUP)
            send(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert came == [signal.SIGTERM]


def test_signals_that_come_together_interrupt_once():
    cleaned = False
    with pytest.raises(KeyboardInterrupt), interrupts():
        try:
            send(signal.SIGINT)
            wait()
        finally:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            cleaned = True
    assert cleaned


def test_an_import_is_not_interrupted_but_what_follows_is(tmp_path, monkeypatch):
    (tmp_path / "interrupted_one.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhole = True"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), interrupts():
        import interrupted_one  # noqa: F401

        wait()
    assert sys.modules.pop("interrupted_one").whole


def test_an_interrupt_that_a_callback_swallows_is_raised_again(capsys):
    comparing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def compare(first, second):
        send()
        wait(0.05)
        return 0

    numbers = (ctypes.c_int * 2)(1, 2)
    with pytest.raises(KeyboardInterrupt), interrupts():
        ctypes.CDLL(None).qsort(numbers, 2, 4, comparing(compare))
        wait()
    assert "ignored" not in capsys.readouterr().err


def test_what_must_not_stay_half_done_is_finished_first():
    done = []
    with pytest.raises(KeyboardInterrupt, match="two things were done"), interrupts():
        with held("two things were done"):
            with held("one thing was done"):
                send()
                done.append(1)
            done.append(2)
        wait()
    assert done == [1, 2]


def test_held_signals_do_not_hide_an_error():
    with pytest.raises(FileNotFoundError), interrupts(), held("it was done"):
        send()
        os.stat("/nowhere")


def test_another_thread_interrupts_once_and_says_why():
    interrupt("nobody is there to be interrupted")
    with interrupts() as state:
        with pytest.raises(KeyboardInterrupt, match="process 1 ended"):
            interrupt("process 1 ended", failed=True)
            wait()
        assert state.failed
        interrupt("and again")
        wait(0.1)


STUCK = """
import sys, time
from neuroal_jax.machine.interrupts import interrupt, interrupts
with interrupts() as state:
    try:
        interrupt("process 0 ended", failed=sys.argv[1] == "failed", at_last=0.2)
        time.sleep(60)
    except KeyboardInterrupt:
        state.over = sys.argv[1] == "over"
        time.sleep(1 if state.over else 60)  # a long computation, or what a caller does next
print("went on")
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("failed", 2, "error: process 0 ended"), ("gone", 130, "interrupted: process 0 ended"), ("over", 0, "")],
)
def test_a_process_that_is_stuck_ends_at_last_but_not_one_whose_program_is_over(how, code, said):
    done = subprocess.run([sys.executable, "-c", STUCK, how], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (code, said)
    assert ("went on" in done.stdout) == (how == "over")
