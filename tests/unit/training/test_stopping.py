"""The first signal is a request, the second ends the process, and handlers are put back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from preftune.training.stopping import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        1 / 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_installs_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


@pytest.mark.parametrize(("second", "code", "words"), [(False, 0, "went on"), (True, 143, "")])
def test_the_second_signal_ends_the_process(second, code, words):
    script = (
        "import os, signal\n"
        "from preftune.training.stopping import StopRequest\n"
        "with StopRequest():\n"
        f"    for _ in range({2 if second else 1}):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, words)
