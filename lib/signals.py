"""Signals that end a run, so that it can save first: Ctrl-C, a lost terminal, a scheduler, a closed pipe."""

import os
import signal
import threading
import time
from contextlib import contextmanager

ASKED = {signal.SIGINT, signal.SIGTERM}  # by a person or a program, who may insist
OTHERS = {getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPIPE")
          if hasattr(signal, name)}  # Windows has none of them


@contextmanager
def signals_caught():
    """Yields a dict in which the signals are recorded, so that the run can end after its step and save. A
    second SIGINT or SIGTERM raises KeyboardInterrupt; under torchrun, which repeats a Ctrl-C, only a second
    later. What `nohup` ignores stays ignored."""
    caught, grace = {}, 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handle(number, frame):
        asked = [when for other, when in caught.items() if other in ASKED]
        if number in ASKED and asked and time.monotonic() - min(asked) > grace:
            raise KeyboardInterrupt
        caught.setdefault(number, time.monotonic())

    def is_ours(number):  # Python itself ignores SIGPIPE, which tells that the reader of our output has gone
        return number in ASKED or number == signal.SIGPIPE or signal.getsignal(number) is signal.SIG_DFL
    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handle) for number in ASKED | OTHERS if is_ours(number)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def exit_if_interrupted(caught: dict) -> None:
    """SystemExit with a shell's code for Ctrl-C or a closed pipe. Ended by a scheduler, a run did well."""
    if signal.SIGINT in caught:
        raise SystemExit(130)
    if getattr(signal, "SIGPIPE", None) in caught:
        raise SystemExit(141)
