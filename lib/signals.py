"""Ctrl-C and SIGTERM, so that a run can save before it ends."""

import os
import signal
import threading
import time
from contextlib import contextmanager


@contextmanager
def signals_caught():
    """What a first SIGINT or SIGTERM fills, so that the run can save and end after its step. A second
    one interrupts; under torchrun, which passes on the Ctrl-C that the terminal has sent already, only when
    it comes a second later."""
    caught, main_thread = {}, threading.current_thread() is threading.main_thread()
    grace = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def handle(number, frame):
        if caught and time.monotonic() - min(caught.values()) > grace:
            raise KeyboardInterrupt
        caught.setdefault(number, time.monotonic())
    old = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def exit_if_interrupted(caught: dict) -> None:
    if signal.SIGINT in caught:
        raise SystemExit(130)
