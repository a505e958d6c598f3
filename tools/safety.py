"""What keeps a run safe: directories with one writer, a log that a kill cannot spoil, signals."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from data import UserError, replacing


def lock(path: Path, wait: bool = False):
    """An open file that is locked until it is closed or its process ends, however that ends. BlockingIOError
    where another process holds the lock, unless `wait`."""
    file = open(path, "a")
    try:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:  # Windows
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:  # as POSIX and Windows say it
        file.close()
        raise BlockingIOError(f"{path} is locked") from error
    except OSError:
        pass  # a file system that has no locks
    return file


@contextmanager
def new_directory(out: Path, flag: str = "--out"):
    """A directory to fill, OUT.building, that becomes `out` at the end and is removed on an error.

    A second process that makes the same waits for the first, and what a killed one has left is removed.
    UserError where `out` or something of another's is there.
    """
    building, mine = out.with_name(f"{out.name}.building"), out.with_name(f"{out.name}.building.lock")
    if out.parent.is_file():
        raise UserError(f"{out} cannot be made: {out.parent} is a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    left = mine.exists()
    if building.exists() and not left:
        raise UserError(f"{building} stands where {out} is to be made, and was not made here: move it away")
    with lock(mine, wait=True):
        try:
            if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out} exists and is not an empty directory: name another with {flag}")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            yield building
            os.replace(building, out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            mine.unlink(missing_ok=True)


FILES = {"log.jsonl", "ckpt.pt", "ckpt.old.pt", "loss.png"}  # of a run, beside its lock and *.part


def check_directory(c, replace: bool, auto: bool) -> None:
    """UserError if --out names something that is not empty, unless the run in it may be replaced, or --resume
    auto finds nothing but what a run has left that was killed before its first checkpoint."""
    path = Path(c.out or "out")
    harmless = {"lock"} | (FILES - {"ckpt.old.pt"} if auto else set())
    found = path.iterdir() if path.is_dir() and c.out and not replace else []
    if path.exists() and not path.is_dir() or {x.name.removesuffix(".part") for x in found} - harmless:
        raise UserError(f"--out {path} exists. Go on with that run: --resume; replace it: --overwrite; or "
                        "name another")


@contextmanager
def run_directory(c, replace: bool, auto: bool, step: int, first: dict):
    """Log and lock of a new run, or of one that is resumed after `step`: yields a function that appends a
    record to the log. Its first record is `first` and the settings. UserError where another process trains
    there."""
    number = 0
    while c.out is None:  # the next free name, also when two runs start at once
        with suppress(FileExistsError):
            path = Path(f"out/{c.size}-{c.method}-{number:02d}")
            path.mkdir(parents=True)
            c.out = str(path)
        number += 1
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(out / "lock")
    except BlockingIOError:
        raise UserError(f"another process trains in {out}: wait for it, stop it, or name another "
                        "--out") from None
    with held:
        if step == 0:
            check_directory(c, replace, auto)  # as it is now
        for path in out.glob("ckpt-[0-9]*.pt") if step == 0 else ():
            path.unlink()
        for name in FILES:
            (out / f"{name}.part").unlink(missing_ok=True)  # which a kill has left
            if step == 0:
                (out / name).unlink(missing_ok=True)  # of the run that is replaced
        cut_log(out / "log.jsonl", step)
        with open(out / "log.jsonl", "ab", buffering=0) as log:
            append(log, {**first, "config": vars(c)})
            yield partial(append, log)


def keep(checkpoint: Path, step: int) -> None:
    """This checkpoint under a name of its own as well; where the disk knows no links, a copy."""
    numbered = checkpoint.with_name(f"ckpt-{step:06}.pt")
    numbered.unlink(missing_ok=True)  # a resumed run comes by here again
    try:
        os.link(checkpoint, numbered)
    except OSError:
        with open(checkpoint, "rb") as source, replacing(numbered) as copy:
            shutil.copyfileobj(source, copy)


def cut_log(path: Path, step: int) -> None:
    """Drop what was logged after a step, and a last line that a kill left torn: the resumed run writes them
    again. UserError for another line that cannot be read."""
    rows = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, row in enumerate(rows, 1):
        try:
            if json.loads(row).get("step", 0) <= step and row.endswith("\n"):
                kept.append(row)
        except (ValueError, AttributeError):
            if number < len(rows):
                raise UserError(f"{path}, line {number}, is damaged; the checkpoint is whole. Move the log "
                                "away and resume again: the new one begins with the next step") from None
    with replacing(path, "w") as file:
        file.writelines(kept)


def append(log, record: dict) -> None:
    """Append a line to a log that has no buffer, so that it is there at once. OSError names the log."""
    row = json.dumps(record).encode() + b"\n"
    try:
        while row:
            row = row[log.write(row):]
    except OSError as error:
        raise OSError(error.errno, error.strerror, log.name) from None


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
