"""Processes of their own for tests, and ranks: forked from one that has torch loaded.

A child is a process like any other: it is killed, stopped and read through pipes. What it cannot show is how
Python itself starts. `python train.py` and torchrun are started for real in test_train.py and test_faults.py.
"""

import atexit
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing import forkserver
from unittest import mock

from conftest import ROOT, TINY

FLOAT64 = "import torch; torch.set_default_dtype(torch.float64)\n"
SHORT_END = "from tools import report\nreport.Journal.end = lambda *args: None\n"
CONTEXT = multiprocessing.get_context("forkserver")


def begin(code: str, argv, cwd: str, env: dict, out, err) -> None:
    """In the child: the streams, the environment and the signals of a process that a shell has started."""
    assert "loaded" in sys.modules, "the fork server has not imported it"
    for number, pipe in (1, out), (2, err):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding=encoding, write_through=False)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace",
                                  write_through=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["test", *argv]
    exec(compile(code, "<child>", "exec"), {"__name__": "__main__"})


class Child:
    """`code` in a forked process, with sys.argv[1:] = argv; to its test what subprocess.Popen is."""

    def __init__(self, code: str, argv=(), cwd=None, env=None):
        (self.stdout, out), (self.stderr, err) = pipe(), pipe()
        CONTEXT.set_forkserver_preload(["loaded"])
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
            forkserver.ensure_running()
        self.process = CONTEXT.Process(target=begin, daemon=True, args=(
            code, [str(x) for x in argv], str(cwd or os.getcwd()), {**os.environ, **(env or {})}, out, err))
        self.process.start()
        self.pid = self.process.pid
        for writer in out, err:
            writer.close()
        atexit.register(self.kill)  # whatever a test that fails has left

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("a forked child", timeout)
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """All that is left of its output, and its end."""
        said = {}
        threads = [threading.Thread(target=lambda name=name: said.update({name: getattr(self, name).read()}))
                   for name in ("stdout", "stderr")]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return said["stdout"], said["stderr"]


def pipe():
    """(text to read here, connection to give to a child)."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    return os.fdopen(os.dup(reader.fileno()), encoding="utf-8"), writer


def ranks_of(count: int, code: str, argv=(), cwd=None) -> list[Child]:
    """A child for each rank, that finds the others as under torchrun; a single one finds no ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(code, argv, cwd, {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port)} if count > 1 else {}) for rank in range(count)]


def finished(children: list[Child]) -> tuple[str, str]:
    """(stdout, stderr) of all of them, after each has ended with 0."""
    said = [child.communicate(timeout=300) for child in children]
    assert not any(child.returncode for child in children), "\n".join(error for _, error in said)
    return "".join(out for out, _ in said), "".join(error for _, error in said)


def train_on(where, ranks: int, flags, before: str = FLOAT64, after: str = "", tiny=TINY,
             whole_end=False) -> tuple[str, str]:
    """train.main(tiny + flags) on so many gloo ranks, one thread each; (stdout, stderr). It runs in float64
    unless `before` says otherwise: sums over ranks and over micro-steps round in another order, and
    optimizers like Adam turn the rounding of a tiny gradient into a whole step."""
    code = f"{before}import sys, train\n{'' if whole_end else SHORT_END}train.main(sys.argv[1:])\n{after}"
    return finished(ranks_of(ranks, code, [*tiny, *flags], where))
