"""Where a command may write: names that are names, checked before any work."""

import re
from pathlib import Path

from lib.cli import UserError


def own_name(path, flag: str = "--out", what: str = "a directory to make") -> Path:
    """path as a Path. UserError where it is empty, or ends in no name of its own: "  ", ".", "/", "a/..".

    Such a path would fill the current directory, or one above it.
    """
    text = str(path)
    if not text.strip():
        raise UserError(f"{flag} is empty: name {what}")
    if "\0" in text or not re.search(r"[^\s.]", Path(text).name):
        raise UserError(f"{flag} {text!r} has no name of its own: name {what}")
    return Path(text)
