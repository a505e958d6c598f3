"""Atomic writes of files and directories, and locks."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.cli import UserError


@contextmanager
def replacing(path, mode: str = "wb"):
    """An open file that takes the place of `path` once it is whole and on the disk; what was there stays
    until then, and an error removes what was written. OSError names the path."""
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if str(path).startswith("/dev/") or os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **text) as file:  # a device or a pipe cannot be replaced
            yield file
        return
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # so that the new name survives a crash
            directory = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):  # CIFS and some others cannot do this
                os.fsync(directory)
            os.close(directory)
    except BaseException as error:
        part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save says RuntimeError
        if isinstance(cause, OSError) and cause.filename in (None, str(part)):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


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

    A second process that makes the same one waits for the first. What a killed process left is removed.
    UserError where `out` or something of another's is there.
    """
    building, mine = out.with_name(f"{out.name}.building"), out.with_name(f"{out.name}.building.lock")
    if out.parent.is_file():
        raise UserError(f"{out} cannot be made: {out.parent} is a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    left = mine.exists()
    if building.exists() and not left:
        raise UserError(f"{out} cannot be made: {building}, which is not ours, is in the way. Name another "
                        f"with {flag}")
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
