"""The official files of HellaSwag, PIQA and ARC-Easy, line by line, each checked."""

import json
from dataclasses import dataclass
from pathlib import Path

from lib.cli import UserError

PIQA_LABELS = "valid-labels.lst"
FETCH = "Fetch the files: python -m tools.download evals; or name a directory of yours: --eval_dir DIR"


@dataclass(frozen=True)
class Item:
    """A question. Its answer is the choice that is likeliest after the context and a space."""
    where: str  # file and line
    context: str
    choices: list[str]
    gold: int

    def __post_init__(self):
        if len(self.choices) < 2 or not all(isinstance(text, str) for text in (self.context, *self.choices)):
            raise ValueError("expected a text and a list of texts to choose from")
        if not (isinstance(self.gold, int) and 0 <= self.gold < len(self.choices)):
            raise ValueError(f"its label is {self.gold!r} and it has {len(self.choices)} choices")


def read_task(task: str, make, name: str, directory: Path) -> list[Item]:
    """The items of a task's official file. UserError, with the line, if one is malformed."""
    path, items = find_file(task, directory, name), []
    labels = read_text(find_file(task, directory, PIQA_LABELS)).split() if task == "piqa" else None
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
            if labels is not None:
                doc["label"] = int(labels[len(items)])
            items.append(Item(f"{path.name}, line {number}", *make(doc)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not an item with its label ({type(error).__name__}: "
                            f"{error}), found {line.strip()[:60]!r}. Is a file cut short? {FETCH}") from None
    if not items or (labels and len(labels) != len(items)):
        counts = f"{len(items):,} items" + (f" and {len(labels):,} labels" if labels else "")
        raise UserError(f"{path} has {counts}: it is not whole. {FETCH}")
    return items


def find_file(task: str, directory: Path, name: str) -> Path:
    for path in directory / name, directory / f"{task}_{name}":
        if path.is_file():
            return path
    part = f"only {name}.part, half of a download," if (directory / f"{name}.part").exists() else f"no {name}"
    raise UserError(f"{task}: there is {part} in {directory}. {FETCH}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. {FETCH}") from None
