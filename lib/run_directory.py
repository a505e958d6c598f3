"""The directory of a run, out/<run>: what may be in it, its lock, its log."""

import itertools
import json
import shlex
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lib.cli import UserError, rank_and_ranks
from lib.files import lock, replacing

FILES = {"log.jsonl", "ckpt.pt", "ckpt.old.pt", "loss.png"}  # of a run, beside its lock and *.part


def check_directory(out: str | None, given: dict) -> None:
    """UserError if --out is not empty. Allowed are a run, with --overwrite, and the remains of a run that was
    killed before its first checkpoint, with --resume auto."""
    path = Path(out or "out")
    if not path.exists() or path.is_dir() and out is None:
        return
    if not path.is_dir():
        raise UserError(f"--out {path} exists and is a file: name a directory")
    found = {file.name for file in path.iterdir()} - {"lock", *(f"{name}.part" for name in FILES)}
    if found and not is_run(path):
        raise UserError(f"--out {path} exists, and is no run of train.py: it has "
                        f"{', '.join(sorted(found)[:3])}. Name another")
    remains = given.get("resume") == "auto" and found <= FILES - {"ckpt.old.pt"}
    if found and not remains and "overwrite" not in given:
        raise UserError(f"--out {path} exists. Go on with that run: --resume; replace it: --overwrite; or "
                        "name another")


def is_run(path: Path) -> bool:
    """Whether the log in this directory is one of ours, or still empty."""
    with suppress(OSError, ValueError, RecursionError):
        with open(path / "log.jsonl", encoding="utf-8") as log:
            first = log.readline()
        return not first or {"argv", "config"} <= dict(json.loads(first)).keys()
    return False


@contextmanager
def run_directory(c, given: dict, step: int, header: dict):
    """Makes or opens --out, for a run that begins or that goes on after `step`. Yields log(record), which
    appends a line to log.jsonl; the first line is `header` and the settings. Yields None on ranks above 0.
    UserError where another process trains there."""
    if rank_and_ranks()[0] > 0:
        yield None
        return
    if c.out is None:
        c.out = next_free(f"out/{c.size}-{c.method}")
    out = Path(c.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(out / "lock")
    except BlockingIOError:
        raise UserError(f"another process trains in {out}: wait for it, stop it, or name another "
                        "--out") from None
    with held:
        if step == 0:
            check_directory(c.out, given)  # once more, now that nobody else can write here
            remove_run(out)
        for name in FILES:
            (out / f"{name}.part").unlink(missing_ok=True)  # left by a kill
        cut_log(out / "log.jsonl", step)
        with open(out / "log.jsonl", "ab", buffering=0) as log:
            append(log, {**header, "config": vars(c)})
            yield partial(append, log)


def next_free(prefix: str) -> str:
    """Makes prefix-00, or the next number that is free, also when two runs start at once."""
    for number in itertools.count():
        path = Path(f"{prefix}-{number:02d}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return str(path)


def remove_run(out: Path) -> None:
    for path in [*out.glob("ckpt-[0-9]*.pt"), *(out / name for name in FILES)]:
        path.unlink(missing_ok=True)


def cut_log(path: Path, step: int) -> None:
    """Drop what was logged after a step, and a last line that a kill left torn: the resumed run writes them
    again. UserError for another line that cannot be read."""
    rows = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, row in enumerate(rows, 1):
        try:
            if json.loads(row).get("step", 0) <= step and row.endswith("\n"):
                kept.append(row)
        except (ValueError, AttributeError, TypeError, RecursionError):
            if number < len(rows):
                run, new = (shlex.quote(str(x)) for x in (path.parent, f"{path.parent}-resumed"))
                raise UserError(f"{path}, line {number}, is damaged; the checkpoint is whole. Go on from it "
                                f"elsewhere: mkdir {new} && cp {run}/ckpt.pt {new} && "
                                f"python train.py --resume --out {new}") from None
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
