"""Many logs in one file: results/runs/<scale>.jsonl has a line for each run, in the order of their names.

    {"run": "adamw-lr0.001-seed0", "log": [{"argv": ..., "config": ...}, {"step": [1, 10], "loss": [6.2, 5]}]}

"log" holds the records of one log.jsonl in their order. A header, which has a config, stays as it is, and a
resumed run has several. Records that follow each other and have the same keys become one object of columns.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from threading import Lock

from lib.cli import UserError
from lib.files import lock, replacing

LOCK, THREADS = Path("out/paper/results.lock"), Lock()  # of processes, and of the threads of this one


def pack(records: list[dict]) -> list[dict]:
    parts = []
    for keys, same in groupby(records, lambda record: None if "config" in record else tuple(record)):
        same = list(same)
        parts += [{key: [record[key] for record in same] for key in keys}] if keys is not None else same
    return parts


def unpack(parts: list[dict]) -> list[dict]:
    records = []
    for part in parts:
        records += [part] if "config" in part else [dict(zip(part, row)) for row in zip(*part.values())]
    return records


def read(path: Path) -> dict[str, list[dict]]:
    """The records of every run in a packed file, by its name. A file is read again only after it changed."""
    if not path.is_file():
        return {}
    stat = path.stat()
    return parse(path.absolute(), (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=32)
def parse(path: Path, stamp: tuple) -> dict[str, list[dict]]:
    return {name: unpack(parts) for name, (_, parts) in lines_of(path).items()}


def lines_of(path: Path) -> dict[str, tuple[str, list]]:
    """By run: its line, and what its log is in it."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        return {run["run"]: (line, run["log"]) for line in lines for run in [json.loads(line)]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: expected a JSON object with a run and its log on every line. "
                        f"Restore it: git checkout {path}") from None


def add(path: Path, name: str, records: list[dict]) -> None:
    """Put a run into a packed file, in place of one of that name. Several processes may do so at once."""
    for directory in path.parent, LOCK.parent:
        directory.mkdir(parents=True, exist_ok=True)
    with THREADS, lock(LOCK, wait=True):
        lines = {other: line for other, (line, _) in lines_of(path).items()}
        lines[name] = json.dumps({"run": name, "log": pack(records)}, separators=(",", ":")) + "\n"
        with replacing(path, "w") as file:
            file.writelines(lines[name] for name in sorted(lines))


def thinned(records: list[dict], kept: int = 100) -> list[dict]:
    """The headers of a log, about so many of its steps, those that were validated and the last; numbers to 6
    digits."""
    every = max(1, len(records) // kept)
    return [{key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in record.items()}
            for i, record in enumerate(records)
            if "config" in record or i % every == 1 % every or i == len(records) - 1
            or record.get("val_loss") is not None]


@dataclass(frozen=True)
class Log:
    """One run: the first header, and the records of its steps, as tools.plot.read_log gives them."""
    header: dict
    steps: list[dict]

    @property
    def config(self) -> dict:
        return self.header["config"]

    @property
    def is_finished(self) -> bool:
        return bool(self.steps) and ("diverged" in self.steps[-1]
                                     or self.steps[-1]["step"] == self.config["steps"])

    @property
    def final_loss(self) -> float | None:
        """The validation loss after the last step; None for a run that diverged: it ceased to be finite, or
        ended worse than a guess, ln V for a vocabulary of V with its padding."""
        loss = self.steps[-1].get("val_loss") if self.steps else None
        return loss if loss is not None and loss < math.log(self.config["model"]["vocab_size"]) else None

    def points(self, key: str, x: str = "step") -> list[tuple]:
        """(x, key) of the steps that have both."""
        return [(r[x], r[key]) for r in self.steps if r.get(key) is not None and r.get(x) is not None]


def get(path: Path, name: str) -> Log | None:
    """A run of a packed file; None where it is not there."""
    if records := read(path).get(name):
        return Log(next(r for r in records if "config" in r), [r for r in records if "step" in r])
