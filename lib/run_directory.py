"""The directory of a run, out/<run>: what may be in it, its lock, its log."""

import itertools
import json
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from lib.cli import UserError, rank_and_ranks
from lib.files import lock, replacing

FILES = {"log.jsonl", "ckpt.pt", "ckpt.old.pt", "loss.png"}  # of a run, beside its lock and *.part


def check_directory(out: str | None, given: dict) -> None:
    """UserError if --out names something that is not empty, unless --overwrite replaces it, or --resume auto
    finds no more than what a run leaves that was killed before its first checkpoint."""
    path = Path(out or "out")
    allowed = {"lock"}
    if given.get("resume") == "auto":
        allowed |= FILES - {"ckpt.old.pt"}
    looked_at = path.is_dir() and out and "overwrite" not in given
    found = {file.name.removesuffix(".part") for file in path.iterdir()} if looked_at else set()
    if path.exists() and not path.is_dir() or found - allowed:
        raise UserError(f"--out {path} exists. Go on with that run: --resume; replace it: --overwrite; or "
                        "name another")


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
